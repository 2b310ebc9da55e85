"""The passage into a phase of the run, in a process that trains already or has just loaded a checkpoint."""

from __future__ import annotations

from megatron_sgt.config.phases import Phase
from megatron_sgt.engine.session import Session
from megatron_sgt.engine.stage import RunningStage
from megatron_sgt.metrics.records import PhaseRecord
from megatron_sgt.model.rotary import set_positions


def enter_phase(session: Session, stage: RunningStage, phase: Phase) -> None:
    """Give the model the positions of ``phase`` and the run its data, and report it. Collective.

    The other settings of a phase are functions of the step: whoever needs them asks the configuration. Between two
    steps, so that validation after the last step of a phase is still its own.
    """
    model = session.config.at_step(phase.first).model
    session.turn_blend(phase.data_path)
    set_positions(stage.runtime.model.chunks, model, session.groups.device)
    record: PhaseRecord = {
        "step": session.state.step,
        "number": phase.number,
        "name": phase.name,
        "first_step": phase.first,
        "last_step": phase.last,
        "settings": phase.words,
    }
    session.hub.log("phase", record)
