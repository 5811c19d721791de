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
    add("--name", help="the folder of the default --output, which names the system (default: from --model)")
    add("--output", help=f"predictions (default: {EVAL_FOLDER}/NAME/{verb}.jsonl)")
# fmt: on


def predict(args, verb, records, compute, batches_of=None):
    """Run `compute(records, device) -> predictions` over what is not done yet, each process its share of the batches
    (batches_of(records), or by length) -> all predictions, in order, on process 0; elsewhere nothing."""
    if not records:
        raise UserError(f"{verb}: the input holds no records")
    process, world, device = common.init_distributed(LONGEST_WAIT)
    args.name = args.name or (common.run_name(args.model) if args.model else args.source)
    args.output = args.output or str(EVAL_FOLDER / args.name / f"{verb}.jsonl")
    journal = Journal(args.output, [r["id"] for r in records], settings_of(args), process, world)
    batches = batches_of(records) if batches_of else generation.batches_by_length(records, args.batch_size)
    batches = [batch for batch in batches if not all(r["id"] in journal.done for r in batch)]
    for batch in tqdm(batches[process::world], desc=verb, disable=process != 0):
        predictions = compute(batch, device)  # of the whole batch: padding changes the last digits
        journal.write({"id": r["id"]} | p for r, p in zip(batch, predictions, strict=True))
    journal.finish()
    return [row for _, row in read_rows(args.output)] if process == 0 else []


def generate_answers(args, records, device):
    """-> an answer (text, num_tokens, finished, logprob) to each record's prompt, greedily or with --num_beams."""
    model, tokenizer = generation.load_generator(args.model, device, args.bf16)
    answers = generation.generate(model, tokenizer, [r["prompt"] for r in records], **generation.options_of(args))
    return [a | {"text": a["text"].strip()} for [a] in answers]


def answer(args, verb, records):
    """predict, where a prediction is the record and its answer."""

    def compute(records, device):
        return [r | a for r, a in zip(records, generate_answers(args, records, device))]

    return predict(args, verb, records, compute)


def draw_per_subset(rows, limit, seed):
    """At most `limit` rows of each subset (of all where they have none), drawn by `seed`, in their order."""
    if not limit:
        return rows
    kept = set()
    for subset in {r.get("subset") for r in rows}:
        ids = [r["id"] for r in rows if r.get("subset") == subset]
        kept |= set(random.Random(f"{seed}-{subset}").sample(ids, min(limit, len(ids))))
    return [r for r in rows if r["id"] in kept]


def by_subset(rows, metrics):
    """The figures of metrics(rows), and as "SUBSET FIGURE" those of each subset's rows."""
    figures = metrics(rows)
    for subset in sorted({row["subset"] for row in rows if row.get("subset")}):
        some = metrics([row for row in rows if row.get("subset") == subset])
        figures |= {f"{subset} {name}": value for name, value in some.items()}
    return figures


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def num_words(row):
    return len(row["text"].split())


def length_figures(rows):
    unfinished = mean(not r["finished"] for r in rows)
    return {"mean_words": mean(map(num_words, rows)), "unfinished": unfinished, "prompts": len(rows)}


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
