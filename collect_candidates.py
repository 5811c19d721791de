"""Collect candidate responses: JSONL in, JSONL out, one verb a step.

    prepare   a data set as it was downloaded -> records with prompt, label, and the human (or reference) response
    sample    + responses sampled from a local model, with their log-probability and token count
    teacher   + responses of another model, behind an OpenAI-compatible server
    flip      + each model response's explanation turned into its opposite, and labelled anew (RESCUE Sec. 5.1)
    anchor    + multi-document QA: responses generated from one passage alone (RESCUE Sec. 5.2)
    rank      + annotations: label and correctness, similarity, reward, a stronger model's ranking
    hindsight ranked records -> one response that names the better and the worse answer (PRO's baseline CoH)
    export    ranked records -> the files that TRL's trainers read (RLHF, DPO, CPO), or ranked lists
    convert   a model whose weights are .bin files -> a folder with safetensors, as OpenAssistant's reward models need

A verb writes finished prompts, whole lines, to OUTPUT.part<rank>, and at the end joins them in the input's order into
OUTPUT. Killed and run again with the same arguments it keeps what is there and does the rest; OUTPUT.args.json holds
the arguments. Each verb is a module of its name in collecting/ (hindsight stands in export.py).

    python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv \\
        --shuffle 0 --limit 20000
    torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf \\
        --num_samples 3 --shots 3 --stop "\\n\\n"
    python collect_candidates.py teacher --task esnli --base_url https://api.openai.com/v1 --model gpt-4o-mini \\
        --shots 3 --input data/esnli/sampled.jsonl
    python collect_candidates.py rank --task esnli --by label --drop_malformed --input data/esnli/teacher.jsonl

    python collect_candidates.py prepare --task multidoc_qa --input nq-open-10_total_documents_gold_at_0.jsonl.gz
    torchrun --nproc_per_node 4 collect_candidates.py anchor --model meta-llama/Llama-2-7b-hf
    python collect_candidates.py rank --task multidoc_qa --by label --input data/multidoc_qa/anchored.jsonl
"""

import common
from collecting.anchor import anchor, anchor_flags
from collecting.convert import convert, convert_flags
from collecting.export import export, export_flags, hindsight, hindsight_flags
from collecting.flags import run_verb
from collecting.flip import flip, flip_flags
from collecting.prepare import prepare, prepare_flags
from collecting.rank import rank, rank_flags
from collecting.sample import sample, sample_flags
from collecting.teacher import teacher, teacher_flags

VERBS = {
    "prepare": (prepare_flags, prepare),
    "sample": (sample_flags, sample),
    "teacher": (teacher_flags, teacher),
    "flip": (flip_flags, flip),
    "anchor": (anchor_flags, anchor),
    "rank": (rank_flags, rank),
    "hindsight": (hindsight_flags, hindsight),
    "export": (export_flags, export),
    "convert": (convert_flags, convert),
}


def main():
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
