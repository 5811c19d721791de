"""The verbs ranking and nll: what a model's likelihood says of responses that are there already."""

import itertools
import math

import torch

import common
from collecting import generation
from collecting.files import load_candidates
from collecting.flags import group
from collecting.scoring import chunks, score_encoded
from common import HUMAN, UserError, in_range
from evaluating.shared import mean, model_flags, predict, write_metrics

# --by -> the field of a candidate that it reads
FIELDS = {"human": "source", "label": "correct", "reward": "reward", "rank": "rank", "similarity": "similarity"}
FIELDS |= {"logprob": "logprob"}


# fmt: off
def ranking_flags(add):
    model_flags(add, "ranking")
    number = in_range(float, 0)
    add("--by", required=True, choices=sorted(FIELDS), help="the annotation that says which candidate is better")
    add("--length_scaling", type=number, default=1.0, help="length exponent of model responses (RESCUE: 0.85)")
    add("--human_length_scaling", type=number, default=1.0, help="length exponent of human responses")
    add("--margin", type=number, default=0.0, help="a pair closer than this is a margin violation (Tuna: 0.1)")
    add("--length_penalty", type=number, default=1.3, help="logprob: beta of the teacher's score (Tuna Eq. 3)")
    scoring_flags(add)


def scoring_flags(add):
    add = group(add, "scoring")
    add("--max_length", type=in_range(int, 8), default=512, help="tokens of prompt + one response")
    add("--max_prompt_length", type=in_range(int, 2), help="of them (default: the response goes first)")


def nll_flags(add):
    model_flags(add, "nll", "records with a reference (or human) response, JSONL")
    scoring_flags(add)
# fmt: on


def score(args, records, device):
    """-> (record, its Encoded, logprobs [n], lengths [n]) of each record's candidates under --model."""
    model, tokenizer = generation.load_generator(args.model, device)
    encoded = [common.encode(tokenizer, r, args.max_length, args.max_prompt_length) for r in records]
    return [(r, e, *scored) for r, e, scored in zip(records, encoded, score_encoded(model, encoded))]


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    records = [annotated(r, args) for r in load_candidates(args.input)]
    records = [r for r in records if r["candidates"]]
    if not records:
        raise UserError(f"{args.input}: no candidate is ranked by {args.by!r}")

    def compute(records, device):
        for record, _, logprobs, lengths in score(args, records, device):
            sources = [c["source"] for c in record["candidates"]]
            exponents = [args.human_length_scaling if s in HUMAN else args.length_scaling for s in sources]
            scores = common.length_normalized(logprobs, lengths, torch.tensor(exponents, device=device))
            row = {"scores": scores.tolist(), "levels": [level(c, args) for c in record["candidates"]]}
            yield row | {"lengths": lengths.tolist(), "logprobs": logprobs.tolist(), "sources": sources}

    if rows := predict(args, "ranking", records, compute, chunks):
        taus = kendall_taus(rows)
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin, taus), {f"kendall_tau by {args.by}": taus})


def annotated(record, args):
    """The record with those of its candidates that carry the annotation; the original response may lack it."""
    needed, kept = ["logprob", "num_tokens"] if args.by == "logprob" else [FIELDS[args.by]], {}
    for i, c in enumerate(record["candidates"]):
        absent = [field for field in needed if field not in c]
        if absent and c["source"] not in HUMAN:
            where = f"{args.input}: record {record['id']!r}: candidates[{i}]"
            raise UserError(f"{where} has no {absent[0]!r}; add it with: collect_candidates.py rank --by {args.by}")
        if not absent and c[needed[0]] is not None:  # rank null: not ranked
            kept.setdefault(c["text"].strip() if args.by == "logprob" else i, c)  # as in training: no text twice
    return record | {"candidates": [*kept.values()]}


def level(candidate, args):
    """A candidate's preference level by the annotation, larger better."""
    value = candidate[FIELDS[args.by]]
    if args.by == "human":
        return float(value in HUMAN)
    if args.by == "logprob":
        return common.length_normalized(value, candidate["num_tokens"], args.length_penalty)
    return -float(value) if args.by == "rank" else float(value)


def kendall_taus(rows):
    """{id: Kendall's tau-b of scores and levels} of the prompts with pairs; 0 where the scores are all the same."""
    from scipy.stats import kendalltau

    compared = [row for row in rows if len(set(row["levels"])) > 1]
    taus = {row["id"]: float(kendalltau(row["scores"], row["levels"]).statistic) for row in compared}
    return {i: 0.0 if math.isnan(tau) else tau for i, tau in taus.items()}


def ranking_metrics(rows, margin, taus):
    """-> pair accuracy, margin violations, mean margin over all ordered pairs, the mean of the prompts' `taus`."""
    pairs = [pair for row in rows for pair in itertools.permutations(zip(row["scores"], row["levels"]), 2)]
    gaps = [better - worse for (better, high), (worse, low) in pairs if high > low]
    if not gaps:
        raise UserError("no record has two candidates of different preference: nothing to compare")
    return {
        "pair_accuracy": mean(g > 0 for g in gaps),
        "margin_violations": mean(g < margin for g in gaps),
        "mean_margin": mean(gaps),
        "kendall_tau": mean(taus.values()),
        "pairs": len(gaps),
        "prompts": len(taus),
    }


def nll(args):
    """Token NLL of the reference responses under a model, EOS included; of a response that --max_length cuts, of what
    is left, so how many these are is said."""
    records = load_candidates(args.input)
    for record in records:
        record["candidates"] = [c for c in record["candidates"] if c["source"] in HUMAN][:1]
        if not record["candidates"]:
            raise UserError(f"{args.input}: record {record['id']!r} has no reference response")

    def compute(records, device):
        for _, e, logp, n in score(args, records, device):
            yield {"nll": -logp.item(), "tokens": int(n), "cut": e.responses_cut, "prompt_cut": e.prompt_cut}

    if rows := predict(args, "nll", records, compute, chunks):
        items = {r["id"]: r["nll"] / r["tokens"] for r in rows}
        tokens = sum(r["tokens"] for r in rows)
        token_nll = sum(r["nll"] for r in rows) / tokens
        figures = {"token_nll": token_nll, "perplexity": math.exp(min(token_nll, 700))}
        figures |= {"response_nll": mean(items.values()), "cut_responses": sum(r["cut"] for r in rows)}
        figures |= {"cut_prompts": sum(r["prompt_cut"] > 0 for r in rows), "tokens": tokens, "prompts": len(rows)}
        write_metrics(args, "nll", figures, {"response_nll": items})
