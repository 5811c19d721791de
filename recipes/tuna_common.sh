# Sourced by Tuna's three recipes (arXiv 2310.13385), which share what they collect and train: how a stage is collected,
# trained and measured. The values: recipes/values.md. First tuna_prm.sh, then tuna.sh, then tuna_sweeps.sh.
#
# ALPACA: alpaca_data.json (52K). DAVINCI: the authors' released responses of text-davinci-003 with their log-probabilities,
# the only way to the paper's teacher, which is retired; without it TEACHER answers, a model at TEACHER_URL or a folder.
# GPT4: their released rankings of Tuna_p's responses, for Tuna. RANKER at RANKER_URL ranks and judges; below paper scale a
# stand-in that prefers the longer response, where no URL is set. SUPERNI, LMENTRY: clones of the benchmarks; VICUNA: its
# questions; empty: left out. HELD_OUT: so many instructions after the first N, on which is measured what the papers'
# benchmarks do not say: the NLL of the references, and how a system ranks the teacher's responses, beside the teacher's
# order (Eq. 3) and the ranker's. At SCALE=cpu ALPACA is a JSONL of instruction, input, output: self-instruct's 175 tasks.
NAME=tuna PAPER_GPUS=8 # App. C: 8 V100 of 32 GB; ours computes in bf16, which wants an A100 or newer
. "$(dirname "$0")/lib.sh"
tiny
if [ "$SCALE" != paper ] && [ -z "${RANKER_URL:-}" ]; then
  tiny_server
  RANKER_URL=$BASE_URL RANKER=${RANKER:-stand-in}
fi

values tuna

template=(--template "$TEMPLATE") # what the models learn is how the benchmarks ask them
tokens=(${EVAL_TOKENS:+--max_new_tokens "$EVAL_TOKENS"})
setting=(--warmup "$WARMUP") more=() prm=()
rest_on="alpaca tuna_p tuna_c"
of_alpaca=$RUNS/alpaca/model of_tuna_c=$RUNS/tuna_c/model

needs() { # needs FILES...: these and the common ones
  [ -z "$LMENTRY" ] || more+=(--packages num2words)
  need 400 --models "$BASE" "${prm[@]}" --files "$ALPACA" $SUPERNI $LMENTRY $VICUNA "$@" --urls "$RANKER_URL" "${more[@]}"
}
needs_teacher() {
  [ -n "$DAVINCI$TEACHER" ] || more+=(--absent "a teacher: DAVINCI=the authors' file (microsoft/LMOps, tuna/gpt_data/), TEACHER=a folder, or TEACHER_URL= too")
  [ "$HELD_OUT" = 0 ] || [ -z "$DAVINCI" ] || more+=(--absent "the teacher's responses to the HELD_OUT instructions: without DAVINCI")
}
prepare() { collect prepare --task alpaca "${template[@]}" "$@"; }
instructions() { # Alpaca's, with the original response, and the model trained on them
  prepare --input "$ALPACA" --limit "$N" --output "$DATA/train.jsonl"
  [ "$HELD_OUT" = 0 ] || prepare --input "$ALPACA" --skip "$N" --limit "$HELD_OUT" --output "$DATA/held-out.jsonl"
  sft alpaca train
}
teach() { # teach FROM TO: TEACHER's responses with their log-probabilities
  local how=(--input "$DATA/$1.jsonl" --model "$TEACHER" --num_samples "$RESPONSES" --temperature "$TEMPERATURE" --max_new_tokens "$TOKENS")
  if [ -n "$TEACHER_URL" ]; then
    ask "$DATA/$2.jsonl" teacher "${how[@]}" --base_url "$TEACHER_URL" --completions --logprobs
  else
    run $TORCHRUN collect_candidates.py sample "${how[@]}" --output "$DATA/$2.jsonl" --source teacher $BF16
  fi
}
teacher() { # N responses of the teacher with its log-probabilities, and as ranks (Eq. 3)
  if [ -n "$DAVINCI" ]; then
    prepare --from_release --input "$DAVINCI" --limit "$N" --output "$DATA/teacher.jsonl"
  else
    teach train teacher
  fi
  collect rank --by probabilistic --input "$DATA/teacher.jsonl" --output "$DATA/teacher-ranked.jsonl" --length_penalty "$BETA"
  split teacher-ranked
  [ "$HELD_OUT" != 0 ] || return 0
  teach held-out held-out-teacher
  contextual held-out-teacher held-out-ranked "$HELD_OUT"
}
sample() { # sample STUDENT LIMIT: its own diverse responses (Sec. 2.3); LIMIT of the instructions
  into "$DATA/train-$2.jsonl" head -n "$2" "$DATA/train.jsonl"
  run $TORCHRUN collect_candidates.py sample --input "$DATA/train-$2.jsonl" --output "$DATA/sampled-$1.jsonl" --model "$RUNS/$1/model" \
    --num_samples "$RESPONSES" --temperature "$TEMPERATURE" --max_rouge_l "$TAU" --max_new_tokens "$TOKENS" $BF16
}
contextual() { # contextual FROM TO LIMIT: the ranker on the responses to the first LIMIT instructions (Table 9)
  ask "$DATA/$2.jsonl" rank --by contextual --input "$DATA/$1.jsonl" --limit "$3" --model "$RANKER" --base_url "$RANKER_URL" $RANK
}
split() { # split FILE: into FILE-first and FILE-rest, the paper's 13K and 39K
  into "$DATA/$1-first.jsonl" head -n "$FIRST" "$DATA/$1.jsonl"
  into "$DATA/$1-rest.jsonl" tail -n "+$((FIRST + 1))" "$DATA/$1.jsonl"
}
join() { into "$DATA/$1.jsonl" cat "$DATA/$2.jsonl" "$DATA/$3.jsonl"; } # join TO FROM FROM

