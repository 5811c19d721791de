#!/usr/bin/env bash
# Tuna (arXiv 2310.13385) with a teacher that knows more, on multi-document QA. The teacher is the base model itself, which
# reads the gold passage alone; the student reads all documents. Systems: Alpaca, Alpaca-Mul, Tuna_p, Tuna_c, Tuna, Tuna_cp,
# and two controls, Tuna_p's candidates with ranks by chance and by length. No paper's table: results/DESIGNS.md says why.
# QUESTIONS: the lost-in-the-middle files, or a JSONL of such rows with the gold passage only. SCALE: 135m | cpu | tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=tuna_multidoc SCALE=${SCALE:-135m}
. recipes/lib.sh

case $SCALE in
tiny) # random model, seconds
  tiny
  : "${QUESTIONS:=$DATA/tiny/nq.jsonl.gz}" "${MODEL:=$DATA/tiny/model}" "${TRAIN:=4}" "${VALIDATION:=1}" "${TEST:=1}"
  : "${TOKENS:=4}" "${BATCH:=2}" "${MAX_WORDS=}" "${SYSTEMS:=alpaca_mul tuna_p shuffled tuna_c tuna}" "${SEEDS:=0}" ;;
*) : "${BF16=--bf16}" ;; # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
esac
QUESTIONS=${QUESTIONS:-nq_open_gold.jsonl} MODEL=${MODEL:-demo/model} BF16=${BF16:-}
TRAIN=${TRAIN:-800} VALIDATION=${VALIDATION:-78} TEST=${TEST:-250} DOCUMENTS=${DOCUMENTS:-3} MAX_WORDS=${MAX_WORDS-90}
SYSTEMS=${SYSTEMS:-alpaca_mul tuna_p tuna_c tuna shuffled length tuna_cp} SEEDS=${SEEDS:-0 1 2}
LR_SFT=${LR_SFT:-1e-4} LR=${LR:-5e-5} LR_SECOND=${LR_SECOND:-2e-5} BATCH=${BATCH:-8} WARMUP=${WARMUP:-2}
BETA=${BETA:-1} MARGIN=${MARGIN:-0.1} LAMBDA=${LAMBDA:-1} TOKENS=${TOKENS:-16} STOP=${STOP-"\n"}
TEMPERATURES=${TEMPERATURES:-1 0.7 0.5 0.3} # of the student's samples: the highest at which enough prompts have both right and wrong

