#!/usr/bin/env bash
# Real text that every machine has, as a tokenizer and a Megatron data set: prepare_text.sh FOLDER
set -euo pipefail
out=$1

python tools/build_corpus.py --output "$out/corpus.jsonl"
python tools/train_tokenizer.py --input "$out/corpus.jsonl" --output "$out/tokenizer.model" \
  --vocab-size 2048 --sample-bytes 4000000
python tools/preprocess_data.py --input "$out/corpus.jsonl" --output-prefix "$out/corpus" \
  --tokenizer-model "$out/tokenizer.model" --append-eod
