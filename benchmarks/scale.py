"""Memory and communication of training under FSDP2, computed from parameter counts: the tables of SCALE.md.

    python benchmarks/scale.py

No weights and no GPU are needed: models are built on the meta device. tests/test_benchmarks.py finds state, gathered
and reduced bytes equal to torch's on 8 fake processes. GB are 10^9 bytes. W processes; fp32 master weights, computing
in bf16, fp32 reduction, as common.shard sets it up:

    state         (4 weights + 4 gradients + 8 Adam) bytes x parameters / W
    gathered      bf16: the root (embedding, head: from the forward to the end of the backward), and two layers (the one
                  that computes and the one that is being fetched)
    reduced       one layer's gradients in bf16, and its fp32 copy on the way to the reduce-scatter
    activations   of a row of T tokens: what autograd keeps of each layer, counted by torch; with
                  --activation_checkpointing a layer's input each, and one layer whole
    logits        of 4,096 response tokens, in bf16 and in fp32 twice
    traffic       received by a GPU for each row: layers gathered twice and the root once in bf16, all reduced in fp32,
                  (W - 1) / W of each. A row's arithmetic takes 6 x parameters x T FLOPs.
    whole         a model that common.stays_whole keeps gathered: all weights in bf16 and all gradients in fp32 on every
                  GPU; received once a step, however many rows it has
"""

import pathlib
import sys

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common  # noqa: E402

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}
T = 8192  # the default row on CUDA
GPU, PEAK = 80e9, 989e12  # an H100: memory, dense bf16 FLOP/s
SHARE = 0.35  # of PEAK that the arithmetic reaches


class FlexAttentionsMemory(torch.autograd.Function):
    """Keeps what FlexAttention keeps (queries, keys, values, output, one fp32 a head and query); computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return out


def attention(module, query, key, value, mask, **kwargs):
    return FlexAttentionsMemory.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flex_memory", attention)


def build(shape, device, **more):
    config = AutoConfig.for_model("llama", use_cache=False, **(shape | more))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def kept_bytes(shape, tokens, layers):
    """What autograd keeps for the backward of a bf16 model with so many layers, weights not counted."""
    model = build(shape | {"num_hidden_layers": layers}, "meta", attn_implementation="flex_memory").bfloat16().train()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its number is not given to another
        return x

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model.model(input_ids=ids, position_ids=ids)
    del output
    return sum(s.nbytes() for s in kept.values())


def predict(shape, world, tokens=T):
    """-> a dict of bytes for each GPU; see the module's docstring."""
    model = build(shape, "meta")
    total, layers = sum(p.numel() for p in model.parameters()), len(common.decoder_layers(model))
    layer = sum(p.numel() for p in common.decoder_layers(model)[0].parameters())
    root, share = total - layer * layers, (world - 1) / world
    each_layer = kept_bytes(shape, tokens, 2) - kept_bytes(shape, tokens, 1)
    return {
        "parameters": total,
        "state": 16 * total / world,
        "gathered": 2 * root + 2 * 2 * layer,
        "reduced": (2 + 4) * layer,
        "activations": each_layer * layers,
        "checkpointed": 2 * shape["hidden_size"] * tokens * layers + each_layer,
        "logits": 4096 * 32000 * (2 + 4 + 4),
        "gather traffic": share * 2 * (2 * layer * layers + root),
        "reduce traffic": share * 4 * total,
        "whole": (2 + 4) * total,
        "whole gather traffic": share * 2 * total,
        "seconds": 6 * total * tokens / (SHARE * PEAK),
    }


def row(*cells):
    print(f"| {' | '.join(x if isinstance(x, str) else f'{x:.1f}' for x in cells)} |")


def main():
    found = {(name, world): predict(shape, world) for name, shape in SHAPES.items() for world in (4, 8, 64)}
    row("model", "GPUs", "state", "gathered + reduced", "activations", "checkpointed", "logits", "of 80 GB")
    row(*["---"] * 8)
    for (name, world), p in found.items():
        fixed = p["state"] + p["gathered"] + p["reduced"] + p["logits"]
        plain, less = (fixed + p[k] for k in ("activations", "checkpointed"))
        fits = f"{plain / 1e9:.1f}" if plain < 0.9 * GPU else f"{less / 1e9:.1f}, checkpointed"  # the allocator's tenth
        fits = fits if less < 0.9 * GPU else f"no ({less / 1e9:.1f}, checkpointed)"
        cells = [p["state"], p["gathered"] + p["reduced"], p["activations"], p["checkpointed"], p["logits"]]
        row(name, str(world), *(x / 1e9 for x in cells), fits)
    print()
    row("model", "GPUs", "gathered, GB a row", "reduced, GB a row", "arithmetic, s a row", "GB/s to hide it")
    row(*["---"] * 6)
    for (name, world), p in found.items():
        gather, reduce, seconds = p["gather traffic"] / 1e9, p["reduce traffic"] / 1e9, p["seconds"]
        row(name, str(world), gather, reduce, seconds, (gather + reduce) / seconds)
    print()
    row("model", "GPUs", "whole: GB more a GPU", "GB received a step of 1, 4, 16 rows", "whole: GB a step")
    row(*["---"] * 5)
    for (name, world), p in found.items():
        each, once = p["gather traffic"] + p["reduce traffic"], p["whole gather traffic"] + p["reduce traffic"]
        rows = ", ".join(f"{k * each / 1e9:.0f}" for k in (1, 4, 16))
        row(name, str(world), (p["whole"] - p["gathered"] - p["reduced"]) / 1e9, rows, once / 1e9)


if __name__ == "__main__":
    main()
