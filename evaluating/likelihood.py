"""The verbs ranking and nll: what a model's likelihood says of responses that are there already."""

import itertools
import math

import torch

import common
from collecting import generation
from collecting.files import load_candidates
from collecting.flags import group
from collecting.scoring import chunks, score_encoded
from common import HUMAN, UserError, in_range, say
from evaluating.shared import mean, model_flags, predict, write_metrics


def hybrid(c):
    """Human, then right (QA: right and anchored in the gold passage, then right), then wrong: as rescue.py's."""
    return 2 if c["source"] in HUMAN else c["correct"] + (c["correct"] and c.get("anchor") == "gold")


LEVELS = {  # --by -> what it reads of a candidate, and the candidate's preference level by it, larger better
    "human": ("source", lambda c: c["source"] in HUMAN),
    "label": ("correct", lambda c: c["correct"]),
    "hybrid": ("correct", hybrid),
    "reward": ("reward", lambda c: c["reward"]),
    "rank": ("rank", lambda c: -c["rank"]),
    "similarity": ("similarity", lambda c: c["similarity"]),
    "logprob": ("logprob", lambda c: c["teacher_score"]),
}
# What a model was trained with is what it is measured with: flags that are not given come from its run
WITHOUT_A_RUN = {"length_scaling": 1.0, "human_length_scaling": 1.0, "margin": 0.0, "length_penalty": 1.3}
WITHOUT_A_RUN |= {"max_length": 512, "max_prompt_length": None}
OF_RUN = "(default: the run's, else %s)"


# fmt: off
def ranking_flags(add):
    model_flags(add, "ranking")
    number = in_range(float, 0)
    add("--by", required=True, choices=sorted(LEVELS), help="the annotation that says which candidate is better")
    add("--length_scaling", type=number, help=f"length exponent of model responses {OF_RUN % 1}")
    add("--human_length_scaling", type=number, help=f"length exponent of human responses {OF_RUN % 1}")
    add("--margin", type=number, help=f"a pair closer than this is a margin violation {OF_RUN % 0}; only Tuna has one")
    add("--length_penalty", type=number, help=f"logprob: beta of the teacher's score, Tuna Eq. 3 {OF_RUN % 1.3}")
    scoring_flags(add)


def scoring_flags(add):
    add = group(add, "scoring")
    add("--max_length", type=in_range(int, 8), help=f"tokens of prompt + one response {OF_RUN % 512}")
    add("--max_prompt_length", type=in_range(int, 2), help=f"of them {OF_RUN % 'none: the response goes first'}")


def nll_flags(add):
    model_flags(add, "nll", "records with a reference (or human) response, JSONL")
    scoring_flags(add)
# fmt: on


def as_trained(args):
    """Fill the flags that were not given: from args.json of the run that left --model, else WITHOUT_A_RUN."""
    found = WITHOUT_A_RUN | common.run_settings(args.model)
    found |= {k: v for k, v in vars(args).items() if v is not None}
    used = {k: found[k] for k in WITHOUT_A_RUN if hasattr(args, k)}
    vars(args).update(used)
    say("measured with:", ", ".join(f"{k} {v}" for k, v in used.items()))


def score(args, records, device):
    """-> (record, its Encoded, logprobs [n], lengths [n]) of each record's candidates under --model."""
    model, tokenizer = generation.load_generator(args.model, device)
    encoded = [common.encode(tokenizer, r, args.max_length, args.max_prompt_length) for r in records]
    return [(r, e, *scored) for r, e, scored in zip(records, encoded, score_encoded(model, encoded))]


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    as_trained(args)
    records = [annotated(r, args) for r in load_candidates(args.input)]
    records = [r for r in records if r["candidates"]]
    if not records:
        raise UserError(f"{args.input}: no candidate is ranked by {args.by!r}")

    def compute(records, device):
        for record, _, logprobs, lengths in score(args, records, device):
            sources = [c["source"] for c in record["candidates"]]
            exponents = [args.human_length_scaling if s in HUMAN else args.length_scaling for s in sources]
            scores = common.length_normalized(logprobs, lengths, torch.tensor(exponents, device=device))
            row = {"scores": scores.tolist(), "levels": [float(LEVELS[args.by][1](c)) for c in record["candidates"]]}
            yield row | {"lengths": lengths.tolist(), "logprobs": logprobs.tolist(), "sources": sources}

    if rows := predict(args, "ranking", records, compute, chunks):
        taus = kendall_taus(rows)
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin, taus), {f"kendall_tau by {args.by}": taus})


def annotated(record, args):
    """The record with those of its candidates that carry the annotation; the original response may lack it."""
    field, candidates = LEVELS[args.by][0], record["candidates"]
    needs = (field, "num_tokens") if args.by == "logprob" else (field,)
    for i, c in enumerate(candidates):
        absent = [k for k in needs if k not in c]
        if absent and c["source"] not in HUMAN:
            by = "label" if field == "correct" else args.by
            where = f"{args.input}: record {record['id']!r}: candidates[{i}]"
            raise UserError(f"{where} has no {absent[0]!r}; add it with: collect_candidates.py rank --by {by}")
    if args.by != "hybrid":
        candidates = [c for c in candidates if all(c.get(k) is not None for k in needs)]  # rank null: not ranked
    if args.by == "logprob":
        texts = {}  # as in training a repeated text is no pair
        for c in candidates:
            texts.setdefault(c["text"].strip(), c)
        candidates = [*texts.values()]
        for c in candidates:
            c["teacher_score"] = common.length_normalized(c["logprob"], c["num_tokens"], args.length_penalty)
    return record | {"candidates": candidates}


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
    as_trained(args)
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
