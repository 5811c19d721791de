"""What a GPU would show first, on stand-ins: waits for the device, traffic of a step."""

import collections
import copy
import importlib
import types

import pytest
import torch
from architectures import make_encoded
from conftest import make_model, ranked_records, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

import common


@pytest.mark.parametrize(
    "script, flags",
    [
        ("rescue", ["--ordering", "label"]),
        ("pro", []),
        ("pro", ["--no_temperature", "--first_only"]),
        ("tuna", ["--stage", "contextual"]),
        ("tuna", ["--stage", "contextual", "--pair_reduction", "mean_by_distance"]),
        ("reward_model", []),
    ],
)
def test_a_row_reads_nothing_back(script, flags, cli, tiny, tmp_path, monkeypatch):
    """On the meta device there is nothing to read and no tensor of another device will do, as on a GPU that is not
    waited for."""
    module, rows = importlib.import_module(script), []
    row_losses = module.row_losses

    def also_on_meta(model, batch, *columns):
        rows.append(batch)
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in columns]
        copied = copy.deepcopy(model).to("meta")
        if script == "reward_model":
            module.add_score_forward(copied)  # whose forward is its own
        row_losses(copied, batch.to(torch.device("meta")), *on_meta)[:, 0].sum().backward()
        return row_losses(model, batch, *columns)

    monkeypatch.setattr(module, "row_losses", also_on_meta)
    data = write_jsonl(tmp_path / "d.jsonl", ranked_records(4))
    argv = ["--model", tiny, "--data", data, "--output", tmp_path / "run", "--epochs", 1, "--attn", "sdpa"]
    result = cli(script, *argv, *flags)
    assert result.code == 0 and rows, result.err


class Collectives(TorchDispatchMode):
    """Counts the collective operations of FSDP2."""

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
    place = f"file://{folder}/{world}{whole}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=process, world_size=world)
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
            options = {"nprocs": world, "start_method": "fork"}  # with everything imported already
            torch.multiprocessing.start_processes(step_of_rows, (world, tmp_path, whole, results), **options)
        (want, *_), (got, few, sharded), (other, many, _) = (results[k] for k in ((1, True), (2, True), (2, False)))
    for gradient in (got, other):
        assert (gradient - want).norm() < 1e-6 * want.norm()
    assert few == {"_allgather_base_": 3, "_reduce_scatter_base_": 3} and not sharded
    assert many == {"_allgather_base_": 4 * (2 + 2 + 1), "_reduce_scatter_base_": 4 * 3}
