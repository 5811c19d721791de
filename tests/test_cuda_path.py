"""What a GPU would show first, on stand-ins: waits for the device, traffic of a step."""

import collections
import importlib
import types

import pytest
import torch
from architectures import make_encoded
from conftest import make_model, ranked_records, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

import common
import pro
import rescue
import reward_model
import tuna

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


class Counts(TorchDispatchMode):
    """Counts the operations that have one of these names, and those that index with a mask; `everything`: all."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.found, self.everything = names, collections.Counter(), 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.found[name] += name in self.names or masks
        self.everything += 1
        return function(*args, **(kwargs or {}))


# What makes the host wait for a GPU, or sends it something: a value or a shape that is read, a new tensor of host data.
WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "lift_fresh")
COLLECTIVES = ("_allgather_base_", "_reduce_scatter_base_")


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
        waits, data = Counts(*WAITS), write_jsonl(tmp_path / f"{n}.jsonl", ranked_records(n))
        argv = ["--model", tiny, "--data", data, "--output", tmp_path / f"run-{n}", "--batch_size", 6, "--epochs", 1]
        result = cli(script, *argv, "--max_tokens_per_row", 10_000, *flags)
        assert result.code == 0, result.err
        found[n] = waits
    assert +found[2].found == +found[6].found
    assert found[6].everything > found[2].everything > 100  # it did count


def step_of_rows(process, world, folder, whole, results):
    """One of `world` processes: the gradient of a step of several rows each, and its collectives."""
    torch.set_num_threads(1)
    place = f"file://{folder}/{world}{whole}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=process, world_size=world)
    common.stays_whole = lambda model: whole
    model = common.shard(make_model().train(), torch.device("cpu"))
    prompts = [(e,) for e in make_encoded(*[(20 + i, [5, 3 + i]) for i in range(8)])]
    args = types.SimpleNamespace(max_tokens_per_row=40, padded=False)
    with Counts(*COLLECTIVES) as collectives:
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
            options = {"nprocs": world, "start_method": "fork"}  # with everything imported already
            torch.multiprocessing.start_processes(step_of_rows, (world, tmp_path, whole, results), **options)
        (want, *_), (got, few, sharded), (other, many, _) = (results[k] for k in ((1, True), (2, True), (2, False)))
    for gradient in (got, other):
        assert (gradient - want).norm() < 1e-6 * want.norm()
    assert few == {"_allgather_base_": 3, "_reduce_scatter_base_": 3} and not sharded
    assert many == {"_allgather_base_": 4 * (2 + 2 + 1), "_reduce_scatter_base_": 4 * 3}
