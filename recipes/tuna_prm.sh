#!/usr/bin/env bash
# Tuna, Tables 4 and 8 (arXiv 2310.13385, Sec. 3.1, 3.4 and App. D): a proxy ranking model learns the ranker's first 13K
# rankings and ranks Alpaca's responses instead of it, the last 39K or all 52K. The paper does not print its loss; here a
# reward model (Bradley-Terry over the ranked pairs). It needs no teacher, and tuna.sh goes on from what it makes.
# Prints Table 8, ours and the paper's; tuna.sh prints it again with its own rows. Table 4, the mean length of responses by
# rank, is $RESULTS/table4.txt.
. "$(dirname "$0")/tuna_common.sh"
HELD_OUT=0 # its data are the teacher's

[ "$SCALE" = tiny ] || [ "$SCALE" = cpu ] && : "${SIZES:=3B}" # there both are BASE
SIZES=${SIZES:-3B 7B}
unset prm && declare -A prm=([3B]=$PRM_3B [7B]=$PRM_7B)

needs
instructions
alpaca
measure alpaca
tuna_c
measure tuna_c
lengths=()
for size in $SIZES; do
  [ "${prm[$size]}" != stabilityai/stablelm-base-alpha-3b ] || collect convert --model "${prm[$size]}" --output "$DATA/stablelm-3b"
  model=${prm[$size]/#stabilityai*/$DATA/stablelm-3b} # published as .bin alone: safetensors are made of them once
  SCRIPT=reward_model.py train "prm-$size" "$model" ranked-alpaca --ordering rank
  run $TORCHRUN collect_candidates.py rank --by prm --model "$RUNS/prm-$size/model" --input "$DATA/sampled-alpaca.jsonl" \
    --output "$DATA/prm-$size-52K.jsonl"
  lengths+=("prm-$size-52K.jsonl.lengths.json")
  split "prm-$size-52K"
  join "prm-$size-39K" ranked-alpaca "prm-$size-52K-rest"
  for part in 39K 52K; do
    name=tuna_c-prm-$size-$part
    kept "$name" || by_rank "$name" "$of_alpaca" "prm-$size-$part" --lr "$LR"
    measure "$name"
  done
done
table4 "${lengths[@]}"
report table8 alpaca tuna_p tuna_c tuna_c-prm-{3B,7B}-{39K,52K} tuna
