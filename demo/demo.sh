#!/usr/bin/env bash
# RESCUE's whole pipeline, small: prepare, sample, rank, train (SFT and RESCUE), evaluate. The commands are the real run's, with the demo's
# model, data and sizes. A second run redoes nothing that is done. TRAIN and TEST set the numbers of prompts (all: TRAIN=270 TEST=72).
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${TRAIN:-42} TEST=${TEST:-30}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

SAMPLE="--model demo/model --source smollm2-135m --num_samples 3 --temperature 0.8 --max_new_tokens 32"
TRAINING="--data data/demo/ranked.jsonl --model demo/model --batch_size 6 --lr 1e-4 --resume"
ANSWER="--input data/demo/test_ranked.jsonl --max_new_tokens 32 --batch_size 15"

run python demo/get_model.py
run python collect_candidates.py prepare --task esnli --input demo/nli.jsonl --limit "$TRAIN" --prompt_file demo/nli_prompt.txt --output data/demo/train.jsonl
run torchrun --nproc_per_node 2 collect_candidates.py sample --task demo $SAMPLE
run python collect_candidates.py rank --task demo --by label

run python collect_candidates.py prepare --task esnli --input demo/nli.jsonl --skip 270 --limit "$TEST" --prompt_file demo/nli_prompt.txt --output data/demo/test.jsonl
run torchrun --nproc_per_node 2 collect_candidates.py sample --task demo --input data/demo/test.jsonl --output data/demo/test_sampled.jsonl $SAMPLE
run python collect_candidates.py rank --by label --input data/demo/test_sampled.jsonl --output data/demo/test_ranked.jsonl

run torchrun --nproc_per_node 2 rescue.py --ordering none $TRAINING --output runs/demo-sft
run torchrun --nproc_per_node 2 rescue.py --ordering label $TRAINING --output runs/demo-rescue

for name in base sft rescue; do
  model=$([ $name = base ] && echo demo/model || echo runs/demo-$name/model)
  run torchrun --nproc_per_node 2 evaluate.py nli --model $model --name demo-$name $ANSWER
  run torchrun --nproc_per_node 2 evaluate.py ranking --model $model --name demo-$name --input data/demo/test_ranked.jsonl --by label --length_scaling 0.85
done
run python evaluate.py report demo-base demo-sft demo-rescue --columns well_formed accuracy pair_accuracy margin_violations

cat <<END

Plots (confusion matrix, label shares)   runs/eval/demo-{base,sft,rescue}/nli.png
Models (from_pretrained, vLLM)           runs/demo-sft/model  runs/demo-rescue/model
Training curves                          runs/demo-{sft,rescue}/log.jsonl
$TRAIN training and $TEST test prompts show that everything works, not how good a method is.

Next: another ordering       torchrun --nproc_per_node 2 rescue.py --ordering hybrid $TRAINING --output runs/demo-hybrid
      all of the demo data   make clean demo TRAIN=270 TEST=72
      your own data          README.md, "Recipes"
END