collect() { run python collect_candidates.py "$@"; }
answers=(--max_new_tokens "$TOKENS" ${STOP:+--stop "$STOP"} $BF16)
questions() { # questions NAME SKIP LIMIT: the student's prompts; NAME-gold: the teacher's
  local from=(prepare --task multidoc_qa --input "$QUESTIONS" --shuffle 0 --num_documents "$DOCUMENTS" --skip "$2" --limit "$3")
  from+=(${MAX_WORDS:+--max_words "$MAX_WORDS"})
  collect "${from[@]}" --output "$DATA/$1.jsonl"
  collect "${from[@]}" --gold_prompt --output "$DATA/$1-gold.jsonl"
}
teach() { # teach NAME: five responses of the teacher, the first the original one, under the student's prompts
  run $TORCHRUN collect_candidates.py sample --task multidoc_qa --model "$MODEL" --source teacher --num_samples 5 --temperature 1 \
    "${answers[@]}" --input "$DATA/$1-gold.jsonl" --output "$DATA/$1-taught.jsonl"
  records "$1-under" under "$DATA/$1-taught.jsonl" "$DATA/$1.jsonl"
  records "$1-teacher" original "$DATA/$1-under.jsonl"
}
train() { # train RUN FROM DATA FLAGS...
  local model=$MODEL
  [ "$2" = base ] || model=$RUNS/$2-seed$seed/model
  [ -d "$RUNS/$1-seed$seed/model" ] || run $TORCHRUN tuna.py --model "$model" --data "$DATA/$3.jsonl" --output "$RUNS/$1-seed$seed" \
    --batch_size "$BATCH" --warmup "$WARMUP" --epochs 1 --seed "$seed" --resume $SAVE $BF16 "${@:4}"
}
ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")
own() { # own STUDENT: its four responses, ranked by the key; ties by the teacher, which reads its own prompt
  local name=$1-seed$seed temperature file
  for temperature in $TEMPERATURES; do
    file=$DATA/sampled-$name-$temperature
    run $TORCHRUN collect_candidates.py sample --task multidoc_qa --model "$RUNS/$name/model" --num_samples 4 \
      --temperature "$temperature" "${answers[@]}" --input "$DATA/train.jsonl" --output "$file.jsonl"
    collect rank --by label --task multidoc_qa --input "$file.jsonl" --output "$file-label.jsonl"
    [ "$(python recipes/records.py mixed "$file-label.jsonl")" -lt $((TRAIN / 5)) ] || break
  done
  echo "$name: temperature $temperature" >&2
  records "$name-gold" under "$file-label.jsonl" "$DATA/train-gold.jsonl"
  run $TORCHRUN collect_candidates.py rank --by logprob --task multidoc_qa --model "$MODEL" $BF16 --input "$DATA/$name-gold.jsonl" \
    --output "$DATA/$name-scored.jsonl"
  records "$name-key" key "$DATA/$name-scored.jsonl"
  records "$name-student" under "$DATA/$name-key.jsonl" "$DATA/train.jsonl"
  records "ranked-$name" with_original "$DATA/train-teacher.jsonl" "$DATA/$name-student.jsonl"
}
measure() { # measure NAME MODEL
  names+=("$RESULTS/$1")
  ! kept "$1" || return 0
  run $TORCHRUN evaluate.py multidoc-qa --model "$2" --name "$1" --input "$DATA/test.jsonl" \
    --output "$RUNS/eval/$1/multidoc-qa.jsonl" "${answers[@]}"
  [ "$1" = teacher ] || run $TORCHRUN evaluate.py ranking --by logprob --model "$2" --name "$1" --input "$DATA/validation-teacher.jsonl" \
    --length_penalty "$BETA" --max_length 1024 --output "$RUNS/eval/$1/ranking.jsonl"
  keep "$1" "$RUNS/eval/$1" "$(dirname "$2")"
}

questions train 0 "$TRAIN"
questions validation "$TRAIN" "$VALIDATION"
questions test $((TRAIN + VALIDATION)) "$TEST"
teach train
teach validation
records shuffled shuffled "$DATA/train-teacher.jsonl"
records length length "$DATA/train-teacher.jsonl"
names=()
measure base "$MODEL"
if ! kept teacher; then # what the teacher knows more
  run $TORCHRUN evaluate.py multidoc-qa --model "$MODEL" --name teacher --input "$DATA/test-gold.jsonl" \
    --output "$RUNS/eval/teacher/multidoc-qa.jsonl" "${answers[@]}"
  keep teacher "$RUNS/eval/teacher"
fi
names+=("$RESULTS/teacher")
make() { # make SYSTEM: train it, and first what it rests on
  case $1 in
  alpaca) train alpaca base train-teacher --stage sft --lr "$LR_SFT" ;;
  alpaca_mul) train alpaca_mul base train-teacher --stage sft --all_candidates --lr "$LR_SFT" ;;
  tuna_p) make alpaca && train tuna_p alpaca train-teacher --stage probabilistic --length_penalty "$BETA" "${ranking[@]}" --lr "$LR" ;;
  tuna_c) make alpaca && own alpaca && train tuna_c alpaca "ranked-alpaca-seed$seed" --stage contextual "${ranking[@]}" --lr "$LR" ;;
  tuna) make tuna_p && own tuna_p && train tuna tuna_p "ranked-tuna_p-seed$seed" --stage contextual "${ranking[@]}" --lr "$LR_SECOND" ;;
  tuna_cp) make tuna_c && train tuna_cp tuna_c train-teacher --stage probabilistic --length_penalty "$BETA" "${ranking[@]}" --lr "$LR_SECOND" ;;
  shuffled | length) make alpaca && train "$1" alpaca "$1" --stage contextual "${ranking[@]}" --lr "$LR" ;;
  esac
}
for seed in $SEEDS; do
  for system in alpaca $SYSTEMS; do
    kept "$system-seed$seed" || make "$system"
    measure "$system-seed$seed" "$RUNS/$system-seed$seed/model"
  done
done
run python evaluate.py report "${names[@]}" --output "$RESULTS/systems.md"
