#!/usr/bin/env bash
# RESCUE, Fig. 4 (arXiv 2311.09136, Sec. 7): accuracy on e-SNLI against alpha (left) and against the number of candidate
# responses a prompt (right). After rescue_esnli.sh: what that collected and trained is used. Draws alpha.png and
# num_candidates.png and prints the accuracies. The paper prints none of the figure's values, only that alpha is best
# "between 0.01 to 0.1" and that 3-4 responses suffice.
FLIP_SIZES=
. "$(dirname "$0")/rescue_common.sh"
ORDERING=${ORDERING:-label} SIZE=${SIZE:-${SIZES%% *}} # the paper does not say of which ordering and size Fig. 4 is
ALPHAS=${ALPHAS:-0.001 0.01 0.1 1}        # around Sec. 7's 0.01 to 0.1
CANDIDATES=${CANDIDATES:-$(seq -s " " 2 $((1 + SAMPLES + (${#TEACHER} > 0))))} # 2 to all, in print 5
annotation=label
case $ORDERING in similarity | gpt) annotation=$ORDERING ;; esac

sweep() { # sweep FLAG VALUES: what rescue_esnli.sh trained with such a value is not trained again
  names=()
  for seed in $SEEDS; do
    for value in $2; do
      local twin=$ORDERING@$SIZE-seed$seed name=$1@$value-seed$seed
      ! grep -q "\"$1\": $value," "$RESULTS/$twin/args.json" 2> /dev/null || same "$twin" "$name"
      local output=$RUNS/$ORDERING-$1-$value@$SIZE-seed$seed
      kept "$name" || train "$output" "$mix-$annotation.jsonl" "$ORDERING" "$SIZE" "$seed" "--$1" "$value"
      measure "$name" "$output/model"
    done
  done
  run python evaluate.py report "${names[@]}" --paper recipes/paper/rescue_figure4.json --plot "$1" --output "$RESULTS/$1.md"
}
needs
candidates
sweep alpha "$ALPHAS"
sweep num_candidates "$CANDIDATES"
