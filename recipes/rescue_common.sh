# Sourced by rescue_esnli.sh and rescue_sweeps.sh: how prompts and candidates of e-SNLI are made (RESCUE, arXiv 2311.09136).
# The values, and what they mean: recipes/values.md.
NAME=rescue_esnli PAPER_GPUS=4 # Sec. 6: 4 A100
. "$(dirname "$0")/lib.sh"
[ "$SCALE" != tiny ] || tiny_server
values rescue_esnli

largest() { printf '%s\n' "$@" | sort -n | tail -1; }
most=$(largest $SIZES) # prompts that lack a well-formed response are left out:
POOL=${POOL:-$((MIN_CANDIDATES == 1 ? most : most * 3 / 2))}
answers=(--max_new_tokens "$TOKENS" ${STOP:+--stop "$STOP"} $BF16)
setting=(--length_scaling "$LENGTH_SCALING" ${ROW_TOKENS:+--max_tokens_per_row "$ROW_TOKENS"})
rest_on="sampler teacher"

order() { # order NAME PREFIX ORDERING SIZE FLAGS...: train on PREFIX.jsonl as the ordering has annotated it
  local data=$2-label.jsonl
  case $3 in similarity | gpt) data=$2-$3.jsonl ;; esac
  train "$1" rescue.py "$MODEL" "$data" --ordering "$3" --max_train_samples "$4" --alpha "$ALPHA" "${@:5}"
}
nli() { # nli NAME MODEL RECORDS [PROMPT-FILE]
  local prompt=${4:-$EVAL_PROMPT}
  evaluate nli "$1" "$2" --input "$DATA/$3.jsonl" ${prompt:+--prompt_file "$prompt"} "${answers[@]}" --batch_size "$EVAL_BATCH"
}
figures() { # figures NAME MODEL [PROMPT-FILE]
  nli "$1" "$2" test "${3:-}"
  evaluate ranking "$1" "$2" --by label --length_scaling "$LENGTH_SCALING" --input "$DATA/test-ranked.jsonl"
}
prompts() { # prompts INPUT TO FLAGS...
  collect prepare --task esnli ${PROMPT:+--prompt_file "$PROMPT"} --input $1 "${@:3}" --output "$DATA/$2.jsonl"
}
apart() { prompts "$ESNLI_TRAIN" "$1" --shuffle 0 --skip "$2" --limit "$3"; } # apart TO SKIP LIMIT: not of the training's
writer() { # writer NAME PROMPTS: a model that writes candidates, of SFT on so many prompts
  apart "$1" "$POOL" "$2"
  seed=0 train "$1" rescue.py "$MODEL" "$DATA/$1.jsonl" --ordering none --max_train_samples "$2" --alpha "$ALPHA"
}
sample() { # sample MODEL SOURCE N FROM TO
  run $TORCHRUN collect_candidates.py sample --model "$1" --source "$2" --num_samples "$3" --temperature "$TEMPERATURE" \
    --shots "$SHOTS" "${answers[@]}" --input "$DATA/$4.jsonl" --output "$DATA/$5.jsonl"
}
teach() { # teach FROM TO: one response of the teacher; of one behind an API greedy and top_p 0.9, as released
  if [ "$TEACHER_PROMPTS" != 0 ]; then
    sample "$RUNS/teacher/model" teacher 1 "$1" "$2"
  elif [ -n "$TEACHER" ]; then
    ask "$DATA/$2.jsonl" teacher --model "$TEACHER" --base_url "$BASE_URL" --shots "$SHOTS" --temperature 0 --top_p 0.9 \
      --input "$DATA/$1.jsonl"
  else
    into "$DATA/$2.jsonl" cat "$DATA/$1.jsonl"
  fi
}
annotate() { # annotate NAME SIZES...: NAME.jsonl -> NAME-label.jsonl, and from it -similarity and -gpt
  local file=$DATA/$1
  collect rank --by label ${DROP:+$DROP --min_candidates "$MIN_CANDIDATES"} --input "$file.jsonl" --output "$file-label.jsonl"
  collect rank --by similarity --encoder "$ENCODER" --input "$file-label.jsonl" --output "$file-similarity.jsonl"
  [ -z "$RANKER" ] || ask "$file-gpt.jsonl" rank --by gpt --model "$RANKER" --base_url "$BASE_URL" \
    --limit "$(largest "${@:2}")" --input "$file-label.jsonl"
}
enough() { # enough NAME SIZES...: the SIZES that NAME.jsonl has prompts for; says which are left out
  for size in "${@:2}"; do
    if [ -n "$DRY" ] || [ "$(wc -l < "$DATA/$1.jsonl")" -ge "$size" ]; then
      echo "$size"
    else
      echo "$DATA/$1.jsonl has too few prompts: size $size is left out. More: a larger POOL and another OUT" >&2
    fi
  done
}

