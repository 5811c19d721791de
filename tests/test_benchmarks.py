"""benchmarks/: the contenders score alike, every figure is found again in the file, the formulas are torch's."""

import json
import sys
import types

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_model, refused
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import scale  # noqa: E402

import common  # noqa: E402

HERE = [name for name, (*_, package, _) in bench.CONTENDERS.items() if not package or bench.installed(package)]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("option", ["", "+checkpoint"])
def test_contenders_score_and_learn_alike(option):
    """`list` subtracts the reference's scores, which are the model's own here: its gradient is that of equal scores."""
    model, encoded = make_model().train(), bench.make_encoded((9, 3, 4), 2, 400)
    found = {}
    for name in HERE:
        model.zero_grad()
        loss, scores = bench.set_up(model, name + option)(model, encoded)
        loss.backward()
        found[name] = scores, gradient(model)
    for name in {"padded", "prefix_grouper"} & {*HERE}:
        torch.testing.assert_close(found[name][0], found["ours"][0], atol=1e-4, rtol=1e-5)
        assert (found[name][1] - found["ours"][1]).norm() < 1e-5 * found["ours"][1].norm()
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    scores = bench.padded_scores(model, encoded)
    (sum(-0.5 * (s[i] - s[j]) for s in scores.split(3) for i in range(3) for j in range(i + 1, 3))).backward()
    assert (found["list"][1] - gradient(model)).norm() < 1e-5 * gradient(model).norm()  # -log sigmoid(0)' is -1/2


@pytest.mark.skipif("dpo" not in HERE, reason="TRL is not installed")
def test_trl_gets_every_pair():
    """Its losses from our scores: DPO's of the summed log-probabilities, with a reference of 0, and SimPO's of the
    means."""
    model, encoded = make_model().train(), bench.make_encoded((9, 3, 4), 2, 400)
    sums = bench.padded_scores(model, encoded) * 4**0.85  # [6]: two prompts of three responses
    gaps = torch.stack([s[0] - s[i] for s in sums.split(3) for i in (1, 2)])
    for name, want in (
        ("dpo", -torch.nn.functional.logsigmoid(0.1 * gaps).mean()),
        ("cpo", -torch.nn.functional.logsigmoid(0.1 * gaps / 4 - 0.5).mean()),
    ):
        loss, _ = bench.set_up(model, name)(model, encoded)
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)


def test_flops_by_hand():
    """2 layers, hidden 32, head tied (400 x 32): the work of P 10, n 2, R 3."""
    model = make_model()
    body = sum(p.numel() for p in model.parameters()) - 400 * 32
    pairs = 10 * 10 / 2 + 2 * (3 * 10 + 3 * 3 / 2)
    assert bench.step_flops(model, (10, 2, 3), prompts=1) == 6 * body * 16 + 6 * 400 * 32 * 6 + 12 * 2 * 32 * pairs
    row = {"contenders": {"ours": {"seconds": [1.0, 2.0, 10.0]}, "padded": {"seconds": [4.0, 8.0, 10.0]}}}
    assert bench.ratio(row, "padded") == 4.0  # turn by turn


def test_command(cli, tiny, tmp_path, monkeypatch):
    """Two workloads, table and plots, then the same table from the file."""
    monkeypatch.setitem(bench.WORKLOADS, "Alpaca", [(6, 2, 3)])
    monkeypatch.setitem(bench.WORKLOADS, "HH", [(8, 2, 3)])
    output, specs = tmp_path / "r.json", ["ours", "ours+checkpoint", *HERE[1:]]
    run = lambda *more: cli("bench", "--model", tiny, "--output", output, *more)  # noqa: E731
    shown = run("--workloads", "Alpaca", "HH", "--repeats", "2", "--contenders", *specs).out
    report = json.loads(output.read_text())
    assert [r["workload"] for r in report["rows"]] == ["Alpaca", "HH"] and "torch" in report["versions"]
    assert all([*r["contenders"]] == specs and len(r["product_flops"]) == 2 for r in report["rows"])
    assert all(len(c["seconds"]) == 2 for r in report["rows"] for c in r["contenders"].values())
    assert shown.endswith(run("--show").out) and shown.count("| ours+checkpoint |") == 4
    assert (tmp_path / "r.seconds.png").stat().st_size > 10_000
    refused(run("--contenders", "nobody"), "nobody")


