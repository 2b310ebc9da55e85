"""What keeps a long run alive: requests to stop, and a watch inside every rank for peers that die, hang or fail.

stop            requests to stop: signals, limits of time
save_now        a request to save without stopping: a file in the run's folder
signals         receives signals, and forces the exit of a process that cannot stop in order
ending          how the process of a rank ends: its exit code, and who reports a user's mistake
progress        what this rank is doing, marked by the training loop
processes       what the operating system says of processes, memory and /dev/shm
store_channel   short texts between ranks, through the store that they share
beat            the sign of life that ranks exchange every second
watch           the threads that exchange beats and measure progress
diagnosis       who is there and what each rank does, asked when a run is failing
flight_recorder which collective a rank was in
report          the text that a person reads
exit_protocol   how a rank leaves: the first failure is claimed, reported once, and ends all ranks

The training loop is above this part and knows none of it but ``Progress`` and the requests to stop.
"""

from megatron_sgt.guard.progress import Progress
from megatron_sgt.guard.watch import Watch

__all__ = ["Progress", "Watch"]
