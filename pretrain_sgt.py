#!/usr/bin/env python
"""Pretrain a Sparse Growing Transformer: ``python pretrain_sgt.py --config FILE.yaml [section.key=value ...]``."""

import sys

from megatron_sgt.engine.main import main

if __name__ == "__main__":
    sys.exit(main())
