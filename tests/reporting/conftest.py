"""Run directories as training leaves them, and as accidents leave them."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.jsonl import encode

LAYERS, HEADS, TOKENS = 5, 3, 1000


def train(step: int, loss: float = 4.0, flops: float = 2e9, seconds: float = 0.5, **more: Any) -> str:
    record = {
        "step": step, "time": 1.7e9 + step, "train_iters": 60, "loss": loss, "global_batch_size": 10,
        "consumed_samples": 10 * step, "consumed_tokens": 10 * step * TOKENS, "step_time_s": seconds,
        "model_flops_per_step": flops, "tokens_per_second": 10 * TOKENS / seconds, "memory_gb": 1.5, **more,
    }  # fmt: skip
    return encode("train", record)


def entropies(step: int) -> list[list[float]]:
    return [[0.5 + 0.01 * (layer + head) + 0.001 * step for head in range(HEADS)] for layer in range(LAYERS)]


def growth(step: int, action: str, layer: int | None, kept: dict[str, list[int]], depth: list[int]) -> str:
    record = {
        "step": step, "time": 1.7e9 + step, "action": action, "layer": layer, "kept_heads": kept, "loop_depth": depth,
        "layer_score": 0.9, "flops_overhead": 0.02 * sum(depth), "ema_entropy": entropies(step),
    }  # fmt: skip
    if action in ("first_selection", "select_new_layer"):
        record["fade_until_step"] = step + 10
    return encode("growth", record)


def grown_lines() -> list[str]:
    """Sixty steps: two layers selected, one of them deepened; killed at 40 and resumed at 30."""
    first = [encode("resume", {"step": 0, "time": 1.7e9, "path": None})]
    first += [train(s, 5.0 - s / 50, ema_entropy=entropies(s)) for s in (1, 10, 20)]
    first += [growth(20, "first_selection", 4, {"4": [0, 2]}, [0, 0, 0, 0, 1])]
    first += [encode("valid", {"step": 20, "time": 1.7e9, "loss": 4.7, "perplexity": 109.9})]
    first += [train(30, 4.4, 2.2e9, ema_entropy=entropies(30))]
    first += [
        encode(
            "save",
            {
                "step": 30,
                "time": 1.7e9,
                "path": "ckpt/global_step30",
                "seconds": 0.2,
                "bytes": 5e6,
                "source_tokens": {"data/a": 98_765},
                "source_epochs": {"data/a": 1.257},
            },
        )
    ]
    void = [train(40, 9.9)]
    kept = {"2": [1], "4": [0, 2]}
    second = [encode("resume", {"step": 30, "time": 1.7e9 + 99, "path": "ckpt/global_step30"})]
    second += [growth(31, "select_new_layer", 2, kept, [0, 0, 1, 0, 1])]
    second += [
        train(40, 4.2, 2.3e9, ema_entropy=entropies(40)),
        growth(41, "increase_depth", 4, kept, [0, 0, 1, 0, 2]),
    ]
    second += [growth(51, "fixed", None, kept, [0, 0, 1, 0, 2]), train(60, 4.0, 2.4e9)]
    second += [encode("valid", {"step": 60, "time": 1.7e9, "loss": 4.1, "perplexity": 60.3})]
    return [*first, *void, *second, encode("summary", {"step": 60, "time": 1.7e9, "reason": "finished"})]


def grow(step: int, operator: str, layers: list[int], heirs: list[int], depth: list[int], **more: Any) -> str:
    sizes = {"hidden_size": 48, "num_attention_heads": HEADS, "num_query_groups": HEADS}
    record = {
        "step": step, "time": 1.7e9 + step, "stage": 1, "operator": operator, "layers": layers, "heirs": heirs,
        "loop_depth": depth, "kept_heads": {}, "lr_policy": "continue", "sizes_before": {"num_layers": LAYERS, **sizes},
        "sizes_after": {"num_layers": len(layers), **sizes}, "parameters_before": 1.25e6, "parameters_after": 2.5e6,
        "flops_per_token_before": 2e5, "flops_per_token_after": 4e5, "probe_loss_before": 4.61,
        "probe_loss_after": 4.87, "seconds": 2.25, **more,
    }  # fmt: skip
    return encode("grow", record)


def staged_lines() -> list[str]:
    """Sixty steps of 5, 10 and 10 layers: stacked in the middle of a window, then wider; resumed at the first end."""

    def table(layers: int, heads: int, step: int) -> list[list[float]]:
        return [[0.4 + 0.03 * n + 0.02 * head + 0.002 * step for head in range(heads)] for n in range(layers)]

    def event(step: int, layer: int | None, kept: dict[str, list[int]], depth: list[int], heads: int) -> str:
        action = "fixed" if layer is None else "select_new_layer"
        fade = {} if layer is None else {"fade_until_step": step + 10}
        entropy = table(len(depth), heads, step)
        values = {"action": action, "layer": layer, "kept_heads": kept, "loop_depth": depth, "ema_entropy": entropy}
        return encode("growth", {"step": step, "time": 1.7e9 + step, **values, **fade, "layer_score": 0.8})

    stacked = grow(15, "g_stack", [*range(5)] * 2, [5, 6, 7, 8, 9], [0] * 9 + [1])
    again = grow(15, "g_stack", [*range(5)] * 2, [5, 6, 7, 8, 9], [0] * 9 + [1], probe_loss_before=None)
    sizes = {"num_layers": 10, "hidden_size": 48, "num_attention_heads": HEADS, "num_query_groups": HEADS}
    wide = {**sizes, "hidden_size": 96, "num_attention_heads": 2 * HEADS, "num_query_groups": 2 * HEADS}
    both = [0] * 6 + [1, 0, 0, 1]
    return [
        encode("resume", {"step": 0, "time": 1.7e9, "path": None}),
        *(train(s, 5.0 - s / 50, 2e9, ema_entropy=table(5, HEADS, s)) for s in (2, 5, 10)),
        event(10, 4, {"4": [0, 2]}, [0, 0, 0, 0, 1], HEADS),
        train(15, 4.7, 2.1e9, ema_entropy=table(5, HEADS, 15)),
        stacked,
        encode("resume", {"step": 15, "time": 1.7e9 + 50, "path": "ckpt/global_step15"}),
        again,
        *(train(s, 5.1 - s / 50, 4e9, ema_entropy=table(10, HEADS, s)) for s in (20, 25)),
        event(25, 6, {"6": [1], "9": [0, 2]}, both, HEADS),
        *(train(s, 5.1 - s / 50, 4.2e9, ema_entropy=table(10, HEADS, s)) for s in (30, 40)),
        grow(40, "msg", [*range(10)], [*range(10)], both, stage=2, sizes_before=sizes, sizes_after=wide),
        *(train(s, 5.0 - s / 50, 7e9, 0.9, ema_entropy=table(10, 2 * HEADS, s)) for s in (45, 50)),
        event(50, None, {"6": [1], "9": [0, 2]}, both, 2 * HEADS),
        train(60, 3.9, 7e9, 0.9),
        encode("valid", {"step": 60, "time": 1.7e9, "loss": 4.0, "perplexity": 54.6}),
        encode("summary", {"step": 60, "time": 1.7e9, "reason": "finished"}),
    ]


def write_run(folder: Path, lines: list[str], config: str | None = "model: {num_layers: 5}\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    return write_run(tmp_path / "grown", grown_lines())


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    return write_run(tmp_path / "staged", staged_lines())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A run as large as examples/configs/sgt_300m.yaml: 24 layers of 16 heads, growth in its first fifth."""
    layers, heads, depth, kept = 24, 16, [0] * 24, {}
    decisions = {250: 22, 500: 19, 750: 15, 1000: None}
    lines = []
    for step in range(10, 4761, 10):
        table = [[0.5 + 0.01 * n + 0.02 * (head % 5) for head in range(heads)] for n in range(layers)]
        measured = {"ema_entropy": table} if step <= 1000 else {}
        lines.append(train(step, 5.0 - step / 2500, 2e15, 2.0, **measured))
        if step not in decisions:
            continue
        layer = decisions[step]
        event = {"step": step, "action": "fixed", "layer": layer, "ema_entropy": table}
        if layer is not None:
            depth[layer], kept[str(layer)] = 1, [layer % 7, layer % 7 + 1]
            event |= {"action": "select_new_layer", "fade_until_step": step + 250}
        lines.append(encode("growth", {**event, "kept_heads": dict(kept), "loop_depth": list(depth)}))
    return write_run(tmp_path / "large", lines)


@pytest.fixture
def vanilla(tmp_path: Path) -> Path:
    lines = [train(s, 5.0 - s / 60, seconds=0.4) for s in range(2, 51, 2)]
    return write_run(
        tmp_path / "vanilla",
        [*lines, encode("valid", {"step": 50, "time": 1.0, "loss": 4.2, "perplexity": 66.7})],
    )
