#!/usr/bin/env bash
# Tuna (arXiv 2310.13385) with a teacher that knows more, on multi-document QA. The teacher is the base model itself, which
# reads the gold passage alone; the student reads all documents. Systems: Alpaca, Alpaca-Mul, Tuna_p, Tuna_c, Tuna, Tuna_cp,
# and two controls, Tuna_p's candidates with ranks by chance and by length. No paper's table: results/DESIGNS.md says why.
NAME=tuna_multidoc PAPER_GPUS=1 SCALE=${SCALE:-cpu} KEEP_MODELS=${KEEP_MODELS-1}
. "$(dirname "$0")/lib.sh"
values tuna_multidoc

answers=(--max_new_tokens "$TOKENS" --min_new_tokens "$MIN_TOKENS" ${STOP:+--stop "$STOP"} $BF16)
setting=(--warmup "$WARMUP")
ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")
questions() { # questions NAME SKIP LIMIT: the student's prompts; NAME-gold: the teacher's
  local from=(prepare --task multidoc_qa --input "$QUESTIONS" --shuffle 0 --num_documents "$DOCUMENTS" --skip "$2" --limit "$3")
  from+=(${MAX_WORDS:+--max_words "$MAX_WORDS"})
  collect "${from[@]}" --output "$DATA/$1.jsonl"
  collect "${from[@]}" --gold_prompt --output "$DATA/$1-gold.jsonl"
}
sample() { # sample MODEL FROM TO FLAGS...
  run $TORCHRUN collect_candidates.py sample --task multidoc_qa --model "$1" --input "$DATA/$2.jsonl" --output "$DATA/$3.jsonl" \
    "${answers[@]}" "${@:4}"
}
teach() { # teach NAME: five responses of the teacher, the first the original one, under the student's prompts
  sample "$MODEL" "$1-gold" "$1-taught" --source teacher --num_samples 5 --temperature 1
  records "$1-under" under "$DATA/$1-taught.jsonl" "$DATA/$1.jsonl"
  records "$1-teacher" original "$DATA/$1-under.jsonl"
}
own() { # own STUDENT: its four responses, ranked by the key; ties by the teacher, which reads its own prompt
  local name=$1-seed$seed temperature file
  for temperature in $TEMPERATURES; do
    file=sampled-$name-$temperature
    sample "$RUNS/$name/model" train "$file" --num_samples 4 --temperature "$temperature"
    collect rank --by label --task multidoc_qa --input "$DATA/$file.jsonl" --output "$DATA/$file-label.jsonl"
    if [ -n "$DRY" ] || [ "$(python recipes/records.py mixed "$DATA/$file-label.jsonl")" -ge $((TRAIN / 5)) ]; then break; fi
  done
  records "$name-gold" under "$DATA/$file-label.jsonl" "$DATA/train-gold.jsonl"
  run $TORCHRUN collect_candidates.py rank --by logprob --task multidoc_qa --model "$MODEL" $BF16 --input "$DATA/$name-gold.jsonl" \
    --output "$DATA/$name-scored.jsonl"
  records "$name-key" key "$DATA/$name-scored.jsonl"
  records "$name-student" under "$DATA/$name-key.jsonl" "$DATA/train.jsonl"
  records "ranked-$name" with_original "$DATA/train-teacher.jsonl" "$DATA/$name-student.jsonl"
}
stage() { # stage STAGE SYSTEM FROM DATA FLAGS...: from the model of another system, or from MODEL
  local model=$RUNS/$3-seed$seed/model
  [ -n "$3" ] || model=$MODEL
  train "$2-seed$seed" tuna.py "$model" "$DATA/$4.jsonl" --stage "$1" "${@:5}"
}
make() { # make SYSTEM: what it rests on comes before it in SYSTEMS
  case $1 in
  alpaca) LR=$LR_SFT stage sft alpaca '' train-teacher ;;
  # --stage sft --all_candidates would read a prompt once for each response: five times the hours
  alpaca_mul) LR=$LR_SFT stage contextual alpaca_mul '' unranked --mle_on all ;;
  tuna_p) stage probabilistic tuna_p alpaca train-teacher --length_penalty "$BETA" "${ranking[@]}" ;;
  tuna_c)
    own alpaca
    stage contextual tuna_c alpaca "ranked-alpaca-seed$seed" "${ranking[@]}" ;;
  tuna)
    own tuna_p
    LR=$LR_SECOND stage contextual tuna tuna_p "ranked-tuna_p-seed$seed" "${ranking[@]}" ;;
  tuna_cp) LR=$LR_SECOND stage probabilistic tuna_cp tuna_c train-teacher --length_penalty "$BETA" "${ranking[@]}" ;;
  shuffled | length) stage contextual "$1" alpaca "$1" "${ranking[@]}" ;;
  esac
}
figures() { # figures NAME MODEL
  local test=test
  [ "$1" != teacher ] || test=test-gold # what the teacher knows more
  evaluate multidoc-qa "$1" "$2" --input "$DATA/$test.jsonl" "${answers[@]}"
  [ "$1" = teacher ] || evaluate ranking "$1" "$2" --by logprob --input "$DATA/validation-teacher.jsonl" --length_penalty "$BETA" \
    --max_length 1024
}

need 10 --models "$MODEL" --files "$QUESTIONS"
questions train 0 "$TRAIN"
questions validation "$TRAIN" "$VALIDATION"
questions test $((TRAIN + VALIDATION)) "$TEST"
teach train
teach validation
records unranked unranked "$DATA/train-teacher.jsonl"
records shuffled shuffled "$DATA/train-teacher.jsonl"
records length length "$DATA/train-teacher.jsonl"
measure base "$MODEL"
measure teacher "$MODEL"
for seed in $SEEDS; do
  rest_on="alpaca-seed$seed tuna_p-seed$seed tuna_c-seed$seed" whole=1 # in a round that is not whole these are made anew
  for system in alpaca $SYSTEMS; do kept "$system-seed$seed" || whole=; done
  for system in alpaca $SYSTEMS; do
    [ -n "$whole" ] || make "$system"
    measure "$system-seed$seed" "$RUNS/$system-seed$seed/model"
  done
done
report systems "${names[@]}"
