# What PRO's three recipes share (arXiv 2306.17492): the values of Sec. 4.1 to 4.4, HH-RLHF and its candidates, how a
# method is trained and measured. They share data/pro-SCALE, runs/pro-SCALE and results/pro-SCALE: nothing is made twice.
NAME=pro PAPER_GPUS=8 # Sec. 4.3: 7 train and 1 holds RM_train; here all 8 train, and rewards are made before
. "$(dirname "$0")/lib.sh"

case $SCALE in
tiny) # random models, seconds
  tiny
  : "${MODEL:=$DATA/tiny/model}" "${RM_TRAIN:=$DATA/tiny/reward-train}" "${RM_EVAL:=$DATA/tiny/reward-eval}"
  : "${HH:=$DATA/tiny/hh}" "${ALPACA:=$MODEL}" "${CHATGPT:=$MODEL}" "${CURIE:=$MODEL}" "${BASE_URL=}" "${BLOCKS:=raw alpaca3}"
  : "${LR:=1e-3}" "${BATCH:=8}" "${EPOCHS:=1}" "${MAX_LENGTH:=160}" "${MAX_PROMPT:=96}" "${TOKENS:=4}" "${VALIDATION:=3}" ;;
cpu) # demo/model on one core, harmless-base alone, two reward models of its own, answers of its own (own3). TRAIN_FILES
  # and TEST_FILES may be one file, such as harmless-base/test.jsonl.gz of 2,312 rows: 320 train the methods, 1,000 each a
  # reward model, 200 are the test
  : "${COLUMNS_SHOWN:=harmless-base char_bleu;harmless-base reward}"
  : "${MODEL:=demo/model}" "${SUBSETS:=harmless-base}" "${TRAIN_ROWS:=--shuffle 0 --limit 320}" "${RM_LR:=1e-4}"
  : "${TEST_ROWS:=--shuffle 0 --skip 2000 --limit 200}" "${RM_ROWS:=--shuffle 0 --limit 1000}" "${BLOCKS:=raw own3}"
  : "${RM_EVAL_ROWS:=--shuffle 0 --skip 1000 --limit 1000}" "${LR:=5e-5}" "${BATCH:=8}" "${TOKENS:=48}"
  : "${MAX_LENGTH:=128}" "${MAX_PROMPT:=80}" "${VALIDATION:=48}" "${EVAL_EVERY:=0}" "${SEEDS:=0 1 2}" "${EPOCHS:=1}"
  : "${BF16=--bf16}" ;; # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
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
LR=${LR:-5e-6} EPOCHS=${EPOCHS:-2} BATCH=${BATCH:-112} MAX_LENGTH=${MAX_LENGTH:-512} # Sec. 4.3; for all methods, Sec. 4.4
MAX_PROMPT=${MAX_PROMPT:-384} EVAL_EVERY=${EVAL_EVERY:-600} # as released, as the constant schedule is
TOKENS=${TOKENS:-128} VALIDATION=${VALIDATION:-280} # Sec. 4.3; Sec. 4.1: of the test data
SPLITS=${SPLITS:-4}                        # K of Algorithm 1: silent
SEEDS=${SEEDS:-0}                          # silent: one run each, as far as the paper says
BF16=${BF16:-}                             # --bf16: on a CPU that has it
COLUMNS_SHOWN=${COLUMNS_SHOWN:-}           # of the paper's tables, a ; between them: all

