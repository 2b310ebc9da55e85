"""Every console line against the text that a reader sees."""

import math
from typing import Any

import pytest

from megatron_sgt.growth.plan import GrowthEvent
from megatron_sgt.metrics import lines

TRAIN: dict[str, Any] = {
    "step": 1250,
    "train_iters": 23842,
    "loss": 3.4119,
    "grad_norm": 0.714,
    "lr": 5.9e-4,
    "tokens_per_second": 1.562e6,
    "tokens_per_second_per_device": 48_812.5,
    "tflops_per_device": 418.2,
    "mfu": 0.4227,
    "memory_gb": 41.26,
    "memory_total_gb": 80.0,
    "device": "gpu",
    "eta_s": 60_690,
    "skipped_steps": 0,
}
TRAIN_TEXT = (
    "step  1,250/23,842   5.2%  loss 3.412  gn 0.71  lr 5.9e-4  1.56 M tok/s  48.8k/gpu  418 TF  MFU 42.3%  "
    "41.3/80 GB  eta 16h51m"
)


def marked(role: str, text: str) -> str:
    return f"<{role}:{text}>"


def test_hook_line() -> None:
    record = {"step": 1250, "hook": "loss_average", "values": {"loss": 2.34567, "count": 40.0}}
    assert lines.hook_line(record, marked) == "<good:HOOK>  step 1,250  loss_average  loss 2.35  count 40.0"


def test_train_line() -> None:
    assert lines.train_line(TRAIN) == TRAIN_TEXT
    assert lines.train_line(TRAIN, marked) == TRAIN_TEXT


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"mfu": None}, "MFU 42.3%", "MFU n/a"),
        ({"memory_total_gb": None}, "41.3/80 GB", "41.3 GB"),
        ({"memory_gb": None}, "  41.3/80 GB", ""),
        ({"device": "cpu"}, "48.8k/gpu", "48.8k/rank"),
        ({"tokens_per_second_per_device": 1.562e6}, "  48.8k/gpu", ""),
        ({"tflops_per_device": None}, "  418 TF  MFU 42.3%", ""),
        ({"lr": 0.0}, "lr 5.9e-4", "lr 0"),
        ({"eta_s": None}, "  eta 16h51m", ""),
        ({"step": 23842}, "step  1,250/23,842   5.2%", "step 23,842/23,842  100.0%"),
        ({"train_iters": None}, "step  1,250/23,842   5.2%", "step 1,250"),
        ({"seq_length": 1024}, "lr 5.9e-4", "lr 5.9e-4  T 1,024"),
    ],
)
def test_train_line_parts(change: dict[str, Any], old: str, new: str) -> None:
    assert old in TRAIN_TEXT
    assert lines.train_line({**TRAIN, **change}) == TRAIN_TEXT.replace(old, new)


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, "loss NaN"), (math.inf, "loss inf"), (-math.inf, "loss -inf")])
def test_a_bad_loss_is_shown_and_painted(loss: float, shown: str) -> None:
    assert f"  {shown}  " in lines.train_line({**TRAIN, "loss": loss})
    assert f"<bad:{shown}>" in lines.train_line({**TRAIN, "loss": loss}, marked)


def test_a_bad_norm_and_skipped_steps_are_shown() -> None:
    record = {**TRAIN, "grad_norm": math.inf, "skipped_steps": 2}
    assert "  gn inf  " in lines.train_line(record)
    assert lines.train_line(record, marked).endswith("  <warn:skipped 2>")
    assert "<bad:gn inf>" in lines.train_line(record, marked)


def test_losses_below_zero_and_zero_are_losses() -> None:
    assert "loss 0.000" in lines.train_line({"step": 1, "loss": 0.0})
    assert "loss -1.500" in lines.train_line({"step": 1, "loss": -1.5})


def growth(action: str, **extra: Any) -> dict[str, Any]:
    depth = [0] * 24
    depth[19] = 2 if action == "increase_depth" else 1
    event = GrowthEvent(
        step=1250,
        action=action,
        layer=None if action == "fixed" else 19,
        phase="selecting",
        kept_heads={19: (4, 11)},
        loops=tuple(depth),
        layer_score=None if action == "fixed" else 0.8123,
    )
    return {**event.to_dict(), **extra}


