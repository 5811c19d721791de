#!/usr/bin/env bash
# Tuna, Fig. 2, Fig. 3 and Table 5 (arXiv 2310.13385, Sec. 3.4 and App. A): Tuna_c with lambda of 0, .1, 1, 5 and 10;
# Tuna_p with 0 (Alpaca), 13K, 24K and 52K probabilistic rankings; Tuna_p with beta of 0.9 to 1.4, by the NLL that it
# gives LIMA's expert responses. Prints the figures of Fig. 2 and 3 (the paper prints no numbers), and Table 5: ours and
# the paper's. Fig. 2 needs no teacher: SIZES= BETAS= does it alone.
. "$(dirname "$0")/tuna_common.sh"

[ "$SCALE" = tiny ] && : "${LAMBDAS:=0 10}" "${SIZES=4}" "${BETAS=0.9 1.3}"
[ "$SCALE" = cpu ] && : "${LAMBDAS:=0 1 10}" "${SIZES=60 125}" "${BETAS=}"
LAMBDAS=${LAMBDAS:-0 0.1 1 5 10}                      # Fig. 2
SIZES=${SIZES-13000 24000 52002}                      # Fig. 3
BETAS=${BETAS-0.9 1.0 1.1 1.2 1.3 1.4}                # Table 5
if [ -n "$SIZES$BETAS" ]; then needs_teacher; else HELD_OUT=0; fi

needs $DAVINCI ${BETAS:+"$LIMA"}
instructions
alpaca
[ -z "$SIZES$BETAS" ] || teacher
measure alpaca
sample alpaca "$N"
contextual sampled-alpaca ranked-alpaca "$FIRST"
for LAMBDA in $LAMBDAS; do
  ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")
  kept "lambda-$LAMBDA" || by_rank "lambda-$LAMBDA" "$of_alpaca" ranked-alpaca --lr "$LR"
  measure "lambda-$LAMBDA"
done
ranking=(--margin "$MARGIN" --mle_weight 1)
for size in $SIZES; do
  kept "size-$size" || probabilistic "size-$size" "$of_alpaca" teacher --lr "$LR" --max_train_samples "$size"
  measure "size-$size"
done
there "${names[@]}"
run python evaluate.py report "${systems[@]}" --output "$RESULTS/figures2-3.md"

[ -n "$BETAS" ] || exit 0
collect prepare --task alpaca --input "$LIMA" "${template[@]}" --output "$DATA/lima.jsonl"
names=()
for BETA in $BETAS; do
  name=beta-$BETA
  names+=("$name")
  kept "$name" && continue
  probabilistic "$name" "$of_alpaca" teacher --lr "$LR"
  run $TORCHRUN evaluate.py nll --model "$RUNS/$name/model" --name "beta@$BETA" --input "$DATA/lima.jsonl" \
    --max_length 2048 --output "$RUNS/eval/$name/nll.jsonl"
  keep "$name" "$RUNS/$name"
done
report table5 "${names[@]}"
