"""Scores of responses by packed rows: log-likelihoods and rewards.

A prompt and one response are a sequence. Sequences with a common start share a packed row, which reads the start once.
So a prompt with many candidates takes no more memory than a row.
"""

import torch

import common
from common import Encoded, UserError, say

ROW_TOKENS = {"cuda": 8192, "cpu": 1024}  # of a packed row, or three times the longest sequence: most of it is shared
CHUNK_ROWS = 4  # records of about that many rows are planned, shared out over processes, and then written, at once


def chunks(records):
    """Yield lists of consecutive records of about CHUNK_ROWS rows, a token taken for four characters."""
    room = 4 * CHUNK_ROWS * ROW_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    chunk, characters = [], 0
    for record in records:
        chunk.append(record)
        characters += len(record["prompt"]) + sum(len(c["text"]) for c in record["candidates"])
        if characters >= room:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@torch.inference_mode()
def score_rows(model, sequences, values_of, check):
    """Score sequences, Encoded with one response each -> [N, ...], what values_of(PackedBatch) gives each of a row.

    A model that misreads packed rows (state-space layers, attention in both directions) reads one sequence at a time.
    check(two sequences) raises UserError for such a model; it is called once a model.
    """
    common.set_attention(model, model.device)
    if not hasattr(model, "reads_rows"):
        by_length = sorted(sequences, key=lambda s: s.num_tokens)
        try:
            check([by_length[0], by_length[-1]])
            model.reads_rows = True
        except UserError as e:
            say(f"{model.config._name_or_path}: {e}; now one sequence at a time")
            model.reads_rows = False
    longest = max(s.num_tokens for s in sequences)
    budget = max(ROW_TOKENS[model.device.type], 3 * longest) if model.reads_rows else 1
    values, [plan] = [None] * len(sequences), common.plan_rows(sequences, budget, 1)
    for row, _ in plan:
        some = [sequences[i] for i in row]
        batch = common.pack_for(model, some) if model.reads_rows else common.pack_padded(some).to(model.device)
        for i, value in zip(row, values_of(batch), strict=True):
            values[i] = value
    return torch.stack(values)


def score_encoded(model, encoded):
    """-> [(logprobs [n], lengths [n])], a pair for each Encoded: its responses' sums of token log-probabilities and
    their token counts, fp32 on the model's device. EOS counts in both where it stands."""

    def values_of(batch):
        return torch.stack(common.candidate_logprobs(model, batch), 1)  # [N, 2]

    sequences = [Encoded(e.id, e.prompt_ids, [r], 0, 0) for e in encoded for r in e.responses]
    values = score_rows(model, sequences, values_of, lambda some: common.check_packing(model, some))
    return [v.unbind(1) for v in values.split([len(e.responses) for e in encoded])]
