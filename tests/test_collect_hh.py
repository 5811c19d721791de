"""collect_candidates.py for PRO: HH-RLHF and its filter, hindsight, export."""

import pytest
from conftest import HH, TWO_TURNS, pair, read_jsonl, run, write_jsonl

import common


def test_prepare_hh(prepared):
    one, two, merged = read_jsonl(prepared)
    assert one["id"] == "helpful-base-0" and one["subset"] == "helpful-base"
    assert one["prompt"] == "Human: Hi\n\nAssistant:"
    assert [(c["text"], c["source"], c["rank"]) for c in one["candidates"]] == [
        ("Yes", "chosen", 0),
        ("No", "rejected", 1),
    ]
    assert two["prompt"] == TWO_TURNS.strip()
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][1]["content"] == "Hello.\n\nSecond paragraph."
    assert [c["text"] for c in two["candidates"]] == ["Because.", ""]
    assert merged["candidates"][0]["text"] == "A\nB"
    assert len(common.load_candidates(prepared)) == 3


def test_prepare_hh_holds_out(monkeypatch, tmp_path):
    source = write_jsonl(
        tmp_path / "hh.jsonl",
        [pair(f"\n\nHuman: {i}\n\nAssistant: Yes", f"\n\nHuman: {i}\n\nAssistant: No") for i in range(9)],
    )
    run(
        monkeypatch,
        "prepare",
        "--task",
        "hh",
        "--input",
        source,
        "--validation",
        4,
        "--output",
        tmp_path / "out" / "t.jsonl",
    )
    train, held_out = (
        {r["id"] for r in read_jsonl(tmp_path / "out" / name)} for name in ("t.jsonl", "validation.jsonl")
    )
    assert (len(train), len(held_out)) == (5, 4) and not train & held_out


def test_one_file_a_subset(monkeypatch, tmp_path, capsys):
    source = write_jsonl(tmp_path / "hh.jsonl", HH[:1])
    argv = ["prepare", "--task", "hh", "--input", source, "--output", tmp_path / "x.jsonl"]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv, "--subset", "harmless-base", "helpful-base")
    assert stop.value.code == 2 and "name a file a subset" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Baselines


def ranked(path, count=3):
    texts = [("worse", 1), ("best", 0), ("middle {x}", 0.5)]
    candidates = [{"text": t, "source": "m", "reward": -r} for t, r in texts]
    return write_jsonl(
        path, [{"id": f"r{i}", "prompt": f"Human: {i}\n\nAssistant:", "candidates": candidates} for i in range(count)]
    )


def test_hindsight(monkeypatch, tmp_path):
    run(monkeypatch, "hindsight", "--input", ranked(tmp_path / "d.jsonl"), "--output", tmp_path / "h.jsonl")
    one, two, three = common.load_candidates(tmp_path / "h.jsonl")
    assert one["prompt"] == three["prompt"].replace("2", "0") == "Human: 0\n\nAssistant: A good answer:"
    assert one["candidates"][0]["text"] == "best A bad answer: worse"
    assert two["prompt"] == "Human: 1\n\nAssistant: A bad answer:"
    assert two["candidates"][0]["text"] == "worse A good answer: best"


def test_export_trl(monkeypatch, tmp_path):
    source = ranked(tmp_path / "d.jsonl")
    run(monkeypatch, "export", "--format", "trl", "--input", source, "--output", tmp_path / "trl.jsonl")
    rows, prompts = read_jsonl(tmp_path / "trl.jsonl"), read_jsonl(tmp_path / "trl-prompts.jsonl")
    assert rows[1] == {"id": "r1", "prompt": "Human: 1\n\nAssistant:", "chosen": " best", "rejected": " worse"}
    assert prompts == [{"id": r["id"], "prompt": r["prompt"]} for r in rows] and len(rows) == 3
