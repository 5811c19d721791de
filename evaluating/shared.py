"""What every verb does: flags, predictions that survive a kill, the file of figures."""

import json
import pathlib
import platform
import random

import torch
import transformers
from tqdm import tqdm

import common
from collecting import generation
from collecting.files import read_rows, write_atomically
from collecting.journal import LONGEST_WAIT, Journal, settings_of
from common import UserError, is_number, say

EVAL_FOLDER = pathlib.Path("runs/eval")


# fmt: off
def model_flags(add, verb, data="records, JSONL", required=True):
    add("--model", required=required, help="hub id or folder")
    if data:
        add("--input", required=True, help=data)
    add("--name", help="the system's name in reports (default: from --model)")
    add("--output", help=f"predictions (default: {EVAL_FOLDER}/NAME/{verb}.jsonl)")
# fmt: on


def system_name(args):
    """--name, else the responses' source, else the model's folder, or the run's where that is `model` or `best`."""
    if args.name or not args.model:
        return args.name or args.source
    return common.run_name(args.model)


def predict(args, verb, records, compute, batches_of=None):
    """Run `compute(records, device) -> predictions` over what is not done yet, each process its share of the batches
    (batches_of(records), or by length) -> all predictions, in order, on process 0; elsewhere nothing."""
    if not records:
        raise UserError(f"{verb}: the input holds no records")
    process, world, device = common.init_distributed(LONGEST_WAIT)
    args.name = system_name(args)
    args.output = args.output or str(EVAL_FOLDER / args.name / f"{verb}.jsonl")
    journal = Journal(args.output, [r["id"] for r in records], settings_of(args), process, world)
    by_length = lambda records: generation.batches_by_length(records, args.batch_size)  # noqa: E731
    batches = [b for b in (batches_of or by_length)(records) if not all(r["id"] in journal.done for r in b)]
    for batch in tqdm(batches[process::world], desc=verb, disable=process != 0):
        predictions = compute(batch, device)  # of the whole batch: padding changes the last digits
        journal.write({"id": r["id"]} | p for r, p in zip(batch, predictions, strict=True))
    journal.finish()
    return [row for _, row in read_rows(args.output)] if process == 0 else []


def generate_answers(args, records, device):
    """-> an answer (text, num_tokens, finished, logprob) to each record's prompt, greedily or with --num_beams."""
    model, tokenizer = generation.load_generator(args.model, device, args.bf16)
    options = generation.options_of(args)
    answers = generation.generate(model, tokenizer, [r["prompt"] for r in records], **options)
    return [a | {"text": a["text"].strip()} for [a] in answers]


def answer(args, verb, records):
    """predict, where a prediction is the record and its answer."""
    return predict(
        args, verb, records, lambda some, device: [r | a for r, a in zip(some, generate_answers(args, some, device))]
    )


def draw_per_subset(rows, limit, seed):
    """At most `limit` rows of each subset (of all where they have none), drawn by `seed`, in their order."""
    kept = set()
    for subset in {r.get("subset") for r in rows} if limit else ():
        ids = [r["id"] for r in rows if r.get("subset") == subset]
        kept |= set(random.Random(f"{seed}-{subset}").sample(ids, min(limit, len(ids))))
    return [r for r in rows if r["id"] in kept] if limit else rows


def by_subset(rows, metrics):
    """Rows of subsets -> {"SUBSET FIGURE": value} for the figures of metrics(a subset's rows)."""
    subsets = sorted({row["subset"] for row in rows if row.get("subset")})
    figures = {s: metrics([row for row in rows if row.get("subset") == s]) for s in subsets}
    return {f"{s} {k}": v for s, values in figures.items() for k, v in values.items()}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def length_figures(rows):
    words, unfinished = (len(r["text"].split()) for r in rows), (not r["finished"] for r in rows)
    return {"mean_words": mean(words), "unfinished": mean(unfinished), "prompts": len(rows)}


def write_metrics(args, verb, metrics, items=None):
    """Write VERB.metrics.json beside the predictions: the figures, the arguments, device and versions; print the
    plain figures. items {figure: {id: value}}, what a figure is the mean of, goes to VERB.items.json for `report
    --paired`."""
    if items:
        write_atomically(beside(args, ".items.json"), json.dumps(items))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    document = {"name": args.name, "verb": verb, "metrics": metrics, "settings": settings_of(args), "device": device}
    document |= {"versions": versions | {"python": platform.python_version()}}
    write_atomically(beside(args, ".metrics.json"), json.dumps(document, indent=1, ensure_ascii=False))
    say(f"{args.name}:", "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if is_number(v)))


def beside(args, suffix):
    """The predictions' path with another ending."""
    return pathlib.Path(args.output.removesuffix(".jsonl") + suffix)
