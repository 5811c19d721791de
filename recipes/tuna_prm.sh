#!/usr/bin/env bash
# Tuna, Tables 4 and 8 (arXiv 2310.13385, Sec. 3.1, 3.4 and App. D): a proxy ranking model learns the ranker's first 13K
# rankings and ranks Alpaca's responses instead of it, the last 39K or all 52K. The paper does not print its loss; here a
# reward model (Bradley-Terry over the ranked pairs). It needs no teacher, and tuna.sh goes on from what it makes.
# Prints Table 8, ours and the paper's; tuna.sh prints it again with its own rows. Table 4, the mean words of responses by
# rank, is $RESULTS/table4.txt.
. "$(dirname "$0")/tuna_common.sh"
values tuna_prm

prm=("$PRM_3B" "$PRM_7B")
needs
instructions
ranked_alpaca
by_rank tuna_c "$of_alpaca" ranked-alpaca
system tuna_c
lengths=("$DATA/ranked-alpaca.jsonl.lengths.json") # `rank` writes it beside its output
safetensors PRM_3B
for size in $SIZES; do
  model=PRM_$size ranked=prm-$size-52K
  LR= train "prm-$size" reward_model.py "${!model}" "$DATA/ranked-alpaca.jsonl" --ordering rank
  run $TORCHRUN collect_candidates.py rank --by prm --model "$RUNS/prm-$size/model" --input "$DATA/sampled-alpaca.jsonl" \
    --output "$DATA/$ranked.jsonl"
  lengths+=("$DATA/$ranked.jsonl.lengths.json")
  split "$ranked"
  join "prm-$size-39K" ranked-alpaca "$ranked-rest"
  for part in 39K 52K; do
    by_rank "tuna_c-prm-$size-$part" "$of_alpaca" "prm-$size-$part"
    system "tuna_c-prm-$size-$part"
  done
done
into "$RESULTS/table4.txt" grep -H "" "${lengths[@]}"
report table8 alpaca tuna_p tuna_c tuna_c-prm-{3B,7B}-{39K,52K} tuna
