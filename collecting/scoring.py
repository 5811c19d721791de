"""One reading for all that is scored, log-likelihoods and rewards: a prompt and one response are a sequence, and those
that begin alike stand in one packed row, which reads the start once. So a prompt of any number of candidates takes no
more memory than a row."""

import torch
import torch.distributed as dist
from tqdm import tqdm

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


def token_bar(total):
    """A bar that says how many tokens a second are read, on process 0."""
    quiet = dist.is_initialized() and dist.get_rank() != 0
    return tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=quiet)


@torch.inference_mode()
def score_rows(model, sequences, values_of, check):
    """Score sequences, Encoded with one response each -> [N, ...], what values_of(PackedBatch) gives each of a row.

    A model that reads packed rows otherwise (state-space layers, attention in both directions) reads
    one sequence at a time: check(two sequences), called once, or values_of raises UserError.
    """
    device = model.device
    common.set_attention(model, device)
    budget = max(ROW_TOKENS[device.type], 3 * max(s.num_tokens for s in sequences))
    values, plan = [None] * len(sequences), common.plan_rows(sequences, budget, 1)[0]
    rows = [[sequences[i] for i in row] for row, _ in plan]
    with token_bar(sum(s.num_tokens for s in sequences)) as bar:
        for (row, _), some in zip(plan, rows):
            scored = None
            try:
                if not hasattr(model, "reads_rows"):
                    by_length = sorted(sequences, key=lambda s: s.num_tokens)
                    check([by_length[0], by_length[-1]])
                    model.reads_rows = True
                if model.reads_rows:
                    scored = values_of(common.pack_for(model, some))
            except UserError as e:
                say(f"{model.config._name_or_path}: {e}; now one sequence at a time")
                model.reads_rows = False
            if scored is None:
                scored = [values_of(common.pack_padded([s]).to(device))[0] for s in some]
            for i, value in zip(row, scored, strict=True):
                values[i] = value
            bar.update(sum(s.num_tokens for s in some))
    return torch.stack(values)


def score_candidates(model, tokenizer, records, max_length=512, max_prompt_length=None, eos=True, cut=None):
    """-> [(logprobs [n], lengths [n])], a pair a record: each candidate's sum of token log-probabilities and its token
    count, fp32 on the model's device; the EOS of a whole response counts in both unless eos=False (an empty response
    is its EOS). cut: a Counter that gains how many prompts and responses did not fit."""
    encoded = [common.encode(tokenizer, r, max_length, max_prompt_length) for r in records]
    if cut is not None:
        cut.update(prompts=sum(e.prompt_cut > 0 for e in encoded), responses=sum(e.responses_cut for e in encoded))
    for e in [] if eos else encoded:
        e.responses = [r[:-1] if r[-1] == tokenizer.eos_token_id and r[1:] else r for r in e.responses]
    return score_encoded(model, encoded)


def score_encoded(model, encoded):
    """score_candidates of records that are encoded already."""

    def values_of(batch):
        return torch.stack(common.candidate_logprobs(model, batch), 1)  # [N, 2]

    sequences = [Encoded(e.id, e.prompt_ids, [r], 0, 0) for e in encoded for r in e.responses]
    values = score_rows(model, sequences, values_of, lambda some: common.check_packing(model, some))
    return [v.unbind(1) for v in values.split([len(e.responses) for e in encoded])]
