# Sourced by every recipe, after it has set NAME: where things go, and `run`, which prints a command and runs it.
# SCALE: paper (default) | 135m | cpu | tiny. GPUS: processes of a torchrun; 1 is plain python. OUT: a folder for it all.
SCALE=${SCALE:-paper} GPUS=${GPUS:-$([ "${SCALE:-paper}" = paper ] && echo 8 || echo 1)}
[ "$SCALE" = paper ] || export HF_HUB_OFFLINE=1
DATA=${OUT:-.}/data/$NAME-$SCALE RUNS=${OUT:-.}/runs/$NAME-$SCALE RESULTS=${RESULTS:-${OUT:-.}/results/$NAME-$SCALE}
mkdir -p "$DATA" "$RUNS" "$RESULTS"
# glibc gives large blocks back to Linux, which zeroes them anew: of five steps of e-SNLI, 68 s, 28 were spent so; now of
# 55 s 16. A process keeps what it once held.
[ "$SCALE" != cpu ] ||
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000}
# A busy machine may end a run for want of memory: little of it is then lost.
[ "$SCALE" != cpu ] || SAVE=${SAVE---checkpoint_every 20}
SAVE=${SAVE:-}
[ "$GPUS" = 1 ] && TORCHRUN=python || TORCHRUN="torchrun --nproc_per_node $GPUS"

run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

tiny() { # the models and data of SCALE=tiny, once
  [ -d "$DATA/tiny/model" ] || run python recipes/tiny.py "$DATA/tiny"
}

tiny_server() { # a stand-in for every model behind an API: sets BASE_URL
  rm -f "$DATA/tiny/url"
  python recipes/tiny.py --serve "$DATA/tiny/url" > /dev/null 2>&1 & # ends when the file is gone
  trap 'rm -f "$DATA/tiny/url"' EXIT
  until [ -s "$DATA/tiny/url" ]; do sleep 0.1; done
  BASE_URL=$(cat "$DATA/tiny/url")
}

records() { # records TO VERB ARGUMENTS...: recipes/records.py into $DATA/TO.jsonl, once
  local to=$DATA/$1.jsonl
  [ -e "$to" ] || { run python recipes/records.py "${@:2}" > "$to.part" && mv "$to.part" "$to"; }
}

keep() { # keep NAME FOLDER [RUN]: a system's figures, item by item too, and its training's settings, where results are kept
  local kept=$RESULTS/$1
  mkdir -p "$kept.part"
  cp "$2"/*.metrics.json "$kept.part/"
  find "$2" -name '*.items.json' -exec cp {} "$kept.part/" ';'
  [ ! -e "${3:-}/args.json" ] || cp "$3/args.json" "$kept.part/"
  # an absolute path is of this machine: its last part is kept
  find "$kept.part" -name '*.json' ! -name '*.items.json' -exec sed -E -i 's#(["= ])/([^" ]*/)?([^/" ]+)#\1\3#g' {} +
  rm -rf "$kept"
  mv "$kept.part" "$kept"
}

kept() { # kept NAME: whether its figures are there, from this machine or another; delete the folder to make them anew
  [ -d "$RESULTS/$1" ] && echo "kept: $RESULTS/$1" >&2
}

as() { # as KEPT NAME: the figures of KEPT, where they are there, under another NAME too
  [ -d "$RESULTS/$1" ] && [ ! -d "$RESULTS/$2" ] || return 0
  echo "$2: the figures of $1" >&2
  mkdir "$RESULTS/$2.part"
  cp "$RESULTS/$1"/* "$RESULTS/$2.part/"
  for figures in "$RESULTS/$1"/*.metrics.json; do
    sed "s/\"name\": \"$1\"/\"name\": \"$2\"/" "$figures" > "$RESULTS/$2.part/${figures##*/}"
  done
  mv "$RESULTS/$2.part" "$RESULTS/$2"
}
