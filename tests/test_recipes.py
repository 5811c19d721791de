"""recipes/*.sh at SCALE=tiny, from end to end, as a user types them."""

import json
import subprocess

import pytest
import warm
from conftest import ROOT, read_jsonl


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    with warm.python(tmp_path_factory.mktemp("warm")) as env:
        yield env


def recipe(name, env, out, **more):
    done = subprocess.run(
        ["bash", ROOT / "recipes" / f"{name}.sh"],
        env=env | {"SCALE": "tiny", "OUT": str(out)} | more,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_the_warm_python_is_python(env, tmp_path):
    (tmp_path / "x.py").write_text("import sys, torch; print(sys.argv[1:], torch.ones(2).sum().item()); sys.exit(3)")
    done = subprocess.run(["python", "x.py", "a b"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("['a b'] 2.0\n", 3)
    (tmp_path / "x.py").write_text("raise KeyError('where')")
    done = subprocess.run(["python", "x.py"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError" in done.stderr


def test_rescue_multidoc(env, tmp_path):
    out = recipe("rescue_multidoc", env, tmp_path).stdout
    assert "| (PO) Label Prioritization, 5 documents |" in out and "(44.88)" in out
    metrics = tmp_path / "results/rescue_multidoc-tiny/label-5-seed0/multidoc-qa.metrics.json"
    assert metrics.is_file()
    log = tmp_path / "runs/rescue_multidoc-tiny/label-seed0/log.jsonl"
    before = log.read_text()
    assert recipe("rescue_multidoc", env, tmp_path).returncode == 0  # again: nothing is collected or trained twice
    assert log.read_text() == before


@pytest.fixture(scope="module")
def pro_folder(tmp_path_factory):
    """PRO's recipes share what they collect and train."""
    return tmp_path_factory.mktemp("pro")


def test_pro_hh(env, pro_folder):
    judge = {"JUDGE": str(pro_folder / "data/pro-tiny/tiny/model"), "JUDGED": "1"}
    done = recipe("pro_hh", env, pro_folder, **judge)
    assert "Table 1, train: 42537 -> 42536" in done.stdout
    results, lines = pro_folder / "results/pro-tiny", done.stdout.splitlines()
    for row in ("SFT, raw", "RRHF, raw", "PRO, raw", "BoN, Alpaca,3", "CoH, Alpaca,3"):
        assert any(line.startswith(f"| {row} |") and "] (" in line for line in lines), row  # ours, and the paper's
    assert any(line.startswith("| PRO_s, raw |") and "] (54.2)" in line for line in lines)
    gold = json.loads((results / "gold/hh.metrics.json").read_text())["metrics"]
    assert gold["char_bleu"] == pytest.approx(100) and gold["prompts"] == 16
    assert json.loads((results / "pro-vs-gold/judge.metrics.json").read_text())["metrics"]["questions"] == 4
    assert all((results / f"table{n}.md").is_file() for n in (2, 3, 6))


def test_pro_ablations(env, pro_folder):
    def made():
        return {p: p.stat().st_mtime_ns for p in (pro_folder / "runs/pro-tiny").rglob("log.jsonl")}

    lines = recipe("pro_ablations", env, pro_folder).stdout.splitlines()
    before = made()
    assert recipe("pro_ablations", env, pro_folder).stdout.splitlines()[-20:] == lines[-20:]
    assert made() == before and len(before) >= 5  # nothing is trained twice
    for row in ("PRO, raw", "-SFT-T, raw", "-PRO k>1, Alpaca,3", "-T, Alpaca,3"):
        assert any(line.startswith(f"| {row} |") and "] (" in line for line in lines), row


def test_pro_rankings(env, pro_folder):
    lines = recipe("pro_rankings", env, pro_folder).stdout.splitlines()
    assert "|  | 2 | 3 | 5 |" in lines
    assert any(line.startswith("| HH-RLHF raw | ") and line.endswith(" (55.35) |  |  |") for line in lines)
    assert any(line.startswith("| Random |  | ") for line in lines)


def test_rescue_esnli(env, tmp_path):
    out = recipe("rescue_esnli", env, tmp_path).stdout
    assert "| (PO) Label Prioritization, flipped |" in out and "(87.97)" in out
    records = read_jsonl(tmp_path / "data/rescue_esnli-tiny/mixed-gpt.jsonl")
    assert [c["source"] for c in records[0]["candidates"]] == ["human", "model", "model", "gpt-3.5-turbo"]
    assert records[0]["candidates"][0]["rank"] == 0
    assert sorted(c["rank"] for c in records[0]["candidates"]) == [0, 1, 2, 3]
    flipped = read_jsonl(tmp_path / "data/rescue_esnli-tiny/flipped.jsonl")
    assert flipped[0]["candidates"][1]["flip_of"] == "gpt-3.5-turbo"  # the random model's have no label to flip
    runs = {p.name for p in (tmp_path / "results/rescue_esnli-tiny").iterdir()}
    assert {"base@0", "none@4-seed0", "hybrid@4-seed0", "label-flip@4-seed0", "table1.md"} <= runs
