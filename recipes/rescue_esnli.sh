#!/usr/bin/env bash
# RESCUE, Table 1 (arXiv 2311.09136, Sec. 5.1 and 6.1): accuracy on e-SNLI of models trained on 2k to 20k prompts with
# SFT, full orderings (similarity, gpt) and partial ones (human, label, hybrid), without and with flipped responses.
# Prints Table 1, ours and the paper's, and draws it: train_size.png. Its values stand in rescue_common.sh; each can be
# set from the environment: SIZES=2000 ORDERINGS="none label" bash recipes/rescue_esnli.sh
. "$(dirname "$0")/rescue_common.sh"

compare() { # compare PREFIX SUFFIX SIZES ORDERINGS SEED: train and measure
  for size in $3; do
    for ordering in $4; do
      local annotation=label name=$ordering$2@$size-seed$5
      case $ordering in similarity | gpt) annotation=$ordering ;; esac
      kept "$name" || train "$RUNS/$name" "$1-$annotation.jsonl" "$ordering" "$size" "$5"
      measure "$name" "$RUNS/$name/model"
    done
  done
}

needs
candidates
measure base@0 "$MODEL" "$BASE_PROMPT"
untrained=${#names[@]}
for seed in $SEEDS; do
  compare "$mix" "" "$SIZES" "$ORDERINGS" "$seed"
  compare "$DATA/flipped" -flip "$FLIP_SIZES" "$FLIP_ORDERINGS" "$seed"
done
run python evaluate.py report "${names[@]}" --paper recipes/paper/rescue_table1.json --output "$RESULTS/table1.md"
into "$RESULTS/plot.log" python evaluate.py report "${names[@]:untrained}" --columns accuracy --plot train_size --output "$RESULTS/train_size.md"
# Fig. 6, the base model's confusion matrix, and Fig. 5, of label at the largest size; where they were measured here
shown=$RUNS/eval/label@$(largest $SIZES)-seed${SEEDS%% *}
[ ! -e "$shown/ranking.jsonl" ] || run python evaluate.py report "$shown" --plot sources
for plot in "$RUNS/eval/base@0/nli.png" "$shown/sources.png"; do [ ! -e "$plot" ] || cp "$plot" "$RESULTS/"; done
