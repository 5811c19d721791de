"""The verbs hindsight and export: ranked records for PRO's baselines, in this project and in others."""

import pathlib

import common
from collecting.files import load_candidates
from collecting.journal import write_all
from collecting.prompts import HINDSIGHT, fill
from common import UserError


def export_flags(add):
    add("--input", required=True, help="ranked records, JSONL")
    add("--output", required=True)


def pair_of(record, path):
    """The record's best and worst candidate, by `reward`, else by `rank`. UserError where not all carry one."""
    for field, sign in (("reward", 1), ("rank", -1)):
        if all(c.get(field) is not None for c in record["candidates"]):
            ranked = sorted(record["candidates"], key=lambda c: -sign * c[field])
            return ranked[0], ranked[-1]
    raise UserError(f"{path}: record {record['id']!r} has no 'reward' or 'rank' on all candidates: run rank first")


def hindsight(args):
    """Chain of hindsight: one response that names a better and a worse answer, for pro.py --no_ranking; the templates
    take turns. What stands before a template's first field ends the prompt: prompt such a model with it too."""
    rows = []
    for number, record in enumerate(load_candidates(args.input)):
        best, worst = pair_of(record, args.input)
        head, template = HINDSIGHT[number % len(HINDSIGHT)]
        text = fill(template, {"better": best["text"], "worse": worst["text"]}, "the template").strip()
        last = worst if template.endswith("{worse}") else best
        candidate = {"text": text, "source": "hindsight", "rank": 0}
        candidate |= {"finished": False} if last.get("finished") is False else {}
        rows.append(record | {"prompt": f"{record['prompt']} {head}", "candidates": [candidate]})
    write_all(args.output, rows, args)


def export(args):
    """Write the best and the worst response of each prompt, and to NAME-prompts.jsonl the prompts alone, as TRL's
    trainers read them (RLHF, DPO, CPO)."""
    rows, prompts, output = [], [], pathlib.Path(args.output)
    for record in load_candidates(args.input):
        prompts.append({"id": record["id"], "prompt": record["prompt"]})
        # TRL tokenises prompt and response as one text, so what common.encode puts between them stands in the file
        best, worst = (
            common.space_before(record["prompt"], c["text"]) + c["text"] for c in pair_of(record, args.input)
        )
        if len(record["candidates"]) > 1:
            rows.append(prompts[-1] | {"chosen": best, "rejected": worst})
    write_all(output, rows, args)
    write_all(output.with_name(f"{output.stem}-prompts.jsonl"), prompts, args)
