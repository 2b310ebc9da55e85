"""What a run reports where it begins and where it ends."""

from __future__ import annotations

from pathlib import Path

from megatron_sgt.checkpoint.layout import ORIGIN_STATE
from megatron_sgt.checkpoint.surgery.state import GROW
from megatron_sgt.data.changes import Change
from megatron_sgt.engine.data_start import data_record
from megatron_sgt.engine.run_folders import CONFIG_FILE
from megatron_sgt.engine.session import Session
from megatron_sgt.engine.stage import RunningStage
from megatron_sgt.errors import ExitCode
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.metrics.records import ResumeRecord, SummaryRecord
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.ops.attention import describe_attention
from megatron_sgt.planning.describe import pipeline_lines, stages_line
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.structure import most_kept_heads
from megatron_sgt.preflight import Start, check_export


def report_start(run: Session, stage: RunningStage, start: Start, change: Change | None) -> None:
    """Where the run begins, what its data has in common with what was read before, and which kernels loop."""
    record: ResumeRecord = {
        "step": run.state.step,
        "path": start.folder,
        "searched": run.config.save_dir,
        "consumed_samples": run.state.consumed_samples,
        "consumed_tokens": run.ledger.tokens(run.state.consumed_samples),
        "changed": start.changed,
        "skipped": start.skipped,
    }
    if start.weights is not None:
        record["origin"] = start.saved[ORIGIN_STATE]
    run.hub.log("resume", record)
    if change is not None:
        run.hub.log("data", data_record(change, run.state.step))
    groups, config = run.groups, stage.config
    for line in check_export(config) if groups.is_main else ():
        print(f"WARNING  {line}", flush=True)
    if groups.is_main and len(run.stages) > 1:  # those to come are in no checkpoint that a change could be told from
        print(f"STAGES  {stages_line(run.stages)}", flush=True)
    for line in pipeline_lines(run.stages, groups.world_size) if groups.is_main else ():
        print(f"PIPELINE  {line}", flush=True)
    if groups.is_main and groups.tp_size > 1 and most_kept_heads(config):
        print(f"LOOPS  {choose_loop_method(config)[1]}", flush=True)
    line = loop_backend(config, stage.runtime.precision, groups.device)[1]
    if groups.is_main and groups.device.type != "cpu":
        print(f"LOOPS  {line}; {describe_attention(groups.device)}", flush=True)


def report_end(run: Session, stage: RunningStage, start: Start, reason: str, code: ExitCode, seconds: float) -> None:
    """Why the run ends, and what it has reached since ``start``, in ``seconds``."""
    run_dir, measured = Path(run.config.logging.run_dir), stage.measured()
    record: SummaryRecord = {
        "step": run.state.step,
        "train_iters": run.config.train.train_iters,
        "reason": reason,
        "exit_code": int(code),
        "first_loss": measured.first_loss if start.folder is None or start.weights else None,
        "loss": measured.last_loss,
        "valid_loss": measured.valid_loss,
        "growth_events": sum(event.get("action") != GROW for event in measured.growth_events),
        "seconds": seconds,
        "consumed_tokens": run.ledger.tokens(run.state.consumed_samples),
        "tokens_per_second": measured.tokens_per_second,
        "paths": {
            "checkpoint": measured.last_path or start.folder,
            "metrics": run_dir / METRICS_FILE,
            "config": run_dir / CONFIG_FILE,
        },
    }
    if measured.valid_ema_loss is not None:
        record["valid_ema_loss"] = measured.valid_ema_loss
    if measured.valid_losses:
        record["valid_losses"] = measured.valid_losses
    run.hub.log("summary", record)