candidates() { # prompts and candidates of the training, flipped ones too, and of the test
  # Sec. 5.1: three samples, a stronger model's, the human one. Of more that are drawn the first three with the form are
  # kept. The teacher, which is paid, is asked about a tenth more prompts than are needed
  local of=sampled sampler=$MODEL source=$(basename "$MODEL")
  if [ "$SAMPLER_PROMPTS" != 0 ]; then
    writer sampler "$SAMPLER_PROMPTS"
    sampler=$RUNS/sampler/model
  fi
  [ "$TEACHER_PROMPTS" = 0 ] || writer teacher "$TEACHER_PROMPTS"
  sample "$sampler" "$source" "$DRAWN" train sampled
  if [ "$DRAWN" != "$SAMPLES" ]; then
    of=whole
    collect rank --by label --drop_malformed --per_source "$SAMPLES" --min_candidates $((1 + SAMPLES)) \
      --input "$DATA/sampled.jsonl" --output "$DATA/all-whole.jsonl"
    [ -n "$(enough all-whole "$most")" ] || exit 2
    into "$DATA/whole.jsonl" head -n $((most * 11 / 10)) "$DATA/all-whole.jsonl"
  fi
  teach "$of" mixed
  annotate mixed $SIZES
  SIZES=$(enough mixed-label $SIZES)
  if [ -n "$FLIP_SIZES" ]; then # in place of the others, as released; of a fifth more prompts than are needed
    into "$DATA/to_flip.jsonl" head -n $(($(largest $FLIP_SIZES) * 6 / 5)) "$DATA/mixed-label.jsonl"
    ask "$DATA/flipped.jsonl" flip --replace --prompt_file recipes/prompts/rescue_flip.txt --model "$FLIPPER" \
      --base_url "$BASE_URL" ${TEACHER:+--label_model "$TEACHER" --label_base_url "$BASE_URL"} --input "$DATA/to_flip.jsonl"
    annotate flipped $FLIP_SIZES
    FLIP_SIZES=$(enough flipped-label $FLIP_SIZES)
  fi
  # Fig. 5 and 6: such candidates of the test's first RANKED prompts, which every model then scores
  into "$DATA/test-first.jsonl" head -n "$RANKED" "$DATA/test.jsonl"
  sample "$sampler" "$source" "$SAMPLES" test-first test-sampled
  teach test-sampled test-mixed
  collect rank --by label $DROP --input "$DATA/test-mixed.jsonl" --output "$DATA/test-ranked.jsonl"
  [ "$SAMPLER_PROMPTS" = 0 ] || measure "sampler@$SAMPLER_PROMPTS-seed0" "$sampler"
  [ "$TEACHER_PROMPTS" = 0 ] || measure "teacher@$TEACHER_PROMPTS-seed0" "$RUNS/teacher/model"
}
start() { # what both recipes begin with. A checkpoint of 7B has 81 GB, and the next is written before it goes
  local urls=()
  [ -z "$TEACHER$RANKER$FLIP_SIZES" ] || urls=(--urls "$BASE_URL")
  need 250 --models "$MODEL" "$ENCODER" --files ${ESNLI:-$ESNLI_TRAIN $ESNLI_TEST} "${urls[@]}"
  if [ -n "$ESNLI" ]; then # one row more: the test's last prompt is whole
    into "$DATA/rows.jsonl" head -n "-$((TEST + 1))" "$ESNLI"
    into "$DATA/test_rows.jsonl" tail -n "$((TEST + 1))" "$ESNLI"
  fi
  prompts "$ESNLI_TEST" test --limit "$TEST"
  apart train 0 "$POOL"
  candidates
}
