"""What the card says of the run, against the run's own files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE
from megatron_sgt.export.card_run import data_section, training_section, validation_section
from megatron_sgt.export.source import ExportSource, open_checkpoint
from tests.helpers import grown_run
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.datasets import write_dataset
from tests.helpers.deepspeed_files import write_manifest
from tests.helpers.single import small_config


def told(lines: list[str]) -> dict[str, str]:
    """First cell -> the others, of a section's table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {first: " | ".join(rest) for first, *rest in cells}


def test_a_run_is_told_without_the_machines_paths() -> None:
    card = (grown_run.export() / "README.md").read_text()
    assert str(grown_run.folder()) not in card and "/tmp" not in card
    beside = json.loads(Path(grown_run.data_prefix() + ".json").read_text())
    assert f"| `words` | 1 | {beside['documents']:,} | {beside['tokens']:,} |" in card
    assert "held out: 0.1 for validation." in card
    losses = grown_run.validation_losses()
    assert f"after step 18: **{losses[18]:.4f}** nats per token" in card
    source = open_checkpoint(grown_run.checkpoints())
    settings = told(training_section(source))
    assert settings["optimizer"] == "adamw (beta 0.9 and 0.95, epsilon 1e-08)"
    assert settings["batch"] == "8 sequences, 384 tokens per step" and settings["precision"] == "fp32"
    assert settings["growth"].startswith("`sgt`: from step ") and "documents of a sequence" not in settings
    data = source.config.data.model_copy(update={"reset_attention_mask": True, "packing": "best_fit"})
    packed = replace(source, config=source.config.model_copy(update={"data": data}))
    expected = "packed whole (data.packing best_fit), attention does not cross them"
    assert told(training_section(packed))["documents of a sequence"] == expected


def test_the_loss_is_of_the_last_validation_up_to_the_step(tmp_path: Path) -> None:
    shutil.copytree(grown_run.checkpoints() / "global_step9", tmp_path / "moved/checkpoints/global_step9")
    source = replace(open_checkpoint(tmp_path / "moved/checkpoints/global_step9"))
    metrics = tmp_path / "moved/metrics.jsonl"
    records = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((3, 5.0), (6, 4.0), (12, 3.0))]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + "no record\n")
    text = "\n".join(validation_section(source))
    assert "of the weights after step 6 (the checkpoint is of step 9): **4.0000**" in text
    assert validation_section(replace(source, quantity=AVERAGE)) == [], "no loss of the average was measured"
    with metrics.open("a") as file:
        file.write(json.dumps({"kind": "valid", "step": 9, "loss": 4.5, "ema_loss": 4.25}) + "\n")
    assert (
        "of the averaged weights after step 9: **4.2500**" in validation_section(replace(source, quantity=AVERAGE))[2]
    )


def blended(tmp_path: Path, orders: list[dict[str, Any]] | None) -> ExportSource:
    """A checkpoint whose run read a blend of two data sets; ``orders``: as it recorded them."""
    for name in ("web", "code"):
        write_dataset(tmp_path / name, [20] * 8, vocab_size=50)
    (tmp_path / "code.json").unlink()
    folder = write_grown_checkpoint(tmp_path / "run")
    data = {"data_path": ["3", str(tmp_path / "web"), "1", str(tmp_path / "code")], "split": "8,1,1"}
    (folder / layout.CONFIG_FILE).write_text(
        small_config(data=data, growth=grown_config().growth.model_dump()).to_yaml()
    )
    if orders is not None:
        state = layout.read_json(folder / layout.STATE_FILE)
        layout.write_json(folder / layout.STATE_FILE, {**state, layout.DATA_STATE: orders})
    write_manifest(folder)
    return open_checkpoint(folder)


def test_a_blend_from_what_lies_beside_its_files(tmp_path: Path) -> None:
    lines = data_section(blended(tmp_path, None))
    assert told(lines)["`web`"] == "0.75 | 8 | 160" and told(lines)["`code`"] == "0.25 | not recorded | not recorded"
    assert "Of the documents of each, shares were held out: 0.1 for validation and 0.1 for test." in lines


def order(from_sample: int, **weights: float) -> dict[str, Any]:
    files = [
        {"prefix": f"/home/me/{name}", "weight": weight, "documents": 5, "tokens": 1000, "lengths": "", "content": ""}
        for name, weight in weights.items()
    ]
    common = {"dataset": "indexed", "split": "1", "shares": [1.0, 0.0, 0.0], "seq_length": 16, "seed": 0}
    return {"from_sample": from_sample, "files": files, **common}


def test_what_the_run_read_before(tmp_path: Path) -> None:
    lines = data_section(blended(tmp_path, [order(0, old=1.0), order(8, web=0.5, new=0.5)]))
    assert told(lines)["`new`"] == "0.5 | 5 | 1,000" and "/home/me" not in "".join(lines)
    assert "From sample 8 on; before, the run read `old`." in lines


def test_names_are_no_markdown(tmp_path: Path) -> None:
    """Nor is one a cell of the table more, or a line."""
    odd = ("a|b", "c`d|e", "_f_<g>[h](i)", "j\nk")
    recorded = [order(0, **dict.fromkeys(odd, 1.0)), order(8, **dict.fromkeys(odd, 1.0))]
    lines = data_section(blended(tmp_path, recorded))
    names = [line.split(" | 0.25 | ")[0] for line in lines if " | 0.25 | " in line]
    assert names == [r"| `a\|b`", r"| `` c`d\|e ``", "| `_f_<g>[h](i)`", "| `j k`"]
    assert "From sample 8 on; before, the run read `a|b`, `` c`d|e ``, `_f_<g>[h](i)`, `j k`." in lines


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 5}, "0.001, cosine to 0.0001 at step 10, 5 steps of warm-up"),
        ({"lr": 1e-3, "lr_decay_style": "constant"}, "0.001, constant"),
        ({"lr": 1e-3, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}, "0.001, WSD to 0 over the last 4 steps"),
    ],
)
def test_the_learning_rate(optim: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path))
    changed = replace(source, config=small_config(optim=optim, train={"train_iters": 10}))
    assert told(training_section(changed))["learning rate"] == said
