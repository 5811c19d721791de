#!/usr/bin/env bash
# RESCUE's whole pipeline, small, on questions over several passages (Sec. 5.2, 6.3): prepare, anchor, rank, train, evaluate. The commands
# are the real run's, with the demo's model, data and sizes. A second run redoes nothing that is done. TRAIN and TEST set the numbers of
# questions (at most 104 and 160).
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${TRAIN:-80} TEST=${TEST:-96}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

PREPARE="--task multidoc_qa --num_documents 4 --prompt_file demo/qa_prompt.txt"
ANCHOR="--model demo/model --source smollm2-135m --prompt_file demo/qa_prompt.txt --max_new_tokens 6 --stop \n --batch_size 32"
TEST_FILES="--input data/demo/test_ranked.jsonl --batch_size 24"

run python demo/get_model.py
run python demo/make_questions.py data/demo/questions
run python collect_candidates.py prepare $PREPARE --input data/demo/questions/train.jsonl --limit "$TRAIN" --output data/demo/train.jsonl
run torchrun --nproc_per_node 2 collect_candidates.py anchor --task demo $ANCHOR --num_distractors 3
run python collect_candidates.py rank --by label --input data/demo/anchored.jsonl --output data/demo/ranked.jsonl

run python collect_candidates.py prepare $PREPARE --input data/demo/questions/test.jsonl --limit "$TEST" --output data/demo/test.jsonl
run torchrun --nproc_per_node 2 collect_candidates.py anchor --input data/demo/test.jsonl --output data/demo/test_anchored.jsonl $ANCHOR --num_distractors 1
run python collect_candidates.py rank --by label --input data/demo/test_anchored.jsonl --output data/demo/test_ranked.jsonl

run torchrun --nproc_per_node 2 rescue.py --ordering label --no_sft --data data/demo/ranked.jsonl --model demo/model --batch_size 8 --lr 2e-4 --resume --output runs/demo-rescue

for name in base rescue; do
  model=$([ $name = base ] && echo demo/model || echo runs/demo-$name/model)
  run torchrun --nproc_per_node 2 evaluate.py multidoc-qa --model $model --name demo-$name $TEST_FILES --max_new_tokens 6 --stop "\n"
  run torchrun --nproc_per_node 2 evaluate.py ranking --model $model --name demo-$name --input data/demo/test_ranked.jsonl --by label --length_scaling 0.85
done
run python evaluate.py report demo-base demo-rescue --columns accuracy accuracy_at_{1..4} pair_accuracy --plot gold_position

cat <<END

Accuracy by the gold passage's place     runs/eval/gold_position.png
Loss and pair accuracy, a line a step    runs/demo-rescue/log.jsonl
The model (from_pretrained, vLLM)        runs/demo-rescue/model
In brackets: 95% intervals. Training and test share no town and no kind of fact.

Next: more of the demo data  make clean demo TRAIN=104 TEST=160
      your own data          README.md, "Your own data"
END
