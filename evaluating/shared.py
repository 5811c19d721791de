"""What every verb does: flags, predictions that survive a kill, the file of figures."""

import json
import math
import pathlib
import platform

import torch
import transformers
from tqdm import tqdm

import common
import runtime
from collecting import generation
from collecting.journal import Journal, settings_of
from common import UserError
from runtime import say

EVAL_FOLDER = pathlib.Path("runs/eval")


def model_flags(add, verb, data="records, JSONL"):
    add("--model", required=True, help="hub id or folder")
    if data:
        add("--input", required=True, help=data)
    add("--name", help="the system's name in reports (default: from --model)")
    add("--output", help=f"predictions (default: {EVAL_FOLDER}/NAME/{verb}.jsonl)")


def system_name(args):
    """--name, else the model's folder, or the run's where that is called `model`."""
    path = pathlib.Path(args.model)
    return args.name or (
        path.parent.name if path.name == "model" and (path.parent / "args.json").exists() else path.name
    )


def open_journal(args, verb, records, rank, world):
    args.name = system_name(args)
    args.output = args.output or str(EVAL_FOLDER / args.name / f"{verb}.jsonl")
    return Journal(args.output, [r["id"] for r in records], settings_of(args), rank, world)


def predict(args, verb, records, compute, rank, world):
    """Run `compute(list of records) -> list of predictions` over what is not done yet -> all predictions, in order,
    on rank 0."""
    if not records:
        raise UserError(f"{verb}: the input holds no records")
    journal = open_journal(args, verb, records, rank, world)
    batches = generation.batches_by_length(records, args.batch_size)[rank::world]
    for batch in tqdm(batches, desc=verb, disable=rank != 0):
        batch = [records[i] for i in batch if records[i]["id"] not in journal.done]
        if batch:
            journal.write({"id": r["id"]} | p for r, p in zip(batch, compute(batch)))
    journal.finish()
    return [row for _, row in common.read_rows(args.output)] if rank == 0 else []


def answer(args, verb, records, rank, world, device):
    """Generate an answer to every record's prompt, greedily or with --num_beams -> predictions: the record without
    candidates, and the answer (text, num_tokens, finished, logprob)."""
    names = ("max_new_tokens", "max_prompt_length", "num_beams")
    options = {k: getattr(args, k) for k in names if hasattr(args, k)}

    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        prompts = [r["prompt"] for r in batch]
        answers = generation.generate(model, tokenizer, prompts, stop=generation.unescape(args.stop), **options)
        return [r | a for r, [a] in zip(batch, answers)]

    return predict(args, verb, records, compute, rank, world)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def write_metrics(args, verb, metrics):
    """Write VERB.metrics.json beside the predictions: the figures, the arguments, device and versions; print the
    plain figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    document = {
        "name": args.name,
        "verb": verb,
        "metrics": metrics,
        "settings": settings_of(args),
        "device": device,
        "versions": versions,
    }
    runtime.write_atomically(metrics_file(args.output), json.dumps(document, indent=1, ensure_ascii=False))
    say(f"{args.name}:", "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if common.is_number(v)))


def metrics_file(output):
    return pathlib.Path(str(output).removesuffix(".jsonl") + ".metrics.json")


def wilson(share, n):
    """Wilson's 95% interval of a share of n -> (low, high)."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
