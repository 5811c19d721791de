"""Likelihoods of candidates under a model, in packed rows, for `rank --by logprob` and prm, `evaluate.py ranking` and
nll."""

import torch

import common

ROW_TOKENS = {"cuda": 8192, "cpu": 1024}  # of a packed row; a longer prompt has a row of its own


@torch.inference_mode()
def score_candidates(model, tokenizer, records, max_length=512, max_prompt_length=None, eos=True):
    """-> [(logprobs [n], lengths [n])], a pair a record: each candidate's sum of token log-probabilities and its token
    count, fp32 on the model's device; the EOS of a whole response counts in both unless eos=False (an empty response
    is its EOS). The records share packed rows of ROW_TOKENS."""
    budget = ROW_TOKENS[model.device.type]
    rows, tokens, scored = [], budget, []
    for encoded in (common.encode(tokenizer, r, max_length, max_prompt_length) for r in records):
        if not eos:
            encoded.responses = [r[:-1] if r[-1] == tokenizer.eos_token_id and r[1:] else r for r in encoded.responses]
        if tokens + encoded.num_tokens > budget:
            rows, tokens = [*rows, []], 0
        rows[-1].append(encoded)
        tokens += encoded.num_tokens
    for row in rows:
        logprobs, lengths = common.candidate_logprobs(model, common.pack(row).to(model.device))
        sizes = [len(encoded.responses) for encoded in row]
        scored += zip(logprobs.split(sizes), lengths.split(sizes))
    return scored
