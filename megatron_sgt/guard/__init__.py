"""Watches a run from inside every rank: who is alive, what hangs, who came first when something fails.

progress   what this rank is doing, marked by the training loop
processes  what the operating system says of processes, memory and /dev/shm
store_channel     the store that the ranks share, for short texts
beat       what ranks tell each other every second
report     the one block that a person reads: pure text
exit_protocol  how a rank leaves: the first failure is claimed, told once, and ends all
flight_recorder  which collective a rank was in
diagnosis  who is there and what each rank does, asked when a run is failing
watch      the threads that see to all this
"""

from megatron_sgt.guard.progress import Progress
from megatron_sgt.guard.watch import Watch

__all__ = ["Progress", "Watch"]