def test_growth_line_of_a_selection() -> None:
    record = growth(
        "first_selection",
        layer_rank=1,
        num_candidates=23,
        fade_until_step=1500,
        flops_overhead=0.0021,
        max_selected_layers=3,
    )
    assert lines.growth_line(record) == (
        "GROW  step 1,250  layer 19 selected (score 0.81, rank 1 of 23)  keep heads [4,11]  "
        "gates of the others fade until 1,500  depth 1  +0.2 % FLOPs  1/3 layers"
    )
    assert lines.growth_line(record, marked).startswith("<event:GROW>  step")


def test_growth_lines_of_a_bare_event() -> None:
    assert lines.growth_line(growth("select_new_layer")) == (
        "GROW  step 1,250  layer 19 selected (score 0.81)  keep heads [4,11]  depth 1"
    )
    assert lines.growth_line(growth("increase_depth", fade_until_step=99)) == (
        "GROW  step 1,250  layer 19 loops once more  keep heads [4,11]  depth 2"
    )
    assert lines.growth_line({"step": 7, "action": "some_action", "layer": None}) == "GROW  step 7  some action"


def test_growth_line_of_the_end() -> None:
    record = {
        **growth("fixed", flops_overhead=0.0063),
        "kept_heads": {"3": [0, 1], "19": [4, 11]},
        "loop_depth": [0, 0, 0, 2, *[0] * 15, 1],
    }
    assert lines.growth_line(record) == ("GROW  step 1,250  structure fixed: 19[4,11] 3[0,1]x2  +0.6 % FLOPs")
    assert "structure fixed: no layer loops" in lines.growth_line({"step": 1, "action": "fixed", "layer": None})


def test_length_line() -> None:
    record = {
        "step": 1000, "seq_length": 1024, "previous_seq_length": 512, "sequences_per_step": 4096,
        "model_flops_per_step": 1.937e16,
    }  # fmt: skip
    expected = "<event:LENGTH>  step 1,000  T 512 -> 1,024  4,096 sequences a step  19.4 PFLOP a step"
    assert lines.length_line(record, marked) == expected


def test_phase_line() -> None:
    record = {
        "step": 6, "number": 2, "name": "long", "first_step": 7, "last_step": 1500, "settings": ["batch 8", "T 32"],
    }  # fmt: skip
    expected = "<event:PHASE>  step 6  long (2), steps 7 to 1,500  batch 8  T 32"
    assert lines.phase_line(record, marked) == expected


def test_valid_line() -> None:
    record = {"step": 1250, "loss": 3.437, "perplexity": 31.09, "batches": 40, "seconds": 6.0}
    assert lines.valid_line(record) == "VALID step 1,250  loss 3.437  ppl 31.1  (40 batches, 6.0 s)"
    averaged = {"step": 9, "loss": 3.4, "perplexity": 30.0, "ema_loss": 3.25, "ema_perplexity": 25.8}
    assert lines.valid_line(averaged) == "VALID step 9  loss 3.400  ppl 30.0  ema loss 3.250  ema ppl 25.8"
    wiki = {"loss": 3.0, "perplexity": 20.09, "bits_per_byte": 1.2345, "samples": 40, "samples_in_set": 400}
    code = {"loss": 2.0, "perplexity": 7.39, "samples": 8, "samples_in_set": 8}
    named = {"step": 9, "batches": 3, "sets": {"wiki": wiki, "code": code}}
    assert lines.valid_line(named).splitlines() == [
        "VALID step 9  (3 batches)",
        "      wiki  loss 3.000  ppl 20.1  bits/byte 1.234  (40 of 400 samples)",
        "      code  loss 2.000  ppl 7.39  (all 8 samples)",
    ]
    bad = {"step": 2, "loss": math.nan, "perplexity": math.nan}
    assert lines.valid_line(bad, marked) == "<good:VALID> step 2  <bad:loss NaN>  ppl NaN"


def test_save_line() -> None:
    record = {"step": 1250, "path": "runs/x/checkpoints/global_step1250", "seconds": 8.06, "bytes": 1.74e10}
    assert lines.save_line(record) == ("SAVE  step 1,250  17.4 GB in 8.1 s  runs/x/checkpoints/global_step1250")
    assert lines.save_line({"step": 3, "path": "p"}) == "SAVE  step 3  p"


