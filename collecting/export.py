"""The verbs hindsight and export: ranked records for PRO's baselines, in this project and in others."""

import pathlib

import common
from collecting.files import load_candidates
from collecting.journal import write_all
from collecting.prompts import HINDSIGHT_TEMPLATE, fill, read_template
from common import UserError


def best_first(record, path):
    """The record's candidates, best first, by `reward`, else by `rank` -> (the field's name, the candidates). UserError
    where they carry neither."""
    candidates = record["candidates"]
    for field, sign in (("reward", -1), ("rank", 1)):
        if all(c.get(field) is not None for c in candidates):
            return field, sorted(candidates, key=lambda c: sign * c[field])
    raise UserError(f"{path}: record {record['id']!r} has no 'reward' or 'rank' on all candidates: run rank first")


def io_flags(add):
    add("--input", required=True, help="ranked records, JSONL")
    add("--output", required=True)


def hindsight_flags(add):
    io_flags(add)
    add("--prompt_file", help="templates of your own with {better} and {worse}, a line --- between them")


def hindsight(args):
    """Chain of hindsight: one response that names a better and a worse answer, for pro.py --no_ranking; the templates
    take turns. What stands before a template's first field ends the prompt: prompt such a model with it too."""
    templates = read_template(args, HINDSIGHT_TEMPLATE).strip().split("\n---\n")
    rows = []
    for number, record in enumerate(load_candidates(args.input)):
        _, ranked = best_first(record, args.input)
        best, worst, template = ranked[0], ranked[-1], templates[number % len(templates)]
        head = template.partition("{")[0].rstrip()
        fields = {"better": best["text"], "worse": worst["text"]}
        text = fill(template.removeprefix(head), fields, args.prompt_file or "the template").strip()
        last = best if template.rfind("{better}") > template.rfind("{worse}") else worst  # it ends the response
        candidate = {"text": text, "source": "hindsight", "rank": 0}
        candidate |= {"finished": False} if last.get("finished") is False else {}
        rows.append(record | {"prompt": f"{record['prompt']} {head}".rstrip(), "candidates": [candidate]})
    write_all(args.output, rows, args)


def trl_row(record, path):
    """-> {id, prompt, chosen, rejected}, the last two where there are two responses.

    TRL tokenises prompt and response as one text, so what common.encode puts between them stands in the file.
    """
    _, ranked = best_first(record, path)
    texts = [common.space_before(record["prompt"], c["text"]) + c["text"] for c in ranked]
    row = {"id": record["id"], "prompt": record["prompt"]}
    return row | ({"chosen": texts[0], "rejected": texts[-1]} if len(texts) > 1 else {})


def ranked_row(record, path):
    """-> {id, prompt, responses best first, rewards or ranks, reference: what a person wrote and nobody ranked}: what
    prepare --task pairs reads."""
    candidates = record["candidates"]
    unranked = [c for c in candidates if c.get("reward") is None and c.get("rank") is None]
    references = [c for c in unranked if c["source"] in common.HUMAN][:1]
    repeated = [c for c in unranked if "rank" in c]  # null: a ranker calls it a repetition
    candidates = [c for c in candidates if c not in references + repeated] or candidates
    field, ranked = best_first(record | {"candidates": candidates}, path)
    row = {"id": record["id"], "prompt": record["prompt"]}
    row["responses"] = [{k: c[k] for k in ("text", "source", "finished") if k in c} for c in ranked]
    row[f"{field}s"] = [c[field] for c in ranked]
    return row | ({"reference": references[0]["text"]} if references else {})


def export_flags(add):
    io_flags(add)
    formats = "trl: prompt, chosen, rejected, and NAME-prompts.jsonl; ranked: all responses, for prepare --task pairs"
    add("--format", choices=["ranked", "trl"], required=True, help=formats)


def export(args):
    """Write the best and the worst response of each prompt, and the prompts alone, as another project reads them; or
    every response, best first."""
    output, make_row = pathlib.Path(args.output), trl_row if args.format == "trl" else ranked_row
    rows = [make_row(record, args.input) for record in load_candidates(args.input)]
    write_all(output, [r for r in rows if "chosen" in r or "responses" in r], args)
    if args.format == "trl":
        prompts = [{k: r[k] for k in ("id", "prompt")} for r in rows]
        write_all(output.with_name(f"{output.stem}-prompts.jsonl"), prompts, args)
