# Sourced by Tuna's three recipes, which share what they collect and train: the paper's values (each can be set from the
# environment), and how a stage is collected, trained and measured.
#
# ALPACA: alpaca_data.json (52K). DAVINCI: the authors' released responses of text-davinci-003 with their
# log-probabilities, the only way to the paper's retired teacher; without it TEACHER answers, a model at TEACHER_URL or a
# folder. GPT4: their released rankings of Tuna_p's responses, for Tuna. RANKER at RANKER_URL ranks and judges (below paper
# scale a stand-in, where no URL is set). SUPERNI, LMENTRY: clones of the benchmarks; VICUNA: its questions; empty: left out.
# HELD_OUT: so many instructions after the first N, on which is measured what the papers' benchmarks do not say: the NLL of
# the references, and how a system ranks the teacher's responses, beside the teacher's order (Eq. 3) and the ranker's.
# MAX_REQUESTS stops the ranking of training data early: training takes what is there, the next start goes on, and what rests on a file
# that grew is made and trained anew; files that it makes anew are first set aside, in $DATA/outdated-*.
NAME=tuna
. recipes/lib.sh

case $SCALE in
tiny) # random models, seconds
  tiny
  : "${ALPACA:=$DATA/tiny/alpaca_data.json}" "${BASE:=$DATA/tiny/model}" "${TEACHER:=$BASE}" "${N:=8}" "${FIRST:=4}"
  : "${SUPERNI=$DATA/tiny/superni}" "${LMENTRY=}" "${VICUNA=$DATA/tiny/question.jsonl}" "${LIMA:=$DATA/tiny/lima.jsonl}"
  : "${HELD_OUT:=3}" "${TOKENS:=8}" "${EVAL_TOKENS:=4}" "${SHOTS:=2}" "${BATCH:=4}" "${SFT_EPOCHS:=1}" "${PRM_3B:=$BASE}" "${PRM_7B:=$BASE}" ;;
cpu) # demo/model, a core, half an hour; ALPACA: a JSONL of instruction, input, output, as self-instruct's 175 seed tasks flattened
  : "${BASE:=demo/model}" "${TEACHER:=$BASE}" "${N:=125}" "${FIRST:=100}" "${HELD_OUT:=50}" "${TOKENS:=64}" "${BATCH:=8}"
  : "${SUPERNI=}" "${LMENTRY=}" "${LMENTRY_EXAMPLES:=15}" "${VICUNA=}" "${EVAL_TOKENS:=64}" "${PRM_3B:=$BASE}" "${PRM_7B:=$BASE}"
  : "${LR_SFT:=1e-4}" "${LR:=5e-5}" "${LR_SECOND:=5e-6}" "${SFT_EPOCHS:=1}"
  : "${BF16=--bf16}" ;; # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
135m) # demo/model, a GPU
  : "${BASE:=demo/model}" "${TEACHER:=$BASE}" "${N:=400}" "${FIRST:=100}" "${TOKENS:=64}" "${EVAL_TOKENS:=64}" "${BATCH:=16}"
  : "${LR_SFT:=1e-4}" "${LR:=5e-5}" "${LR_SECOND:=5e-6}" "${SFT_EPOCHS:=1}" "${PRM_3B:=$BASE}" "${PRM_7B:=$BASE}" ;;
esac
if [ "$SCALE" != paper ] && [ -z "${RANKER_URL:-}" ]; then # without a ranker: one that prefers the longer response
  mkdir -p "$DATA/tiny"
  tiny_server
  RANKER_URL=$BASE_URL RANKER=${RANKER:-stand-in}
