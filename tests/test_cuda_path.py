"""What a GPU would show first, on stand-ins: waits for the device, the attention of each kind of work."""

import collections
import copy
import importlib
import types

import pytest
import torch
from architectures import make_encoded
from conftest import make_records, write_jsonl
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import common
import pro
import rescue
import reward_model
import tuna
from recipes.tiny import make_model, make_tokenizer

SCORES, LEVELS, TAKEN = (torch.empty(5, device="meta", dtype=t) for t in (torch.float, torch.float, torch.bool))
LOSSES = {
    "rescue": lambda s: rescue.ranking_loss(s, LEVELS) + rescue.sft_loss(s, LEVELS, TAKEN),
    "pro": lambda s: pro.pro_loss(s, LEVELS) + pro.sft_loss(s, LEVELS, "mean"),
    "pro Eq. 8": lambda s: pro.pro_loss(s) + pro.pro_loss(s, LEVELS, first_only=True),
    "tuna": lambda s: tuna.ranking_loss(s, 0.1, LEVELS) + tuna.ranking_loss(s, 0.1) + tuna.mle_loss(s, LEVELS, TAKEN),
    "tuna by distance": lambda s: tuna.ranking_loss(s, 0.1, LEVELS, "mean_by_distance"),
    "reward_model": lambda s: reward_model.ranking_loss(s, LEVELS),
    "statistics": lambda s: sum(common.pair_statistics(s, LEVELS)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_read_nothing_back(name):
    """On the meta device there is nothing to read and no tensor of another device will do, as on a GPU that is not
    waited for."""
    LOSSES[name](SCORES.clone().requires_grad_()).backward()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, or sends it something: a value or a shape that is read, a new tensor
    of host data. `everything`: all operations."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found, self.everything = collections.Counter(), 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.found[name] += name in self.NAMES or masks
        self.everything += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "script, flags",
    [
        ("rescue", ["--ordering", "label"]),
        ("pro", []),
        ("tuna", ["--stage", "contextual", "--pair_reduction", "mean_by_distance"]),
        ("reward_model", []),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_step_waits_as_often_for_many_prompts(script, flags, cli, tiny, tmp_path, monkeypatch):
    """From the scores of a row to its gradients: a row of 6 prompts against one of 2."""
    module, found = importlib.import_module(script), {}
    score = "candidate_rewards" if script == "reward_model" else "candidate_logprobs"
    forward, clip = getattr(module, score), common.clip_grad_norm

    def begin(model, batch):
        scores = forward(model, batch)
        waits.__enter__()
        return scores

    def end(*args):
        waits.__exit__(None, None, None)
        return clip(*args)

    monkeypatch.setattr(module, score, begin)
    monkeypatch.setattr(common, "clip_grad_norm", end)
    monkeypatch.setattr(common, "means", lambda *args: {})  # a step reads its figures once
    monkeypatch.setattr(common, "check_packing", lambda *args: None)  # it scores too
    monkeypatch.setattr(reward_model, "check_packing", lambda *args: None)
    for n in (2, 6):
        records, waits = make_records(n), Waits()
        for record in records:
            record["candidates"] = [c | {"rank": i, "reward": -float(i)} for i, c in enumerate(record["candidates"])]
        data = write_jsonl(tmp_path / f"{n}.jsonl", records)
        argv = ["--model", tiny, "--data", data, "--output", tmp_path / f"run-{n}", "--batch_size", 6, "--epochs", 1]
        result = cli(script, *argv, "--max_tokens_per_row", 10_000, *flags)
        assert result.code == 0, result.err
        found[n] = waits
    assert +found[2].found == +found[6].found
    assert found[6].everything > found[2].everything > 100  # it did count


def generate(process, folder, attention, results):
    """One of two processes that hold a shard each: what `on_policy` makes of a model in training."""
    from collecting import generation, on_policy

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{attention}", rank=process, world_size=2)
    model = common.shard(make_model(num_attention_heads=2).train(), torch.device("cpu"))
    model.set_attn_implementation(attention)
    seen, plain = set(), generation.generate

    def spy(*args, **options):
        found = plain(*args, **options)
        seen.add(model.config._attn_implementation)
        return found

    generation.generate = spy
    args = types.SimpleNamespace(max_new_tokens=12, max_prompt_length=40, seed=0)
    records = make_records(40)[: 20 if process else 40]  # one process has more to do than the other
    answers = on_policy.answers(model, make_tokenizer(), records, args, 0, what="test", temperature=1.0)
    found = [a["text"] for _, batch in answers for a in batch]
    sharded = all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    results[process] = found, seen, model.config._attn_implementation, sharded
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_generation_in_training_is_sdpas_on_two_processes(tmp_path):
    """Under FlexAttention on two processes: SDPA while each generates by itself, FlexAttention again after it, the
    answers those of a model that had SDPA all along."""
    found = {}
    for attention in ("flex_attention", "sdpa"):
        with torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            torch.multiprocessing.spawn(generate, (tmp_path, attention, results), nprocs=2)
            found[attention] = [results[i] for i in (0, 1)]
    for (answers, seen, after, sharded), (want, *_) in zip(found["flex_attention"], found["sdpa"]):
        assert answers == want and any(answers)
        assert seen == {"sdpa"} and after == "flex_attention" and sharded


def test_compiled_layers_share_their_graphs_under_flex(monkeypatch):
    """--compile with FlexAttention in rows of three lengths: ten layers have two graphs between them (a first length,
    then any), which give what SDPA gives; past eight Dynamo would leave the others uncompiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    shapes = [((11, [5, 3, 7]), (6, [4, 9])), ((200, [5, 30]),), ((70, [90, 90, 90]),)]
    model = make_model(layers=10, num_attention_heads=2).eval()
    common.init_distributed()
    compiled = copy.deepcopy(model)
    for layer in common.decoder_layers(compiled):  # as common.load_model does
        layer.compile(dynamic=True, backend="aot_eager")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in compiled.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(compiled, mesh=mesh)
    compiled.set_attn_implementation("flex_attention")
    with torch.no_grad():  # FlexAttention has no backward on CPU
        for records in (make_encoded(*s) for s in shapes):
            want, _ = common.candidate_logprobs(model, common.pack(records))
            got, _ = common.candidate_logprobs(compiled, common.pack_for(compiled, records))
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    graphs = torch._dynamo.eval_frame._debug_get_cache_entry_list(type(compiled.model.layers[0]).forward.__code__)
    torch.distributed.destroy_process_group()
    assert 1 <= len(graphs) <= 2


class Collectives(TorchDispatchMode):
    """Counts the collectives of FSDP2 by name."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.found[name] += name in ("_allgather_base_", "_reduce_scatter_base_")
        return function(*args, **(kwargs or {}))


def step_of_rows(process, world, folder, whole, results):
    """One of `world` processes: the gradient of a step of several rows each, and its collectives."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}{whole}", rank=process, world_size=world
    )
    common.stays_whole = lambda model: whole
    model = common.shard(make_model().train(), torch.device("cpu"))
    prompts = [(e,) for e in make_encoded(*[(20 + i, [5, 3 + i]) for i in range(8)])]
    args = types.SimpleNamespace(max_tokens_per_row=40, padded=False)
    with Collectives() as collectives:
        for weight, batch in common.rows(prompts, model, None, args):
            logprobs, lengths = common.candidate_logprobs(model, batch)
            (weight * (logprobs / lengths).sum() * world).backward()
            gathered = not isinstance(model.model.layers[0].mlp.up_proj.weight, torch.distributed.tensor.DTensor)
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    gradient = torch.cat([full(p.grad).flatten() for p in model.parameters()])
    if process == 0:
        results[world, whole] = gradient, dict(+collectives.found), gathered
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_model_that_stays_whole_is_gathered_once_a_step(tmp_path):
    """Four rows on each of two processes: the gradient of one process; three groups (two layers, the root) are gathered
    and reduced once a step where the model stays whole, else the layers twice a row."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        for world, whole in ((1, True), (2, True), (2, False)):
            torch.multiprocessing.spawn(step_of_rows, (world, tmp_path, whole, results), nprocs=world)
        (want, *_), (got, few, sharded), (other, many, _) = (results[k] for k in ((1, True), (2, True), (2, False)))
    for gradient in (got, other):
        assert (gradient - want).norm() < 1e-6 * want.norm()
    assert few == {"_allgather_base_": 3, "_reduce_scatter_base_": 3} and not sharded
    assert many == {"_allgather_base_": 4 * (2 + 2 + 1), "_reduce_scatter_base_": 4 * 3}
