#!/usr/bin/env bash
# Tuna, Tables 1, 2, 3 and 7 (arXiv 2310.13385, Sec. 2.4 to 3.4): Alpaca and Alpaca-Mul; Tuna_p from the teacher's
# likelihoods; Tuna_c from a ranking of what Alpaca answers, Tuna from one of what Tuna_p answers; the other order
# (Tuna_cp) with the first 13K, the last 39K and all 52K probabilistic rankings; both kinds of data at once (mix-Tuna).
# mix-Tuna-104K and the rows with a PRM rest on tuna_prm.sh: run that first. Prints Tables 1, 3 and 8, ours and the paper's,
# and HELD_OUT's figures. The page for Table 2, which wants people, is $RESULTS/sheet.html.
. "$(dirname "$0")/tuna_common.sh"

[ "$SCALE" = tiny ] && : "${SYSTEMS:=llama alpaca_mul tuna_p tuna_c tuna tuna_cp-13K mix-52K}"
[ "$SCALE" = cpu ] && : "${SYSTEMS:=llama alpaca_mul tuna_p tuna_c tuna}"
SYSTEMS=${SYSTEMS:-llama alpaca_mul tuna_p tuna_c tuna tuna_cp-13K tuna_cp-39K tuna_cp-52K mix-52K mix-104K}

needs_teacher
needs $DAVINCI $GPT4 $([[ $SYSTEMS != *mix-104K* ]] || echo "$DATA/prm-3B-39K.jsonl")
instructions
alpaca
teacher
measure alpaca
for system in $SYSTEMS; do
  of_tuna_c=$RUNS/tuna_c/model
  case $system in
  alpaca_mul) kept alpaca_mul || sft alpaca_mul teacher --all_candidates ;;
  tuna_p) tuna_p ;;
  tuna_c) tuna_c ;;
  tuna)
    if [ -n "$GPT4" ]; then
      collect prepare --task alpaca --from_release --input "$GPT4" --references "$ALPACA" "${template[@]}" --output "$DATA/ranked-tuna_p.jsonl"
    else
      sample tuna_p "$FIRST"
      contextual sampled-tuna_p ranked-tuna_p "$FIRST"
    fi
    kept tuna || by_rank tuna "$RUNS/tuna_p/model" ranked-tuna_p --lr "$LR_SECOND" ;;
  tuna_cp-13K) kept "$system" || by_rank "$system" "$of_tuna_c" teacher-ranked-first --lr "$LR_SECOND" ;;
  tuna_cp-39K) kept "$system" || by_rank "$system" "$of_tuna_c" teacher-ranked-rest --lr "$LR_SECOND" ;;
  tuna_cp-52K) kept "$system" || by_rank "$system" "$of_tuna_c" teacher-ranked --lr "$LR_SECOND" ;;
  mix-52K)
    join mix-52K ranked-alpaca teacher-ranked-rest
    kept "$system" || by_rank mix-52K "$of_alpaca" mix-52K --lr "$LR" ;;
  mix-104K) # the two halves share ids: those of one are changed
    into "$DATA/p-ranked.jsonl" sed 's/^{"id": "/{"id": "p-/' "$DATA/teacher-ranked.jsonl"
    join mix-104K prm-3B-39K p-ranked
    kept "$system" || by_rank mix-104K "$of_alpaca" mix-104K --lr "$LR_104K" ;;
  esac
  measure "$system"
done

if [ -n "$VICUNA" ]; then
  people=() # Table 2's systems, without PPO-sim
  for system in alpaca tuna_p tuna_c tuna; do
    [[ " alpaca $SYSTEMS " != *" $system "* ]] || people+=("$RUNS/eval/$system/vicuna.jsonl")
  done
  run python evaluate.py sheet --systems "${people[@]}" --input "${people[0]}" --output "$RESULTS/sheet.html"
fi
main=(llama alpaca tuna_p tuna_c tuna_c-prm-3B-52K tuna)
if [ -n "$SUPERNI$LMENTRY$VICUNA" ]; then
  report table1 "${main[@]}"
  report table3 alpaca alpaca_mul tuna_p tuna tuna_c tuna_cp-{13K,39K,52K} mix-52K mix-104K
  report table8 alpaca tuna_p tuna_c tuna_c-prm-{3B,7B}-{39K,52K} tuna
fi
there "${main[@]}"
[ "$HELD_OUT" = 0 ] || run python evaluate.py report "${systems[@]}" --output "$RESULTS/held-out.md"
