"""Watches a run from inside every rank: who is alive, what hangs, who came first when something fails.

progress   what this rank is doing, marked by the training loop
processes  what the operating system says of processes, memory and /dev/shm
post       the store that the ranks share, for short texts
beat       what ranks tell each other every second
report     the one block that a person reads: pure text
way_out    how a rank leaves: the first failure is claimed, told once, and ends all
flight_recorder  which collective a rank was in
roll_call  who is there and what each rank does, asked when a run is failing
watch      the threads that see to all this
hooks      marks progress around the loop's hooks and data
"""

from megatron_sgt.engine.watch.hooks import watched_batches, watched_hooks
from megatron_sgt.engine.watch.progress import Progress
from megatron_sgt.engine.watch.watch import Watch

__all__ = ["Progress", "Watch", "watched_batches", "watched_hooks"]
