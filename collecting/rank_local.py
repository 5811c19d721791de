"""The rankers that run a model here: rank --by logprob and prm (Tuna), reward (PRO), similarity (RESCUE)."""

import math

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import common
from collecting import reward_models, scoring
from collecting.generation import load_generator, local_device
from collecting.rank_given import with_ranks
from common import UserError, say


def log_likelihoods(records, args, eos):
    """Yield (record, logprobs [n], token counts [n]) under --model; prints how much --max_length cut. The EOS of a
    whole response counts in both if `eos`, or if the response is empty."""
    prompts, responses = 0, 0
    for chunk in scoring.chunks(records):
        model, tokenizer = load_generator(args.model, local_device(), args.bf16)
        encoded = [common.encode(tokenizer, r, args.max_length) for r in chunk]
        prompts += sum(e.prompt_cut > 0 for e in encoded)
        responses += sum(e.responses_cut for e in encoded)
        for e in encoded if not eos else []:
            e.responses = [r[:-1] if r[-1] == tokenizer.eos_token_id and r[1:] else r for r in e.responses]
        yield from ((record, *pair) for record, pair in zip(chunk, scoring.score_encoded(model, encoded)))
    prompts, responses = common.all_sum([prompts, responses])
    say(f"cut to fit --max_length {args.max_length}: {prompts:.0f} prompts (left), {responses:.0f} responses (right)")


def rewards(records, args, name, flag):
    """Yield (record, the raw logits [n] of the reward model `name`)."""
    for chunk in scoring.chunks(records):
        pairs = [(r, c) for r in chunk for c in r["candidates"]]
        options = {"flag": flag, "allow_pickle": args.allow_pickle}
        logits = iter(reward_models.reward_logits(name, local_device(), pairs, **options))
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
    for record, logits in rewards(records, args, args.reward_model, "--reward_model"):
        candidates = with_ranks([c | {"reward": x} for c, x in zip(record["candidates"], logits)], logits)
        candidates.sort(key=lambda c: c["rank"])
        yield record | {"candidates": candidates, "reward_model": args.reward_model}


def rank_by_prm(records, args):
    """Rank by a model trained on ranked records, Tuna's proxy ranking model: a language model by log p / length, a
    reward model (reward_model.py's) by its logit. The original response is not ranked, unless --rank_original: it is
    not the model's own (Sec. 2.3)."""
    for record, scores in prm_scores(records, args):
        if not all(map(math.isfinite, scores)):
            raise UserError(f"--model {args.model}: its score of record {record['id']!r} is not finite")
        candidates = record["candidates"]
        own = [args.rank_original or c["source"] not in common.HUMAN for c in candidates]
        candidates = with_ranks(candidates, [score if some else None for score, some in zip(scores, own)])
        yield record | {"candidates": candidates, "ranked_by": common.run_name(args.model)}


def prm_scores(records, args):
    """-> an iterator of (record, scores [n]) under --model."""
    architectures = common.load_pretrained(AutoConfig, args.model).architectures or []
    if any("SequenceClassification" in name or name == "RewardModel" for name in architectures):
        return rewards(records, args, args.model, "--model")
    return ((r, (logprobs / lengths).tolist()) for r, logprobs, lengths in log_likelihoods(records, args, eos=True))


def rank_by_similarity(records, args):
    """Set every candidate's `similarity`: the cosine of its sentence embedding to that of the human response."""
    model = common.load_pretrained(AutoModel, args.encoder, "--encoder").to(local_device()).eval()
    tokenizer = common.load_pretrained(AutoTokenizer, args.encoder, "--encoder")
    for chunk in scoring.chunks(records):
        texts = [c["text"] for r in chunk for c in r["candidates"]]
        vectors = embed(model, tokenizer, texts).split([len(r["candidates"]) for r in chunk])
        for record, own in zip(chunk, vectors):
            candidates = record["candidates"]
            human = next((i for i, c in enumerate(candidates) if c["source"] in common.HUMAN), None)
            if human is None:
                raise UserError(f"{args.input}: record {record['id']!r} has no human response to compare with")
            for c, cosine in zip(candidates, (own @ own[human]).tolist()):
                c["similarity"] = round(cosine, 6)
            yield record


@torch.inference_mode()
def embed(model, tokenizer, texts, max_length=256):
    """texts -> [len(texts), d] unit vectors: the mean of the last hidden states over each text's tokens.

    256 tokens are what all-MiniLM-L6-v2 was trained with; longer texts are cut, as sentence-transformers does.
    """
    inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    hidden = model(**inputs).last_hidden_state  # [B, L, d]
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
