# Sourced by every recipe, after it has set NAME and PAPER_GPUS: where things go, `run`, and the figures that are kept.
# What can be set before every recipe:
#   SCALE=paper | cpu | tiny   the paper's values (default); two cores, hours; seconds
#   GPUS=N                     processes of a torchrun, one a GPU (default: as many as the paper used); 1 is plain python
#   OUT=FOLDER                 for everything (default: here)
#   DRY=1                      print every command; run none
#   KEEP_MODELS=1              keep the models whose figures are kept: 27 GB each at the papers' size
#   MAX_REQUESTS=N             send so many requests to the next model that is asked, then stop; the next start goes on
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-paper} DRY=${DRY:-} MAX_REQUESTS=${MAX_REQUESTS:-}
case $SCALE in
paper) : "${GPUS:=$PAPER_GPUS}" "${KEEP_MODELS=}" ;;
cpu | tiny) : "${GPUS:=1}" "${KEEP_MODELS=1}" && export HF_HUB_OFFLINE=1 ;;
*) echo "SCALE=$SCALE: it is paper, cpu or tiny" >&2 && exit 2 ;;
esac
DATA=${OUT:-.}/data/$NAME-$SCALE RUNS=${OUT:-.}/runs/$NAME-$SCALE RESULTS=${RESULTS:-${OUT:-.}/results/$NAME-$SCALE}
[ -n "$DRY" ] || mkdir -p "$DATA" "$RUNS" "$RESULTS"
# glibc gives large blocks back to Linux, which zeroes them anew: of five steps of e-SNLI, 68 s, 28 were spent so; now of
# 55 s 16. A process keeps what it once held.
[ "$SCALE" != cpu ] ||
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000}
[ "$GPUS" = 1 ] && TORCHRUN=python || TORCHRUN="torchrun --nproc_per_node $GPUS"

run() { # run COMMAND...
  echo "+$(printf ' %q' "$@")" >&2
  [ -n "$DRY" ] || "$@"
}
into() { # into FILE COMMAND...: what it prints goes to FILE
  echo "+$(printf ' %q' "${@:2}") > $1" >&2
  [ -n "$DRY" ] || { "${@:2}" > "$1.part" && mv "$1.part" "$1"; }
}
collect() { run python collect_candidates.py "$@"; }
ask() { # ask FILE COMMAND...: a model that may cost money writes FILE. Requests that fail are left out of it; once it is
  # there it is not asked for again, so that what is trained on it stays as it is. To ask again: delete FILE.asked
  [ -n "$DRY" ] || [ ! -e "$1" ] || [ ! -e "$1.asked" ] || return 0
  run "${@:2}" ${MAX_REQUESTS:+--max_requests "$MAX_REQUESTS"}
  if [ -n "$MAX_REQUESTS" ]; then
    echo "stopped by MAX_REQUESTS: $1 is begun. Start again to go on, and without MAX_REQUESTS for all the rest"
    exit 0
  fi
  [ -n "$DRY" ] || touch "$1.asked"
}
need() { # need GB FLAGS...: what recipes/helper.py looks for before the first hour and the first paid call
  [ "$SCALE" != paper ] || set -- "$@" --gpus "$GPUS" --gb "$1" --at "${OUT:-.}"
  [ "$SCALE" = tiny ] || run python recipes/helper.py need "${@:2}"
}

kept() { # kept NAME: whether its figures are there, from this machine or another; delete the folder to make them anew
  [ -z "$DRY" ] && [ -d "$RESULTS/$1" ] && echo "kept: $RESULTS/$1" >&2
}
keep() { # keep NAME [RUN]: keep its figures, and the settings of its training; then the model goes
  run python recipes/helper.py keep "$RUNS/eval/$1" "$RESULTS/$1" ${2:+"$2"}
  [ -z "${2:-}" ] || [ -n "$KEEP_MODELS" ] || run rm -rf "$2/model" "$2/best"
}
same() { # same NAME OTHER: the figures of NAME under another name too
  [ -d "$RESULTS/$2" ] || run python recipes/helper.py same "$RESULTS/$1" "$RESULTS/$2"
}

tiny() { # the models and data of SCALE=tiny, once
  [ -d "$DATA/tiny/model" ] || run python recipes/tiny.py "$DATA/tiny"
}
tiny_server() { # a stand-in for every model behind an API: sets BASE_URL
  BASE_URL=http://127.0.0.1/v1
  [ -z "$DRY" ] || return 0
  mkdir -p "$DATA/tiny" && rm -f "$DATA/tiny/url"
  python recipes/tiny.py --serve "$DATA/tiny/url" > /dev/null 2>&1 & # ends when the file is gone
  trap 'rm -f "$DATA/tiny/url"' EXIT
  until [ -s "$DATA/tiny/url" ]; do sleep 0.1; done
  BASE_URL=$(cat "$DATA/tiny/url")
}
