"""The rankers that run a model here: rank --by logprob and prm (Tuna), reward (PRO), similarity (RESCUE)."""

import math
from collections import Counter

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import common
from collecting import generation, reward_models, scoring
from collecting.rank_given import spearman, with_ranks
from common import UserError, say


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def log_likelihoods(records, args, eos):
    """Yield (record, logprobs [n], token counts [n]) under --model; prints how much --max_length cut."""
    cut = Counter()
    for chunk in scoring.chunks(records):
        model, tokenizer = generation.load_generator(args.model, device(), args.bf16)  # once
        scored = scoring.score_candidates(model, tokenizer, chunk, args.max_length, eos=eos, cut=cut)
        yield from ((record, *pair) for record, pair in zip(chunk, scored))
    prompts, responses = common.all_sum([cut["prompts"], cut["responses"]])
    say(f"cut to fit --max_length {args.max_length}: {prompts:.0f} prompts (left), {responses:.0f} responses (right)")


def rewards(records, args, name, flag):
    """Yield (record, the raw logits [n] of the reward model `name`)."""
    options = {"flag": flag, "form": args.dialogue, "allow_pickle": args.allow_pickle}
    for chunk in scoring.chunks(records):
        pairs = [(r, c) for r in chunk for c in r["candidates"]]
        logits = iter(reward_models.reward_logits(name, device(), pairs, **options))
        yield from ((record, [next(logits) for _ in record["candidates"]]) for record in chunk)


def rank_by_logprob(records, args):
    """Set every candidate's `logprob` and `num_tokens` under a local teacher, --model (Tuna Eq. 3 reads them), which
    `teacher` names. EOS counts in neither, as in `sample` and `teacher`."""
    by = {"teacher": common.run_name(args.model)}
    for record, logprobs, lengths in log_likelihoods(records, args, eos=False):
        values = zip(record["candidates"], logprobs.tolist(), lengths.tolist())
        yield record | {"candidates": [c | {"logprob": logp, "num_tokens": int(n)} | by for c, logp, n in values]}


def rank_by_reward(records, args):
    """Set every candidate's `reward`, the raw logit, and sort the candidates, best first (PRO Sec. 4.3)."""
    gaps = []  # of the responses that people chose and rejected
    for record, logits in rewards(records, args, args.reward_model, "--reward_model"):
        candidates = [c | {"reward": logit} for c, logit in zip(record["candidates"], logits)]
        own = {c["source"]: c["reward"] for c in candidates if c["source"] in ("chosen", "rejected")}
        gaps += [own["chosen"] - own["rejected"]] if len(own) == 2 else []
        candidates.sort(key=lambda c: -c["reward"])
        candidates = with_ranks(candidates, [c["reward"] for c in candidates])
        yield record | {"candidates": candidates, "reward_model": args.reward_model}
    agrees, equal, total = common.all_sum([sum(g > 0 for g in gaps), gaps.count(0), len(gaps)])
    if total:
        say(
            f"{args.reward_model} prefers the chosen response to the rejected one in {agrees:.0f} of "
            f"{total:.0f} pairs; {equal:.0f} have equal rewards"
        )


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
            candidates = with_ranks(candidates, [score if some else None for score, some in zip(scores, own)])
            record = record | {"candidates": candidates, "ranked_by": common.run_name(args.model)}
        yield record
    total, number = common.all_sum([sum(agreement), len(agreement)])
    if number:
        say(f"agreement with the ranking of {number:.0f} records: Spearman {total / number:.3f}")


def prm_scores(records, args):
    """-> an iterator of (record, scores [n]) under --model."""
    architectures = common.load_pretrained(AutoConfig, args.model).architectures or []
    if any("SequenceClassification" in name or name == "RewardModel" for name in architectures):
        return rewards(records, args, args.model, "--model")
    return ((r, (logprobs / lengths).tolist()) for r, logprobs, lengths in log_likelihoods(records, args, eos=True))


def rank_by_similarity(records, args):
    """Set every candidate's `similarity`: the cosine of its sentence embedding to that of the human response."""
    model = common.load_pretrained(AutoModel, args.encoder, "--encoder").to(device()).eval()
    tokenizer = common.load_pretrained(AutoTokenizer, args.encoder, "--encoder")
    for chunk in scoring.chunks(records):
        for record in chunk:
            if not any(c["source"] in common.HUMAN for c in record["candidates"]):
                raise UserError(f"{args.input}: record {record['id']!r} has no human response to compare with")
        texts = [c["text"] for r in chunk for c in r["candidates"]]
        vectors = embed(model, tokenizer, texts).split([len(r["candidates"]) for r in chunk])
        for record, vector in zip(chunk, vectors):
            human = next(i for i, c in enumerate(record["candidates"]) if c["source"] in common.HUMAN)
            for c, cosine in zip(record["candidates"], (vector @ vector[human]).tolist()):
                c["similarity"] = round(cosine, 6)
            yield record


@torch.inference_mode()
def embed(model, tokenizer, texts, max_length=256):
    """texts -> [len(texts), d] unit vectors: the mean of the last hidden states over each text's tokens.

    256 tokens are what all-MiniLM-L6-v2 was trained with; longer texts are cut, as sentence-transformers does.
    """
    ids = tokenizer(texts, truncation=True, max_length=max_length).input_ids
    order, vectors = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
    with scoring.token_bar(sum(map(len, ids))) as bar:
        while order:  # the longest together, within a row's tokens
            n = max(1, scoring.ROW_TOKENS[model.device.type] // len(ids[order[-1]]))
            batch, order = order[-n:], order[:-n]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)
            hidden = model(**inputs).last_hidden_state  # [B, L, d]
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            for i, vector in zip(batch, means):
                vectors[i] = vector
            bar.update(sum(len(ids[i]) for i in batch))
    return torch.stack(vectors)
