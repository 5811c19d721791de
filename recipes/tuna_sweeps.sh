#!/usr/bin/env bash
# Tuna, Fig. 2, Fig. 3 and Table 5 (arXiv 2310.13385, Sec. 3.4 and App. A): Tuna_c with lambda of 0, .1, 1, 5 and 10;
# Tuna_p with 0 (Alpaca), 13K, 24K and 52K probabilistic rankings; Tuna_p with beta of 0.9 to 1.4, by the NLL that it
# gives LIMA's expert responses. Prints the figures of Fig. 2 and 3 (the paper prints no numbers), and Table 5: ours and
# the paper's.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/tuna_common.sh

[ "$SCALE" = tiny ] && : "${LAMBDAS:=0 10}" "${SIZES:=4}" "${BETAS:=0.9 1.3}"
[ "$SCALE" = cpu ] && : "${LAMBDAS:=0 1 10}" "${SIZES:=60 125}" "${BETAS=}"
LAMBDAS=${LAMBDAS:-0 0.1 1 5 10}                      # Fig. 2
SIZES=${SIZES:-13000 24000 52002}                     # Fig. 3
BETAS=${BETAS-0.9 1.0 1.1 1.2 1.3 1.4}                # Table 5; empty: left out, it wants LIMA

instructions
alpaca
teacher
measure alpaca
sample alpaca "$N"
contextual sampled-alpaca ranked-alpaca "$FIRST"
for LAMBDA in $LAMBDAS; do
  ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")
  by_rank "lambda-$LAMBDA" alpaca ranked-alpaca --lr "$LR"
  measure "lambda-$LAMBDA"
done
ranking=(--margin "$MARGIN" --mle_weight 1)
for size in $SIZES; do
  probabilistic "size-$size" alpaca teacher --lr "$LR" --max_train_samples "$size"
  measure "size-$size"
done
run python evaluate.py report "${names[@]}" --output "$RESULTS/figures2-3.md"

[ -n "$BETAS" ] || exit 0
names=()
collect prepare --task alpaca --input "$LIMA" "${template[@]}" --output "$DATA/lima.jsonl"
for BETA in $BETAS; do
  probabilistic "beta-$BETA" alpaca teacher --lr "$LR"
  run $TORCHRUN evaluate.py nll --model "$RUNS/beta-$BETA/model" --name "beta@$BETA" --input "$DATA/lima.jsonl" \
    --max_length 2048 --output "$RUNS/eval/beta-$BETA/nll.jsonl"
  keep "beta-$BETA" "$RUNS/eval/beta-$BETA" "$RUNS/beta-$BETA"
  names+=("$RESULTS/beta-$BETA")
done
report table5
