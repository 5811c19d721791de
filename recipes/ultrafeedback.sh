#!/usr/bin/env bash
# No paper's: from a preference set of the hub to figures, for one card of 80 GB. PRO on UltraFeedback's rankings of four
# responses, with a model of 1.5B that is not gated and has a chat template. Printed at the end: how the model ranks 500
# held-out prompts before and after. SCALE=paper alone.
NAME=ultrafeedback PAPER_GPUS=1 KEEP_MODELS=${KEEP_MODELS-1}
[ "${SCALE:-paper}" = paper ] || { echo "recipes/ultrafeedback.sh has SCALE=paper alone" >&2 && exit 2; }
. "$(dirname "$0")/lib.sh"
values ultrafeedback

need 60 --models "$MODEL"
collect prepare --task pairs --input "$DATASET" --chat_template "$MODEL" --shuffle 0 --limit $((PROMPTS + 500)) \
  --output "$DATA/all.jsonl"
into "$DATA/train.jsonl" head -n "$PROMPTS" "$DATA/all.jsonl"
into "$DATA/test.jsonl" tail -n 500 "$DATA/all.jsonl"
train pro pro.py "$MODEL" "$DATA/train.jsonl" --max_length "$LENGTH" --max_prompt_length $((LENGTH / 2))
figures() { evaluate ranking "$1" "$2" --input "$DATA/test.jsonl" --by reward --max_length "$LENGTH"; }
measure base "$MODEL"
measure pro "$RUNS/pro/model"
report ranking base pro
