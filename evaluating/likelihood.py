"""The verbs ranking and nll: what a model's likelihood says of responses that are there already."""

import math

import torch

import common
import runtime
from collecting import generation
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


def ranking_flags(add):
    model_flags(add, "ranking")
    add("--by", required=True, choices=sorted(LEVELS), help="the annotation that says which candidate is better")
    add(
        "--length_scaling",
        type=in_range(float, 0),
        default=1.0,
        help="length exponent of model responses (RESCUE: 0.85)",
    )
    add("--human_length_scaling", type=in_range(float, 0), default=1.0, help="length exponent of human responses")
    add(
        "--margin", type=in_range(float, 0), default=0.1, help="a pair closer than this is a margin violation (Tuna: m)"
    )
    add(
        "--length_penalty",
        type=in_range(float, 0),
        default=1.3,
        help="logprob: beta of the teacher's score (Tuna Eq. 3)",
    )
    scoring_flags(add)


def scoring_flags(add):
    add("--max_length", type=in_range(int, 8), default=512, help="tokens of prompt + one response")
    add("--max_response_length", type=in_range(int, 2), help="tokens of a response with EOS")
    add("--batch_size", type=in_range(int, 1), default=2, help="prompts a packed row")


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    rank, world, device = runtime.init_distributed()
    field = {"label": "correct", "human": "source"}.get(args.by, args.by)
    records = [annotated(r, field, args) for r in common.load_candidates(args.input)]
    records = [r for r in records if r["candidates"]]
    if not records:
        raise UserError(f"{args.input}: no candidate is ranked by {field!r}")

    @torch.inference_mode()
    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        encoded = [common.encode(tokenizer, r, args.max_length, args.max_response_length) for r in batch]
        logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        for record, logp, n in zip(
            batch,
            logprobs.split([len(e.responses) for e in encoded]),
            lengths.split([len(e.responses) for e in encoded]),
        ):
            human = torch.tensor([c["source"] in common.HUMAN for c in record["candidates"]], device=device)
            exponent = torch.where(human, args.human_length_scaling, args.length_scaling)
            levels = [float(LEVELS[args.by](c)) for c in record["candidates"]]
            yield {
                "scores": common.length_normalized(logp, n, exponent).tolist(),
                "levels": levels,
                "lengths": n.tolist(),
                "logprobs": logp.tolist(),
                "sources": [c["source"] for c in record["candidates"]],
            }

    rows = predict(args, "ranking", records, compute, rank, world)
    if rank == 0:
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin))


def annotated(record, field, args):
    """The record with those of its candidates that carry the annotation; the original response may lack it."""
    for i, c in enumerate(record["candidates"]):
        if field not in c and c["source"] not in common.HUMAN:
            raise UserError(
                f"{args.input}: record {record['id']!r}: candidates[{i}] has no {field!r}; "
                f"add it with: collect_candidates.py rank --by {args.by}"
            )
    candidates = [c for c in record["candidates"] if c.get(field) is not None]  # rank null: not ranked
    if field == "logprob":
        score = common.length_normalized
        candidates = [
            c | {"teacher_score": score(c["logprob"], c["num_tokens"], args.length_penalty)} for c in candidates
        ]
    return record | {"candidates": candidates}


def ranking_metrics(rows, margin):
    """-> pair accuracy, margin violations, mean margin over all ordered pairs, Kendall's tau-b averaged over prompts
    with pairs."""
    gaps, taus = [], []
    for row in rows:
        pairs = [
            (si - sj)
            for si, li in zip(row["scores"], row["levels"])
            for sj, lj in zip(row["scores"], row["levels"])
            if li > lj
        ]
        gaps += pairs
        if pairs:
            taus.append(kendall_tau(row["scores"], row["levels"]))
    if not gaps:
        raise UserError("no record has two candidates of different preference: nothing to compare")
    return {
        "pair_accuracy": sum(g > 0 for g in gaps) / len(gaps),
        "margin_violations": sum(g < margin for g in gaps) / len(gaps),
        "mean_margin": sum(gaps) / len(gaps),
        "kendall_tau": sum(taus) / len(taus),
        "pairs": len(gaps),
        "prompts": len(taus),
    }


def kendall_tau(a, b):
    """Kendall's tau-b of two lists: (concordant - discordant) / sqrt(pairs untied in a x pairs untied in b); 0 where
    one is all ties."""

    def sign(x):
        return (x > 0) - (x < 0)

    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    untied = sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs)
    return sum(x * y for x, y in pairs) / math.sqrt(untied) if untied else 0.0


def nll_flags(add):
    model_flags(add, "nll", "records with a reference (or human) response, JSONL")
    scoring_flags(add)


def nll(args):
    """Token NLL of the reference responses under a model, EOS included."""
    rank, world, device = runtime.init_distributed()
    records = []
    for record in common.load_candidates(args.input):
        references = [c for c in record["candidates"] if c["source"] in common.HUMAN]
        if not references:
            raise UserError(f"{args.input}: record {record['id']!r} has no reference response")
        records.append(record | {"candidates": references[:1]})

    @torch.inference_mode()
    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        encoded = [common.encode(tokenizer, r, args.max_length, args.max_response_length) for r in batch]
        logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        return [{"nll": -logp, "tokens": int(n)} for logp, n in zip(logprobs.tolist(), lengths.tolist())]

    rows = predict(args, "nll", records, compute, rank, world)
    if rank == 0:
        token_nll = sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
        by_response = mean(r["nll"] / r["tokens"] for r in rows)
        figures = {"token_nll": token_nll, "perplexity": math.exp(token_nll), "response_nll": by_response}
        write_metrics(args, "nll", figures | {"tokens": sum(r["tokens"] for r in rows), "prompts": len(rows)})
