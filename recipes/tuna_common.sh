# Sourced by Tuna's three recipes (arXiv 2310.13385), which share what they collect and train: the paper's values, each of
# which can be set from the environment, and how a stage is collected, trained and measured. At the papers' size first
# tuna_prm.sh, then tuna.sh, then tuna_sweeps.sh.
#
# ALPACA: alpaca_data.json (52K). DAVINCI: the authors' released responses of text-davinci-003 with their log-probabilities,
# the only way to the paper's teacher, which is retired; without it TEACHER answers, a model at TEACHER_URL or a folder.
# GPT4: their released rankings of Tuna_p's responses, for Tuna. RANKER at RANKER_URL ranks and judges (below paper scale a
# stand-in, where no URL is set). SUPERNI, LMENTRY: clones of the benchmarks; VICUNA: its questions; empty: left out.
# HELD_OUT: so many instructions after the first N, on which is measured what the papers' benchmarks do not say: the NLL of
# the references, and how a system ranks the teacher's responses, beside the teacher's order (Eq. 3) and the ranker's.
NAME=tuna PAPER_GPUS=8 # App. C: 8 V100 of 32 GB; ours computes in bf16, which wants an A100 or newer
. "$(dirname "$0")/lib.sh"

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
paper)
  : "${RANK=--prompt_file recipes/prompts/tuna_rank.txt --max_new_tokens 2048}" # Table 9; 2,048 as released
  : "${JUDGE=--prompt_file recipes/prompts/judge_plain.txt --verdicts mean}" ;; # see PAPERS.md
esac
if [ "$SCALE" != paper ] && [ -z "${RANKER_URL:-}" ]; then # without a ranker: one that prefers the longer response
  tiny_server
  RANKER_URL=$BASE_URL RANKER=${RANKER:-stand-in}
