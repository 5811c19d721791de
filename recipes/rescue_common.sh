# Sourced by rescue_esnli.sh and rescue_sweeps.sh: the values of RESCUE's experiments on e-SNLI (arXiv 2311.09136), and its
# prompts and candidates. Every value can be set from the environment.
#
# ESNLI_TRAIN, ESNLI_TEST: OanaMariaCamburu/e-SNLI, dataset/esnli_{train_1,train_2,test}.csv. The paper's proprietary
# models are gone: TEACHER, RANKER, FLIPPER name others, all at BASE_URL (their key: OPENAI_API_KEY); TEACHER="" does
# without a response of it. A sampler that does not know the form yet can be trained first: SAMPLER_PROMPTS. TEACHER_PROMPTS
# trains a stronger one on more prompts, those of the sampler included; it then stands in for TEACHER.
NAME=rescue_esnli
. recipes/lib.sh

case $SCALE in
tiny) # random model and a stand-in server, seconds
  tiny && tiny_server
  : "${ESNLI_TRAIN:=$DATA/tiny/esnli.csv}" "${ESNLI_TEST:=$DATA/tiny/esnli.csv}" "${TEST:=3}" "${MODEL:=$DATA/tiny/model}"
  : "${SIZES:=4}" "${FLIP_SIZES=4}" "${FLIP_ORDERINGS=label}" "${DROP=}" "${MIN_CANDIDATES:=1}"
  : "${RANKED:=3}" "${ENCODER:=$DATA/tiny/model}" "${TOKENS:=8}" "${STOP=}" "${BATCH:=2}" "${LR:=1e-3}" "${SAMPLES:=2}" ;;
cpu | 135m) # demo/model: one core, hours; a GPU, minutes. One file of e-SNLI, as JSONL, gives all prompts: its last 2,001
  # rows are the test's. The design: results/DESIGNS.md
  : "${ESNLI:=esnli_dev.jsonl}" "${ESNLI_TRAIN:=$DATA/rows.jsonl}" "${ESNLI_TEST:=$DATA/test_rows.jsonl}" "${TEST:=2000}"
  if [ ! -e "$ESNLI" ]; then
    echo "set ESNLI to a JSONL of esnli_dev.csv's rows (no $ESNLI here)" >&2
    exit 2
  fi
  head -n -2001 "$ESNLI" > "$DATA/rows.jsonl"
  tail -n 2001 "$ESNLI" > "$DATA/test_rows.jsonl"
  : "${MODEL:=demo/model}" "${SIZES:=3000}" "${ORDERINGS:=none label hybrid}" "${SEEDS:=0 1 2 3 4}" "${FLIP_SIZES=}" "${TEACHER=}"
  : "${RANKER=}" "${SAMPLER_PROMPTS:=2000}" "${TEACHER_PROMPTS:=4000}" "${SHOTS:=0}" "${MIN_CANDIDATES:=1}" "${RANKED:=200}"
  : "${ALPHA_CHOICES:=0.1 0.3 1}" "${ALPHA_SIZE:=1500}" "${HELD_OUT:=841}"
  : "${PROMPT:=recipes/prompts/nli_short.txt}" "${BASE_PROMPT:=recipes/prompts/nli_chat.txt}" # three shots for the base model
  : "${ENCODER:=demo/encoder}" "${TOKENS:=32}" "${STOP=}" "${BATCH:=16}" "${LR:=3e-4}" "${EVAL_BATCH:=64}"
  : "${BF16=--bf16}" # on a CPU without avx512_bf16 or amx_bf16 (lscpu) BF16= is faster
  [ "$SCALE" = 135m ] || : "${ROW_TOKENS=2560}" ;; # a step in one row: a tenth faster than in two
