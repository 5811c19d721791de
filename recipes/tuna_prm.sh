#!/usr/bin/env bash
# Tuna, Table 8 (arXiv 2310.13385, Sec. 3.1 and App. D), and mix-Tuna-104K of Table 3: a proxy ranking model learns the
# ranker's first 13K rankings and ranks Alpaca's responses instead of it, the last 39K or all 52K. The paper does not
# print its loss; here a reward model (Bradley-Terry over the ranked pairs).
# Prints the mean length of responses by rank (Table 4), and Table 8: ours and the paper's.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/tuna_common.sh

[ "$SCALE" = tiny ] || [ "$SCALE" = cpu ] && : "${SIZES:=3B}" # there both are BASE
SIZES=${SIZES:-3B 7B}
declare -A prm=([3B]=$PRM_3B [7B]=$PRM_7B)

instructions
alpaca
teacher
measure alpaca
tuna_c
measure tuna_c
for size in $SIZES; do
  SCRIPT=reward_model.py train "prm-$size" "${prm[$size]}" ranked-alpaca --ordering rank
  anew "$DATA/prm-$size-52K.jsonl" "$DATA/sampled-alpaca.jsonl" "$RUNS/prm-$size.data"
  collect rank --by prm --model "$RUNS/prm-$size/model" --input "$DATA/sampled-alpaca.jsonl" --output "$DATA/prm-$size-52K.jsonl"
  split "prm-$size-52K"
  cat "$DATA/ranked-alpaca.jsonl" "$DATA/prm-$size-52K-rest.jsonl" > "$DATA/prm-$size-39K.jsonl"
  for part in 39K 52K; do
    by_rank "tuna_c-prm-$size-$part" alpaca "prm-$size-$part" --lr "$LR"
    measure "tuna_c-prm-$size-$part"
  done
done
sed 's/^{"id": "/{"id": "p-/' "$DATA/teacher-ranked.jsonl" | cat "$DATA/prm-${SIZES%% *}-39K.jsonl" - > "$DATA/mix-104K.jsonl"
by_rank mix-104K alpaca mix-104K --lr "$LR_104K"
measure mix-104K
for system in tuna_p tuna; do # if tuna.sh has made them
  [ ! -d "$RESULTS/$system" ] || names+=("$RESULTS/$system")
done
report table8
