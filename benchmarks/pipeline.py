"""The third page of `make bench`: a recipe from rows to report, wall time by step, beside the same steps done plainly.

RESCUE on demo/nli.jsonl in this one process: prepare, sample (3 shots, 4 responses), rank by labels, the model's own
log-probabilities of the candidates, train, answer and rank held-out prompts, report. Plainly: transformers' generate()
on padded prompts, num_return_sequences, until the longest response has ended; 8 padded sequences at a time to score,
logits at every position; `--padded` to train. All else, loading the model included, is the same code. Both go once
through 2 prompts first, which counts for nothing.

    make bench PAGE=pipeline
    make bench PAGE=pipeline ARGS="--prompts 48 --repeats 3"
"""

import contextlib
import json
import pathlib
import re
import runpy
import statistics
import sys
import tempfile
import time
from unittest import mock

import bench
import torch
from bench import ROOT

import common
from collecting import generation, scoring
from collecting.files import write_atomically
from common import in_range, say

STEPS = """
prepare  collect_candidates.py prepare --task esnli --input NLI --limit N --output D/train.jsonl
prepare  collect_candidates.py prepare --task esnli --input NLI --skip 270 --limit N --output D/test.jsonl
sample   collect_candidates.py sample --model MODEL SHOWN --num_samples 4 --input D/train.jsonl --output D/sampled.jsonl
rank     collect_candidates.py rank --by label --input D/sampled.jsonl --output D/ranked.jsonl
score    collect_candidates.py rank --by logprob --model MODEL --input D/ranked.jsonl --output D/scored.jsonl
train    rescue.py --ordering label --model MODEL --data D/ranked.jsonl --batch_size 8 --output D/run
evaluate evaluate.py nli --model D/run/model SHOWN --input D/test.jsonl --output D/eval/nli.jsonl
evaluate evaluate.py ranking --by label --model D/run/model --input D/ranked.jsonl --output D/eval/ranking.jsonl
report   evaluate.py report D/eval
"""
SHOWN = "--shots 3 --max_new_tokens 32 --stop \\n\\n"


def plain_generate(model, tokenizer, prompts, *, max_new_tokens, num_samples=1, temperature=0.0, stop=(), **_):
    """generation.generate as a user writes it."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    options |= {"num_return_sequences": num_samples, "stop_strings": list(stop) or None, "tokenizer": tokenizer}
    out = model.generate(**batch, **options, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id)
    responses = []
    for row in out[:, batch.input_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token == tokenizer.eos_token_id), len(row))
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        cut = min((text.index(s) for s in stop if s in text), default=None)
        finished = cut is not None or end < len(row)
        responses.append({"text": text[:cut].strip(), "num_tokens": max(1, end), "finished": finished})
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


@torch.inference_mode()
def plain_score_rows(model, sequences, values_of, check):
    """scoring.score_rows as a user writes it."""
    eights = (sequences[i : i + 8] for i in range(0, len(sequences), 8))
    return torch.cat([values_of(common.pack_padded(some).to(model.device)) for some in eights])


def timed(model, prompts, plain):
    """-> {step: seconds}"""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(mock.patch.object(generation, "generate", torch.inference_mode()(plain_generate)))
            stack.enter_context(mock.patch.object(scoring, "score_rows", plain_score_rows))
        names = {"NLI": f"{ROOT}/demo/nli.jsonl", "N": str(prompts), "MODEL": model, "SHOWN": SHOWN, "D": folder}
        for line in STEPS.strip().splitlines():
            step, *words = re.sub(r"\b[A-Z]+\b", lambda m: names[m[0]], line).split()
            words += ["--padded"] * (plain and step == "train")
            generation.load_generator.cache_clear()
            began = time.perf_counter()
            with (
                open(f"{folder}/log", "a") as log,
                contextlib.redirect_stdout(log),
                mock.patch.object(sys, "argv", words),
            ):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            seconds[step] = seconds.get(step, 0) + time.perf_counter() - began
    return seconds


def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo/model"), help="folder or hub id")
    add("--prompts", type=in_range(int, 1, 72), default=24, help="to train on, and as many to test on")
    add("--repeats", type=in_range(int, 1), default=1, help="turns")
    add("--output", default=str(ROOT / "benchmarks/results/cpu-pipeline.json"), help="results, JSON")
    args = parser.parse_args()
    for plain in (False, True):
        timed(args.model, 2, plain)
    turns = [{k: timed(args.model, args.prompts, k == "plain") for k in ("ours", "plain")} for _ in range(args.repeats)]
    device = bench.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_atomically(pathlib.Path(args.output), json.dumps({"device": device, "turns": turns}, indent=1) + "\n")
    for step in [*turns[0]["ours"], "all"]:
        of = lambda times: times[step] if step in times else sum(times.values())  # noqa: B023, E731
        ours, plain = (statistics.median(of(turn[k]) for turn in turns) for k in ("ours", "plain"))
        say(f"{step}: {ours:.1f} s, plainly {plain:.1f} s, {plain / ours:.2f} times")


if __name__ == "__main__":
    common.run_cli(main)
