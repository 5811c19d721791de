# What PRO's three recipes share (arXiv 2306.17492): the values of Sec. 4.1 to 4.4, HH-RLHF and its candidates, how a
# method is trained and measured. They share data/pro-SCALE, runs/pro-SCALE and results/pro-SCALE: nothing is made twice.
NAME=pro
. recipes/lib.sh

case $SCALE in
tiny) # random models, seconds
  tiny
  : "${MODEL:=$DATA/tiny/model}" "${RM_TRAIN:=$DATA/tiny/reward-train}" "${RM_EVAL:=$DATA/tiny/reward-eval}"
  : "${HH:=$DATA/tiny/hh}" "${ALPACA:=$MODEL}" "${CHATGPT:=$MODEL}" "${CURIE:=$MODEL}" "${BASE_URL=}" "${BLOCKS:=raw alpaca3}"
  : "${LR:=1e-3}" "${BATCH:=8}" "${EPOCHS:=1}" "${MAX_LENGTH:=160}" "${MAX_PROMPT:=96}" "${TOKENS:=4}" "${VALIDATION:=3}" ;;
cpu) # demo/model on one core, harmless-base alone, five answers of its own a prompt (own5). The rewards are rules, so no
  # reward model is trained. TRAIN_FILES and TEST_FILES may be one file. The design: results/DESIGNS.md
  : "${COLUMNS_SHOWN:=harmless-base char_bleu;harmless-base reward}" "${RM_TRAIN:=vader}" "${RM_EVAL:=afinn}"
  : "${MODEL:=demo/model}" "${SUBSETS:=harmless-base}" "${TRAIN_ROWS:=--shuffle 0 --limit 600}" "${BLOCKS:=own5}"
  : "${TEST_ROWS:=--shuffle 0 --skip 600 --limit 500}" "${VALIDATION:=100}" "${KEEP_VALIDATION=}" "${TOKENS:=24}"
  : "${LR:=5e-5}" "${EVAL_LIMIT:=200}" "${SCHEDULE:=--schedule cosine --warmup 0.1}" "${BATCH:=8}" "${EPOCHS:=1}"
  : "${MAX_LENGTH:=80}" "${MAX_PROMPT:=48}" "${EVAL_EVERY:=0}" "${SEEDS:=0 1 2 3 4}" "${PROMPTS:=320}" "${EVAL_BATCH:=64}"
  : "${BF16=--bf16}" ;; # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
135m) # demo/model on one GPU, all subsets, two reward models of its own, answers of its own (own3)
  : "${MODEL:=demo/model}" "${TRAIN_ROWS:=--shuffle 0 --limit 8000}" "${TEST_ROWS:=--shuffle 0 --limit 1000}" "${RM_LR:=5e-5}"
  : "${RM_ROWS:=--shuffle 0 --limit 16000}" "${RM_EVAL_ROWS:=--shuffle 0 --skip 16000 --limit 16000}"
  : "${BLOCKS:=raw own3}" "${LR:=2e-5}" "${EVAL_EVERY:=25}" ;;
