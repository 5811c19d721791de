# Sourced by every recipe, after it has set NAME and PAPER_GPUS. What can be set before every recipe:
#   SCALE=paper | cpu | tiny   the paper's values (default); demo/model on two cores, hours; random models, seconds
#   GPUS=N                     processes of a torchrun, one a GPU (default: as many as the paper used); 1 is plain python
#   OUT=FOLDER                 for everything (default: here)
#   DRY=1                      print every command; run none
#   KEEP_MODELS=1              keep the models whose figures are kept: 27 GB each at the papers' size
#   and every value of recipes/values.md
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-paper}
[[ $SCALE = @(paper|cpu|tiny) ]] || { echo "SCALE=$SCALE: it is paper, cpu or tiny" >&2 && exit 2; }

values() { # values SECTION: sets what recipes/values.md has there, unless the environment has set it
  local name paper cpu tiny cell
  while IFS='|' read -r _ name paper cpu tiny _; do
    name=${name//[ \`]/}
    [ -z "${!name+set}" ] || continue
    read -r cell <<< "${!SCALE}"
    [ "$cell" != = ] || read -r cell <<< "$paper"
    eval "$name=\"${cell//\`/}\""
  done < <(sed -n "/^## $1$/,/^## /p" recipes/values.md | grep '^| `')
}
values all
DATA=$OUT/data/$NAME-$SCALE RUNS=$OUT/runs/$NAME-$SCALE RESULTS=${RESULTS:-$OUT/results/$NAME-$SCALE} TINY=$DATA/tiny
names=() setting=() shown=() rest_on="" seed=""
[ "$GPUS" = 1 ] && TORCHRUN=python || TORCHRUN="torchrun --nproc_per_node $GPUS"
[ -n "$DRY" ] || mkdir -p "$DATA" "$RUNS" "$RESULTS"
[ "$SCALE" = paper ] || export HF_HUB_OFFLINE=1
# glibc gives large blocks back to Linux, which zeroes them anew. That took 28 of 68 s in five steps of e-SNLI. With these
# settings it takes 16 of 55 s. tcmalloc is better still: LD_PRELOAD=libtcmalloc_minimal.so.4 TCMALLOC_RELEASE_RATE=0, and
# transparent huge pages set to always. A step of Tuna then took 6.7 s instead of 8.1, and a run 4.6 GB of memory instead of 9.
[ "$SCALE" != cpu ] ||
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000}

run() { # run COMMAND...
  echo "+$(printf ' %q' "$@")" >&2
  [ -n "$DRY" ] || "$@"
}
into() { # into FILE COMMAND...: what it prints goes to FILE
  echo "+$(printf ' %q' "${@:2}") > $1" >&2
  [ -n "$DRY" ] || { "${@:2}" > "$1.part" && mv "$1.part" "$1"; }
}
collect() { run python collect_candidates.py "$@"; }
records() { into "$DATA/$1.jsonl" python recipes/records.py "${@:2}"; } # records TO VERB ARGUMENTS...
safetensors() { # safetensors NAME: the hub has some models as .bin alone; NAME then names a folder of safetensors
  [[ ${!1} = @(OpenAssistant/oasst|stabilityai/stablelm-base)* ]] || return 0
  collect convert --model "${!1}" --output "$DATA/${!1##*/}"
  printf -v "$1" %s "$DATA/${!1##*/}"
}
ask() { # ask FILE VERB FLAGS...: a model that may cost money writes FILE, once. Requests that fail are left out of it, and
  # what is trained on it stays as it is. To ask for them again: delete what was trained, and run the printed command
  [ -z "$DRY" ] && [ -e "$1" ] || collect "${@:2}" --output "$1"
}
need() { # need GB FLAGS...: what recipes/helper.py looks for before the first hour and the first paid call
  [ "$SCALE" != paper ] || set -- "$@" --gpus "$GPUS" --gb "$1" --at "$OUT"
  [ "$SCALE" = tiny ] || run python recipes/helper.py need "${@:2}"
}

kept() { # kept NAME: whether its figures are there, from this machine or another; delete the folder to make them anew
  [ -z "$DRY" ] && [ -d "$RESULTS/$1" ] && echo "kept: $RESULTS/$1" >&2
}
needed() { [[ " $rest_on " = *" ${1%%@*} "* ]]; } # needed NAME: whether other systems rest on its model
train() { # train NAME SCRIPT MODEL DATA FLAGS...: the model $RUNS/NAME/model, unless its figures are kept
  needed "$1" || ! kept "$1" || return 0
  run $TORCHRUN "$2" --model "$3" --data "$4" --output "$RUNS/$1" ${LR:+--lr "$LR"} --batch_size "$BATCH" --epochs "$EPOCHS" \
    ${seed:+--seed "$seed"} --resume $SAVE $BF16 "${setting[@]}" "${@:5}"
}
evaluate() { # evaluate VERB[_MORE] NAME MODEL FLAGS...: one of its figures
  run $TORCHRUN evaluate.py "${1%%_*}" ${3:+--model "$3"} --name "$2" --output "$RUNS/eval/$2/${1/_/-}.jsonl" "${@:4}"
}
measure() { # measure NAME MODEL FLAGS...: what the recipe's `figures` says of a system, once; then its model goes
  names+=("$1")
  ! kept "$1" || return 0
  figures "$@" # not before an &&: there bash does not stop at a failure
  keep "$1" "$2"
}
keep() { # keep NAME [MODEL]: keep its figures, and the settings of its training, where it has one
  local trained=
  [[ ${2:-} != "$RUNS"/* ]] || trained=${2%/*}
  run python recipes/helper.py keep "$RUNS/eval/$1" "$RESULTS/$1" $trained
  [ -z "$trained" ] || [ -n "$KEEP_MODELS" ] || needed "$1" || run rm -rf "$trained/model" "$trained/best"
}
report() { # report TABLE NAMES...: those that are there, beside the paper's TABLE if it has one, with the flags in `shown`
  local name systems=() paper=recipes/paper/${NAME%%_*}_$1.json
  [ -e "$paper" ] || paper=
  for name in "${@:2}"; do
    [ ! -d "$RESULTS/$name" ] && [[ " ${names[*]} " != *" $name "* ]] || systems+=("$RESULTS/$name")
  done
  run python evaluate.py report "${systems[@]}" ${paper:+--paper "$paper"} --output "$RESULTS/$1.md" "${shown[@]}"
}
tiny_server() { # a stand-in for every model behind an API: sets BASE_URL
  BASE_URL=http://127.0.0.1/v1
  [ -z "$DRY" ] || return 0
  mkdir -p "$TINY" && rm -f "$TINY/url"
  python recipes/tiny.py --serve "$TINY/url" > /dev/null 2>&1 & # ends when the file is gone
  trap 'rm -f "$TINY/url"' EXIT
  until [ -s "$TINY/url" ]; do sleep 0.1; done
  BASE_URL=$(cat "$TINY/url")
}
[ "$SCALE" != tiny ] || [ -d "$TINY/model" ] || run python recipes/tiny.py "$TINY"
