#!/usr/bin/env bash
# PRO, Table 5 (arXiv 2306.17492, Sec. 4.7): without L_SFT, without the temperature, without both, and with the first term
# of L_PRO alone, on Table 2's blocks. Prints Table 5, ours and the paper's; the row PRO is pro_hh.sh's run.
# Its values: recipes/values.md.
. "$(dirname "$0")/pro_common.sh"

start "$BLOCKS"
for block in $BLOCKS; do block "$block"; done
for seed in $SEEDS; do
  for block in $BLOCKS; do
    pro "pro-$block" "$block"
    for ablation in $([ "$block" = raw ] && echo "$ABLATIONS_RAW" || echo "$ABLATIONS"); do
      pro "$ablation-$block" "$block" --${ablation//-/ --}
    done
  done
done
report table5 "${names[@]}"
