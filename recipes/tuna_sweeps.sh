#!/usr/bin/env bash
# Tuna, Fig. 2, Fig. 3 and Table 5 (arXiv 2310.13385, Sec. 3.4 and App. A): Tuna_c with lambda of 0, .1, 1, 5 and 10;
# Tuna_p with 0 (Alpaca), 13K, 24K and 52K probabilistic rankings; Tuna_p with beta of 0.9 to 1.4, by the NLL that it
# gives LIMA's expert responses. Prints the figures of Fig. 2 and 3 (the paper prints no numbers), and Table 5: ours and
# the paper's. Fig. 2 needs no teacher: SIZES= BETAS= does it alone.
. "$(dirname "$0")/tuna_common.sh"
values tuna_sweeps

[ -z "$SIZES$BETAS" ] || needs_teacher
needs $DAVINCI ${BETAS:+"$LIMA"}
instructions
[ -z "$SIZES$BETAS" ] || teacher
ranked_alpaca
for LAMBDA in $LAMBDAS; do
  by_rank "lambda-$LAMBDA" "$of_alpaca" ranked-alpaca
  system "lambda-$LAMBDA"
done
LAMBDA=1
for size in $SIZES; do
  probabilistic "size-$size" "$of_alpaca" teacher --max_train_samples "$size"
  system "size-$size"
done
report figures2-3 "${names[@]}"

[ -n "$BETAS" ] || exit 0
prepare --input "$LIMA" --output "$DATA/lima.jsonl"
names=()
figures() { evaluate nll "$1" "$2" --input "$DATA/lima.jsonl" --max_length 2048; }
for BETA in $BETAS; do
  probabilistic "beta@$BETA" "$of_alpaca" teacher
  system "beta@$BETA"
done
report table5 "${names[@]}"
