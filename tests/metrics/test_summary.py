"""The summary says what the metrics file holds, and no more."""

from pathlib import Path

from megatron_sgt.metrics.summary import run_summary

TRAIN = [
    {"kind": "train", "step": 1, "train_iters": 200, "loss": 7.5},
    {"kind": "train", "step": 200, "train_iters": 200, "loss": 4.25},
]
GROWTH = {
    "kind": "growth",
    "step": 30,
    "action": "first_selection",
    "layer": 4,
    "kept_heads": {"4": [0, 3]},
    "loop_depth": [0, 0, 0, 0, 1, 0],
    "layer_score": 0.97,
}


def test_a_whole_run() -> None:
    records = [
        {"kind": "resume", "step": 0, "path": None},
        TRAIN[0],
        GROWTH,
        {"kind": "valid", "step": 50, "loss": 5.0, "perplexity": 148.4, "sets": {"wiki": {"loss": 4.0}}},
        {"kind": "save", "step": 120, "path": "ckpt/global_step120"},
        {"kind": "resume", "step": 120, "path": "ckpt/global_step120"},
        TRAIN[1],
        {
            "kind": "valid",
            "step": 200,
            "loss": 4.5,
            "perplexity": 90.0,
            "ema_loss": 4.25,
            "ema_perplexity": 70.1,
            "sets": {"wiki": {"loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.25}},
        },
    ]
    text = run_summary(records, Path("runs/x"))
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["train"] == "step 200 of 200 · loss 7.500 (step 1) -> 4.250"
    assert rows["validation"] == "loss 5.000 (step 50) -> 4.500 (step 200) · perplexity 90.0"
    assert rows["wiki"] == "loss 4.000 (step 50) -> 3.500 (step 200) · perplexity 33.1 · 1.250 bits/byte"
    assert rows["ema"] == "loss 4.250 (step 200) of the averaged weights · perplexity 70.1"
    assert rows["growth"].startswith("step 30  layer 4 selected")
    assert "[0,3]" in rows["growth"]
    assert rows["resumed"] == "at step 120"
    assert rows["checkpoint"] == "ckpt/global_step120"


def test_a_run_that_died_before_its_first_report() -> None:
    text = run_summary([], Path("runs/x"))
    assert "no step was reported" in text
    assert "checkpoint" not in text


def test_the_stages_of_a_model_that_grew() -> None:
    grow = {
        "kind": "grow", "step": 15, "stage": 1, "operator": "g_stack", "lr_policy": "continue", "notes": ["a note"],
        "sizes_before": {"num_layers": 5}, "sizes_after": {"num_layers": 10}, "parameters_before": 1e6,
        "parameters_after": 2e6, "flops_per_token_before": 2e5, "flops_per_token_after": 4e5,
        "probe_loss_before": 4.61, "probe_loss_after": 4.87,
    }  # fmt: skip
    (line,) = [line for line in run_summary([grow], Path("run")).splitlines() if line.startswith("stage ")]
    assert line.split(maxsplit=1)[1].startswith("step 15") and "num_layers 5 -> 10" in line and "note" not in line