def test_a_contender_that_fails_on_a_gpu_leaves_the_others(monkeypatch):
    """Out of memory in the backward, and what does not compile: each is named in the table, the model made anew."""
    made, peak = [], types.SimpleNamespace(bytes=2e9, step_bytes=1e9)

    def make():
        made.append(1)
        monkeypatch.setattr(type(model := make_model()), "device", torch.device(device))
        return model

    def step(spec, *rest):
        if spec == "padded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        if spec == "ours+compile":
            raise ValueError("a | b\ndoes not compile")
        return 0.5, peak, torch.zeros(2)

    monkeypatch.setattr(bench, "timed_step", step)
    monkeypatch.setattr(bench.Products, "rate", lambda self: 1e12)
    device, specs = "cuda", ["padded", "ours+compile", "ours"]
    row = bench.measure(make, specs, (6, 2, 3), 1, repeats=2)
    result = row["contenders"]
    assert result["padded"] == {"failed": "out of memory"} and "compile" in result["ours+compile"]["failed"]
    assert result["ours"]["seconds"] == [0.5, 0.5] and len(made) == 3
    report = {"rows": [row | {"workload": "HH", "flops": 1e12}], "peak_flops": 1e14, "versions": {}}
    table = bench.table(report).splitlines()
    assert "| padded | out of memory |" in table[2]
    assert "| ours+compile | ValueError: a / b does not compile |" in table[3]
    assert "| 24 | 2% | 200% |" in table[4]  # 12 tokens and 1e12 FLOPs in half a second, of 1e14, and of 1e12
    device = "cpu"
    with pytest.raises(torch.OutOfMemoryError):
        bench.measure(make, specs, (6, 2, 3), 1)  # there it is a mistake


def torch_reports(shape, world):
    """What a step of torch shows of scale.py's bytes, on process 0 of `world` fake ones (CPU, bf16 policy)."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    traffic = {"gather": 0, "reduce": 0}
    larger = {"_allgather_base_": ("gather", 0), "_reduce_scatter_base_": ("reduce", 1)}  # output, input

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            name, which = larger.get(function._schema.name.partition("::")[2], (None, None))
            if name:
                traffic[name] += args[which].nbytes * (world - 1) // world
            return function(*args, **(kwargs or {}))

    try:
        model = common.shard(scale.build(shape, "cpu").train(), torch.device("cpu"), bf16=True)
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


@pytest.mark.parametrize("whole", [False, True])
def test_formulas_are_what_torch_does(whole, monkeypatch):
    """State, gathered and reduced bytes of 8 processes, to the byte: of a model that stays whole, and of one that does
    not."""
    monkeypatch.setattr(common, "stays_whole", lambda model: whole)
    want, got = scale.predict(SMALL, 8, 16), torch_reports(SMALL, 8)
    gather = want["whole gather traffic" if whole else "gather traffic"]
    assert got == {"state": want["state"], "gather traffic": gather, "reduce traffic": want["reduce traffic"]}


def test_kept_bytes_of_a_layer():
    """Twice the tokens are twice the bytes, a third layer adds what the second added, and the queries, keys, values,
    output and log-sum-exp of attention are in it."""
    one, two, three = (scale.kept_bytes(SMALL, 16, n) for n in (1, 2, 3))
    assert three - two == two - one == (scale.kept_bytes(SMALL, 32, 2) - scale.kept_bytes(SMALL, 32, 1)) / 2
    assert two - one > 16 * (4 * 64 * 2 + 4 * 4)
