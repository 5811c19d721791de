"""benchmarks/: the contenders score alike, every figure is found again in the file, the formulas are torch's."""

import json
import sys

import pytest
import torch
from conftest import ROOT, make_model, refused

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import scale  # noqa: E402

HERE = [name for name, (*_, package, _) in bench.CONTENDERS.items() if not package or bench.installed(package)]


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


def test_the_pages_tables_of_scale_are_what_the_script_prints(capsys):
    scale.main()
    memory, traffic, _ = capsys.readouterr().out.split("\n\n")
    page = (ROOT / "benchmarks/SCALE.md").read_text()
    assert not [line for line in f"{memory}\n{traffic}".splitlines() if line not in page and "---" not in line]