def test_resume_line_says_which_of_the_two_it_is() -> None:
    resumed = {"step": 1250, "path": "runs/x/checkpoints/global_step1250", "consumed_tokens": 40_000}
    assert lines.resume_line(resumed) == (
        "RESUME  resumed at step 1,250  from runs/x/checkpoints/global_step1250  (40,000 tokens consumed)"
    )
    assert lines.resume_line({**resumed, "changed": ("optim.lr 0.1 -> 0.2", "train.seed 1 -> 2")}).endswith(
        "tokens consumed)  changed: optim.lr 0.1 -> 0.2; train.seed 1 -> 2"
    )
    assert lines.resume_line({**resumed, "changed": ()}).endswith("tokens consumed)")
    fresh = {"step": 0, "path": None, "searched": "runs/x/checkpoints"}
    assert lines.resume_line(fresh) == "START  fresh start (no checkpoint in runs/x/checkpoints)"
    assert lines.resume_line({"step": 0}) == "START  fresh start"


def test_summary_line() -> None:
    record = {
        "step": 60,
        "train_iters": 60,
        "reason": "finished",
        "first_loss": 9.01,
        "loss": 5.5,
        "valid_loss": 5.75,
        "growth_events": 4,
        "consumed_tokens": 245_760,
        "tokens_per_second": 3900.0,
        "seconds": 63.0,
        "paths": {"checkpoint": "runs/q/checkpoints/global_step60", "metrics": "runs/q/metrics.jsonl"},
    }
    assert lines.summary_line(record) == (
        "DONE  step 60/60  finished  loss 9.010 -> 5.500  valid loss 5.750  4 growth events  246 k tokens  "
        "3.90 k tok/s  in 1m03s\n"
        "      checkpoint  runs/q/checkpoints/global_step60\n"
        "      metrics     runs/q/metrics.jsonl"
    )
    assert "<bad:loss 9.010 -> NaN>" in lines.summary_line({**record, "loss": math.nan}, marked)
    assert lines.summary_line({"step": 3, "growth_events": 1}) == "DONE  step 3  1 growth event"


def test_the_summary_has_both_validation_losses() -> None:
    record = {"step": 6, "loss": 5.5, "valid_loss": 5.75, "valid_ema_loss": 5.6, "reason": "finished", "exit_code": 0}
    assert lines.summary_line(record) == ("DONE  step 6  finished  loss 5.500  valid loss 5.750  ema valid loss 5.600")
    named = lines.summary_line({**record, "valid_losses": {"wiki": 5.25, "code": 4.5}})
    assert named.endswith("ema valid loss 5.600  wiki 5.250  code 4.500")


def test_a_run_that_was_asked_to_stop_says_so_twice() -> None:
    stop = {"step": 1200, "reason": "SIGUSR1"}
    assert lines.stop_line(stop) == "STOP  step 1,200  SIGUSR1: saving, then leaving"
    saved = {"step": 1200, "exit_code": 75, "reason": "stopped (SIGUSR1), start again to go on"}
    assert lines.summary_line(saved) == "SAVED  step 1,200  stopped (SIGUSR1), start again to go on"
    assert lines.summary_line({**saved, "exit_code": 0}).startswith("DONE")


def test_rollback_line() -> None:
    spike = {"loss": 7.25, "limit": 3.5, "spike_step": 1207}
    back = {"step": 1200, "path": "runs/x/checkpoints/global_step1200", "passed_samples": 7168, **spike}
    assert lines.rollback_line(back) == (
        "ROLLBACK  loss 7.250 of step 1,207 is above 3.500; back to step 1,200, 7,168 samples passed over"
    )
    assert lines.rollback_line({"step": 1207, "path": None, **spike}) == (
        "SPIKE  loss 7.250 of step 1,207 is above 3.500; no checkpoint to go back to, training goes on"
    )


def test_ranks_line() -> None:
    assert lines.ranks_line({"step": 30, "work_s": [1.0, 1.0]}) == "", "nobody lags, nothing is said"
    lag = {"step": 30, "lagging_rank": 17, "host": "node3", "excess": 0.21}
    assert lines.ranks_line({**lag, "what": "computing"}) == (
        "SLOW  step 30  rank 17 on node3: computing 21% longer than the median rank"
    )
    assert "waiting for data 21% of a step longer" in lines.ranks_line({**lag, "what": "waiting for data"})


def test_tasks_line() -> None:
    record = {"step": 9, "results": {"words": {"acc": 0.5, "acc_norm": 0.25}, "own": {"f1": 1.0}}, "seconds": 3.0}
    assert lines.tasks_line(record) == "TASKS step 9  words, acc 0.500, acc_norm 0.250  own, f1 1.00  (3.0 s)"
    assert lines.tasks_line({"step": 9, "failed": "no such file"}) == "TASKS step 9  not measured  no such file"
