#!/usr/bin/env python
"""What the loops of an exported model cost per token: FLOPs of a forward pass, and bytes of keys and values.

python tools/bench/serving_cost.py runs/a_hf                         at 4096 tokens of context, in bf16
python tools/bench/serving_cost.py runs/a_hf --context 32768 --bytes 1

FLOPs count a multiplication and an addition as two. They are those of all projections, attention over the context, MLP
and the output projection. Computed from config.json; nothing is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_sgt.cli import path, positive, run_main

FORMS = {
    "without loops": "the layers alone",
    "kept heads": "transformers' own generation (the standard form)",
    "kept groups": "the vLLM plugin with sgt_kv_heads kept",
    "all heads": "the serving form; the vLLM plugin with sgt_kv_heads all",
}


@dataclass(frozen=True)
class Shape:
    """Of attention: hidden size, query heads, key/value heads, head size; tokens of context; bytes of an element.

    joint_norms: queries are normalised over all heads, and keys.
    """

    hidden: int
    heads: int
    groups: int
    size: int
    context: int
    element: int
    joint_norms: bool

    def one_pass(self, projected: int, attending: tuple[int, int]) -> tuple[int, int]:
        """(FLOPs, bytes of cache) of one token in a pass.

        Args:
            projected: heads of all four projections together.
            attending: query heads, key/value heads.
        """
        linear = 2 * self.hidden * self.size * projected
        attention = 4 * self.context * self.size * attending[0]
        return linear + attention, 2 * attending[1] * self.size * self.element


def loop_cost(shape: Shape, loop: dict[str, Any], form: str) -> tuple[int, int]:
    """(FLOPs, bytes of cache) of one token in one pass of a layer's loop."""
    total = 2 * (shape.heads + shape.groups)
    if form == "all heads" or loop.get("other_gate"):
        return shape.one_pass(total, (shape.heads, shape.groups))
    each = shape.heads // shape.groups
    kept = len(loop["heads"])
    groups = len({head // each for head in loop["heads"]})
    if form == "kept heads":
        projected = total // 2 + kept + groups if shape.joint_norms else 2 * (kept + groups)
        return shape.one_pass(projected, (kept, groups))
    return shape.one_pass(total, (groups * each, groups))


def costs(config: Any, context: int, element: int) -> dict[str, tuple[int, int]]:
    """For each of ``FORMS``, (FLOPs, bytes of cache) of one token in the whole model."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    joint_norms = getattr(config, "qk_norm", False) and getattr(config, "qk_norm_over", "head") == "all"
    shape = Shape(config.hidden_size, heads, config.num_key_value_heads, size, context, element, joint_norms)
    ordinary = shape.one_pass(2 * (heads + shape.groups), (heads, shape.groups))
    mlp = 2 * shape.hidden * config.intermediate_size * (3 if getattr(config, "gated_mlp", True) else 2)
    layers = getattr(config, "sgt_num_layers", None) or config.num_hidden_layers
    head = 2 * shape.hidden * config.vocab_size
    found = {}
    for form in FORMS:
        flops, cache = head, 0
        for layer in range(layers):
            loop = (getattr(config, "sgt_loops", None) or {}).get(str(layer), {})
            depth, blocks = (0, 0) if form == "without loops" else (loop.get("depth", 0), loop.get("block_loops", 0))
            looped = loop_cost(shape, loop, form) if depth else (0, 0)
            flops += (1 + blocks) * (ordinary[0] + mlp + depth * looped[0])
            cache += (1 + blocks) * (ordinary[1] + depth * looped[1])
        found[form] = (flops, cache)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=path, help="an exported model; only its config.json is read")
    parser.add_argument("--context", type=positive, default=4096, metavar="N", help="tokens attended to [%(default)s]")
    parser.add_argument("--bytes", type=positive, default=2, metavar="N", help="of a key's element [%(default)s]")
    args = parser.parse_args()

    from megatron_sgt.export.hf.families import read_config

    table = costs(read_config(args.folder), args.context, args.bytes)
    base = table["without loops"]
    print(f"{'loops':<14} {'MFLOP/token':>12} {'':>7} {'cache, bytes/token':>19}")
    for form, (flops, cache) in table.items():
        rise = [f"{100 * (value / start - 1):+.1f} %" for value, start in zip((flops, cache), base, strict=True)]
        print(f"{form:<14} {flops / 1e6:12,.1f} {rise[0]:>8} {cache:18,} {rise[1]:>8}  {FORMS[form]}")


if __name__ == "__main__":
    run_main(main)
