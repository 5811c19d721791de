#!/usr/bin/env bash
# Tuna, Tables 1, 2, 3 and 7 (arXiv 2310.13385, Sec. 2.4 to 3.4): Alpaca and Alpaca-Mul; Tuna_p from the teacher's
# likelihoods; Tuna_c from a ranking of what Alpaca answers, Tuna from one of what Tuna_p answers; the other order
# (Tuna_cp) with the first 13K, the last 39K and all 52K probabilistic rankings; both kinds of data at once (mix-Tuna).
# Prints each stage's data by its digest, at the end Tables 1 and 3: ours and the paper's, and HELD_OUT's figures. The page for Table 2, which
# wants people, is $RESULTS/sheet.html. Rows with a PRM (Tuna_c (PRM), mix-Tuna-104K): tuna_prm.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/tuna_common.sh

[ "$SCALE" = tiny ] && : "${SYSTEMS:=llama alpaca_mul tuna_p tuna_c tuna tuna_cp-13K mix-52K}"
[ "$SCALE" = cpu ] && : "${SYSTEMS:=llama alpaca_mul tuna_p tuna_c tuna}"
SYSTEMS=${SYSTEMS:-llama alpaca_mul tuna_p tuna_c tuna tuna_cp-13K tuna_cp-39K tuna_cp-52K mix-52K}

instructions
alpaca
teacher
measure alpaca
for system in $SYSTEMS; do
  case $system in
  alpaca_mul) sft alpaca_mul teacher --all_candidates ;;
  tuna_p) tuna_p ;;
  tuna_c) tuna_c ;;
  tuna)
    if [ -n "$GPT4" ]; then
      collect prepare --task alpaca --from_release --input "$GPT4" --references "$ALPACA" "${template[@]}" --output "$DATA/ranked-tuna_p.jsonl"
    else
      sample tuna_p "$FIRST"
      contextual sampled-tuna_p ranked-tuna_p "$FIRST"
    fi
    by_rank tuna tuna_p ranked-tuna_p --lr "$LR_SECOND" ;;
  tuna_cp-13K) by_rank "$system" tuna_c teacher-ranked-first --lr "$LR_SECOND" ;;
  tuna_cp-39K) by_rank "$system" tuna_c teacher-ranked-rest --lr "$LR_SECOND" ;;
  tuna_cp-52K) by_rank "$system" tuna_c teacher-ranked --lr "$LR_SECOND" ;;
  mix-52K)
    cat "$DATA/ranked-alpaca.jsonl" "$DATA/teacher-ranked-rest.jsonl" > "$DATA/mix-52K.jsonl"
    by_rank mix-52K alpaca mix-52K --lr "$LR" ;;
  esac
  measure "$system"
done

if [ -n "$VICUNA" ]; then
  people=() # Table 2's systems, without PPO-sim
  for system in alpaca tuna_p tuna_c tuna; do
    [[ " alpaca $SYSTEMS " != *" $system "* ]] || people+=("$RUNS/eval/$system/vicuna.jsonl")
  done
  anew "$RESULTS/sheet.html" "${people[@]}"
  [ -e "$RESULTS/sheet.html" ] || run python evaluate.py sheet --systems "${people[@]}" --input "${people[0]}" --output "$RESULTS/sheet.html"
fi
main=()
for system in llama alpaca tuna_p tuna_c tuna_c-prm-3B-52K tuna; do
  [ ! -d "$RESULTS/$system" ] || main+=("$RESULTS/$system")
done
if [ -n "$SUPERNI$LMENTRY$VICUNA" ]; then
  report table1 "${main[@]}"
  report table3
fi
[ "$HELD_OUT" = 0 ] || run python evaluate.py report "${main[@]}" --output "$RESULTS/held-out.md"
