"""Memory and communication of training under FSDP2, computed from parameter counts, checked against torch.

    python benchmarks/scale.py            # the tables of SCALE.md for Llama-2's 7B, 13B, 70B shapes
    python benchmarks/scale.py --check    # the same formulas beside what torch does with a small model, 8 ranks

No weights and no GPU are needed: models are built on the meta device, ranks are torch's fake process group. GB are 10^9
bytes. W ranks; fp32 master weights, computing in bf16, fp32 reduction, as common.shard sets it up:

    state         (4 weights + 4 gradients + 8 Adam) bytes x parameters / W
    gathered      bf16: the root (embedding, head: from the forward to the end of the backward), and two layers (the one
                  that computes and the one that is being fetched)
    reduced       one layer's gradients in bf16, and its fp32 copy on the way to the reduce-scatter
    activations   of a row of T tokens: what autograd keeps of each layer, counted by torch; with
                  --activation_checkpointing a layer's input each, and one layer whole
    logits        a chunk of at most 2^27 (candidate_logprobs) in bf16, and in fp32 twice
    traffic       received by a GPU for each row: layers gathered twice and the root once in bf16, all reduced in fp32,
                  (W - 1) / W of each. A row's arithmetic takes 6 x parameters x T FLOPs.
"""

import pathlib
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common  # noqa: E402

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
T = 8192  # the default row on CUDA
GPU, PEAK = 80e9, 989e12  # an H100: memory, dense bf16 FLOP/s


class FlexAttentionsMemory(torch.autograd.Function):
    """Keeps what FlexAttention keeps (queries, keys, values, output, one fp32 a head and query); computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return out


def attention(module, query, key, value, mask, **kwargs):
    return FlexAttentionsMemory.apply(query, key, value).transpose(1, 2).contiguous(), None


def build(shape, device, **more):
    config = AutoConfig.for_model("llama", use_cache=False, **(shape | more))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def parameters(model):
    """-> (parameters of one decoder layer, number of layers, parameters of the root)."""
    layers = common.decoder_layers(model)
    layer = sum(p.numel() for p in layers[0].parameters())
    return layer, len(layers), sum(p.numel() for p in model.parameters()) - layer * len(layers)


def kept_bytes(shape, tokens, layers):
    """What autograd keeps for the backward of a bf16 model with so many layers, weights not counted."""
    AttentionInterface.register("flex_memory", attention)
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
    layer, layers, root = parameters(build(shape, "meta"))
    total = layer * layers + root
    each_layer = kept_bytes(shape, tokens, 2) - kept_bytes(shape, tokens, 1)
    share = (world - 1) / world
    return {
        "parameters": total,
        "state": 16 * total / world,
        "gathered": 2 * root + 2 * 2 * layer,
        "reduced": (2 + 4) * layer,
        "activations": each_layer * layers,
        "checkpointed": 2 * shape["hidden_size"] * tokens * layers + each_layer,
        "logits": 2**27 * (2 + 4 + 4),
        "gather traffic": share * 2 * (2 * layer * layers + root),
        "reduce traffic": share * 4 * total,
        "seconds at 40%": 6 * total * tokens / (0.4 * PEAK),
    }


def torch_reports(shape, world):
    """The same quantities, as far as a step of torch shows them on rank 0 of `world` fake ranks (CPU, bf16 policy)."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    traffic = {"gather": 0, "reduce": 0}
    larger = {"_allgather_base_": ("gather", 0), "_reduce_scatter_base_": ("reduce", 1)}  # output, input

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name, which = larger.get(function._schema.name.partition("::")[2], (None, None))
            if name:
                traffic[name] += args[which].nbytes * (world - 1) // world
            return function(*args, **(kwargs or {}))

    try:
        model = common.shard(build(shape, "cpu").train(), torch.device("cpu"), bf16=True)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(1, 16, dtype=torch.long)
        with Counted():
            model(input_ids=ids, logits_to_keep=torch.arange(8)).logits.float().mean().backward()
        optimizer.step()
        local = [p.to_local() for p in model.parameters()]
        adam = [s for p in model.parameters() for s in optimizer.state[p].values() if s.numel() > 1]
        state = local + [p.grad.to_local() for p in model.parameters()] + [getattr(s, "_local_tensor", s) for s in adam]
        return {"state": sum(x.nbytes for x in state)} | {f"{k} traffic": v for k, v in traffic.items()}
    finally:
        dist.destroy_process_group()


def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="beside torch, on a small model")
    if parser.parse_args().check:
        want, got = predict(SMALL, 8, 16), torch_reports(SMALL, 8)
        for name, value in got.items():
            print(f"{name}: computed {want[name]:.0f} bytes, torch {value} bytes")
        sys.exit(any(want[name] != value for name, value in got.items()))
    print(
        f"| model | GPUs | state | gathered + reduced | activations | checkpointed | logits | of {GPU / 1e9:.0f} GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = {(name, world): predict(shape, world) for name, shape in SHAPES.items() for world in (4, 8, 64)}
    for (name, world), p in found.items():
        fixed, size = p["state"] + p["gathered"] + p["reduced"] + p["logits"], lambda x: f"{x / 1e9:.1f}"
        plain, less = fixed + p["activations"], fixed + p["checkpointed"]
        fits = f"{size(plain)}" if plain < 0.9 * GPU else f"{size(less)}, checkpointed"  # a tenth for the allocator
        fits = fits if less < 0.9 * GPU else f"no ({size(less)}, checkpointed)"
        cells = [p["state"], p["gathered"] + p["reduced"], p["activations"], p["checkpointed"], p["logits"]]
        print(f"| {name} | {world} | {' | '.join(map(size, cells))} | {fits} |")
    print("\n| model | GPUs | gathered, GB a row | reduced, GB a row | arithmetic, s a row | GB/s to hide it |")
    print("|---|---|---|---|---|---|")
    for (name, world), p in found.items():
        gather, reduce, seconds = p["gather traffic"], p["reduce traffic"], p["seconds at 40%"]
        numbers = [gather / 1e9, reduce / 1e9, seconds, (gather + reduce) / 1e9 / seconds]
        print(f"| {name} | {world} | {' | '.join(f'{x:.1f}' for x in numbers)} |")


if __name__ == "__main__":
    common.run_cli(main)
