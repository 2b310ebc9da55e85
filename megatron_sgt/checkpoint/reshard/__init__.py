"""Checkpoints that any layout can load: read from any ZeRO stage, written layout-free, loaded into any engine.

DeepSpeed's own universal checkpoint cannot convert between ZeRO 1 and 3 or start from stage 0, and at stage 3 it shares
one Adam step between all states and copies group 0's weight decay to every group. This package has its own readers and
writers; from DeepSpeed it takes only where the shards lie in its files and in its memory.

    restricted.py    one file of DeepSpeed's, without executing what it holds
    stage0.py, stage12.py, stage3.py
                     one tensor-parallel rank's state from the files of its data-parallel ranks
    convert.py       all ranks merged under Hugging Face names, streamed into safetensors files
    layout_free.py   what such a folder holds, and any rank's shard of it
    engine_state.py  into a running engine of any stage
"""
