"""Answers of a model in training: PRO's self-bootstrapping (Algorithm 1) and its reward on held-out prompts."""

import math
import zlib

import torch
from tqdm import tqdm

import runtime
from collecting import generation
from collecting.reward_models import reward_logits

BATCH = 16  # prompts at once


def answers(run, records, what, temperature, done=()):
    """Yield (batch, answers) for this process's batches of records: each answer a candidate {text, finished, source}.

    A batch is left out where all its records are in `done`, and answered whole otherwise; its draw is seeded by
    --seed, the run's step, and its first record: a resumed run, or another number of processes, samples the same.
    Ends early where the run is told to stop.
    """
    args, model = run.args, run.model
    options = {"max_new_tokens": args.max_new_tokens, "max_prompt_length": args.max_prompt_length}
    options |= {"temperature": temperature, "stop": generation.TURNS}
    training = model.training
    model.eval()
    with runtime.gathered(model), torch.no_grad():  # each process on its own, however long its answers are
        batches = generation.batches_by_length(records, BATCH)[run.process :: run.world]
        for batch in tqdm(batches, desc=what, leave=False, disable=run.process != 0):
            if run.signal or all(r["id"] in done for r in batch):
                continue
            torch.manual_seed(zlib.crc32(f"{args.seed} {run.step} {batch[0]['id']}".encode()))
            found = generation.generate(model, run.tokenizer, [r["prompt"] for r in batch], **options)
            yield batch, [{"text": a["text"], "finished": a["finished"], "source": "bootstrap"} for [a] in found]
    model.train(training)


def rewards(run, batch, candidates):
    """The raw logits of --reward_model for a candidate each of some records, as `rank --by reward` gives them."""
    pairs, pickle = list(zip(batch, candidates)), run.args.allow_pickle
    return reward_logits(run.args.reward_model, run.device, pairs, allow_pickle=pickle)


def mean_reward(run, records):
    """100 x the mean sigmoid reward of greedy answers to the records' prompts, over all processes (Table 2's unit)."""
    total = 0.0
    for batch, found in answers(run, records, "reward", temperature=0.0):
        total += sum(1 / (1 + math.exp(-max(r, -700))) for r in rewards(run, batch, found))
    return 100 * runtime.all_sum([total])[0] / len(records)
