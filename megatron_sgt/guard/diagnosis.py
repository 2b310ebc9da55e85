"""Who is there and what each rank does, when a run is failing: from all ranks' beats, places and processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass

from megatron_sgt.guard import processes
from megatron_sgt.guard.beat import Beat, behind, in_earlier_step
from megatron_sgt.guard.exit_protocol import ExitProtocol
from megatron_sgt.guard.report import Failure, guess_loss, state_words
from megatron_sgt.guard.store_channel import StoreGoneError
from megatron_sgt.lease import process

BEAT_SECONDS = 1.0
GATHER_SECONDS = 3 * BEAT_SECONDS
"""A rank whose beat does not change for this long is silent."""
MAX_LINES = 16
"""Ranks that the report describes in detail."""


@dataclass(frozen=True)
class Diagnosis:
    """What the rank of ``exit`` can find out about a failure.

    ``identities``: every rank's process; ``keeper``: whether rank 0's process keeps the store (under torchrun its agent
    does); ``queued``: collectives run on a device, so that a host that is not inside one may still wait for one;
    ``num_stages``: of the pipeline, whose ranks follow each other.
    """

    exit: ExitProtocol
    identities: list[process.Identity]
    keeper: bool
    queued: bool = False
    num_stages: int = 1

    def beats(self) -> dict[int, Beat]:
        keys = [f"beat/{rank}" for rank in range(len(self.identities))]
        try:
            texts = self.exit.ask(lambda channel: channel.get(keys))
        except StoreGoneError:
            return {}
        return {rank: Beat.from_text(text) for rank, text in enumerate(texts) if text}

    def silent(self) -> list[int]:
        """Ranks whose beats do not change; where the store is gone, rank 0 if it kept the store."""
        before = self.beats()
        if before:
            time.sleep(GATHER_SECONDS)
        after = self.beats()
        if not after:
            return [0] if self.keeper and self.exit.rank != 0 else []
        others = (rank for rank in range(len(self.identities)) if rank != self.exit.rank)
        return [rank for rank in others if rank not in after or before.get(rank) == after[rank]]

    def states(self) -> dict[int, str]:
        """State of the visible ranks by the operating system: gone, stopped, ...; "" for an ordinary one."""
        own = self.identities[self.exit.rank]
        return {
            rank: state_words(process.process_state(identity))
            for rank, identity in enumerate(self.identities)
            if process.visible(identity, own)
        }

    def loss(self, dead: list[int], own_beat: Beat) -> tuple[Failure, list[str]]:
        """The failure for ``dead`` ranks, and a line for each but the first.

        Ranks keep in step, and the last beat of a dead one may be a second old: of the two places the later one counts.
        """
        heard = self.beats() | {self.exit.rank: own_beat}
        by_host: dict[str, list[Beat]] = {}
        for rank, beat in heard.items():
            by_host.setdefault(self.identities[rank].host, []).append(beat)
        host = self.identities[dead[0]].host
        there = {rank for rank, identity in enumerate(self.identities) if identity.host == host}
        whole = there <= set(dead) and len(there) < len(self.identities)
        last = heard.get(dead[0], own_beat)
        place = last.place if last.step >= own_beat.step else own_beat.place
        failure = Failure("lost", dead[0], host, place, guess_loss(host, by_host, whole))
        return failure, [f"also gone: rank {r} on {self.identities[r].host}" for r in dead[1:MAX_LINES]]

    def is_reporter(self, where: str) -> bool:
        """Note where this rank is; True for the one rank that collects the notes of all and reports."""
        own = str(self.exit.rank)
        try:
            self.exit.ask(lambda channel: channel.put(f"hang/{own}", where))
            return self.exit.ask(lambda channel: channel.claim("reporter", own)) == own
        except StoreGoneError:
            return True

    def hang(self, what: str, place: str) -> tuple[Failure, list[str]]:
        """The failure for a hang, which names the rank that the others wait for; and a line for each notable rank.

        Where all ranks wait at the same mark, or ranks of several pipeline stages for each other, nobody is named.
        """
        silent, states, heard = self.silent(), self.states(), self.beats()
        places = self._places()
        stopped = [rank for rank, state in states.items() if state and rank != self.exit.rank]
        suspects = stopped or silent or self._overtaken(heard, places)
        for rank in suspects[:MAX_LINES]:
            if rank != self.exit.rank and rank not in places and rank in states:
                with contextlib.suppress(OSError):
                    os.kill(self.identities[rank].pid, signal.SIGUSR2)  # its stacks, to its own stderr
        details = []
        for rank in [*suspects, *(r for r in range(len(self.identities)) if r not in suspects)][:MAX_LINES]:
            known = (states.get(rank), "silent" if rank in silent else "", places.get(rank))
            at = heard[rank].place if rank in heard else "?"
            said = "; ".join(text for text in known if text)
            details.append(f"rank {rank} on {self.identities[rank].host}, {at}: {said}")
        if not suspects:
            cause = f"{what}; behind: none, all ranks are at the same mark and wait for each other"
            return Failure("hang", None, "", place, cause), details
        first, names = suspects[0], ", ".join(map(str, suspects[:MAX_LINES]))
        stages = self._stages()
        if not stopped and not silent and len({stages[rank] for rank in suspects}) > 1:
            cause = f"{what}; behind: rank {names}, on several pipeline stages: one keeps the others waiting"
            return Failure("hang", None, "", place, cause), details
        place = heard[first].place if first in heard else place
        host = self.identities[first].host
        return Failure("hang", first, host, place, f"{what}; behind: rank {names}"), details

    def _stages(self) -> list[int]:
        """The pipeline stage of every rank: Megatron-Core's order."""
        size = len(self.identities)
        return [rank * self.num_stages // size for rank in range(size)]

    def _overtaken(self, heard: dict[int, Beat], places: dict[int, str]) -> list[int]:
        """Ranks that the others have left behind.

        A rank that hangs in a pipeline holds up its neighbour stages too, which then lag behind their own peers. So
        there the place of a host says more than the number of its marks.
        """
        late, busy = behind(heard, self._stages()), self._waited_for(places)
        if self.num_stages == 1:
            return late or busy
        early = in_earlier_step(heard)
        return [rank for rank in early if rank in busy] or early or busy or late

    def _waited_for(self, places: dict[int, str]) -> list[int]:
        """Ranks that are busy while others wait, as far as the places of their hosts show it."""
        wait = processes.AT_STORE if self.queued else "waiting"
        busy = [rank for rank, text in places.items() if not text.startswith(wait)]
        return busy if len(busy) < len(places) else []

    def _places(self) -> dict[int, str]:
        keys = [f"hang/{rank}" for rank in range(len(self.identities))]
        try:
            texts = self.exit.ask(lambda channel: channel.get(keys))
        except StoreGoneError:
            return {}
        return {rank: text for rank, text in enumerate(texts) if text}
