"""One writer per folder: who may write into it, whether its holder is still there, and how the right passes on.

process      which process somebody is, and whether it is alive
scheduler    whether a Slurm job still runs
holder       what a lease says of its holder
lease_file   the file: made at once or not at all, beaten in place, taken away only if it is the one that was judged
judge        whether a holder is gone, alive, or to be watched
lease        the right itself: taken, kept alive, checked before each write, given back

No torch. Everything that a command writes into for longer than a moment is held: the folders of a run, the output of
a conversion or an export.
"""

from megatron_sgt.lease.lease import LEASE_FILE, Hold, Lease, beside, held, holder_of, inside, release_all

__all__ = ["LEASE_FILE", "Hold", "Lease", "beside", "held", "holder_of", "inside", "release_all"]
