# Sourced by rescue_esnli.sh and rescue_sweeps.sh: the values of RESCUE's experiments on e-SNLI (arXiv 2311.09136), each of
# which can be set from the environment, and how its prompts and candidates are made.
#
# ESNLI_TRAIN, ESNLI_TEST: OanaMariaCamburu/e-SNLI, dataset/esnli_{train_1,train_2,test}.csv. The paper's models behind
# APIs, -0613 of each, are retired: TEACHER, RANKER, FLIPPER name others, all at BASE_URL (their key: OPENAI_API_KEY).
# TEACHER="" does without a response of it. A sampler that does not know the form yet can be trained first: SAMPLER_PROMPTS.
NAME=rescue_esnli PAPER_GPUS=4 # Sec. 6: 4 A100
. "$(dirname "$0")/lib.sh"

case $SCALE in
tiny) # random model and a stand-in server, seconds
  tiny && tiny_server
  : "${ESNLI_TRAIN:=$DATA/tiny/esnli.csv}" "${ESNLI_TEST:=$DATA/tiny/esnli.csv}" "${TEST:=3}" "${MODEL:=$DATA/tiny/model}"
  : "${SIZES:=4}" "${FLIP_SIZES=4}" "${FLIP_ORDERINGS=label}" "${DROP=}" "${MIN_CANDIDATES:=1}" "${SAMPLES:=2}" "${DRAWN:=2}"
  : "${RANKED:=3}" "${ENCODER:=$DATA/tiny/model}" "${TOKENS:=8}" "${STOP=}" "${BATCH:=2}" "${LR:=1e-3}" ;;
cpu) # demo/model, one core, hours. One file of e-SNLI, as JSONL, gives all prompts: its last 1,001 rows are the test's
  : "${ESNLI:=esnli_dev.jsonl}" "${ESNLI_TRAIN:=$DATA/rows.jsonl}" "${ESNLI_TEST:=$DATA/test_rows.jsonl}" "${TEST:=1000}"
  : "${MODEL:=demo/model}" "${SIZES:=500 1500}" "${POOL:=1500}" "${ORDERINGS:=none label hybrid human similarity}" "${SEEDS:=0 1 2}"
  : "${FLIP_SIZES=}" "${TEACHER=}" "${RANKER=}" "${SAMPLER_PROMPTS:=3000}" "${SHOTS:=0}" "${MIN_CANDIDATES:=1}" "${RANKED:=200}"
  : "${PROMPT:=recipes/prompts/nli_short.txt}" "${EVAL_PROMPT=}" "${BASE_PROMPT:=recipes/prompts/nli_chat.txt}"
  : "${ENCODER:=demo/encoder}" "${TOKENS:=32}" "${STOP=}" "${BATCH:=16}" "${LR:=1e-4}" "${EVAL_BATCH:=64}" "${DRAWN:=3}"
  : "${SAMPLER_LR:=3e-4}" "${FROM_SAMPLER=1}" # the base model answers at chance, and after 500 prompts still does
  : "${ROW_TOKENS=2560}" "${BF16=--bf16}" ;; # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
