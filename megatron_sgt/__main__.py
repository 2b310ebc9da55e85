"""``python -m megatron_sgt`` is ``python pretrain_sgt.py``, for an installation without the repository."""

import sys

from megatron_sgt.engine.main import main

if __name__ == "__main__":
    sys.exit(main())