esac
MODEL=${MODEL:-huggyllama/llama-7b}                                    # Sec. 4.3: LLaMA-7B
RM_TRAIN=${RM_TRAIN:-OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5} # footnote 4; RM_ROWS: our own, trained on these
RM_EVAL=${RM_EVAL:-OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1}       # footnote 5
SUBSETS=${SUBSETS:-harmless-base helpful-base helpful-online helpful-rejection-sampled} # Table 1
HH=${HH:-}                                 # a folder of SUBSET/{train,test}.jsonl.gz; without: the hub
TRAIN_FILES=${TRAIN_FILES:-} TEST_FILES=${TEST_FILES:-} # or the files, one a subset
TRAIN_ROWS=${TRAIN_ROWS:-} TEST_ROWS=${TEST_ROWS:-} RM_ROWS=${RM_ROWS:-} # of them, as `prepare` takes rows: all
ALPACA=${ALPACA:-alpaca-7b} CHATGPT=${CHATGPT:-gpt-3.5-turbo} CURIE=${CURIE:-text-curie-001} # a folder; names at BASE_URL
BASE_URL=${BASE_URL-https://api.openai.com/v1}
BLOCKS=${BLOCKS:-raw alpaca3 chatgpt3}     # Table 2's
if [[ $BLOCKS = *alpaca3* && $ALPACA != */* ]]; then
  echo "set ALPACA to a folder with Alpaca-7B's weights (Table 2's Alpaca-3 block), or BLOCKS='raw chatgpt3' without" >&2
  exit 2
fi
LR=${LR:-5e-6} EPOCHS=${EPOCHS:-2} BATCH=${BATCH:-112} MAX_LENGTH=${MAX_LENGTH:-512} # Sec. 4.3; for all methods, Sec. 4.4
MAX_PROMPT=${MAX_PROMPT:-384} EVAL_EVERY=${EVAL_EVERY:-600} SCHEDULE=${SCHEDULE:---schedule constant --warmup 0} # as released
KEEP_VALIDATION=${KEEP_VALIDATION---keep_validation} # of the test's rows, which keep them, as the paper's
PROMPTS=${PROMPTS:-} EVAL_BATCH=${EVAL_BATCH:-16} # of the training data, the first so many: all
EVAL_LIMIT=${EVAL_LIMIT:-}                 # of the test's, so many, drawn by a seed: all
TOKENS=${TOKENS:-128} VALIDATION=${VALIDATION:-280} # Sec. 4.3; Sec. 4.1: of the test data
SPLITS=${SPLITS:-4}                        # K of Algorithm 1: silent
SEEDS=${SEEDS:-0}                          # silent: one run each, as far as the paper says
BF16=${BF16:-}                             # --bf16: on a CPU that has it
COLUMNS_SHOWN=${COLUMNS_SHOWN:-}           # of the paper's tables, a ; between them: all

collect() { run python collect_candidates.py "$@"; }
prepare() { # prepare SPLIT FILES FLAGS...
  local split=$1 files=$2
  [ -n "$files" ] || [ -z "$HH" ] || files=$(for s in $SUBSETS; do echo "$HH/$s/$split.jsonl.gz"; done)
  collect prepare --task hh --subset $SUBSETS --split "$split" ${files:+--input $files} "${@:3}"
}
rank() { # rank FROM TO FLAGS...
  collect rank --by reward --reward_model "$RM_TRAIN" --input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl" "${@:3}"
}
server=(${BASE_URL:+--base_url "$BASE_URL"})
answers=(--max_new_tokens "$TOKENS" --max_prompt_length "$MAX_PROMPT" --stop Human: human: Assistant: assistant: $BF16)
add() { # add FROM TO SOURCE N: N responses of a source to each prompt, from this machine or from a server
  local io=(--task hh --input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl" --source "$3" --num_samples "$4")
  case $3 in
  own) run $TORCHRUN collect_candidates.py sample --model "$MODEL" "${io[@]}" "${answers[@]}" ;;
  alpaca-7b) run $TORCHRUN collect_candidates.py sample --model "$ALPACA" "${io[@]}" "${answers[@]}" ;;
  text-curie-001) collect teacher --completions --model "$CURIE" "${server[@]}" "${io[@]}" "${answers[@]}" ;;
  gpt-3.5-turbo) collect teacher --model "$CHATGPT" "${server[@]}" "${io[@]}" --max_new_tokens "$TOKENS" ;;
  esac
}
block() { # block NAME: $DATA/NAME.jsonl, ranked by RM_train: raw, or with one more response a prompt
  case $1 in
  raw) rank train raw ;;
  own3) add train own3-sampled own 1 && rank own3-sampled own3 ;;
  own5) # of the model's own answers alone
    add train own5-and-pair own 5
    records own5-sampled only own "$DATA/own5-and-pair.jsonl"
    rank own5-sampled own5 ;;
  alpaca3) add train alpaca3-sampled alpaca-7b 1 && rank alpaca3-sampled alpaca3 ;;
  chatgpt3) add train chatgpt3-sampled gpt-3.5-turbo 1 && rank chatgpt3-sampled chatgpt3 ;;
  esac
}
train() { # train NAME SCRIPT FLAGS...
  run $TORCHRUN "$2" --model "$MODEL" --lr "$LR" --epochs "$EPOCHS" --batch_size "$BATCH" --max_length "$MAX_LENGTH" \
    --max_prompt_length "$MAX_PROMPT" --seed "$seed" --resume $SAVE $SCHEDULE $BF16 ${PROMPTS:+--max_train_samples "$PROMPTS"} --output "$RUNS/$1" "${@:3}"
}
measure() { # measure NAME FLAGS...: answers to the test set, or with --source answers that are there
  names+=("$RESULTS/$1")
  ! kept "$1" || return 0
  run $TORCHRUN evaluate.py hh --name "$1" --input "$DATA/test.jsonl" --output "$RUNS/eval/$1/hh.jsonl" \
    --reward_model "$RM_EVAL" --batch_size "$EVAL_BATCH" ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} "${answers[@]}" "${@:2}"
  keep "$1" "$RUNS/eval/$1" "$RUNS/$1"
}
pro() { # pro NAME DATA FLAGS...: PRO or an ablation, at its best step by the reward of the validation answers; with
  # EVAL_EVERY=0 at its last
  local name=$1-seed$seed best=model chosen=()
  if [ "$EVAL_EVERY" != 0 ]; then
    best=best chosen=(--eval_data "$DATA/validation-ranked.jsonl" --eval_every "$EVAL_EVERY" "${answering[@]}")
  fi
  kept "$name" || train "$name" pro.py --data "$DATA/$2.jsonl" "${chosen[@]}" "${@:3}"
  measure "$name" --model "$RUNS/$name/$best"
}
report() { # report PAPER'S-TABLE SYSTEMS...
  local shown
  IFS=';' read -ra shown <<<"$COLUMNS_SHOWN"
  run python evaluate.py report "${@:2}" --paper "recipes/paper/pro_$1.json" --output "$RESULTS/$1.md" \
    ${COLUMNS_SHOWN:+--columns "${shown[@]}"}
}

names=()
prepare train "$TRAIN_FILES" $TRAIN_ROWS --output "$DATA/train.jsonl"
prepare test "$TEST_FILES" $TEST_ROWS --output "$DATA/test.jsonl" --validation "$VALIDATION" $KEEP_VALIDATION
if [ -n "$RM_ROWS" ]; then
  prepare train "$TRAIN_FILES" $RM_ROWS --output "$DATA/reward-train.jsonl"
  prepare train "$TRAIN_FILES" $RM_EVAL_ROWS --output "$DATA/reward-eval.jsonl"
  for rm in reward-train reward-eval; do
    run $TORCHRUN reward_model.py --model "$MODEL" --data "$DATA/$rm.jsonl" --output "$RUNS/$rm" --lr "$RM_LR" --resume \
      --batch_size "$BATCH" --max_length "$MAX_LENGTH" $BF16
  done
  RM_TRAIN=$RUNS/reward-train/model RM_EVAL=$RUNS/reward-eval/model
fi
rank validation validation-ranked
answering=(--reward_model "$RM_TRAIN" --max_new_tokens "$TOKENS")
