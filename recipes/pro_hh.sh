#!/usr/bin/env bash
# PRO, Tables 1, 2, 3 and 6 (arXiv 2306.17492, Sec. 4.1 to 4.6 and 4.8.2): SFT, BoN, CoH, RRHF, PRO and PRO_s, which
# answers its own prompts, on HH-RLHF as it is (raw) and with one more response a prompt (alpaca3, chatgpt3).
# Prints Table 1's counts first, at the end Tables 6 and 2, with a JUDGE Table 3: ours and the paper's. Table 2's
# RLHF is not ours (`export`), nor are its rows of Curie and ChatGLM, which answer zero-shot; Table 4 wants
# people (`evaluate.py sheet`). Its values: recipes/values.md.
. "$(dirname "$0")/pro_common.sh"

method() { # method METHOD BLOCK. RRHF and CoH at their last step: their released codes choose none
  local name=$1-$2-seed$seed data=$DATA/$2.jsonl
  case $1 in
  pro) pro "pro-$2" "$2" ;;
  pro_s) pro "pro_s-$2" "$2" --bootstrap_splits "$SPLITS" "${answering[@]}" ;;
  bon) pro "bon-$2" "$2" --no_ranking ;;
  sft) pro "sft-$2" train --no_ranking ;; # the response that people chose
  rrhf)
    train "$name" rescue.py "$MODEL" "$data" --ordering reward $RRHF
    measure "$name" "$RUNS/$name/model" ;;
  coh)
    collect hindsight --input "$data" --output "$DATA/$2-hindsight.jsonl"
    train "$name" pro.py "$MODEL" "$DATA/$2-hindsight.jsonl" --no_ranking
    measure "$name" "$RUNS/$name/model" --cue " A good answer:" --stop "A bad answer:" Human: human: Assistant: assistant: ;;
  esac
}

start "$BLOCKS" ${JUDGE:+--urls "$BASE_URL"}
measure base "$MODEL"
measure gold '' --source chosen
measure rejected '' --source rejected # against gold: what RM_eval knows of people's choice
for block in $BLOCKS; do
  block "$block"
  case $block in
  alpaca3) measure alpaca "$ALPACA" ;;
  chatgpt3)
    add test test-chatgpt gpt-3.5-turbo 1
    measure chatgpt '' --source gpt-3.5-turbo --input "$DATA/test-chatgpt.jsonl" ;;
  esac
done
for seed in $SEEDS; do
  for block in $BLOCKS; do
    for method in $([ "$block" = raw ] && echo "$METHODS" || echo "$METHODS_3"); do method "$method" "$block"; done
  done
done

bootstrapped=$(printf '%s\n' "${names[@]}" | grep '^pro' || true)
[ -z "$bootstrapped" ] || report table6 $bootstrapped
report table2 "${names[@]}"
[ -n "$JUDGE" ] || exit 0
shown=()
for pair in gold:gold rrhf:rrhf-raw-seed0; do
  name=pro-vs-${pair%%:*}
  run python evaluate.py judge --answers "$RUNS/eval/pro-raw-seed0/hh.jsonl" "$RUNS/eval/${pair##*:}/hh.jsonl" \
    --name "$name" --output "$RUNS/eval/$name/judge.jsonl" --verdicts average --limit "$JUDGED" --model "$JUDGE" "${server[@]}"
  keep "$name"
done
names+=(pro-vs-gold pro-vs-rrhf)
report table3 pro-vs-gold pro-vs-rrhf
