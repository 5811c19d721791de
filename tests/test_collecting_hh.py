"""collect_candidates.py for PRO: HH-RLHF and its filter, hindsight, export."""

import pytest
from conftest import HH, TWO_TURNS, pair, read_jsonl, run, write_jsonl

from collecting.files import load_candidates


def test_prepare_hh(prepared):
    one, two, merged = read_jsonl(prepared)
    assert one["id"] == "helpful-base-0" and one["subset"] == "helpful-base"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    assert [(c["text"], c["source"], c["rank"]) for c in one["candidates"]] == [
        ("Yes", "chosen", 0),
        ("No", "rejected", 1),
    ]
    assert two["prompt"] == TWO_TURNS
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][1]["content"] == "Hello.\n\nSecond paragraph."
    assert [c["text"] for c in two["candidates"]] == ["Because.", ""]
    assert merged["candidates"][0]["text"] == "A\nB"
    assert len(load_candidates(prepared)) == 3


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


def test_the_filter_is_the_papers(monkeypatch, capsys, tmp_path):
    """Identical contexts but different responses (Sec. 4.1), and Table 1's numbers of the split that is read."""
    rows = [*HH[:2], pair("\n\nHuman: Hi\n\nAssistant: Same", "\n\nHuman: Hi\n\nAssistant: Same ")]
    source = write_jsonl(tmp_path / "hh.jsonl", rows)
    argv = ["prepare", "--task", "hh", "--input", source, "--split", "test", "--output", tmp_path / "t.jsonl"]
    run(monkeypatch, *argv)
    assert [r["id"] for r in read_jsonl(tmp_path / "t.jsonl")] == ["harmless-base-0", "harmless-base-1"]
    out = capsys.readouterr().out
    assert "harmless-base: 3 samples read, 2 with one context" in out and "Table 1, test: 2312 -> 2312" in out


def test_validation_on_test_data_as_in_the_paper(monkeypatch, tmp_path):
    source = write_jsonl(tmp_path / "hh.jsonl", HH[:2])
    argv = ["prepare", "--task", "hh", "--input", source, "--validation", 1, "--keep_validation"]
    run(monkeypatch, *argv, "--output", tmp_path / "t.jsonl")
    held_out, test = (read_jsonl(tmp_path / name) for name in ("validation.jsonl", "t.jsonl"))
    assert len(test) == 2 and len(held_out) == 1 and held_out[0] in test


def release_row(*texts, rewards=(1.5, 0.5), **more):
    turns = ["<|prompter|>Hi", "<|assistant|>Hello.", "<|prompter|>Why?", "<|assistant|>"]
    meta = {"path": "../../data/raw_data/hhrlhf/helpful-rejection/train.jsonl", "line_num": 1, "task": "dialogue"}
    row = {"meta": meta, "prefix": [turns] * len(texts), "suffix": list(texts), "reward": list(rewards), "sft_index": 0}
    return row | more


def test_the_authors_files(monkeypatch, tmp_path):
    rows = [release_row("Because.", "No."), release_row("A", "B", "C", rewards=(0.5, 2.0, -1))]
    source = write_jsonl(tmp_path / "train.json", rows)  # .json, and a row a line
    argv = ["prepare", "--task", "hh", "--from_release", "--input", source, "--output", tmp_path / "t.jsonl"]
    run(monkeypatch, *argv)
    one, two = load_candidates(tmp_path / "t.jsonl")
    assert one["id"] == "helpful-rejection-sampled-0"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    assert [m["role"] for m in one["messages"]] == ["user", "assistant", "user"]
    assert [(c["text"], c["reward"], c["rank"]) for c in two["candidates"]] == [
        ("A", 0.5, 0),
        ("B", 2, 1),
        ("C", -1, 2),
    ]


@pytest.mark.parametrize(
    "row",
    [release_row("A", rewards=(1, 2)), release_row("A", prefix="x"), release_row("A", rewards=(1,), prefix=[["A"]])]
    + [release_row("A", "B", prefix=[["<|assistant|>"], ["<|prompter|>x", "<|assistant|>"]]), {"chosen": "x"}],
)
def test_not_the_authors_files(monkeypatch, capsys, tmp_path, row):
    source = write_jsonl(tmp_path / "train.json", [row])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "prepare", "--task", "hh", "--from_release", "--input", source)
    assert stop.value.code == 2 and "not a row of PRO's preprocessed files" in capsys.readouterr().err


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
    one, two, three = load_candidates(tmp_path / "h.jsonl")
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
