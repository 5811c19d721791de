# What PRO's three recipes share (arXiv 2306.17492): the values of Sec. 4.1 to 4.4, HH-RLHF and its candidates, how a
# method is trained and measured. They share data/pro-SCALE, runs/pro-SCALE and results/pro-SCALE: nothing is made twice.
# At SCALE=cpu: results/DESIGNS.md.
NAME=pro PAPER_GPUS=8 # Sec. 4.3: 7 train and 1 holds RM_train; here all 8 train, and rewards are made before
. "$(dirname "$0")/lib.sh"
tiny

#     NAME     paper               cpu        tiny
value MODEL    huggyllama/llama-7b demo/model "$TINY/model"                                 # Sec. 4.3
value RM_TRAIN OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5 vader "$TINY/reward-train"  # footnote 4; cpu: a rule
value RM_EVAL  OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1     afinn "$TINY/reward-eval"   # footnote 5
value SUBSETS  "harmless-base helpful-base helpful-online helpful-rejection-sampled" harmless-base - # Table 1
value TRAIN_FILES '' - "$(printf "$TINY/hh/%s/train.jsonl.gz " $SUBSETS)" # a file for each subset; without: the hub
value TEST_FILES  '' - "$(printf "$TINY/hh/%s/test.jsonl.gz " $SUBSETS)"
value TRAIN_ROWS  '' "--shuffle 0 --limit 600"                            # of them, as `prepare` takes rows
value TEST_ROWS   '' "--shuffle 0 --skip 600 --limit 500"
value VALIDATION  280 100 3                                               # Sec. 4.1: of the test data
value KEEP_VALIDATION --keep_validation ''                                # which keep them, as the paper's
value ALPACA   alpaca-7b      - "$MODEL"                                  # a folder; names at BASE_URL:
value CHATGPT  gpt-3.5-turbo  - "$MODEL"
value CURIE    text-curie-001 - "$MODEL"
value BASE_URL https://api.openai.com/v1 - ''
value BLOCKS   "raw alpaca3 chatgpt3" own5 "raw alpaca3"                  # Table 2's; own5: five answers of the model
value LR         5e-6 5e-5 1e-3                                           # Sec. 4.3; for all methods, Sec. 4.4
value EPOCHS     2    1    1
value BATCH      112  8    8
value PROMPTS    ''   320                                                 # the first so many of a block; all
value SCHEDULE   "--schedule constant --warmup 0" "--schedule cosine --warmup 0.1" # as released
value MAX_LENGTH 512  80   160                                            # Sec. 4.3
value MAX_PROMPT 384  48   96                                             # as released
value TOKENS     128  24   4                                              # Sec. 4.3
value EVAL_EVERY 600  0                                                   # as released; 0: a run's last step is tested
value EVAL_BATCH 16   64
value EVAL_LIMIT ''   200                                                 # so many of the test, drawn by a seed; all
value SPLITS     4                                                        # K of Algorithm 1: silent
value SEEDS      0 "0 1 2 3 4"                                            # silent: one run each, as far as it says

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
  raw) rank train raw && return ;;
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
