#!/usr/bin/env python
"""Greedy text of an exported model under vLLM, against transformers' generate on the same folder.

python integrations/vllm_sgt/check_served.py runs/a_hf --trust-remote-code
python integrations/vllm_sgt/check_served.py runs/a_hf --trust-remote-code --kv-heads kept --without-kernels

vLLM runs in float32, and transformers on the CPU, with the code in the folder (hence --trust-remote-code). Prompts are
random ids. Exit code 1 where a token differs; ties aside, that is an error. Needs vLLM, and the plugin or, with
--impl transformers, a folder of the serving form.
--without-kernels: on a machine without a GPU, with vLLM's wheel for CUDA, whose CPU operators PyTorch stands in for.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

TOKENS = 12


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--kv-heads", choices=("all", "kept"), default="all")
    parser.add_argument("--impl", choices=("auto", "transformers"), default="auto", help="whose model vLLM runs")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--without-kernels", action="store_true")
    return parser.parse_args()


def expected(args: argparse.Namespace) -> list[tuple[list[int], list[int], list[float]]]:
    """Per prompt: its ids, the ids that transformers adds, and their log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.folder, trust_remote_code=args.trust_remote_code, dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (1, 5, 17, 33):
        prompt = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            scores = model(ids).logits[0].log_softmax(-1)
        added = ids[0, length:].tolist()
        found.append((prompt[0].tolist(), added, [float(scores[length - 1 + n, id]) for n, id in enumerate(added)]))
    return found


def served(args: argparse.Namespace, prompts: list[list[int]]) -> list[Any]:
    """What vLLM adds to each prompt."""
    from vllm import LLM, SamplingParams

    kept: Any = []
    if args.without_kernels:
        from without_kernels import install

        kept = install()
    engine = LLM(
        model=args.folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=4, seed=0,
        enforce_eager=args.without_kernels, model_impl=args.impl, trust_remote_code=args.trust_remote_code,
        tensor_parallel_size=args.tensor_parallel_size, hf_overrides={"sgt_kv_heads": args.kv_heads},
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    del kept
    return [output.outputs[0] for output in outputs]


def main() -> int:
    """Compare; returns the exit code."""
    args = parse()
    if args.without_kernels:
        # Read by vLLM when it is imported. One process, so that its operators are replaced where they are called.
        os.environ |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    if args.impl == "transformers":
        os.environ["VLLM_PLUGINS"] = ""  # with the plugin's configuration the folder's own model cannot be made
    wanted = expected(args)
    gap, differing = 0.0, 0
    for (_, ids, scores), output in zip(wanted, served(args, [one[0] for one in wanted]), strict=True):
        differing += list(output.token_ids) != ids
        if list(output.token_ids) == ids:
            found = [of_token[id].logprob for of_token, id in zip(output.logprobs, ids, strict=True)]
            gap = max(gap, *(abs(a - b) for a, b in zip(found, scores, strict=True)))
    print(f"{differing} of {len(wanted)} continuations differ; largest difference of log-probabilities {gap:.1e}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
