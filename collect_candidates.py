"""Collect candidate responses: JSONL in, JSONL out, one verb a step.

    prepare   a data set as it was downloaded -> records with prompt, label, and the human (or reference) response
    sample    + responses sampled from a local model, with their log-probability and token count
    teacher   + responses of another model, behind an OpenAI-compatible server
    flip      + each model response's explanation turned into its opposite, and labelled anew (RESCUE Sec. 5.1)
    anchor    + multi-document QA: responses generated from one passage alone (RESCUE Sec. 5.2)
    rank      + annotations: label and correctness, similarity, reward, a stronger model's ranking
    hindsight ranked records -> one response that names the better and the worse answer (PRO's baseline CoH)
    export    ranked records -> the files that TRL's trainers read (RLHF, DPO, CPO)
    convert   a model whose weights are .bin files -> a folder with safetensors, as OpenAssistant's reward models need

A verb writes finished prompts, whole lines, to OUTPUT.part<rank>, and at the end joins them in the input's order into
OUTPUT. Killed and run again with the same arguments it keeps what is there and does the rest; OUTPUT.args.json holds
the arguments. Each verb is a module of its name in collecting/ (hindsight stands in export.py). README.md shows
their commands.
"""

import common
from collecting import anchor, convert, export, flip, prepare, rank, sample, teacher
from collecting.flags import run_verb

VERBS = {
    "prepare": (prepare.prepare_flags, prepare.prepare),
    "sample": (sample.sample_flags, sample.sample),
    "teacher": (teacher.teacher_flags, teacher.teacher),
    "flip": (flip.flip_flags, flip.flip),
    "anchor": (anchor.anchor_flags, anchor.anchor),
    "rank": (rank.rank_flags, rank.rank),
    "hindsight": (export.export_flags, export.hindsight),
    "export": (export.export_flags, export.export),
    "convert": (convert.convert_flags, convert.convert),
}


def main():
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
