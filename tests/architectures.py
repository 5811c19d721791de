"""Tiny random models of many architectures, and encoded records of given lengths.

python -m tests.architectures      # the table of PAPERS.md: what reads packed rows, what needs --padded
"""

import collections
import dataclasses
import pathlib
import sys
import warnings

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import common  # noqa: E402
from common import Encoded, UserError, candidate_logprobs  # noqa: E402

# What `make` sets in a config of any kind, as far as the config has it: windows and chunks are shorter than a prompt
# with its response, and weights so large that a wrong mask shows.
WINDOW = 6
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 48}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "init_std": 0.2}
SMALL |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
SMALL |= {"sliding_window": WINDOW, "attention_chunk_size": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
SMALL |= {"d_model": 32, "n_layers": 2, "n_heads": 4, "num_layers": 2, "max_position_embeddings": 512}
SMALL |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "n_positions": 512, "rotary_dim": 8}
SMALL |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1}
SMALL |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SMALL |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}
SMALL |= {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SMALL |= dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop"), 0.0)
SMALL |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_dropout", "resid_dropout"), 0.0)
SMALL |= dict.fromkeys(("embd_dropout", "embedding_dropout", "router_jitter_noise", "input_jitter_noise"), 0.0)
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4}
FALCON = SIZES | {"initializer_range": 0.2}
OWN = {  # what a kind needs beside that
    "bamba": HEADS | {"attn_layer_indices": [1]},
    "falcon": FALCON | {"alibi": False},
    "falcon (alibi)": FALCON | {"alibi": True},
    "falcon_h1": MAMBA,
    "gemma3_text": BOTH,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": HEADS | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
}
OWN |= dict.fromkeys(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"), BOTH)
OWN |= dict.fromkeys(("ministral", "olmo3", "laguna", "mellum"), BOTH)


def make(name, **more):
    """A model of any kind in transformers -> the model. None if it is still large, or has other parts than text."""
    kind = name.partition(" ")[0]
    default, own = transformers.AutoConfig.for_model(kind), OWN.get(name, {})
    sizes = {k: v for k, v in SMALL.items() if hasattr(default, k)}
    if "qk_rope_head_dim" in sizes:  # latent attention: a head's size follows from these, and all heads have keys
        sizes = {k: v for k, v in sizes.items() if k != "head_dim"} | {"num_key_value_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **((own if kind == "falcon" else sizes | own) | more))
    auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        large = sum(p.numel() for p in auto.from_config(config).parameters()) > 2e6
    if config.get_text_config() is config and not large:
        torch.manual_seed(0)
        return auto.from_config(config).train()


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


@torch.no_grad()
def score_alone(model, encoded):
    """-> (the sum of log-probabilities, the number of tokens) of each candidate in the plainest way: one sequence at a
    time, no mask, no padding."""
    for response in encoded.responses:
        logits = model(torch.tensor([encoded.prompt_ids + response])).logits[0, len(encoded.prompt_ids) - 1 : -1]
        yield logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().item(), len(response)


def gradients(model, batch):
    """-> (log-probabilities [N], {parameter: gradient}) of a weighted sum of scores."""
    model.zero_grad()
    logprobs, lengths = candidate_logprobs(model, batch)
    (common.length_normalized(logprobs, lengths, 0.85) * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return logprobs.detach(), {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, bound=1e-5, floor=1e-4):
    """Relative difference of every parameter tensor; one whose gradient is rounding (a key's bias) beside a share,
    `floor`, of the whole."""
    assert got.keys() == want.keys()
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, g in want.items():
        assert (got[name] - g).norm() <= bound * max(g.norm(), floor * whole), name


def assert_packed_is_padded(model, encoded, floor=1e-4):
    """Scores and gradients of the row that training packs, and of one sequence per candidate."""
    packed, grads = gradients(model, common.pack_for(model, encoded))
    padded, padded_grads = gradients(model, common.pack_padded(encoded))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
    assert_same_gradients(grads, padded_grads, floor=floor)
    return padded


def is_causal(model):
    """Whether a token's logits leave those of the tokens before it alone."""
    a = torch.arange(3, 15)[None]
    with torch.no_grad():
        one, other = (model.eval()(x, use_cache=False).logits[:, :11] for x in (a, torch.cat([a[:, :11], a[:, :1]], 1)))
    return torch.allclose(one, other, atol=1e-4)


def outcome(name):
    """(how a tiny model of a kind reads: "packed", "--padded", or "no causal language model"; why), or None where there
    is none."""
    try:
        model = make(name)
        if model is None:
            return None
        if not is_causal(model):
            return "no causal language model", ""
    except Exception:  # a kind that needs other inputs, or other sizes
        return None
    try:
        common.set_attention(model, torch.device("cpu"))
        common.check_packing(model, TREE)
    except UserError as e:
        return "--padded", str(e)
    return "packed", ""


def main():
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    found = collections.defaultdict(list)
    for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OWN}):
        if how := outcome(name):
            found[how[0]].append(name)
    print("| reads | architectures (model_type) |\n|---|---|")
    for how in ("packed", "--padded"):
        print(f"| {how} | {', '.join(found[how])} |")


if __name__ == "__main__":
    main()
