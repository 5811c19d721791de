# Sourced by Tuna's three recipes (arXiv 2310.13385), which share what they collect and train: how a stage is collected,
# trained and measured. The values, and what they mean: recipes/values.md. First tuna_prm.sh, then tuna.sh, tuna_sweeps.sh.
NAME=tuna PAPER_GPUS=8 # App. C: 8 V100 of 32 GB; ours computes in bf16, which wants an A100 or newer
[ "${SCALE:-paper}" != cpu ] || { echo "at SCALE=cpu Tuna is recipes/tuna_multidoc.sh" >&2 && exit 2; }
. "$(dirname "$0")/lib.sh"
if [ "$SCALE" = tiny ]; then
  tiny_server
  RANKER_URL=$BASE_URL
fi
values tuna

template=(--template "$TEMPLATE") # what the models learn is how the benchmarks ask them
tokens=(${EVAL_TOKENS:+--max_new_tokens "$EVAL_TOKENS"})
setting=(--warmup "$WARMUP") prm=()
rest_on="alpaca tuna_p tuna_c"
of_alpaca=$RUNS/alpaca/model of_tuna_c=$RUNS/tuna_c/model

needs() { # needs FILES...: these and the common ones
  need 400 --models "$BASE" "${prm[@]}" --files "$ALPACA" $SUPERNI $LMENTRY $VICUNA "$@" --urls "$RANKER_URL" \
    ${LMENTRY:+--packages num2words} ${absent:+--absent "$absent"}
}
needs_teacher() {
  [ -n "$DAVINCI$TEACHER" ] || absent="a teacher: DAVINCI=the authors' file (microsoft/LMOps, tuna/gpt_data/), or TEACHER=a folder"
}
prepare() { collect prepare --task alpaca "${template[@]}" "$@"; }
instructions() { # Alpaca's, with the original response, and the model trained on them
  prepare --input "$ALPACA" --limit "$N" --output "$DATA/train.jsonl"
  sft alpaca train
  system alpaca
}
teacher() { # RESPONSES of the teacher to N instructions with their log-probabilities, and as ranks (Eq. 3)
  if [ -n "$DAVINCI" ]; then
    prepare --from_release --input "$DAVINCI" --limit "$N" --output "$DATA/teacher.jsonl"
  else
    run $TORCHRUN collect_candidates.py sample --input "$DATA/train.jsonl" --model "$TEACHER" --num_samples "$RESPONSES" \
      --temperature "$TEMPERATURE" --max_new_tokens "$TOKENS" --output "$DATA/teacher.jsonl" --source teacher $BF16
  fi
  collect rank --by probabilistic --input "$DATA/teacher.jsonl" --output "$DATA/teacher-ranked.jsonl" --length_penalty "$BETA"
  split teacher-ranked
}
sample() { # sample STUDENT LIMIT: its own diverse responses (Sec. 2.3); LIMIT of the instructions
  into "$DATA/train-$2.jsonl" head -n "$2" "$DATA/train.jsonl"
  run $TORCHRUN collect_candidates.py sample --input "$DATA/train-$2.jsonl" --output "$DATA/sampled-$1.jsonl" --model "$RUNS/$1/model" \
    --num_samples "$RESPONSES" --temperature "$TEMPERATURE" --max_rouge_l "$TAU" --max_new_tokens "$TOKENS" $BF16
}
contextual() { # contextual STUDENT: the ranker on its responses to the FIRST instructions (Table 9)
  ask "$DATA/ranked-$1.jsonl" rank --by contextual --input "$DATA/sampled-$1.jsonl" --limit "$FIRST" --model "$RANKER" \
    --base_url "$RANKER_URL" $RANK
}
ranked_alpaca() { # Alpaca's responses to all instructions (the PRM ranks the rest), the ranker on the first
  sample alpaca "$N"
  contextual alpaca
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
by_rank() { stage contextual "$@"; }                                    # by_rank RUN MODEL DATA

figures() { # figures RUN MODEL: Super-NI, LMentry, Vicuna QA, the last against Alpaca's answers. llama: BASE, which has learnt
  # no template, so in the benchmarks' own form
  local system=("$1" "$2") form=("${template[@]}")
  [ "$1" != llama ] || form=()
  [ -z "$SUPERNI" ] || for shots in $SHOTS; do
    evaluate "superni_$shots" "${system[@]}" --superni_dir "$SUPERNI" --shots "$shots" "${form[@]}" "${tokens[@]}"
  done
  [ -z "$LMENTRY" ] || evaluate lmentry "${system[@]}" --lmentry_dir "$LMENTRY" "${form[@]}" "${tokens[@]}" $BF16
  [ -n "$VICUNA" ] || return 0
  evaluate vicuna "${system[@]}" --input "$VICUNA" "${template[@]}" "${tokens[@]}"
  [ "$1" = alpaca ] || run python evaluate.py judge --answers "$RUNS/eval/$1/vicuna.jsonl" "$RUNS/eval/alpaca/vicuna.jsonl" \
    --name "$1" --output "$RUNS/eval/$1/judge.jsonl" --model "$RANKER" --base_url "$RANKER_URL" $JUDGE
}
system() { measure "$1" "$RUNS/$1/model"; }
