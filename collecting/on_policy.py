"""Answers of a model in training: PRO's self-bootstrapping (Algorithm 1) and its reward on held-out prompts."""

import contextlib
import zlib

import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from collecting import generation
from collecting.reward_models import reward_logits

BATCH = 16  # prompts at once


@contextlib.contextmanager
def gathered(model):
    """Within it every process holds all weights, in the computing dtype, so that each may generate without the others.
    Use it under no_grad, not under inference_mode: the weights are trained further. FlexAttention would compile anew as
    the cache grows, so SDPA reads it, or eager attention where the model has no SDPA."""
    parts, attention = [m for m in model.modules() if hasattr(m, "unshard")], model.config._attn_implementation
    if attention == "flex_attention":
        model.set_attn_implementation("sdpa" if common.has_sdpa(model) else "eager")
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield model
    finally:
        for m in parts:
            m.set_reshard_after_forward(m is not model and not common.stays_whole(model), recurse=False)  # as in shard
            m.reshard()
        if attention == "flex_attention":
            model.set_attn_implementation(attention)


def answers(model, tokenizer, records, args, step, *, what, temperature, done=()):
    """Yield (batch, answers) for this process's batches of records: each answer a candidate {text, finished, source}.

    A batch is left out if all its records are in `done`, else answered whole. Its draw is seeded by --seed, the step,
    and its first record, so a resumed run, or another number of processes, samples the same. After a signal the rest is
    left out: call common.stop_if_asked before the answers are used.
    """
    options = {"max_new_tokens": args.max_new_tokens, "max_prompt_length": args.max_prompt_length}
    options |= {"temperature": temperature, "stop": generation.TURNS}
    training, process = model.training, dist.get_rank()
    model.eval()
    with gathered(model), torch.no_grad():
        batches = [b for b in generation.batches_by_length(records, BATCH) if not all(r["id"] in done for r in b)]
        for batch in tqdm(batches[process :: dist.get_world_size()], desc=what, leave=False, disable=process != 0):
            if common.STOP["asked"]:
                break
            torch.manual_seed(zlib.crc32(f"{args.seed} {step} {batch[0]['id']}".encode()))
            found = generation.generate(model, tokenizer, [r["prompt"] for r in batch], **options)
            yield batch, [{"text": a["text"], "finished": a["finished"], "source": "bootstrap"} for [a] in found]
    model.train(training)


def rewards(batch, candidates, args):
    """The raw logits of --reward_model for a candidate each of some records, as `rank --by reward` gives them."""
    pairs = list(zip(batch, candidates))
    return reward_logits(args.reward_model, generation.local_device(), pairs, allow_pickle=args.allow_pickle)


def mean_reward(model, tokenizer, records, args, step):
    """100 x the mean sigmoid reward of greedy answers to the records' prompts, over all processes (Table 2's unit). A
    signal stops the run here: the mean of some answers is no figure."""
    total = 0.0
    for batch, found in answers(model, tokenizer, records, args, step, what="reward", temperature=0.0):
        found = [a | {"text": a["text"].strip()} for a in found]  # as evaluate.py reads answers
        logits = torch.tensor(rewards(batch, found, args), dtype=torch.float64)
        total += logits.sigmoid().sum().item()
    common.stop_if_asked()
    return 100 * common.all_sum([total])[0] / len(records)
