#!/usr/bin/env bash
# PRO, Tables 1, 2, 3 and 6 (arXiv 2306.17492, Sec. 4.1 to 4.6 and 4.8.2): SFT, BoN, CoH, RRHF, PRO and PRO_s, which
# answers its own prompts, on HH-RLHF as it is (raw) and with one more response a prompt (alpaca3, chatgpt3).
# Prints Table 1's counts first, at the end Table 6, with a JUDGE Table 3, and Table 2: ours and the paper's. Table 2's
# RLHF is not ours (`export --format trl`), nor are its rows of Curie and ChatGLM, which answer zero-shot; Table 4 wants people (`evaluate.py sheet`).
# Every value, at the top of pro_common.sh, can be set from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/pro_common.sh

[ "$SCALE" = cpu ] && : "${METHODS_3:=bon rrhf pro}"
[ "$SCALE" = tiny ] && : "${METHODS:=sft rrhf pro pro_s}" "${METHODS_3:=bon coh}"
METHODS=${METHODS:-sft coh rrhf pro pro_s} METHODS_3=${METHODS_3:-bon coh rrhf pro pro_s} # raw; with more responses
JUDGE=${JUDGE:-}        # gpt-4, Sec. 4.6
JUDGED=${JUDGED:-20}    # questions a subset: Table 3's shares are multiples of 2.5, so 20 in two orders

method() { # method METHOD BLOCK. RRHF and CoH at their last step: their released codes choose none
  local name=$1-$2-seed$seed data=$DATA/$2.jsonl
  case $1 in
  pro) pro "pro-$2" "$2" ;;
  pro_s) pro "pro_s-$2" "$2" --bootstrap_splits "$SPLITS" "${answering[@]}" ;;
  bon) pro "bon-$2" "$2" --no_ranking ;;
  sft) pro "sft-$2" train --no_ranking ;; # the response that people chose
  rrhf)
    kept "$name" || train "$name" rescue.py --ordering reward --alpha 1 --length_scaling 1 --human_length_scaling 1 \
      --data "$data"
    measure "$name" --model "$RUNS/$name/model" ;;
  coh)
    collect hindsight --input "$data" --output "$DATA/$2-hindsight.jsonl"
    kept "$name" || train "$name" pro.py --no_ranking --data "$DATA/$2-hindsight.jsonl"
    measure "$name" --model "$RUNS/$name/model" --cue " A good answer:" --stop "A bad answer:" Human: human: \
      Assistant: assistant: ;;
  esac
}

measure base --model "$MODEL"
measure gold --source chosen
measure rejected --source rejected # against gold: what RM_eval knows of people's choice
[[ $BLOCKS != *alpaca3* ]] || measure alpaca --model "$ALPACA"
for block in $BLOCKS; do
  block "$block"
  if [ "$block" = chatgpt3 ]; then
    add test test-chatgpt gpt-3.5-turbo 1
    measure chatgpt --source gpt-3.5-turbo --input "$DATA/test-chatgpt.jsonl"
  fi
done
for seed in $SEEDS; do
  for block in $BLOCKS; do
    for method in $([ "$block" = raw ] && echo "$METHODS" || echo "$METHODS_3"); do method "$method" "$block"; done
  done
done

bootstrapped=()
for name in "${names[@]}"; do [[ ${name##*/} != pro* ]] || bootstrapped+=("$name"); done
[ ${#bootstrapped[@]} = 0 ] || report table6 "${bootstrapped[@]}"
if [ -n "$JUDGE" ]; then
  judged=()
  for pair in gold:gold rrhf:rrhf-raw-seed0; do
    name=pro-vs-${pair%%:*}
    run python evaluate.py judge --answers "$RUNS/eval/pro-raw-seed0/hh.jsonl" "$RUNS/eval/${pair##*:}/hh.jsonl" \
      --name "$name" --output "$RUNS/eval/$name/judge.jsonl" --verdicts average --limit "$JUDGED" \
      --model "$JUDGE" "${server[@]}"
    keep "$name" "$RUNS/eval/$name"
    judged+=("$RESULTS/$name")
  done
  COLUMNS_SHOWN='' report table3 "${judged[@]}"
fi
report table2 "${names[@]}"
