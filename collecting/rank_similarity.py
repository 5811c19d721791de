"""rank --by similarity: how close each candidate is to the human response."""

import torch
from transformers import AutoModel, AutoTokenizer

import common
from collecting import scoring
from common import UserError


def rank_by_similarity(records, args):
    """Set every candidate's `similarity`: the cosine of its sentence embedding to that of the human response."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = common.load_pretrained(AutoModel, args.encoder, "--encoder").to(device).eval()
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
