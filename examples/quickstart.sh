#!/usr/bin/env bash
# From nothing to a grown, saved and resumed SGT model on two CPU processes. Run it with `make quickstart`.
# It starts afresh every time: everything it writes lies under runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/quickstart
config=examples/configs/quickstart.yaml
export OMP_NUM_THREADS=1

say() { printf '\n[%s] %s\n' "$1" "$2"; }
pretrain() { torchrun --standalone --nproc-per-node 2 pretrain_sgt.py --config "$config" "$@"; }

rm -rf "$out"
mkdir -p "$out"

say 1/5 "text: the sources of Python's standard library, a tokenizer of 2,048 tokens, a Megatron .bin/.idx"
bash examples/prepare_text.sh "$out"

say 2/5 "check the run without starting it"
python pretrain_sgt.py --config "$config" --dry-run

say 3/5 "pretrain on 2 ranks (tensor parallel 2) until the structure is fixed, then stop"
pretrain train.exit_interval=120

say 4/5 "resume from the checkpoint and finish"
pretrain

say 5/5 "export to Hugging Face, and compare the result with the trained model"
python tools/convert_to_hf.py --load "$out/run/checkpoints" --output "$out/hf"

say done "everything worked; this is what happened"
python tools/summarize_run.py "$out/run"
python tools/report.py "$out/run"

cat <<END

Tokenizer, corpus and data set lie in $out, the exported model in $out/hf.
What to run next:
  . .venv/bin/activate
  torchrun --standalone --nproc-per-node 2 pretrain_sgt.py --config examples/configs/vanilla_quickstart.yaml
                                          the same without growth, to compare
  python tools/bench/step_overhead.py     what loops cost in FLOPs and time
  python pretrain_sgt.py --config examples/configs/sgt_300m.yaml --print-config
                                          a full-size run (examples/configs holds up to 70B)
END
