#!/usr/bin/env bash
# The paper's comparison on two CPU cores. Run it with `make study`; stopped, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -e runs/quickstart/corpus_text_document.idx ] || bash examples/prepare_text.sh runs/quickstart
python tools/study.py --config examples/configs/study_cpu.yaml --output runs/study --at-once 2 "$@"