fi
ALPACA=${ALPACA:-alpaca_data.json} DAVINCI=${DAVINCI:-} GPT4=${GPT4:-} LIMA=${LIMA:-lima.jsonl} VICUNA=${VICUNA-question.jsonl}
BASE=${BASE:-huggyllama/llama-7b} TEACHER=${TEACHER:-text-davinci-003} TEACHER_URL=${TEACHER_URL:-}
RANKER=${RANKER:-gpt-4} RANKER_URL=${RANKER_URL:-https://api.openai.com/v1} MAX_REQUESTS=${MAX_REQUESTS:-}
SUPERNI=${SUPERNI-natural-instructions} LMENTRY=${LMENTRY-lmentry} LMENTRY_EXAMPLES=${LMENTRY_EXAMPLES:-} SHOTS=${SHOTS:-0 2}
N=${N:-52002} FIRST=${FIRST:-13000}                         # Alpaca's instructions; "the first 13K", Sec. 3.1
HELD_OUT=${HELD_OUT:-0} BF16=${BF16:-}                      # not the paper's
LR_SFT=${LR_SFT:-2e-5}                                      # Sec. 3.1
SFT_EPOCHS=${SFT_EPOCHS:-3} SFT_BATCH=${SFT_BATCH:-${BATCH:-512}} # not printed; the recipe it cites: 3, 64 a GPU on 8
LR=${LR:-1e-5} LR_SECOND=${LR_SECOND:-1e-6} LR_104K=${LR_104K:-5e-6} # Table 7; LR_SECOND: on Tuna_c or Tuna_p
EPOCHS=${EPOCHS:-1} BATCH=${BATCH:-128} WARMUP=${WARMUP:-2}  # Table 7
BETA=${BETA:-1.3} MARGIN=${MARGIN:-0.1} LAMBDA=${LAMBDA:-1}  # Sec. 3.1
RESPONSES=${RESPONSES:-4} TEMPERATURE=${TEMPERATURE:-1} TAU=${TAU:-0.8} # Sec. 3.1
TOKENS=${TOKENS:-512} EVAL_TOKENS=${EVAL_TOKENS:-}          # 512 as released; the benchmarks' own defaults
TEMPLATE=${TEMPLATE:-own}                                   # alpaca: the released prompt, for others' Alpaca weights
PRM_3B=${PRM_3B:-stabilityai/stablelm-base-alpha-3b} PRM_7B=${PRM_7B:-$BASE} # Sec. 3.1, App. D

template=(--template "$TEMPLATE") # what the models learn is how the benchmarks ask them
tokens=(${EVAL_TOKENS:+--max_new_tokens "$EVAL_TOKENS"})
names=()
if [ "$HELD_OUT" != 0 ] && [ -n "$DAVINCI" ]; then
  echo "HELD_OUT wants the teacher's own responses to instructions that it has not seen: leave DAVINCI empty, or HELD_OUT" >&2
  exit 2
fi

collect() { run python collect_candidates.py "$@"; }

anew() { # anew FILE INPUTS...: where INPUTS are not those that FILE was made from, set it aside, so that it is made again
  local now aside
  mkdir -p "${1%/*}"
  now=$(cat "${@:2}" | sha256sum | cut -c1-16)
  if [ -e "$1.from" ] && [ "$(cat "$1.from")" != "$now" ]; then
    aside=$(mktemp -d "$DATA/outdated-XXXX")
    echo "$1: what it was made from changed; it is made anew, the old one is in $aside"
    mv "$1"* "$aside"
  fi
  echo "$now" > "$1.from"
}

instructions() { # Alpaca's, with the original response
  local from=(prepare --task alpaca --input "$ALPACA" "${template[@]}")
  collect "${from[@]}" --limit "$N" --output "$DATA/train.jsonl"
  [ "$HELD_OUT" = 0 ] || collect "${from[@]}" --skip "$N" --limit "$HELD_OUT" --output "$DATA/held-out.jsonl"
}

teach() { # teach FROM TO: TEACHER's responses with their log-probabilities
  local io=(--input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl" --model "$TEACHER" --num_samples "$RESPONSES"
    --temperature "$TEMPERATURE" --max_new_tokens "$TOKENS")
  if [ -n "$TEACHER_URL" ]; then
    collect teacher "${io[@]}" --base_url "$TEACHER_URL" --completions --logprobs
  else
    run $TORCHRUN collect_candidates.py sample "${io[@]}" --source teacher $BF16
  fi
}

teacher() { # N responses of the teacher with its log-probabilities, and as ranks (Eq. 3)
  if [ -n "$DAVINCI" ]; then
    collect prepare --task alpaca --from_release --input "$DAVINCI" --limit "$N" "${template[@]}" --output "$DATA/teacher.jsonl"
  else
    teach train teacher
  fi
  anew "$DATA/teacher-ranked.jsonl" "$DATA/teacher.jsonl"
  collect rank --by probabilistic --input "$DATA/teacher.jsonl" --output "$DATA/teacher-ranked.jsonl" --length_penalty "$BETA"
  split teacher-ranked
  if [ "$HELD_OUT" != 0 ]; then
    teach held-out held-out-teacher
    MAX_REQUESTS='' contextual held-out-teacher held-out-ranked "$HELD_OUT"
  fi
}

sample() { # sample STUDENT LIMIT: its own diverse responses (Sec. 2.3); LIMIT of the instructions
  head -n "$2" "$DATA/train.jsonl" > "$DATA/train-$2.jsonl"
  anew "$DATA/sampled-$1.jsonl" "$DATA/train-$2.jsonl" "$RUNS/$1.data"
  run $TORCHRUN collect_candidates.py sample --input "$DATA/train-$2.jsonl" --output "$DATA/sampled-$1.jsonl" \
    --model "$RUNS/$1/model" --num_samples "$RESPONSES" --temperature "$TEMPERATURE" --max_rouge_l "$TAU" --max_new_tokens "$TOKENS" $BF16
}

contextual() { # contextual FROM TO LIMIT: the ranker on the responses to the first LIMIT instructions (Table 9)
  anew "$DATA/$2.jsonl" "$DATA/$1.jsonl"
  collect rank --by contextual --input "$DATA/$1.jsonl" --limit "$3" --output "$DATA/$2.jsonl" \
    --model "$RANKER" --base_url "$RANKER_URL" ${MAX_REQUESTS:+--max_requests "$MAX_REQUESTS"}
}

split() { # split FILE: into FILE-first and FILE-rest, the paper's 13K and 39K
  head -n "$FIRST" "$DATA/$1.jsonl" > "$DATA/$1-first.jsonl"
  tail -n +$((FIRST + 1)) "$DATA/$1.jsonl" > "$DATA/$1-rest.jsonl"
}

train() { # train RUN FROM DATA FLAGS...: tuna.py (or $SCRIPT) from the run FROM, or from a model; anew where the data grew
  local name=$1 from=$2 data=$DATA/$3.jsonl model=$2
  [ ! -d "$RUNS/$from/model" ] || model=$RUNS/$from/model
  local digest
  digest=$(sha256sum < "$data" | cut -c1-16)$(cat "$RUNS/$from.data" 2>/dev/null || true)
  if [ -e "$RUNS/$name.data" ] && [ "$(cat "$RUNS/$name.data")" != "$digest" ]; then
    echo "$name: its data changed, so it is trained and measured anew"
    rm -rf "${RUNS:?}/$name" "$RUNS/eval/$name"
  fi
  echo "$digest" > "$RUNS/$name.data"
  echo "data of $name: ${digest:0:16} $data"
  run $TORCHRUN "${SCRIPT:-tuna.py}" --model "$model" --data "$data" --output "$RUNS/$name" --batch_size "$BATCH" \
    --warmup "$WARMUP" --epochs "$EPOCHS" --resume $BF16 "${@:4}"
}

probabilistic() { train "$1" "$2" "$3" --stage probabilistic --length_penalty "$BETA" "${ranking[@]}" "${@:4}"; }
by_rank() { train "$1" "$2" "$3" --stage contextual "${ranking[@]}" "${@:4}"; }
ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")

sft() { EPOCHS=$SFT_EPOCHS BATCH=$SFT_BATCH train "$1" "$BASE" "$2" --stage sft --lr "$LR_SFT" "${@:3}"; }

alpaca() { sft alpaca train; }

tuna_p() { probabilistic tuna_p alpaca teacher --lr "$LR"; }

tuna_c() { # Alpaca's responses to all instructions (the PRM ranks the rest), the ranker on the first
  sample alpaca "$N"
  contextual sampled-alpaca ranked-alpaca "$FIRST"
  by_rank tuna_c alpaca ranked-alpaca --lr "$LR"
}

measure() { # measure RUN: held out, Super-NI, LMentry, Vicuna QA, the last against Alpaca's answers. llama: BASE, which
  # has learnt no template, so in the benchmarks' own form; of what is held out it is the teacher itself, where TEACHER is BASE
  local model=$RUNS/$1/model out=$RUNS/eval/$1 form=("${template[@]}")
  [ "$1" != llama ] || model=$BASE form=()
  local eval=(--model "$model" --name "$1")
  if [ -n "$SUPERNI" ]; then
    for shots in $SHOTS; do
      run $TORCHRUN evaluate.py superni "${eval[@]}" --superni_dir "$SUPERNI" --shots "$shots" "${form[@]}" "${tokens[@]}" \
        --output "$out/superni-$shots.jsonl"
    done
  fi
  [ -z "$LMENTRY" ] || run $TORCHRUN evaluate.py lmentry "${eval[@]}" --lmentry_dir "$LMENTRY" "${form[@]}" "${tokens[@]}" $BF16 \
    ${LMENTRY_EXAMPLES:+--max_examples "$LMENTRY_EXAMPLES"} --output "$out/lmentry.jsonl"
  if [ "$HELD_OUT" != 0 ]; then
    run $TORCHRUN evaluate.py nll "${eval[@]}" --input "$DATA/held-out.jsonl" --max_length 1024 --output "$out/nll.jsonl"
    for by in logprob rank; do # beside the teacher's order, beside the ranker's
      anew "$out/ranking-$by.jsonl" "$DATA/held-out-ranked.jsonl"
      run $TORCHRUN evaluate.py ranking "${eval[@]}" --by $by --input "$DATA/held-out-ranked.jsonl" --max_length 1024 \
        --margin "$MARGIN" --length_penalty "$BETA" --output "$out/ranking-$by.jsonl"
    done
  fi
  if [ -n "$VICUNA" ]; then
    run $TORCHRUN evaluate.py vicuna "${eval[@]}" --input "$VICUNA" "${template[@]}" "${tokens[@]}" --output "$out/vicuna.jsonl"
    [ "$1" = alpaca ] || run python evaluate.py judge --answers "$out/vicuna.jsonl" "$RUNS/eval/alpaca/vicuna.jsonl" \
      --name "$1" --output "$out/judge.jsonl" --model "$RANKER" --base_url "$RANKER_URL"
  fi
  keep "$1" "$out" "$RUNS/$1"
  [ "$1" = llama ] || names+=("$RESULTS/$1")
}

report() { # report TABLE [FOLDERS...]: ours beside the paper's
  local table=$1
  shift
  [ $# -gt 0 ] || set -- "${names[@]}"
  run python evaluate.py report "$@" --paper "recipes/paper/tuna_$table.json" --output "$RESULTS/$table.md"
}
