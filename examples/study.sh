#!/usr/bin/env bash
# A comparison on two CPU cores: the paper's, or with --growing that of ways to grow a model. Run it with `make study` or
# `make study-growing`; stopped, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

study=(--config examples/configs/study_cpu.yaml --output runs/study)
if [ "${1:-}" = --growing ]; then
  study=(--growing --config examples/configs/study_growing.yaml --output runs/study_growing --seeds 3)
fi
[ -e runs/quickstart/corpus_text_document.idx ] || bash examples/prepare_text.sh runs/quickstart
python tools/study.py "${study[@]}" --at-once 2 "$@"