fi
ALPACA=${ALPACA:-alpaca_data.json} DAVINCI=${DAVINCI:-} GPT4=${GPT4:-} LIMA=${LIMA:-lima.jsonl} VICUNA=${VICUNA-question.jsonl}
BASE=${BASE:-huggyllama/llama-7b} TEACHER=${TEACHER:-} TEACHER_URL=${TEACHER_URL:-}
RANKER=${RANKER:-gpt-4} RANKER_URL=${RANKER_URL:-https://api.openai.com/v1} RANK=${RANK:-} JUDGE=${JUDGE:-}
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
ranking=(--margin "$MARGIN" --mle_weight "$LAMBDA")
names=() more=() prm=()

needs() { # needs FILES...: these and the common ones. Alpaca, Tuna_p and Tuna_c are kept for what rests on them
  [ -z "$LMENTRY" ] || more+=(--packages num2words)
  need 400 --models "$BASE" "${prm[@]}" --files "$ALPACA" $SUPERNI $LMENTRY $VICUNA "$@" --urls "$RANKER_URL" "${more[@]}"
}
needs_teacher() {
  [ -n "$DAVINCI$TEACHER" ] || more+=(--absent "a teacher: DAVINCI=the authors' file (microsoft/LMOps, tuna/gpt_data/), TEACHER=a folder, or TEACHER_URL= too")
  [ "$HELD_OUT" = 0 ] || [ -z "$DAVINCI" ] || more+=(--absent "the teacher's responses to the HELD_OUT instructions: without DAVINCI")
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
    ask "$DATA/$2.jsonl" python collect_candidates.py teacher "${io[@]}" --base_url "$TEACHER_URL" --completions --logprobs
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
  collect rank --by probabilistic --input "$DATA/teacher.jsonl" --output "$DATA/teacher-ranked.jsonl" --length_penalty "$BETA"
  split teacher-ranked
  if [ "$HELD_OUT" != 0 ]; then
    teach held-out held-out-teacher
    contextual held-out-teacher held-out-ranked "$HELD_OUT"
  fi
}
sample() { # sample STUDENT LIMIT: its own diverse responses (Sec. 2.3); LIMIT of the instructions
  into "$DATA/train-$2.jsonl" head -n "$2" "$DATA/train.jsonl"
  run $TORCHRUN collect_candidates.py sample --input "$DATA/train-$2.jsonl" --output "$DATA/sampled-$1.jsonl" --model "$RUNS/$1/model" \
    --num_samples "$RESPONSES" --temperature "$TEMPERATURE" --max_rouge_l "$TAU" --max_new_tokens "$TOKENS" $BF16
}
contextual() { # contextual FROM TO LIMIT: the ranker on the responses to the first LIMIT instructions (Table 9)
  ask "$DATA/$2.jsonl" python collect_candidates.py rank --by contextual --input "$DATA/$1.jsonl" --limit "$3" \
    --output "$DATA/$2.jsonl" --model "$RANKER" --base_url "$RANKER_URL" $RANK
}
split() { # split FILE: into FILE-first and FILE-rest, the paper's 13K and 39K
  into "$DATA/$1-first.jsonl" head -n "$FIRST" "$DATA/$1.jsonl"
  into "$DATA/$1-rest.jsonl" tail -n "+$((FIRST + 1))" "$DATA/$1.jsonl"
}
join() { into "$DATA/$1.jsonl" cat "$DATA/$2.jsonl" "$DATA/$3.jsonl"; } # join TO FROM FROM
table4() { # the mean words of responses by rank, which `rank` writes beside its output
  into "$RESULTS/table4.txt" grep -H "" "$DATA/ranked-alpaca.jsonl.lengths.json" "${@/#/$DATA/}"
}

train() { # train RUN MODEL DATA FLAGS...: tuna.py, or $SCRIPT
  run $TORCHRUN "${SCRIPT:-tuna.py}" --model "$2" --data "$DATA/$3.jsonl" --output "$RUNS/$1" --batch_size "$BATCH" \
    --warmup "$WARMUP" --epochs "$EPOCHS" --resume $BF16 "${@:4}"
}
probabilistic() { train "$1" "$2" "$3" --stage probabilistic --length_penalty "$BETA" "${ranking[@]}" "${@:4}"; }
by_rank() { train "$1" "$2" "$3" --stage contextual "${ranking[@]}" "${@:4}"; }
sft() { EPOCHS=$SFT_EPOCHS BATCH=$SFT_BATCH train "$1" "$BASE" "$2" --stage sft --lr "$LR_SFT" "${@:3}"; }
of_alpaca=$RUNS/alpaca/model
alpaca() { sft alpaca train; }
tuna_p() { probabilistic tuna_p "$of_alpaca" teacher --lr "$LR"; }
tuna_c() { # Alpaca's responses to all instructions (the PRM ranks the rest), the ranker on the first
  sample alpaca "$N"
  contextual sampled-alpaca ranked-alpaca "$FIRST"
  by_rank tuna_c "$of_alpaca" ranked-alpaca --lr "$LR"
}

measure() { # measure RUN: held out, Super-NI, LMentry, Vicuna QA, the last against Alpaca's answers. llama: BASE, which
  # has learnt no template, so in the benchmarks' own form; of what is held out it is the teacher itself, where TEACHER is BASE
  names+=("$1")
  ! kept "$1" || return 0
  local model=$RUNS/$1/model out=$RUNS/eval/$1 form=("${template[@]}") trained=$RUNS/$1
  [ "$1" != llama ] || model=$BASE form=() trained=
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
      run $TORCHRUN evaluate.py ranking "${eval[@]}" --by $by --input "$DATA/held-out-ranked.jsonl" --max_length 1024 \
        --margin "$MARGIN" --length_penalty "$BETA" --output "$out/ranking-$by.jsonl"
    done
  fi
  if [ -n "$VICUNA" ]; then
    run $TORCHRUN evaluate.py vicuna "${eval[@]}" --input "$VICUNA" "${template[@]}" "${tokens[@]}" --output "$out/vicuna.jsonl"
    [ "$1" = alpaca ] || run python evaluate.py judge --answers "$out/vicuna.jsonl" "$RUNS/eval/alpaca/vicuna.jsonl" \
      --name "$1" --output "$out/judge.jsonl" --model "$RANKER" --base_url "$RANKER_URL" $JUDGE
  fi
  case $1 in
  alpaca | tuna_p | tuna_c) KEEP_MODELS=1 keep "$1" "$trained" ;;
  *) keep "$1" "$trained" ;;
  esac
}
there() { # there SYSTEMS...: sets `systems` to the results of those that are there
  systems=()
  for system in "$@"; do
    [ ! -d "$RESULTS/$system" ] && [[ " ${names[*]} " != *" $system "* ]] || systems+=("$RESULTS/$system")
  done
}
report() { # report TABLE SYSTEMS...: ours beside the paper's
  there "${@:2}"
  run python evaluate.py report "${systems[@]}" --paper "recipes/paper/tuna_$1.json" --output "$RESULTS/$1.md"
}
