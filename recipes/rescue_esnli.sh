#!/usr/bin/env bash
# RESCUE, Table 1 (arXiv 2311.09136, Sec. 5.1 and 6.1): accuracy on e-SNLI of models trained on 2k to 20k prompts with
# SFT, full orderings (similarity, gpt) and partial ones (human, label, hybrid), without and with flipped responses.
# Prints Table 1, ours and the paper's, and draws it: train_size.png. Its values: recipes/values.md.
. "$(dirname "$0")/rescue_common.sh"

compare() { # compare PREFIX SUFFIX SIZES ORDERINGS: train and measure
  for size in $3; do
    for ordering in $4; do
      local name=$ordering$2@$size-seed$seed
      order "$name" "$DATA/$1" "$ordering" "$size"
      measure "$name" "$RUNS/$name/model"
    done
  done
}

start
measure base@0 "$MODEL" "$BASE_PROMPT"
untrained=${#names[@]}
for seed in $SEEDS; do
  compare mixed "" "$SIZES" "$ORDERINGS"
  compare flipped -flip "$FLIP_SIZES" "$FLIP_ORDERINGS"
done
report table1 "${names[@]}"
shown=(--columns accuracy --plot train_size)
report train_size "${names[@]:untrained}"
# Fig. 6, the base model's confusion matrix, and Fig. 5, of label at the largest size; where they were measured here
label=$RUNS/eval/label@$(largest $SIZES)-seed${SEEDS%% *}
[ ! -e "$label/ranking.jsonl" ] || run python evaluate.py report "$label" --plot sources
for plot in "$RUNS/eval/base@0/nli.png" "$label/sources.png"; do [ ! -e "$plot" ] || cp "$plot" "$RESULTS/"; done
