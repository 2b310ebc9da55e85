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
    first += [encode("save", {"step": 30, "time": 1.7e9, "path": "ckpt/global_step30", "seconds": 0.2, "bytes": 5e6})]
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
