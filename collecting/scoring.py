"""Likelihoods of candidates under a model, in packed rows."""

import itertools

import torch

import common
from collecting import generation


def log_likelihoods(records, args):
    """Yield (record, logprobs [n], token counts [n]) under --model, prompts in packed rows of --batch_size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = generation.load_generator(args.model, device)
    records = iter(records)
    while batch := list(itertools.islice(records, args.batch_size)):
        encoded = [common.encode(tokenizer, r, args.max_length) for r in batch]
        with torch.inference_mode():
            logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        sizes = [len(e.responses) for e in encoded]
        yield from zip(batch, logprobs.split(sizes), lengths.split(sizes))