server=(${BASE_URL:+--base_url "$BASE_URL"})
answers=(--max_new_tokens "$TOKENS" --max_prompt_length "$MAX_PROMPT" --stop Human: human: Assistant: assistant: $BF16)
names=()
files() { # files SPLIT: TRAIN_FILES or TEST_FILES, or those of HH, or none: the hub's
  local given=$TRAIN_FILES
  [ "$1" = train ] || given=$TEST_FILES
  [ -n "$given" ] || [ -z "$HH" ] || given=$(for s in $SUBSETS; do echo "$HH/$s/$1.jsonl.gz"; done)
  echo $given
}
prepare() { # prepare SPLIT FLAGS...
  local given=$(files "$1")
  collect prepare --task hh --subset $SUBSETS --split "$1" ${given:+--input $given} "${@:2}"
}
rank() { # rank FROM TO FLAGS...
  run $TORCHRUN collect_candidates.py rank --by reward --reward_model "$RM_TRAIN" --input "$DATA/$1.jsonl" \
    --output "$DATA/$2.jsonl" "${@:3}"
}
add() { # add FROM TO SOURCE N: N responses of a source to each prompt, from this machine or from a server
  local io=(--task hh --input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl" --source "$3" --num_samples "$4")
  local asked=(ask "$DATA/$2.jsonl" python collect_candidates.py teacher "${server[@]}" "${io[@]}")
  case $3 in
  own) run $TORCHRUN collect_candidates.py sample --model "$MODEL" "${io[@]}" "${answers[@]}" ;;
  alpaca-7b) run $TORCHRUN collect_candidates.py sample --model "$ALPACA" "${io[@]}" "${answers[@]}" ;;
  text-curie-001) "${asked[@]}" --completions --model "$CURIE" "${answers[@]}" ;;
  gpt-3.5-turbo) "${asked[@]}" --model "$CHATGPT" --max_new_tokens "$TOKENS" ;;
  esac
}
block() { # block NAME: $DATA/NAME.jsonl, ranked by RM_train: raw, or with one more response a prompt
  case $1 in
  raw) rank train raw ;;
  own3) add train own3-sampled own 1 && rank own3-sampled own3 ;;
  alpaca3) add train alpaca3-sampled alpaca-7b 1 && rank alpaca3-sampled alpaca3 ;;
  chatgpt3) add train chatgpt3-sampled gpt-3.5-turbo 1 && rank chatgpt3-sampled chatgpt3 ;;
  esac
}
train() { # train NAME SCRIPT FLAGS...
  run $TORCHRUN "$2" --model "$MODEL" --lr "$LR" --epochs "$EPOCHS" --batch_size "$BATCH" --max_length "$MAX_LENGTH" \
    --max_prompt_length "$MAX_PROMPT" --seed "$seed" --resume $BF16 --output "$RUNS/$1" "${@:3}"
}
measure() { # measure NAME FLAGS...: answers to the test set, or with --source answers that are there
  names+=("$RESULTS/$1")
  ! kept "$1" || return 0
  run $TORCHRUN evaluate.py hh --name "$1" --input "$DATA/test.jsonl" --output "$RUNS/eval/$1/hh.jsonl" \
    --reward_model "$RM_EVAL" "${answers[@]}" "${@:2}"
  local trained=
  [[ $* != *"--model $RUNS/"* ]] || trained=$RUNS/$1
  keep "$1" "$trained"
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

needs() { # needs BLOCKS FLAGS...: what these blocks need, and more flags of recipes/helper.py. A checkpoint of 7B has 81 GB,
  # and the next is written before it goes; two models and two reward models lie beside it
  local files=($(files train) $(files test))
  [[ $1 != *alpaca3* ]] || files+=("$ALPACA/config.json")
  [[ $1 != *chatgpt3* ]] || set -- "$@" --urls "$BASE_URL"
  need 300 --models "$MODEL" "$RM_TRAIN" "$RM_EVAL" --files "${files[@]}" "${@:2}"
}
start() { # the data and the reward models
  prepare train $TRAIN_ROWS --output "$DATA/train.jsonl"
  prepare test $TEST_ROWS --output "$DATA/test.jsonl" --validation "$VALIDATION" --keep_validation
  if [ -n "$RM_ROWS" ]; then
    prepare train $RM_ROWS --output "$DATA/reward-train.jsonl"
    prepare train $RM_EVAL_ROWS --output "$DATA/reward-eval.jsonl"
    for rm in reward-train reward-eval; do
      run $TORCHRUN reward_model.py --model "$MODEL" --data "$DATA/$rm.jsonl" --output "$RUNS/$rm" --lr "$RM_LR" --resume \
        --batch_size "$BATCH" --max_length "$MAX_LENGTH" $BF16
    done
    RM_TRAIN=$RUNS/reward-train/model RM_EVAL=$RUNS/reward-eval/model
  fi
  local rm # OpenAssistant's are published as .bin alone: safetensors are made of them once
  for rm in RM_TRAIN RM_EVAL; do
    [[ ${!rm} = OpenAssistant/* ]] || continue
    collect convert --model "${!rm}" --output "$DATA/${!rm##*/}"
    printf -v "$rm" %s "$DATA/${!rm##*/}"
  done
  rank validation validation-ranked
  answering=(--reward_model "$RM_TRAIN" --max_new_tokens "$TOKENS")
}
