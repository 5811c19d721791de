#!/usr/bin/env bash
# Tuna, Tables 1, 2, 3 and 7 (arXiv 2310.13385, Sec. 2.4 to 3.4): Alpaca and Alpaca-Mul; Tuna_p from the teacher's
# likelihoods; Tuna_c from a ranking of what Alpaca answers, Tuna from one of what Tuna_p answers; the other order
# (Tuna_cp) with the first 13K, the last 39K and all 52K probabilistic rankings; both kinds of data at once (mix-Tuna).
# mix-Tuna-104K and the rows with a PRM rest on tuna_prm.sh: run that first. Prints Tables 1, 3 and 8, ours and the paper's.
# The page for Table 2, which wants people, is $RESULTS/sheet.html.
. "$(dirname "$0")/tuna_common.sh"

needs_teacher
needs $DAVINCI $GPT4 $([[ $SYSTEMS != *mix-104K* ]] || echo "$DATA/prm-3B-39K.jsonl")
instructions
teacher
for system in $SYSTEMS; do
  case $system in
  llama)
    measure llama "$BASE"
    continue ;;
  alpaca_mul) sft alpaca_mul teacher --all_candidates ;;
  tuna_p) probabilistic tuna_p "$of_alpaca" teacher ;;
  tuna_c)
    ranked_alpaca
    by_rank tuna_c "$of_alpaca" ranked-alpaca ;;
  tuna)
    if [ -n "$GPT4" ]; then
      prepare --from_release --input "$GPT4" --references "$ALPACA" --output "$DATA/ranked-tuna_p.jsonl"
    else
      sample tuna_p "$FIRST"
      contextual tuna_p
    fi
    LR=$LR_SECOND by_rank tuna "$RUNS/tuna_p/model" ranked-tuna_p ;;
  tuna_cp-13K) LR=$LR_SECOND by_rank "$system" "$of_tuna_c" teacher-ranked-first ;;
  tuna_cp-39K) LR=$LR_SECOND by_rank "$system" "$of_tuna_c" teacher-ranked-rest ;;
  tuna_cp-52K) LR=$LR_SECOND by_rank "$system" "$of_tuna_c" teacher-ranked ;;
  mix-52K)
    join mix-52K ranked-alpaca teacher-ranked-rest
    by_rank mix-52K "$of_alpaca" mix-52K ;;
  mix-104K) # the two halves share ids: those of one are changed
    into "$DATA/p-ranked.jsonl" sed 's/^{"id": "/{"id": "p-/' "$DATA/teacher-ranked.jsonl"
    join mix-104K prm-3B-39K p-ranked
    LR=$LR_104K by_rank mix-104K "$of_alpaca" mix-104K ;;
  esac
  system "$system"
done

if [ -n "$VICUNA" ]; then
  people=() # Table 2's systems, without PPO-sim
  for system in alpaca tuna_p tuna_c tuna; do
    [[ " alpaca $SYSTEMS " != *" $system "* ]] || people+=("$RUNS/eval/$system/vicuna.jsonl")
  done
  run python evaluate.py sheet --systems "${people[@]}" --input "${people[0]}" --output "$RESULTS/sheet.html"
fi
report table1 llama alpaca tuna_p tuna_c tuna_c-prm-3B-52K tuna
report table3 alpaca alpaca_mul tuna_p tuna tuna_c tuna_cp-{13K,39K,52K} mix-52K mix-104K
report table8 alpaca tuna_p tuna_c tuna_c-prm-{3B,7B}-{39K,52K} tuna
