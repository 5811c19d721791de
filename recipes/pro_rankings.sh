#!/usr/bin/env bash
# PRO, Fig. 3 (arXiv 2306.17492, Sec. 4.8.1): rankings of 2 to 5 responses, lengthened in five ways by three models'
# answers, which are sampled one model after the other into one file. Prints the rewards, a row a way and a column a
# length. The figure has no printed numbers; lengths 2 and 3 of Alpaca and ChatGPT stand in Table 2. Table 6 is pro_hh.sh's.
# Every value, at the top of pro_common.sh, can be set from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/pro_common.sh

[ "$SCALE" = tiny ] && : "${EXPANSIONS:=alpacas random}" "${LENGTHS:=3 5}"
[ "$SCALE" = cpu ] && : "${EXPANSIONS:=subset}" "${LENGTHS:=2 3}" # so many of the five of own5, drawn by the seed
[ "$SCALE" = paper ] || : "${EXPANSIONS:=own}" # several answers of the model itself: there is no other on the machine
EXPANSIONS=${EXPANSIONS:-alpacas chatgpt ascending descending random} LENGTHS=${LENGTHS:-3 4 5}

if [ "$EXPANSIONS" = subset ]; then
  block own5
  for seed in $SEEDS; do
    for length in $LENGTHS; do pro "subset@$length" own5 --ranking_length "$length"; done
    pro pro-own5 own5 # pro_hh.sh's run, which has all five
  done
  report figure3 "${names[@]}"
  exit
fi
if [ "$EXPANSIONS" = own ]; then
  add train longer own 3
else
  add train longer-alpaca alpaca-7b 3
  add longer-alpaca longer-curie text-curie-001 1
  add longer-curie longer gpt-3.5-turbo 3
fi
block raw
names=()
for seed in $SEEDS; do
  pro pro-raw raw # pro_hh.sh's run, which has two responses
  names[-1]=$RESULTS/raw@2-seed$seed
  as "pro-raw-seed$seed" "raw@2-seed$seed"
  for expansion in $EXPANSIONS; do
    for length in $LENGTHS; do
      way=(--expand "$expansion")
      [ "$expansion" != own ] || way=(--expand alpacas --expand_sources own)
      rank longer "$expansion-$length" "${way[@]}" --ranking_length "$length"
      pro "$expansion@$length" "$expansion-$length"
    done
  done
done
report figure3 "${names[@]}"
