"""The verbs ranking and nll: what a model's likelihood says of responses that are there already."""

import math

import torch

import common
from collecting import generation
from collecting.flags import group
from collecting.scoring import chunks, score_candidates
from common import UserError, in_range
from evaluating.shared import mean, model_flags, predict, write_metrics

LEVELS = {  # --by -> a candidate's preference level, larger better
    "human": lambda c: c["source"] in common.HUMAN,
    "label": lambda c: c["correct"],
    "reward": lambda c: c["reward"],
    "rank": lambda c: -c["rank"],
    "similarity": lambda c: c["similarity"],
    "logprob": lambda c: c["teacher_score"],
}


# fmt: off
def ranking_flags(add):
    model_flags(add, "ranking")
    number = in_range(float, 0)
    add("--by", required=True, choices=sorted(LEVELS), help="the annotation that says which candidate is better")
    add("--length_scaling", type=number, default=1.0, help="length exponent of model responses (RESCUE: 0.85)")
    add("--human_length_scaling", type=number, default=1.0, help="length exponent of human responses")
    add("--margin", type=number, default=0.1, help="a pair closer than this is a margin violation (Tuna: m)")
    add("--length_penalty", type=number, default=1.3, help="logprob: beta of the teacher's score (Tuna Eq. 3)")
    scoring_flags(add)


def scoring_flags(add):
    add = group(add, "scoring")
    add("--max_length", type=in_range(int, 8), default=512, help="tokens of prompt + one response")
    add("--max_prompt_length", type=in_range(int, 2), help="of them; without, the response goes first (PRO: 384)")


def nll_flags(add):
    model_flags(add, "nll", "records with a reference (or human) response, JSONL")
    scoring_flags(add)
# fmt: on


def score(args, records, device):
    """-> (record, logprobs [n], lengths [n]) of each record's candidates under --model."""
    model, tokenizer = generation.load_generator(args.model, device)
    scored = score_candidates(model, tokenizer, records, args.max_length, args.max_prompt_length)
    return [(record, *pair) for record, pair in zip(records, scored)]


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    field = {"label": "correct", "human": "source"}.get(args.by, args.by)
    records = [annotated(r, field, args) for r in common.load_candidates(args.input)]
    records = [r for r in records if r["candidates"]]
    if not records:
        raise UserError(f"{args.input}: no candidate is ranked by {field!r}")

    def compute(records, device):
        for record, logprobs, lengths in score(args, records, device):
            sources = [c["source"] for c in record["candidates"]]
            exponents = [args.human_length_scaling if s in common.HUMAN else args.length_scaling for s in sources]
            scores = common.length_normalized(logprobs, lengths, torch.tensor(exponents, device=device))
            yield {
                "scores": scores.tolist(),
                "levels": [float(LEVELS[args.by](c)) for c in record["candidates"]],
                "lengths": lengths.tolist(),
                "logprobs": logprobs.tolist(),
                "sources": sources,
            }

    if rows := predict(args, "ranking", records, compute, chunks):
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin))


def annotated(record, field, args):
    """The record with those of its candidates that carry the annotation; the original response may lack it."""
    for i, c in enumerate(record["candidates"]):
        if field not in c and c["source"] not in common.HUMAN:
            where = f"{args.input}: record {record['id']!r}: candidates[{i}]"
            raise UserError(f"{where} has no {field!r}; add it with: collect_candidates.py rank --by {args.by}")
    candidates = [c for c in record["candidates"] if c.get(field) is not None]  # rank null: not ranked
    if field == "logprob":
        scores = (common.length_normalized(c["logprob"], c["num_tokens"], args.length_penalty) for c in candidates)
        candidates = [c | {"teacher_score": s} for c, s in zip(candidates, scores)]
    return record | {"candidates": candidates}


def ranking_metrics(rows, margin):
    """-> pair accuracy, margin violations, mean margin over all ordered pairs, Kendall's tau-b averaged over prompts
    with pairs (0 where the scores are all the same)."""
    from scipy.stats import kendalltau

    gaps, taus = [], []
    for row in rows:
        both = list(zip(row["scores"], row["levels"]))
        gaps += [better - worse for better, high in both for worse, low in both if high > low]
        if len(set(row["levels"])) > 1:
            tau = kendalltau(row["scores"], row["levels"]).statistic
            taus.append(0.0 if math.isnan(tau) else float(tau))
    if not gaps:
        raise UserError("no record has two candidates of different preference: nothing to compare")
    return {
        "pair_accuracy": mean(g > 0 for g in gaps),
        "margin_violations": mean(g < margin for g in gaps),
        "mean_margin": mean(gaps),
        "kendall_tau": mean(taus),
        "pairs": len(gaps),
        "prompts": len(taus),
    }


def nll(args):
    """Token NLL of the reference responses under a model, EOS included."""
    records = []
    for record in common.load_candidates(args.input):
        references = [c for c in record["candidates"] if c["source"] in common.HUMAN]
        if not references:
            raise UserError(f"{args.input}: record {record['id']!r} has no reference response")
        records.append(record | {"candidates": references[:1]})

    def compute(records, device):
        return [{"nll": -logp.item(), "tokens": int(n)} for _, logp, n in score(args, records, device)]

    if rows := predict(args, "nll", records, compute, chunks):
        tokens = sum(r["tokens"] for r in rows)
        token_nll = sum(r["nll"] for r in rows) / tokens
        by_response = mean(r["nll"] / r["tokens"] for r in rows)
        figures = {"token_nll": token_nll, "perplexity": math.exp(token_nll), "response_nll": by_response}
        write_metrics(args, "nll", figures | {"tokens": tokens, "prompts": len(rows)})
