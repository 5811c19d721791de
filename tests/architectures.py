"""Tiny random models of many architectures, and encoded records of given lengths."""

import dataclasses

import torch
import transformers

import common
from common import Encoded, candidate_logprobs

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 512},
}


def make(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(ARCHITECTURES.get(kind, LLAMA) | more))
    return transformers.AutoModelForCausalLM.from_config(config).train()


def make_encoded(*shapes):
    """shapes: (prompt length, response lengths) of each record."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 64, (n,), generator=g).tolist()  # noqa: E731
    return [Encoded(str(i), draw(P), [draw(r) for r in R], 0, 0) for i, (P, R) in enumerate(shapes)]


ENCODED = make_encoded((11, [5, 3, 7]), (6, [4, 9]))


def make_tree():
    """Records whose sequences share starts in every way there is."""
    a, b = make_encoded((9, [6, 4]), (5, [7]))
    follow = lambda i, prompt, *responses: Encoded(str(i), prompt, [*responses], 0, 0)  # noqa: E731
    first, second = a.responses
    return [
        follow(0, a.prompt_ids, first, second, first[:3] + second, first),  # a shared start, the same candidate twice
        follow(1, a.prompt_ids + b.prompt_ids, *b.responses, [1]),  # a prompt before it is the start of this one
        follow(2, a.prompt_ids[:4] + b.prompt_ids, second, b.responses[0]),  # a template
        follow(3, a.prompt_ids + first[:2], first[2:], second),  # the end of a prompt stands in another's candidate
        follow(4, a.prompt_ids[:1], [1], [5, 1]),  # one token
        follow(5, [2], [1], first),
        follow(6, b.prompt_ids, second),
    ]


TREE = make_tree()
LONG = make_encoded((150, [40, 90, 1]), (1, [1, 1]), (300, [128] * 3), (20, [60, 7, 130, 33]))
FEW_SHOT = [dataclasses.replace(e, prompt_ids=LONG[2].prompt_ids + e.prompt_ids) for e in LONG]


def gradients(model, batch):
    model.zero_grad()
    logprobs, lengths = candidate_logprobs(model, batch)
    (common.length_normalized(logprobs, lengths, 0.85) * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return logprobs.detach(), {n: full(p.grad).clone() for n, p in model.named_parameters()}


def assert_same_gradients(got, want, bound=1e-5):
    """Relative difference of every parameter tensor; one whose gradient is rounding (a key's bias) beside the whole."""
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, g in want.items():
        assert (got[name] - g).norm() <= bound * max(g.norm(), 1e-4 * whole), name
