"""benchmarks/: the contenders score alike, every figure is found again in the file, the formulas are torch's."""

import json
import sys
import types

import pytest
import torch
from conftest import ROOT, make_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import pipeline  # noqa: E402
import reading  # noqa: E402
import scale  # noqa: E402


def test_contenders_score_and_learn_alike():
    model, encoded = make_model().train(), bench.make_encoded((9, 3, 4), 2, 400, seed=0)
    found = []
    peers = [bench.prefix_grouper] * bool(bench.installed("prefix-grouper"))
    for contender in (bench.ours, bench.padded, *peers):
        model.zero_grad()
        model.set_attn_implementation(bench.ATTENTION.get(contender.__name__, "sdpa"))
        loss, scores = contender(model, encoded, torch.device("cpu"))
        loss.backward()
        found.append((scores.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (scores, gradient), *others = found
    for its_scores, its_gradient in others:
        torch.testing.assert_close(scores, its_scores, atol=1e-4, rtol=1e-5)
        assert (gradient - its_gradient).norm() < 1e-5 * gradient.norm()


def test_flops_by_hand():
    """2 layers, hidden 32, head tied (400 x 32): the work of P 10, n 2, R 3; padded, 2 rows of 13 as a whole."""
    model = make_model()
    body = sum(p.numel() for p in model.parameters()) - 400 * 32
    pairs = 10 * 10 / 2 + 2 * (3 * 10 + 3 * 3 / 2)
    want = 6 * body * 16 + 6 * 400 * 32 * 6 + 12 * 2 * 32 * pairs
    padded = 2 * (6 * (body + 400 * 32) * 13 + 12 * 2 * 32 * 13 * 13)
    assert bench.step_flops(model, (10, 2, 3), prompts=1) == (want, padded)


def test_ratios_are_taken_turn_by_turn():
    ours = {"seconds": [1.0, 2.0, 10.0], "peak_bytes": [2, 2, 2], "step_bytes": [1, 1, 1]}
    padded = {"seconds": [4.0, 8.0, 10.0], "peak_bytes": [3, 4, 5], "step_bytes": [3, 4, 5]}
    row = {"contenders": {"ours": ours, "padded": padded}}
    assert bench.ratios(row, "padded") == (4.0, 0.5, 0.25)


def test_command(tiny, tmp_path, monkeypatch):
    """One workload, then another into the same file, table and plot; another model's results are not mixed in."""
    monkeypatch.setitem(bench.WORKLOADS, "Alpaca", [(6, 2, 3)])
    monkeypatch.setitem(bench.WORKLOADS, "HH", [(8, 2, 3)])
    output = tmp_path / "r.json"

    def run(*more):
        argv = ["bench.py", "--model", str(tiny), "--repeats", "2", "--output", str(output), *more]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            bench.main()
        finally:
            torch.distributed.destroy_process_group()

    peers = ["prefix_grouper"] * bool(bench.installed("prefix-grouper"))
    run("--workloads", "Alpaca", "--contenders", "ours", "padded", *peers)
    run("--workloads", "HH", "Alpaca")
    report = json.loads(output.read_text())
    assert sorted(r["workload"] for r in report["rows"]) == ["Alpaca", "HH"] and "torch" in report["versions"]
    assert all(len(c["seconds"]) == 2 for r in report["rows"] for c in r["contenders"].values())
    assert all(
        len(r["product_flops"]) == 2 and sum(r["contenders"]["ours"]["profile"].values()) < 1 for r in report["rows"]
    )
    assert output.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(bench.common.UserError, match="another model"):
        run("--workloads", "HH", "--optimizer")


def test_a_contender_that_fails_on_a_gpu_leaves_the_others(monkeypatch):
    """Out of memory in the backward, and what does not compile: each is named in the table, the model made anew."""
    renewed, peak = [], types.SimpleNamespace(bytes=2e9, step_bytes=1e9)
    args = types.SimpleNamespace(prompts=1, seed=0, warmup=1, repeats=2)
    here = types.SimpleNamespace(names=["padded", "ours_compiled", "ours"], model=make_model(), optimizer=None)
    here.contenders, here.renew = {name: name for name in here.names}, lambda: renewed.append(1)

    def step(contender, *rest):
        if contender == "padded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        if contender == "ours_compiled":
            raise ValueError("a | b\ndoes not compile")
        return 0.5, peak, torch.zeros(2)

    monkeypatch.setattr(bench, "timed_step", step)
    monkeypatch.setattr(bench, "set_up", lambda model, name: None)
    result, _ = bench.measure(here, (6, 2, 3), args, torch.device("cuda"))
    assert result["padded"] == {"failed": "out of memory"} and "compile" in result["ours_compiled"]["failed"]
    assert result["ours"]["seconds"] == [0.5, 0.5] and len(renewed) == 2
    row = {"workload": "HH", "shape": (6, 2, 3), "prompts": 1, "flops": 1e12, "padded_flops": 2e12}
    table = bench.table({"rows": [row | {"contenders": result}], "peak_flops": [1e14, "some GPU"]}).splitlines()
    assert "| padded | out of memory |" in table[2] and "| ValueError: a / b does not compile |" in table[3]
    assert "| 24 | 2% |" in table[4]  # 12 tokens and 1e12 FLOPs in half a second, of 1e14
    with pytest.raises(torch.OutOfMemoryError):
        bench.measure(here, (6, 2, 3), args, torch.device("cpu"))  # there it is a mistake


def test_formulas_are_what_torch_does():
    """State, gathered and reduced bytes of 8 ranks, to the byte."""
    want, got = scale.predict(scale.SMALL, 8, 16), scale.torch_reports(scale.SMALL, 8)
    assert len(got) == 3 and got == {name: want[name] for name in got}


def test_kept_bytes_of_a_layer():
    """Twice the tokens are twice the bytes, a third layer adds what the second added, and the queries, keys, values,
    output and log-sum-exp of attention are in it."""
    one, two, three = (scale.kept_bytes(scale.SMALL, 16, n) for n in (1, 2, 3))
    assert three - two == two - one == (scale.kept_bytes(scale.SMALL, 32, 2) - scale.kept_bytes(scale.SMALL, 32, 1)) / 2
    assert two - one > 16 * (4 * 64 * 2 + 4 * 4)


def reading_report(tiny, tmp_path, monkeypatch, *more):
    argv = ["reading.py", "--model", tiny, "--repeats", 1, "--output", tmp_path / "r.json", *more]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    bench.common.run_cli(reading.main)
    return json.loads((tmp_path / "r.json").read_text())


def test_reading(tiny, tmp_path, monkeypatch):
    """Every job of the second page, whose contenders must agree, into one file."""
    monkeypatch.setattr(reading, "LONG", 50)
    report = reading_report(tiny, tmp_path, monkeypatch, "--candidates", 30)
    assert list(report) == list(reading.JOBS)
    assert list(report["few-shot"]["contenders"]) == ["ours", "flat", "rows", "padded"]
    assert all(len(c["seconds"]) == 1 for job in report.values() for c in job["contenders"].values())
    assert all(job["limit"][0] > 0 and job["flops"] > 0 for job in report.values())


def test_reading_of_data(tiny, tmp_path, monkeypatch):
    """Records of two files; trees, flat rows and a row a prompt agree, on prompts that share a start and none."""
    for name, start in (("shared", "A cook stirs soup. "), ("apart", "")):
        rows = [{"id": str(i), "prompt": f"{i} {start}Why {i}?", "candidates": []} for i in range(4)]
        for row in rows:
            row["prompt"] = start + row["prompt"]
            row["candidates"] = [{"text": f"{word} {row['id']}", "source": "a"} for word in ("Yes", "No, no")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = ["--data", tmp_path / "shared.jsonl", tmp_path / "apart.jsonl", "--prompts", 3]
    report = reading_report(tiny, tmp_path, monkeypatch, *files, "--contenders", "flat", "rows")
    assert list(report) == ["step shared", "sample shared", "step apart", "sample apart"]
    assert list(report["step apart"]["contenders"]) == ["ours", "flat", "rows"]


def test_tree_work_by_hand():
    """Prompt 1 2 3, responses 4 5 and 4 6: six tokens, three of them predicted; 1 + 2 + 3 + 4 + 5 + 5 pairs."""
    model = make_model()
    encoded = bench.common.Encoded("a", [1, 2, 3], [[4, 5], [4, 6]], 0, 0)
    assert reading.tree_work(model, [encoded], 3).flops == bench.needed_flops(model, 6, 3, 20, 3)


def test_pipeline(tiny, tokenizer, tmp_path, monkeypatch):
    """Every step is timed both ways; the plain ones read and draw the same."""
    output = tmp_path / "r.json"
    argv = ["pipeline.py", "--model", str(tiny), "--prompts", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    pipeline.main()
    [turn] = json.loads(output.read_text())["turns"]
    assert [*turn["ours"]] == [*turn["plain"]] == ["prepare", "sample", "rank", "score", "train", "evaluate", "report"]
    model = bench.common.load_pretrained(bench.AutoModelForCausalLM, str(tiny))
    drawn = []
    for generate in (pipeline.generation.generate, pipeline.plain_generate):
        torch.manual_seed(0)
        drawn.append(
            generate(model, tokenizer, ["A man", "Two girls sit"], num_samples=2, temperature=0.8, max_new_tokens=6)
        )
    assert [r["text"] for group in drawn[0] for r in group] == [r["text"] for group in drawn[1] for r in group]
