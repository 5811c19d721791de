"""rank --by logprob, probabilistic and prm: a language model's likelihood, a proxy ranking model (Tuna)."""

import math
from collections import Counter

import torch
from scipy.stats import spearmanr
from transformers import AutoConfig

import common
from collecting import generation, scoring
from collecting.reward_models import reward_logits
from common import UserError, say


def log_likelihoods(records, args, eos):
    """Yield (record, logprobs [n], token counts [n]) under --model; prints how much --max_length cut."""
    cut = Counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for chunk in scoring.chunks(records):
        model, tokenizer = generation.load_generator(args.model, device, args.bf16)  # once
        scored = scoring.score_candidates(model, tokenizer, chunk, args.max_length, eos=eos, cut=cut)
        yield from ((record, *pair) for record, pair in zip(chunk, scored))
    prompts, responses = common.all_sum([cut["prompts"], cut["responses"]])
    say(f"cut to fit --max_length {args.max_length}: {prompts:.0f} prompts (left), {responses:.0f} responses (right)")


def rank_by_logprob(records, args):
    """Set every candidate's `logprob` and `num_tokens` under a local teacher, --model (Tuna Eq. 3 reads them), which
    `teacher` names. EOS counts in neither, as in `sample` and `teacher`."""
    by = {"teacher": common.run_name(args.model)}
    for record, logprobs, lengths in log_likelihoods(records, args, eos=False):
        values = zip(record["candidates"], logprobs.tolist(), lengths.tolist())
        yield record | {"candidates": [c | {"logprob": logp, "num_tokens": int(n)} | by for c, logp, n in values]}


def rank_by_probabilistic(records, args):
    """Set `rank` by the teacher's likelihood, logprob / num_tokens ** --length_penalty (Tuna Eq. 3).

    It is null where the likelihood is not known; `ranked_by` is the teacher. tuna.py --stage probabilistic does this
    by itself; here it is for Table 4 and for mixtures.
    """
    for record in records:
        known = [c for c in record["candidates"] if "logprob" in c and "num_tokens" in c]
        if not known:
            raise UserError(f"{args.input}: record {record['id']!r} has no logprob; add it with rank --by logprob")
        if len(teachers := {c.get("teacher", "a teacher not named") for c in known}) > 1:
            names = " and ".join(sorted(teachers))
            raise UserError(f"{args.input}: record {record['id']!r} has log-probabilities of {names}: two scales")
        scores = {id(c): c["logprob"] / c["num_tokens"] ** args.length_penalty for c in known}
        ranks = {i: sum(other > score for other in scores.values()) for i, score in scores.items()}
        ranked = [c | {"rank": ranks.get(id(c))} for c in record["candidates"]]
        yield record | {"candidates": ranked, "ranked_by": teachers.pop()}


def rank_by_prm(records, args):
    """Rank by a model trained on ranked records, Tuna's proxy ranking model: a language model by log p / length, a
    reward model (reward_model.py's) by its logit.

    The original response is not ranked, unless --rank_original: it is not the model's own (Sec. 2.3). A record that
    carries ranks keeps them: there the two rankings are compared (Spearman, averaged over prompts).
    """
    agreement = []
    for record, scores in prm_scores(records, args):
        candidates = record["candidates"]
        if not all(map(math.isfinite, scores)):
            raise UserError(f"--model {args.model}: its score of record {record['id']!r} is not finite")
        ranked = [i for i, c in enumerate(candidates) if c.get("rank") is not None]
        if len(ranked) > 1:
            agreement.append(spearman([-candidates[i]["rank"] for i in ranked], [scores[i] for i in ranked]))
        if not ranked:
            own = [args.rank_original or c["source"] not in common.HUMAN for c in candidates]
            scores = [score if some else None for score, some in zip(scores, own)]
            ranks = [s if s is None else sum(x > s for x in scores if x is not None) for s in scores]
            candidates = [c | {"rank": k} for c, k in zip(candidates, ranks)]
            record = record | {"candidates": candidates, "ranked_by": common.run_name(args.model)}
        yield record
    total, number = common.all_sum([sum(agreement), len(agreement)])
    if number:
        say(f"agreement with the ranking of {number:.0f} records: Spearman {total / number:.3f}")


def prm_scores(records, args):
    """Yield (record, scores [n]) under --model."""
    architectures = common.load_pretrained(AutoConfig, args.model).architectures or []
    if not any("SequenceClassification" in name or name == "RewardModel" for name in architectures):
        yield from ((r, (logprobs / lengths).tolist()) for r, logprobs, lengths in log_likelihoods(records, args, True))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"flag": "--model", "form": args.dialogue, "allow_pickle": args.allow_pickle}
    for chunk in scoring.chunks(records):
        rewards = iter(reward_logits(args.model, device, [(r, c) for r in chunk for c in r["candidates"]], **options))
        yield from ((record, [next(rewards) for _ in record["candidates"]]) for record in chunk)


def spearman(a, b):
    """Spearman's rank correlation of two lists of n > 1 numbers; 0 where one is constant, which orders nothing."""
    return float(spearmanr(a, b).statistic) if len({*a}) > 1 and len({*b}) > 1 else 0.0
