"""recipes/*.sh at SCALE=tiny, from end to end, as a user types them."""

import json
import re
import subprocess

import pytest
from conftest import ROOT, read_jsonl, warm_environment

from recipes import tiny as stand_in


@pytest.fixture(scope="module")
def env():
    return warm_environment()


def recipe(name, env, out, **more):
    done = subprocess.run(
        ["bash", ROOT / "recipes" / f"{name}.sh"],
        env=env | {"SCALE": "tiny", "OUT": str(out)} | more,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_rescue_multidoc(env, tmp_path):
    out = recipe("rescue_multidoc", env, tmp_path).stdout
    assert "| (PO) Label Prioritization, 5 documents |" in out and "(44.88)" in out
    metrics = tmp_path / "results/rescue_multidoc-tiny/label-5-seed0/multidoc-qa.metrics.json"
    assert metrics.is_file()


@pytest.fixture(scope="module")
def pro_folder(tmp_path_factory):
    """PRO's recipes share what they collect and train."""
    return tmp_path_factory.mktemp("pro")


def test_pro_hh(env, pro_folder):
    judge = {"JUDGE": str(pro_folder / "data/pro-tiny/tiny/model"), "JUDGED": "1"}
    done = recipe("pro_hh", env, pro_folder, **judge)
    assert "harmless-base: 6 rows read" in done.stdout
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
    again = recipe("pro_ablations", env, pro_folder)
    assert [x for x in again.stdout.splitlines() if x[:1] == "|"] == [x for x in lines if x[:1] == "|"]
    assert made() == before and len(before) >= 5  # nothing is trained twice
    assert "kept: " in again.stderr and "evaluate.py hh" not in again.stderr  # nor measured
    for row in ("PRO, raw", "-SFT-T, raw", "-PRO k>1, Alpaca,3", "-T, Alpaca,3"):
        assert any(line.startswith(f"| {row} |") and "] (" in line for line in lines), row


def test_pro_rankings(env, pro_folder):
    lines = recipe("pro_rankings", env, pro_folder, EVAL_EVERY="0").stdout.splitlines()
    assert "|  | 2 | 3 | 5 |" in lines
    assert any(line.startswith("| HH-RLHF raw | ") and line.endswith(" (55.35) |  |  |") for line in lines)
    assert any(line.startswith("| Random |  | ") for line in lines)


def test_rescue_esnli_and_sweeps(env, tmp_path):
    out = recipe("rescue_esnli", env, tmp_path).stdout
    assert "| (PO) Label Prioritization, flipped |" in out and "(87.97)" in out
    records = read_jsonl(tmp_path / "data/rescue_esnli-tiny/mixed-gpt.jsonl")
    assert [c["source"] for c in records[0]["candidates"]] == ["human", "model", "model", "gpt-3.5-turbo"]
    assert records[0]["candidates"][0]["rank"] == 0
    assert sorted(c["rank"] for c in records[0]["candidates"]) == [0, 1, 2, 3]
    flipped = read_jsonl(tmp_path / "data/rescue_esnli-tiny/flipped.jsonl")
    assert flipped[0]["candidates"][1]["flip_of"] == "gpt-3.5-turbo"  # the random model's have no label to flip
    assert len(read_jsonl(tmp_path / "data/rescue_esnli-tiny/test-ranked.jsonl")[0]["candidates"]) == 4
    runs = {p.name for p in (tmp_path / "results/rescue_esnli-tiny").iterdir()}
    assert {"base@0", "none@4-seed0", "hybrid@4-seed0", "label-flip@4-seed0", "table1.md", "train_size.png"} <= runs
    assert {"nli.png", "sources.png"} <= runs
    out = recipe("rescue_sweeps", env, tmp_path, ALPHAS="0.01 1").stdout
    assert "|  | 0.01 | 1 |" in out and "|  | 2 | 3 | 4 |" in out and "prints no value" in out
    assert "responses: 0 drawn" in out  # what the other recipe collected is used
    assert all((tmp_path / f"results/rescue_esnli-tiny/{x}.png").is_file() for x in ("alpha", "num_candidates"))


@pytest.fixture(scope="module")
def tuna_folder(env, tmp_path_factory):
    """Tuna's recipes share what they collect and train; tuna_prm.sh comes first."""
    folder = tmp_path_factory.mktemp("tuna")
    (folder / "said").write_text(recipe("tuna_prm", env, folder).stdout)
    return folder


def data_of(run):
    """What a run's args.json says of its training data: the digest."""
    settings = json.loads((run / "args.json").read_text())["settings"]
    return settings[f"content of {settings['data']}"]


def test_tuna_prm(env, tuna_folder):
    """It needs no teacher."""
    rows = [x for x in (tuna_folder / "said").read_text().splitlines() if x.startswith("| Tuna_c (PRM-3B-")]
    assert len(rows) == 2 and all(len(re.findall(r"\d\]? \(", line)) == 4 for line in rows)  # ours, and the paper's
    table4 = (tuna_folder / "results/tuna-tiny/table4.txt").read_text().splitlines()
    assert [re.search(r"([\w-]+)\.jsonl", line)[1] for line in table4] == ["ranked-alpaca", "prm-3B-52K"]
    lengths = json.loads(table4[0].partition(":")[2])
    assert lengths["0"] >= lengths["1"] >= lengths["2"]  # the stand-in prefers the longer one
    ranked = tuna_folder / "data/tuna-tiny/ranked-alpaca.jsonl"
    assert not list(ranked.parent.glob("teacher*"))
    ranked.with_name(f"{ranked.name}.args.json").unlink()  # another ranking would now be refused
    again = recipe("tuna_prm", env, tuna_folder)  # a model that costs money is asked once
    assert "--by contextual" not in again.stderr and "kept: " in again.stderr


def test_tuna(env, tuna_folder):
    """The whole sequence; each stage's data differ where the paper samples anew."""
    systems = ["alpaca_mul", "tuna_p", "tuna_c", "tuna", "tuna_cp-13K", "mix-52K", "mix-104K"]
    out = recipe("tuna", env, tuna_folder, SYSTEMS=" ".join(["llama", *systems])).stdout
    data = {s: data_of(tuna_folder / f"runs/tuna-tiny/{s}") for s in ["alpaca", *systems]}
    assert data["alpaca_mul"] == data["tuna_p"] and len(set(data.values())) == len(data) - 1  # the teacher's responses
    for row in ("Alpaca-Mul", "Tuna_p", "Tuna_c", "Tuna", "Tuna_cp-13K", "mix-Tuna-52K", "mix-Tuna-104K"):
        lines = [line for line in out.splitlines() if line.startswith(f"| {row} | ")]
        assert any(len(re.findall(r"\d\]? \(", line)) == 4 for line in lines), row  # ours, and the paper's
    assert "| Tuna_c (PRM-3B-39K) | " in out.partition("Tuna, arXiv 2310.13385, Table 8")[2]
    assert "8 prompts are 40 examples" in out  # Alpaca-Mul
    folder = tuna_folder / "data/tuna-tiny"
    ranked = {s: read_jsonl(folder / f"ranked-{s}.jsonl") for s in ("alpaca", "tuna_p")}
    for student, records in ranked.items():
        assert len(records) == 4 and {r["ranked_by"] for r in records} == {"gpt-4"}
        assert {c["source"] for r in records for c in r["candidates"]} == {"reference", student}
    page = (tuna_folder / "results/tuna-tiny/sheet.html").read_text()  # the question, without a template
    assert "Carry out the task" not in page and stand_in.ROWS[0]["hypothesis"] in page


def test_tuna_sweeps(env, tuna_folder):
    out = recipe("tuna_sweeps", env, tuna_folder).stdout
    assert any(line.startswith("| lambda-10 |") for line in out.splitlines())
    line = [line for line in out.splitlines() if line.startswith("| Tuna_p | ")][-1]
    assert "(2.14)" in line and len(re.findall(r"\d \(", line)) == 2  # ours at two of six betas


def test_tuna_multidoc(env, tmp_path):
    """The teacher reads the gold passage alone; its responses stand under the student's prompt."""
    recipe("tuna_multidoc", env, tmp_path, SYSTEMS="shuffled tuna_c")
    folder = tmp_path / "data/tuna_multidoc-tiny"
    student, teacher = (read_jsonl(folder / f"train{x}.jsonl")[0]["prompt"] for x in ("", "-gold"))
    assert (student.count("Document "), teacher.count("Document ")) == (3, 1)
    for name in ("train-teacher", "shuffled", "ranked-alpaca-seed0"):
        for record in read_jsonl(folder / f"{name}.jsonl"):
            first, *others = record["candidates"]
            assert first["source"] == "reference" and "rank" not in first and len(others) == 4
            assert all("logprob" in c for c in others) and record["prompt"].count("Document ") == 3
            if name.startswith("ranked"):
                right = [c["correct"] for c in sorted(others, key=lambda c: c["rank"])]
                assert right == sorted(right, reverse=True)
    assert {p.name for p in (tmp_path / "results/tuna_multidoc-tiny").iterdir() if p.is_dir()} == {
        *("base", "teacher"), *(f"{x}-seed0" for x in ("alpaca", "shuffled", "tuna_c"))
    }  # fmt: skip