sft() { # sft RUN DATA FLAGS...
  LR=$LR_SFT EPOCHS=$SFT_EPOCHS BATCH=$SFT_BATCH train "$1" tuna.py "$BASE" "$DATA/$2.jsonl" --stage sft "${@:3}"
}
stage() { # stage STAGE RUN MODEL DATA FLAGS...: probabilistic or contextual
  train "$2" tuna.py "$3" "$DATA/$4.jsonl" --stage "$1" --margin "$MARGIN" --mle_weight "$LAMBDA" "${@:5}"
}
probabilistic() { stage probabilistic "$@" --length_penalty "$BETA"; } # probabilistic RUN MODEL DATA FLAGS...
by_rank() { stage contextual "$@"; }                                    # by_rank RUN MODEL DATA FLAGS...
ranked_alpaca() { # Alpaca's responses to all instructions (the PRM ranks the rest), the ranker on the first
  sample alpaca "$N"
  contextual sampled-alpaca ranked-alpaca "$FIRST"
}
tuna_c() {
  ranked_alpaca
  by_rank tuna_c "$of_alpaca" ranked-alpaca
}

figures() { # figures RUN MODEL: Super-NI, LMentry, held out, Vicuna QA, the last against Alpaca's answers. llama: BASE, which
  # has learnt no template, so in the benchmarks' own form; of what is held out it is the teacher itself, where TEACHER is BASE
  local system=("$1" "$2") form=("${template[@]}") answers=$RUNS/eval/$1/vicuna.jsonl
  [ "$1" != llama ] || form=()
  [ -z "$SUPERNI" ] || for shots in $SHOTS; do
    evaluate "superni_$shots" "${system[@]}" --superni_dir "$SUPERNI" --shots "$shots" "${form[@]}" "${tokens[@]}"
  done
  [ -z "$LMENTRY" ] || evaluate lmentry "${system[@]}" --lmentry_dir "$LMENTRY" "${form[@]}" "${tokens[@]}" $BF16 \
    ${LMENTRY_EXAMPLES:+--max_examples "$LMENTRY_EXAMPLES"}
  if [ "$HELD_OUT" != 0 ]; then
    evaluate nll "${system[@]}" --input "$DATA/held-out.jsonl" --max_length 1024
    for by in logprob rank; do # beside the teacher's order, beside the ranker's
      evaluate "ranking_$by" "${system[@]}" --by $by --input "$DATA/held-out-ranked.jsonl" --max_length 1024 \
        --margin "$MARGIN" --length_penalty "$BETA"
    done
  fi
  [ -n "$VICUNA" ] || return 0
  evaluate vicuna "${system[@]}" --input "$VICUNA" "${template[@]}" "${tokens[@]}"
  [ "$1" = alpaca ] || run python evaluate.py judge --answers "$answers" "$RUNS/eval/alpaca/vicuna.jsonl" \
    --name "$1" --output "$RUNS/eval/$1/judge.jsonl" --model "$RANKER" --base_url "$RANKER_URL" $JUDGE
}
system() { measure "$1" "$RUNS/$1/model"; }
