#!/usr/bin/env bash
# RESCUE, Fig. 4 (arXiv 2311.09136, Sec. 7): accuracy on e-SNLI against alpha (left) and against the number of candidate
# responses a prompt (right). After rescue_esnli.sh: what that collected and trained is used. Draws alpha.png and
# num_candidates.png and prints the accuracies. The paper prints none of the figure's values, only that alpha is best
# "between 0.01 to 0.1" and that 3-4 responses suffice.
FLIP_SIZES=
. "$(dirname "$0")/rescue_common.sh"

sweep() { # sweep FLAG VALUES: what rescue_esnli.sh trained with such a value is not trained again
  names=() shown=(--plot "$1" --paper recipes/paper/rescue_figure4.json)
  for seed in $SEEDS; do
    for value in $2; do
      local twin=$ORDERING@$SIZE-seed$seed name=$1@$value-seed$seed
      if grep -qs "\"$1\": $value," "$RESULTS/$twin/args.json"; then
        same "$twin" "$name"
      else
        order "$name" "$DATA/mixed" "$ORDERING" "$SIZE" "--$1" "$value"
        measure "$name" "$RUNS/$name/model"
      fi
    done
  done
  report "$1" "${names[@]}"
}
start
sweep alpha "$ALPHAS"
sweep num_candidates "$CANDIDATES"