esac
ESNLI=${ESNLI:-} ESNLI_TRAIN=${ESNLI_TRAIN:-esnli_train_1.csv esnli_train_2.csv} ESNLI_TEST=${ESNLI_TEST:-esnli_test.csv}
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
SIZES=${SIZES:-2000 5000 10000 20000}     # Sec. 6.1; the first so many of one seeded draw
FLIP_SIZES=${FLIP_SIZES-2000 5000}        # Table 1
ORDERINGS=${ORDERINGS:-none similarity gpt human label hybrid} FLIP_ORDERINGS=${FLIP_ORDERINGS-similarity gpt human label hybrid}
SEEDS=${SEEDS:-0}                         # the paper reports one run each, as far as it says
SAMPLES=${SAMPLES:-3} TEMPERATURE=${TEMPERATURE:-0.8} SHOTS=${SHOTS:-3} # Sec. 5.1; three shots as released
TEACHER=${TEACHER-gpt-3.5-turbo} RANKER=${RANKER-gpt-3.5-turbo} FLIPPER=${FLIPPER-gpt-4} # Sec. 5.1
BASE_URL=${BASE_URL:-https://api.openai.com/v1}
DROP=${DROP---drop_malformed} DRAWN=${DRAWN:-$((2 * SAMPLES))} # as released: of six samples the first three with the form
MIN_CANDIDATES=${MIN_CANDIDATES:-$((1 + SAMPLES + (${#TEACHER} > 0)))} # as released; 3 + 1 + human
ENCODER=${ENCODER:-sentence-transformers/all-MiniLM-L6-v2} # as released; the paper does not name it
ALPHA=${ALPHA:-0.1} LENGTH_SCALING=${LENGTH_SCALING:-0.85} # 0.1 as released, Sec. 7: 0.01 to 0.1; lambda, Sec. 7
LR=${LR:-2e-5} BATCH=${BATCH:-64} EPOCHS=${EPOCHS:-1} # Sec. 6
# Trained without examples, evaluated with three, as released; the examples have the form that training teaches
EVAL_PROMPT=${EVAL_PROMPT-recipes/prompts/nli_three_shots.txt} BASE_PROMPT=${BASE_PROMPT:-${EVAL_PROMPT-}}
TOKENS=${TOKENS:-128} STOP=${STOP-"\n\n"} TEST=${TEST:-9824} RANKED=${RANKED:-1000} SAMPLER_PROMPTS=${SAMPLER_PROMPTS:-0} EVAL_BATCH=${EVAL_BATCH:-16}
BF16=${BF16:-} ROW_TOKENS=${ROW_TOKENS:-} SAMPLER_LR=${SAMPLER_LR:-} FROM_SAMPLER=${FROM_SAMPLER:-} PROMPT=${PROMPT:-}

largest() { printf '%s\n' "$@" | sort -n | tail -1; }
most=$(largest $SIZES)
POOL=${POOL:-$((MIN_CANDIDATES == 1 ? most : most * 3 / 2))} # prompts that lack a well-formed response are left out
answers=(--max_new_tokens "$TOKENS" ${STOP:+--stop "$STOP"} $BF16)
of=sampled
[ "$DRAWN" = "$SAMPLES" ] || of=whole
names=() start=$MODEL mix=$DATA/$([ -n "$TEACHER" ] && echo mixed || echo "$of")

train() { # train OUTPUT DATA ORDERING SIZE SEED FLAGS...
  run $TORCHRUN rescue.py --ordering "$3" --data "$2" --model "$start" --output "$1" --max_train_samples "$4" --seed "$5" \
    --alpha "$ALPHA" --length_scaling "$LENGTH_SCALING" --lr "$LR" --batch_size "$BATCH" --epochs "$EPOCHS" --resume \
    ${ROW_TOKENS:+--max_tokens_per_row "$ROW_TOKENS"} $BF16 "${@:6}"
}
measure() { # measure NAME MODEL [PROMPT-FILE]
  names+=("$RESULTS/$1")
  ! kept "$1" || return 0
  local prompt=${3:-$EVAL_PROMPT} trained=
  [ "$2" = "$MODEL" ] || trained=${2%/model}
  run $TORCHRUN evaluate.py nli --model "$2" --name "$1" --input "$DATA/test.jsonl" --output "$RUNS/eval/$1/nli.jsonl" \
    ${prompt:+--prompt_file "$prompt"} "${answers[@]}" --batch_size "$EVAL_BATCH"
  run $TORCHRUN evaluate.py ranking --by label --model "$2" --name "$1" --length_scaling "$LENGTH_SCALING" \
    --input "$DATA/test-ranked.jsonl" --output "$RUNS/eval/$1/ranking.jsonl"
  keep "$1" "$trained"
}
enough() { # enough FILE SIZES...: the SIZES that FILE has prompts for; says which are left out
  local there=${!#}
  [ -n "$DRY" ] || there=$(wc -l < "$1")
  for size in "${@:2}"; do
    if [ "$there" -ge "$size" ]; then echo "$size"; else echo "$1: $there prompts, so size $size is left out" >&2; fi
  done
}
annotate() { # annotate PREFIX SIZES...: PREFIX.jsonl -> PREFIX-label.jsonl, and from it -similarity and -gpt
  collect rank --by label ${DROP:+$DROP --min_candidates "$MIN_CANDIDATES"} --input "$1.jsonl" --output "$1-label.jsonl"
  collect rank --by similarity --encoder "$ENCODER" --input "$1-label.jsonl" --output "$1-similarity.jsonl"
  [ -z "$RANKER" ] || ask "$1-gpt.jsonl" python collect_candidates.py rank --by gpt --model "$RANKER" --base_url "$BASE_URL" \
    --limit "$(largest "${@:2}")" --input "$1-label.jsonl" --output "$1-gpt.jsonl"
}
sample() { # sample FROM TO N: N samples of the sampler to each prompt
  run $TORCHRUN collect_candidates.py sample --model "$sampler" --source "$(basename "$MODEL")" --num_samples "$3" \
    --temperature "$TEMPERATURE" --shots "$SHOTS" "${answers[@]}" --input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl"
}
teach() { # teach FROM TO: one response of the teacher, greedy and top_p 0.9 as released
  ask "$DATA/$2.jsonl" python collect_candidates.py teacher --model "$TEACHER" --base_url "$BASE_URL" --shots "$SHOTS" \
    --temperature 0 --top_p 0.9 --input "$DATA/$1.jsonl" --output "$DATA/$2.jsonl"
}
prompts() { # prompts INPUT TO FLAGS...
  collect prepare --task esnli ${PROMPT:+--prompt_file "$PROMPT"} --input $1 "${@:3}" --output "$DATA/$2.jsonl"
}

candidates() { # prompts and candidates of the training, flipped ones too, and of the test
  if [ -n "$ESNLI" ]; then
    into "$DATA/rows.jsonl" head -n -1001 "$ESNLI"
    into "$DATA/test_rows.jsonl" tail -n 1001 "$ESNLI"
  fi
  prompts "$ESNLI_TEST" test --limit "$TEST"
  prompts "$ESNLI_TRAIN" train --shuffle 0 --limit "$POOL"
  sampler=$MODEL
  if [ "$SAMPLER_PROMPTS" -gt 0 ]; then # of prompts apart from the pool
    prompts "$ESNLI_TRAIN" sampler --shuffle 0 --skip "$POOL" --limit "$SAMPLER_PROMPTS"
    train "$RUNS/sampler" "$DATA/sampler.jsonl" none "$SAMPLER_PROMPTS" 0 ${SAMPLER_LR:+--lr "$SAMPLER_LR"}
    sampler=$RUNS/sampler/model
    [ -z "$FROM_SAMPLER" ] || start=$sampler
  fi
  # Sec. 5.1: three samples, a stronger model's, the human one. Of more that are drawn the first three with the form are
  # kept. The teacher, which is paid, is asked about a tenth more prompts than are needed
  sample train sampled "$DRAWN"
  if [ "$of" = whole ]; then
    collect rank --by label --drop_malformed --per_source "$SAMPLES" --min_candidates $((1 + SAMPLES)) \
      --input "$DATA/sampled.jsonl" --output "$DATA/all-whole.jsonl"
    if [ -z "$(enough "$DATA/all-whole.jsonl" "$most")" ]; then
      echo "of $POOL prompts too few have $SAMPLES well-formed samples: a larger POOL and another OUT, or a smaller SIZES" >&2
      exit 2
    fi
    into "$DATA/whole.jsonl" head -n $((most * 11 / 10)) "$DATA/all-whole.jsonl"
  fi
  [ -z "$TEACHER" ] || teach "$of" mixed
  annotate "$mix" $SIZES
  SIZES=$(enough "$mix-label.jsonl" $SIZES)
  if [ -n "$FLIP_SIZES" ]; then # in place of the others, as released; of a fifth more prompts than are needed
    into "$DATA/to_flip.jsonl" head -n $(($(largest $FLIP_SIZES) * 6 / 5)) "$mix-label.jsonl"
    ask "$DATA/flipped.jsonl" python collect_candidates.py flip --replace --prompt_file recipes/prompts/rescue_flip.txt \
      --model "$FLIPPER" --base_url "$BASE_URL" ${TEACHER:+--label_model "$TEACHER" --label_base_url "$BASE_URL"} \
      --input "$DATA/to_flip.jsonl" --output "$DATA/flipped.jsonl"
    annotate "$DATA/flipped" $FLIP_SIZES
    FLIP_SIZES=$(enough "$DATA/flipped-label.jsonl" $FLIP_SIZES)
  fi
  # Fig. 5 and 6: such candidates of the test's first RANKED prompts (how many: silent), which every model then scores
  into "$DATA/test-first.jsonl" head -n "$RANKED" "$DATA/test.jsonl"
  sample test-first test-sampled "$SAMPLES"
  [ -z "$TEACHER" ] || teach test-sampled test-mixed
  collect rank --by label $DROP --input "$DATA/test-$([ -n "$TEACHER" ] && echo mixed || echo sampled).jsonl" --output "$DATA/test-ranked.jsonl"
  [ "$sampler" = "$MODEL" ] || KEEP_MODELS=1 measure "sampler@$SAMPLER_PROMPTS-seed0" "$sampler"
}

needs() { # a checkpoint of 7B has 81 GB, and the next is written before it goes
  local urls=()
  [ -z "$TEACHER$RANKER$FLIP_SIZES" ] || urls=(--urls "$BASE_URL")
  need 250 --models "$MODEL" "$ENCODER" --files ${ESNLI:-$ESNLI_TRAIN $ESNLI_TEST} "${urls[@]}"
}
