#!/usr/bin/env bash
# RESCUE, Table 2 (arXiv 2311.09136, Sec. 5.2 and 6.3): multi-document QA. The base model answers each training question
# from single passages; it learns to rank the answers that hold a gold answer before the others (label, no SFT term),
# and answers test questions from 5 and from 10 documents, the gold one at three places.
# Prints Table 2, ours and the paper's. Its values: recipes/values.md.
# The paper says 1k questions for training and 665 for the test, not which: here a seeded draw, apart.
NAME=rescue_multidoc PAPER_GPUS=4 # Sec. 6: 4 A100
. "$(dirname "$0")/lib.sh"
values rescue_multidoc

answers=(--max_new_tokens "$TOKENS" --min_new_tokens "$MIN_TOKENS" ${STOP:+--stop "$STOP"} $BF16)
setting=(--length_scaling "$LENGTH_SCALING" --max_length "$MAX_LENGTH")
prepare() { # prepare INPUT FLAGS...
  collect prepare --task multidoc_qa --input "$1" --shuffle 0 "${@:2}"
}
figures() { # figures NAME MODEL DOCUMENTS
  evaluate multidoc-qa "$1" "$2" --input "$DATA/$test-$3.jsonl" --num_beams "$BEAMS" "${answers[@]}" \
    --batch_size "${EVAL_BATCH:-$((40 / $3))}"
}
at_all_places() { # at_all_places SYSTEM MODEL SUFFIX: at every number of documents; after the last the model goes
  for place in $PLACES; do
    local documents=${place%%:*} keep=1
    [ "$place" != "$last" ] || keep=$KEEP_MODELS
    KEEP_MODELS=$keep measure "${UNSEEN:+unseen-}$1-$documents$3" "$2" "$documents"
  done
}

need 250 --models "$MODEL" --files "$QUESTIONS"
short=(${MAX_WORDS:+--max_words "$MAX_WORDS"})
prepare "$QUESTIONS" "${short[@]}" --num_documents "$TRAIN_DOCUMENTS" --limit "$TRAIN" --output "$DATA/train.jsonl"
run $TORCHRUN collect_candidates.py anchor --model "$MODEL" --input "$DATA/train.jsonl" --output "$DATA/anchored.jsonl" \
  --num_distractors "$DISTRACTORS" "${answers[@]}"
from=anchored test=test tested=("$QUESTIONS" "${short[@]}" --skip "$TRAIN" --limit "$TEST")
if [ -n "$DROP_EMPTY" ]; then
  from=answered
  records answered answered "$DATA/anchored.jsonl"
fi
collect rank --by label --task multidoc_qa --input "$DATA/$from.jsonl" --output "$DATA/ranked.jsonl"
if [ -n "$UNSEEN" ]; then
  records unseen_rows passages 56 65 "$QUESTIONS"
  test=unseen tested=("$DATA/unseen_rows.jsonl" --limit 190)
fi
for place in $PLACES; do
  positions=${place##*:}
  prepare "${tested[@]}" --num_documents "${place%%:*}" --gold_position ${positions//,/ } --output "$DATA/$test-${place%%:*}.jsonl"
done
last=${PLACES##* }
at_all_places base "$MODEL" ""
for seed in $SEEDS; do
  for ordering in $ORDERINGS; do
    kept "$ordering-${last%%:*}-seed$seed" ||
      train "$ordering-seed$seed" rescue.py "$MODEL" "$DATA/ranked.jsonl" --ordering "$ordering" --no_sft
    at_all_places "$ordering" "$RUNS/$ordering-seed$seed/model" "-seed$seed"
  done
done
shown=(--plot gold_position)
report table2 ${UNSEEN:+"${names[@]#unseen-}"} "${names[@]}" # with UNSEEN both tests
