"""The verbs hindsight and export: ranked records for PRO's baselines, in this project and in others."""

import pathlib

import common
from collecting.files import load_candidates
from collecting.journal import write_all
from collecting.prompts import HINDSIGHT_TEMPLATE, fill, read_template
from common import UserError


def best_first(record, path):
    """The record's candidates, best first, by `reward`, else by `rank`. UserError where they carry neither."""
    for field, sign in (("reward", -1), ("rank", 1)):
        if all(c.get(field) is not None for c in record["candidates"]):
            return sorted(record["candidates"], key=lambda c: sign * c[field])
    raise UserError(
        f"{path}: record {record['id']!r} has neither 'reward' nor 'rank' on all candidates: run rank first"
    )


def conversion_flags(add):
    add("--input", required=True, help="ranked records, JSONL")
    add("--output", required=True)


def hindsight_flags(add):
    conversion_flags(add)
    add("--prompt_file", help="templates of your own with {better} and {worse}, a line --- between them")


def hindsight(args):
    """Chain of hindsight: one response that names a better and a worse answer, for pro.py --no_ranking; the templates
    take turns. What stands before a template's first field ends the prompt: prompt such a model with it too."""
    records = load_candidates(args.input)
    templates = read_template(args, HINDSIGHT_TEMPLATE).strip().split("\n---\n")
    heads = [t.partition("{")[0].rstrip() for t in templates]
    rows = []
    for number, record in enumerate(records):
        best, *_, worst = best_first(record, args.input) * 2  # a lone response is better and worse
        template, head = templates[number % len(templates)], heads[number % len(heads)]
        fields = {"better": best["text"], "worse": worst["text"]}
        text = fill(template.removeprefix(head), fields, args.prompt_file or "the template").strip()
        last = best if template.rfind("{better}") > template.rfind("{worse}") else worst  # it ends the response
        cut = {"finished": False} if last.get("finished") is False else {}
        candidates = [{"text": text, "source": "hindsight", "rank": 0} | cut]
        rows.append(record | {"prompt": f"{record['prompt']} {head}".rstrip(), "candidates": candidates})
    write_all(args.output, rows, args)


def trl_row(record, path):
    """-> {id, prompt, chosen, rejected}, the last two where there are two responses.

    TRL tokenises prompt and response as one text, so what common.encode puts between them stands in the file.
    """
    best, *_, worst = best_first(record, path) * 2
    prompt = record["prompt"]
    texts = {k: common.space_before(prompt, c["text"]) + c["text"] for k, c in (("chosen", best), ("rejected", worst))}
    return {"id": record["id"], "prompt": prompt} | (texts if best is not worst else {})


def ranked_row(record, path):
    """-> {id, prompt, responses best first, rewards or ranks, reference: what a person wrote and nobody ranked}: what
    prepare --task pairs reads."""
    candidates = record["candidates"]
    unranked = [c for c in candidates if c["source"] in common.HUMAN and not {"reward", "rank"} & c.keys()]
    ranked = [c for c in candidates if c not in unranked[:1]]
    ordered = best_first(record | {"candidates": ranked} if ranked else record, path)
    field = "reward" if all(c.get("reward") is not None for c in ordered) else "rank"
    responses = [{k: c[k] for k in ("text", "source", "finished") if k in c} for c in ordered]
    row = {"id": record["id"], "prompt": record["prompt"], "responses": responses}
    row |= {f"{field}s": [c[field] for c in ordered]}
    return row | ({"reference": unranked[0]["text"]} if unranked else {})


EXPORTS = {"trl": trl_row, "ranked": ranked_row}
FORMATS = "trl: prompt, chosen, rejected, and NAME-prompts.jsonl; ranked: all responses, as prepare --task pairs reads"


def export_flags(add):
    conversion_flags(add)
    add("--format", choices=sorted(EXPORTS), required=True, help=FORMATS)


def export(args):
    """Write the best and the worst response of each prompt, and the prompts alone, as another project reads them; or
    every response, best first."""
    output = pathlib.Path(args.output)
    rows = [EXPORTS[args.format](record, args.input) for record in load_candidates(args.input)]
    files = {output: [r for r in rows if "chosen" in r or "responses" in r]}
    if args.format == "trl":
        files[output.with_name(f"{output.stem}-prompts.jsonl")] = [{k: r[k] for k in ("id", "prompt")} for r in rows]
    for path, content in files.items():
        write_all(path, content, args)
