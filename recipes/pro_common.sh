# What PRO's three recipes share (arXiv 2306.17492): HH-RLHF and its candidates, how a method is trained and measured. The
# values: recipes/values.md. They share data/pro-SCALE, runs/pro-SCALE and results/pro-SCALE: nothing is made twice.
NAME=pro PAPER_GPUS=8 # Sec. 4.3: 7 train and 1 holds RM_train; here all 8 train, and rewards are made before
. "$(dirname "$0")/lib.sh"
values pro

server=(${BASE_URL:+--base_url "$BASE_URL"})
answers=(--max_new_tokens "$TOKENS" --max_prompt_length "$MAX_PROMPT" --stop Human: human: Assistant: assistant: $BF16)
setting=(--max_length "$MAX_LENGTH" --max_prompt_length "$MAX_PROMPT" $SCHEDULE ${PROMPTS:+--max_train_samples "$PROMPTS"})
[ "$SCALE" != cpu ] || shown=(--columns "harmless-base char_bleu" "harmless-base reward")

rank() { # rank FROM TO FLAGS...
  run $TORCHRUN collect_candidates.py rank --by reward --reward_model "$RM_TRAIN" --input "$DATA/$1.jsonl" \
    --output "$DATA/$2.jsonl" "${@:3}"
}
add() { # add FROM TO SOURCE N: N responses of a source to each prompt, from this machine or from a server
  local to=$DATA/$2.jsonl io=(--task hh --input "$DATA/$1.jsonl" --source "$3" --num_samples "$4")
  local sample=(run $TORCHRUN collect_candidates.py sample "${io[@]}" --output "$to" "${answers[@]}")
  local asked=(ask "$to" teacher "${server[@]}" "${io[@]}")
  case $3 in
  own) "${sample[@]}" --model "$MODEL" ;;
  alpaca-7b) "${sample[@]}" --model "$ALPACA" ;;
  text-curie-001) "${asked[@]}" --completions --model "$CURIE" "${answers[@]}" ;;
  gpt-3.5-turbo) "${asked[@]}" --model "$CHATGPT" --max_new_tokens "$TOKENS" ;;
  esac
}
block() { # block NAME: $DATA/NAME.jsonl, ranked by RM_train
  case $1 in
  raw)
    rank train raw
    return ;;
  alpaca3) add train alpaca3-sampled alpaca-7b 1 ;;
  chatgpt3) add train chatgpt3-sampled gpt-3.5-turbo 1 ;;
  own5) # without the data's own pair
    add train own5-and-pair own 5
    records own5-sampled only own "$DATA/own5-and-pair.jsonl" ;;
  esac
  rank "$1-sampled" "$1"
}
figures() { # figures NAME MODEL FLAGS...: answers to the test set; without a model and with --source, those that are there
  evaluate hh "$1" "$2" --input "$DATA/test.jsonl" --reward_model "$RM_EVAL" --batch_size "$EVAL_BATCH" \
    ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} "${answers[@]}" "${@:3}"
}
pro() { # pro NAME DATA FLAGS...: PRO or an ablation, at its best step by the reward of the validation answers
  local name=$1-seed$seed best=best choice=(--eval_data "$DATA/validation-ranked.jsonl" --eval_every "$EVAL_EVERY" "${answering[@]}")
  [ "$EVAL_EVERY" != 0 ] || best=model choice=()
  train "$name" pro.py "$MODEL" "$DATA/$2.jsonl" "${choice[@]}" "${@:3}"
  measure "$name" "$RUNS/$name/$best"
}
start() { # start BLOCKS FLAGS...: looks for what these blocks need, with more flags of recipes/helper.py; the data and the
  # reward models. A checkpoint of 7B has 81 GB, and the next is written before it goes; four models lie beside it
  local files=($TRAIN_FILES $TEST_FILES)
  [[ $1 != *alpaca3* ]] || files+=("$ALPACA/config.json")
  [[ $1 != *chatgpt3* ]] || set -- "$@" --urls "$BASE_URL"
  need 300 --models "$MODEL" "$RM_TRAIN" "$RM_EVAL" --files "${files[@]}" "${@:2}"
  collect prepare --task hh --subset $SUBSETS ${TRAIN_FILES:+--input $TRAIN_FILES} $TRAIN_ROWS --output "$DATA/train.jsonl"
  collect prepare --task hh --subset $SUBSETS --split test ${TEST_FILES:+--input $TEST_FILES} $TEST_ROWS \
    --output "$DATA/test.jsonl" --validation "$VALIDATION" $KEEP_VALIDATION
  safetensors RM_TRAIN
  safetensors RM_EVAL
  rank validation validation-ranked
  answering=(--reward_model "$RM_TRAIN" --max_new_tokens "$TOKENS")
}
