#!/usr/bin/env bash
# No paper's: from a preference set of the hub to figures, for one card of 80 GB. PRO on UltraFeedback's rankings of four
# responses, with a model of 1.5B that is not gated and has a chat template. Printed at the end: how the model ranks 500
# held-out prompts before and after.
NAME=ultrafeedback PAPER_GPUS=1 KEEP_MODELS=${KEEP_MODELS-1}
. "$(dirname "$0")/lib.sh"

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct} DATASET=${DATASET:-openbmb/UltraFeedback}
PROMPTS=${PROMPTS:-10000} LR=${LR:-1e-6} LENGTH=${LENGTH:-2048}

[ "$SCALE" = paper ] || { echo "recipes/ultrafeedback.sh has SCALE=paper alone" >&2 && exit 2; }
need 60 --models "$MODEL"
collect prepare --task pairs --input "$DATASET" --chat_template "$MODEL" --shuffle 0 --limit $((PROMPTS + 500)) \
  --output "$DATA/all.jsonl"
into "$DATA/train.jsonl" head -n "$PROMPTS" "$DATA/all.jsonl"
into "$DATA/test.jsonl" tail -n 500 "$DATA/all.jsonl"
kept pro || run $TORCHRUN pro.py --model "$MODEL" --data "$DATA/train.jsonl" --output "$RUNS/pro" --lr "$LR" --epochs 1 \
  --batch_size 64 --max_length "$LENGTH" --max_prompt_length $((LENGTH / 2)) --resume
for name in base pro; do
  [ "$name" = base ] && model=$MODEL || model=$RUNS/pro/model
  run python evaluate.py ranking --model "$model" --name "$name" --input "$DATA/test.jsonl" --by reward \
    --max_length "$LENGTH" --output "$RUNS/eval/$name/ranking.jsonl"
done
keep base
keep pro "$RUNS/pro"
run python evaluate.py report "$RESULTS/base" "$RESULTS/pro"