esac
ESNLI_TRAIN=${ESNLI_TRAIN:-esnli_train_1.csv esnli_train_2.csv} ESNLI_TEST=${ESNLI_TEST:-esnli_test.csv}
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
SIZES=${SIZES:-2000 5000 10000 20000}     # Sec. 6.1; the first so many of one seeded draw
FLIP_SIZES=${FLIP_SIZES-2000 5000}        # Table 1
ORDERINGS=${ORDERINGS:-none similarity gpt human label hybrid} FLIP_ORDERINGS=${FLIP_ORDERINGS-similarity gpt human label hybrid}
SEEDS=${SEEDS:-0}                         # the paper reports one run each, as far as it says
SAMPLES=${SAMPLES:-3} TEMPERATURE=${TEMPERATURE:-0.8} SHOTS=${SHOTS:-3} # Sec. 5.1; three shots as released
TEACHER=${TEACHER-gpt-3.5-turbo} RANKER=${RANKER-gpt-3.5-turbo} FLIPPER=${FLIPPER-gpt-4} # Sec. 5.1: -0613 of each
BASE_URL=${BASE_URL:-https://api.openai.com/v1}
DROP=${DROP---drop_malformed} # as released; and every response must be left: 3 + 1 + human
MIN_CANDIDATES=${MIN_CANDIDATES:-$((1 + SAMPLES + (${#TEACHER} > 0)))}
ENCODER=${ENCODER:-sentence-transformers/all-MiniLM-L6-v2} # as released; the paper does not name it
ALPHA=${ALPHA:-0.1} LENGTH_SCALING=${LENGTH_SCALING:-0.85} # 0.1 as released, Sec. 7: 0.01 to 0.1; lambda, Sec. 7
LR=${LR:-2e-5} BATCH=${BATCH:-64} EPOCHS=${EPOCHS:-1} # Sec. 6
EVAL_SHOTS=${EVAL_SHOTS:-$SHOTS}          # trained without examples, evaluated with three, as released
TOKENS=${TOKENS:-128} STOP=${STOP-"\n\n"} TEST=${TEST:-9824} RANKED=${RANKED:-1000} SAMPLER_PROMPTS=${SAMPLER_PROMPTS:-0} EVAL_BATCH=${EVAL_BATCH:-16}
BF16=${BF16:-} ROW_TOKENS=${ROW_TOKENS:-} PROMPT=${PROMPT:-} BASE_PROMPT=${BASE_PROMPT:-} TEACHER_PROMPTS=${TEACHER_PROMPTS:-0}
ALPHA_CHOICES=${ALPHA_CHOICES:-} ALPHA_SIZE=${ALPHA_SIZE:-0} HELD_OUT=${HELD_OUT:-0} # alpha chosen on HELD_OUT rows, with a seed of its own

largest() { printf '%s\n' "$@" | sort -n | tail -1; }
pool=$(largest $SIZES)
[ "$MIN_CANDIDATES" = 1 ] || pool=$((pool * 3 / 2)) # prompts that lose a candidate are left out
pool=${POOL:-$pool}
answers=(--max_new_tokens "$TOKENS" ${STOP:+--stop "$STOP"} $BF16)
train() { # train OUTPUT DATA ORDERING SIZE SEED, and more flags
  run $TORCHRUN rescue.py --ordering "$3" --data "$2" --model "$MODEL" --output "$1" --max_train_samples "$4" --seed "$5" \
    --alpha "$ALPHA" --length_scaling "$LENGTH_SCALING" --lr "$LR" --batch_size "$BATCH" --epochs "$EPOCHS" --resume $SAVE \
    ${ROW_TOKENS:+--max_tokens_per_row "$ROW_TOKENS"} $BF16 "${@:6}"
}
names=()
measure() { # measure NAME MODEL, and flags that name another prompt
  names+=("$RESULTS/$1")
  ! kept "$1" || return 0
  local asked=("${@:3}")
  [ $# -gt 2 ] || asked=(--shots "$EVAL_SHOTS")
  answer "$1" "$2" test "${asked[@]}"
  [ ! -e "$DATA/test-ranked.jsonl" ] || run $TORCHRUN evaluate.py ranking --by label --model "$2" --name "$1" \
    --length_scaling "$LENGTH_SCALING" --input "$DATA/test-ranked.jsonl" --output "$RUNS/eval/$1/ranking.jsonl"
  keep "$1" "$RUNS/eval/$1" "$(dirname "$2")"
}
answer() { # answer NAME MODEL RECORDS FLAGS...
  run $TORCHRUN evaluate.py nli --model "$2" --name "$1" --input "$DATA/$3.jsonl" --output "$RUNS/eval/$1/nli.jsonl" \
    "${@:4}" "${answers[@]}" --batch_size "$EVAL_BATCH"
}
collect() { run python collect_candidates.py "$@"; }
annotate() { # annotate PREFIX SIZES: PREFIX.jsonl -> PREFIX-label.jsonl, and from that -similarity and -gpt
  collect rank --by label ${DROP:+$DROP --min_candidates "$MIN_CANDIDATES"} --input "$1.jsonl" --output "$1-label.jsonl"
  local left=$(wc -l < "$1-label.jsonl") most=$(largest $2)
  if [ "$left" -lt "$most" ]; then
    echo "$1-label.jsonl: $left of $pool prompts are left, $most are wanted: a larger POOL and another OUT, or fewer in SIZES" >&2
    exit 2
  fi
  [[ "$ORDERINGS $FLIP_ORDERINGS" != *similarity* ]] ||
    collect rank --by similarity --encoder "$ENCODER" --input "$1-label.jsonl" --output "$1-similarity.jsonl"
  [ -z "$RANKER" ] || collect rank --by gpt --model "$RANKER" --base_url "$BASE_URL" --limit "$most" \
    --input "$1-label.jsonl" --output "$1-gpt.jsonl"
}

# Prompts: the test's, the training pool, and, apart from it, those of the candidates' writers and those held out
prepare=(prepare --task esnli ${PROMPT:+--prompt_file "$PROMPT"})
rows() { collect "${prepare[@]}" --input $ESNLI_TRAIN --shuffle 0 "${@:2}" --output "$DATA/$1.jsonl"; }
collect "${prepare[@]}" --input $ESNLI_TEST --limit "$TEST" --output "$DATA/test.jsonl"
rows train --limit "$pool"
sampler=$MODEL apart=$((SAMPLER_PROMPTS > TEACHER_PROMPTS ? SAMPLER_PROMPTS : TEACHER_PROMPTS))
writer() { # writer NAME PROMPTS: a model of SFT on the first so many prompts beside the pool
  rows "$1" --skip "$pool" --limit "$2"
  [ -d "$RUNS/$1/model" ] || train "$RUNS/$1" "$DATA/$1.jsonl" none "$2" 0
}
if [ "$SAMPLER_PROMPTS" -gt 0 ]; then
  writer sampler "$SAMPLER_PROMPTS"
  sampler=$RUNS/sampler/model
fi
[ "$TEACHER_PROMPTS" = 0 ] || writer teacher "$TEACHER_PROMPTS"
[ "$HELD_OUT" = 0 ] || rows held-out --skip $((pool + apart)) --limit "$HELD_OUT"
# Candidates (Sec. 5.1): three samples, a stronger model's, the human one
sample() { # sample MODEL SOURCE N FROM TO
  run $TORCHRUN collect_candidates.py sample --model "$1" --source "$2" --num_samples "$3" --temperature "$TEMPERATURE" \
    --shots "$SHOTS" "${answers[@]}" --input "$DATA/$4.jsonl" --output "$DATA/$5.jsonl"
}
candidates() { # candidates OF PREFIX: of OF.jsonl, PREFIXsampled.jsonl, and with a teacher PREFIXmixed.jsonl
  sample "$sampler" "$(basename "$MODEL")" "$SAMPLES" "$1" "$2sampled"
  if [ "$TEACHER_PROMPTS" != 0 ]; then
    sample "$RUNS/teacher/model" teacher 1 "$2sampled" "$2mixed"
  elif [ -n "$TEACHER" ]; then
    collect teacher --model "$TEACHER" --base_url "$BASE_URL" --shots "$SHOTS" --input "$DATA/$2sampled.jsonl" \
      --output "$DATA/$2mixed.jsonl"
  fi
}
of=sampled
[ -z "$TEACHER" ] && [ "$TEACHER_PROMPTS" = 0 ] || of=mixed
candidates train ""
mix=$DATA/$of
annotate "$mix" "$SIZES"
if [ -n "$FLIP_SIZES" ]; then # the flipped ones in place of the others, as released; of no more prompts than are needed
  wanted=$(largest $FLIP_SIZES)
  head -n $((wanted * pool / $(largest $SIZES))) "$mix-label.jsonl" > "$DATA/to_flip.jsonl"
  collect flip --replace --prompt_file recipes/prompts/rescue_flip.txt --model "$FLIPPER" --base_url "$BASE_URL" \
    ${TEACHER:+--label_model "$TEACHER" --label_base_url "$BASE_URL"} --input "$DATA/to_flip.jsonl" --output "$DATA/flipped.jsonl"
  annotate "$DATA/flipped" "$FLIP_SIZES"
fi
# Fig. 5 and 6: such candidates of the test's first RANKED prompts (how many: silent), which every model then scores
head -n "$RANKED" "$DATA/test.jsonl" > "$DATA/test-first.jsonl"
candidates test-first test-
collect rank --by label $DROP --input "$DATA/test-$of.jsonl" --output "$DATA/test-ranked.jsonl"
[ "$sampler" = "$MODEL" ] || measure "sampler@$SAMPLER_PROMPTS-seed0" "$sampler"
[ "$TEACHER_PROMPTS" = 0 ] || measure "teacher@$TEACHER_PROMPTS-seed0" "$RUNS/teacher/model"
if [ -n "$ALPHA_CHOICES" ]; then # the most accurate on the held-out rows, of equals the first
  figures=() choices=($ALPHA_CHOICES)
  for ALPHA in "${choices[@]}"; do
    name=choice-alpha@$ALPHA-seed100
    figures+=("$RESULTS/$name/nli.metrics.json")
    kept "$name" && continue
    train "$RUNS/$name" "$mix-label.jsonl" label "$ALPHA_SIZE" 100
    answer "$name" "$RUNS/$name/model" held-out
    keep "$name" "$RUNS/eval/$name" "$RUNS/$name"
  done
  ALPHA=${choices[$(python recipes/records.py best accuracy "${figures[@]}")]}
  echo "alpha $ALPHA" >&2
fi
