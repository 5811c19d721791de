#!/usr/bin/env bash
# PRO, Fig. 3 (arXiv 2306.17492, Sec. 4.8.1): rankings of 2 to 5 responses, lengthened in five ways by three models'
# answers, which are sampled one model after the other into one file. Prints the rewards, a row a way and a column a
# length. The figure has no printed numbers; lengths 2 and 3 of Alpaca and ChatGPT stand in Table 2. Table 6 is pro_hh.sh's.
# Its values: recipes/values.md.
. "$(dirname "$0")/pro_common.sh"

same() { # same NAME OTHER: the figures of NAME are those of OTHER too
  names+=("$2")
  [ -d "$RESULTS/$2" ] || run cp -r "$RESULTS/$1" "$RESULTS/$2"
}

if [ "$EXPANSIONS" = subset ]; then
  start own5
  block own5
  for seed in $SEEDS; do
    for length in $LENGTHS; do pro "subset@$length" own5 --ranking_length "$length"; done
    pro pro-own5 own5 # pro_hh.sh's run, which has all five
  done
  report figure3 "${names[@]}"
  exit
fi
retired=()
[[ $CURIE$EXPANSIONS != text-curie-001*@(ascending|descending|random)* ]] ||
  retired=(--absent "CURIE, a weak model at BASE_URL: text-curie-001 is retired. CURIE=another, or EXPANSIONS='alpacas chatgpt'")
start "alpaca3 chatgpt3" "${retired[@]}"
add train longer-alpaca alpaca-7b 3
add longer-alpaca longer-curie text-curie-001 1
add longer-curie longer gpt-3.5-turbo 3
block raw
for seed in $SEEDS; do
  pro pro-raw raw # pro_hh.sh's run, which has two responses
  unset "names[-1]"
  same "pro-raw-seed$seed" "raw@2-seed$seed"
  for way in $EXPANSIONS; do
    for length in $LENGTHS; do
      if [[ $way@$length = @(descending|random)@5 && " $EXPANSIONS " = *" ascending "* ]]; then
        same "ascending@5-seed$seed" "$way@5-seed$seed" # all three sources: the same candidates
        continue
      fi
      rank longer "$way-$length" --expand "$way" --ranking_length "$length"
      pro "$way@$length" "$way-$length"
    done
  done
done
report figure3 "${names[@]}"
