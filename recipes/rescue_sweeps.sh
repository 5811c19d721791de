#!/usr/bin/env bash
# RESCUE, Fig. 4 (arXiv 2311.09136, Sec. 7): accuracy on e-SNLI against alpha (left) and against the number of candidate
# responses a prompt (right). After rescue_esnli.sh: what that collected is used. Draws alpha.png and
# num_candidates.png and prints the accuracies. The paper prints none of the figure's values, only that alpha is best
# "between 0.01 to 0.1" and that 3-4 responses suffice.
FLIP_SIZES=
. "$(dirname "$0")/rescue_common.sh"

sweep() { # sweep FLAG VALUES
  names=() shown=(--plot "$1" --paper recipes/paper/rescue_figure4.json)
  for seed in $SEEDS; do
    for value in $2; do
      local name=$1@$value-seed$seed
      order "$name" "$DATA/mixed" "$ORDERING" "$SIZE" "--$1" "$value"
      measure "$name" "$RUNS/$name/model"
    done
  done
  report "$1" "${names[@]}"
}
start
sweep alpha "$ALPHAS"
sweep num_candidates "$CANDIDATES"
