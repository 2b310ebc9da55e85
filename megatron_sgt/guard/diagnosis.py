"""Who is there, and what each rank does: asked when a run is failing, of the beats, words and processes of all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass

from megatron_sgt.guard import processes
from megatron_sgt.guard.beat import Beat, behind
from megatron_sgt.guard.exit_protocol import ExitProtocol
from megatron_sgt.guard.report import Failure, guess_loss, state_words
from megatron_sgt.guard.store_channel import StoreGoneError

BEAT_SECONDS = 1.0
GATHER_SECONDS = 3 * BEAT_SECONDS
"""A rank whose beat does not change for so long is silent."""
MAX_LINES = 16
"""Ranks of which the block tells in detail."""


@dataclass(frozen=True)
class Diagnosis:
    """Asks for the rank of ``out``. ``identities``: every rank's process; ``keeper``: whether rank 0's process
    keeps the store (under torchrun its agent does); ``queued``: collectives run on a device, and a host that is
    not in one may wait for one all the same: only the store is waited for by hosts alone.
    """

    out: ExitProtocol
    identities: list[processes.Identity]
    keeper: bool
    queued: bool = False

    def beats(self) -> dict[int, Beat]:
        """The last beat of every rank; none where the store is gone."""
        keys = [f"beat/{rank}" for rank in range(len(self.identities))]
        try:
            texts = self.out.ask(lambda post: post.get(keys))
        except StoreGoneError:
            return {}
        return {rank: Beat.from_text(text) for rank, text in enumerate(texts) if text}

    def silent(self) -> list[int]:
        """Ranks whose beats stand still; rank 0, if it kept the store, where the store is gone."""
        before = self.beats()
        if before:
            time.sleep(GATHER_SECONDS)
        after = self.beats()
        if not after:
            return [0] if self.keeper and self.out.rank != 0 else []
        others = (rank for rank in range(len(self.identities)) if rank != self.out.rank)
        return [rank for rank in others if rank not in after or before.get(rank) == after[rank]]

    def states(self) -> dict[int, str]:
        """What the operating system says of the ranks that can be seen: gone, stopped, ...; "" for nothing."""
        own = self.identities[self.out.rank]
        return {
            rank: state_words(processes.process_state(identity))
            for rank, identity in enumerate(self.identities)
            if processes.visible(identity, own)
        }

    def loss(self, dead: list[int], own_beat: Beat) -> tuple[Failure, list[str]]:
        """The failure that ``dead`` ranks are, and a line on each but the first.

        Ranks keep step with each other, and a dead one's last word may be a beat old: the later place counts.
        """
        heard = self.beats() | {self.out.rank: own_beat}
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

    def asked_to_tell(self, where: str) -> bool:
        """Leave word of where this rank is; True for the one rank that gathers what all have left."""
        own = str(self.out.rank)
        try:
            self.out.ask(lambda post: post.put(f"hang/{own}", where))
            return self.out.ask(lambda post: post.claim("teller", own)) == own
        except StoreGoneError:
            return True

    def hang(self, what: str, place: str) -> tuple[Failure, list[str]]:
        """The failure that a hang is: the rank that the others wait for; and a line on each rank of note.

        Ranks at the same mark that wait like each other name nobody.
        """
        silent, states, heard = self.silent(), self.states(), self.beats()
        words = self._words()
        stopped = [rank for rank, state in states.items() if state and rank != self.out.rank]
        suspects = stopped or silent or behind(heard) or self._waited_for(words)
        for rank in suspects[:MAX_LINES]:
            if rank != self.out.rank and rank not in words and rank in states:
                with contextlib.suppress(OSError):
                    os.kill(self.identities[rank].pid, signal.SIGUSR2)  # its stacks, to its own stderr
        details = []
        for rank in [*suspects, *(r for r in range(len(self.identities)) if r not in suspects)][:MAX_LINES]:
            known = (states.get(rank), "silent" if rank in silent else "", words.get(rank))
            at = heard[rank].place if rank in heard else "?"
            said = "; ".join(word for word in known if word)
            details.append(f"rank {rank} on {self.identities[rank].host}, {at}: {said}")
        if not suspects:
            cause = f"{what}; behind: none, all ranks are at the same mark and wait for each other"
            return Failure("hang", None, "", place, cause), details
        first, names = suspects[0], ", ".join(map(str, suspects[:MAX_LINES]))
        place = heard[first].place if first in heard else place
        host = self.identities[first].host
        return Failure("hang", first, host, place, f"{what}; behind: rank {names}"), details

    def _waited_for(self, words: dict[int, str]) -> list[int]:
        """Ranks that are busy while the others wait for them, as far as where the hosts are can tell."""
        wait = processes.AT_STORE if self.queued else "waiting"
        busy = [rank for rank, text in words.items() if not text.startswith(wait)]
        return busy if len(busy) < len(words) else []

    def _words(self) -> dict[int, str]:
        """Where each rank says that it is."""
        keys = [f"hang/{rank}" for rank in range(len(self.identities))]
        try:
            texts = self.out.ask(lambda post: post.get(keys))
        except StoreGoneError:
            return {}
        return {rank: text for rank, text in enumerate(texts) if text}
