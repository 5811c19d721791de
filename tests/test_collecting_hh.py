"""collect_candidates.py for PRO: HH-RLHF and its filter, hindsight, export."""

import pytest
from conftest import HH, TWO_TURNS, pair, read_jsonl, refused, run, write_jsonl

from collecting.files import load_candidates


def test_prepare_hh(prepared):
    one, two, merged = read_jsonl(prepared)
    assert one["id"] == "helpful-base-0" and one["subset"] == "helpful-base"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    found = [(c["text"], c["source"], c["rank"]) for c in one["candidates"]]
    assert found == [("Yes", "chosen", 0), ("No", "rejected", 1)]
    assert two["prompt"] == TWO_TURNS
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][1]["content"] == "Hello.\n\nSecond paragraph."
    assert [c["text"] for c in two["candidates"]] == ["Because.", ""]
    assert merged["candidates"][0]["text"] == "A\nB"
    assert len(load_candidates(prepared)) == 3


def test_the_filter_is_the_papers(preparing):
    """Identical contexts but different responses (Sec. 4.1), and Table 1's numbers of the split that is read."""
    rows = [*HH[:2], pair("\n\nHuman: Hi\n\nAssistant: Same", "\n\nHuman: Hi\n\nAssistant: Same ")]
    result, output = preparing(rows, "--task", "hh", "--split", "test")
    assert [r["id"] for r in read_jsonl(output)] == ["harmless-base-0", "harmless-base-1"]
    assert "harmless-base: 3 samples read, 2 with one context" in result.out
    assert "Table 1, test: 2312 -> 2312" in result.out


def test_a_file_for_each_subset(prepare, preparing, tmp_path):
    files = [write_jsonl(tmp_path / f"{k}.jsonl", HH[k : k + 1]) for k in range(2)]
    flags = ("--task", "hh", "--subset", "harmless-base", "helpful-base")
    assert [r["id"] for r in prepare(files, *flags)] == ["harmless-base-0", "helpful-base-1"]
    refused(preparing(files[:1], *flags)[0], "name a file a subset")


def release_row(*texts, rewards=(1.5, 0.5), **more):
    turns = ["<|prompter|>Hi", "<|assistant|>Hello.", "<|prompter|>Why?", "<|assistant|>"]
    meta = {"path": "../../data/raw_data/hhrlhf/helpful-rejection/train.jsonl", "line_num": 1, "task": "dialogue"}
    row = {"meta": meta, "prefix": [turns] * len(texts), "suffix": list(texts), "reward": list(rewards), "sft_index": 0}
    return row | more


def test_the_authors_files(prepare, tmp_path):
    rows = [release_row("Because.", "No."), release_row("A", "B", "C", rewards=(0.5, 2.0, -1))]
    source = write_jsonl(tmp_path / "train.json", rows)  # .json, and a row a line
    one, two = prepare(source, "--task", "hh", "--from_release")
    assert one["id"] == "helpful-rejection-sampled-0"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    assert [m["role"] for m in one["messages"]] == ["user", "assistant", "user"]
    found = [(c["text"], c["reward"], c["rank"]) for c in two["candidates"]]
    assert found == [("A", 0.5, 0), ("B", 2, 1), ("C", -1, 2)]


@pytest.mark.parametrize(
    "row, words",
    [
        (release_row("A", rewards=(1, 2)), "argument 2 is longer"),
        (release_row("A", prefix="x"), "one prefix"),
        (release_row("A", rewards=(1,), prefix=[["A"]]), "one prefix"),
        (release_row("A", "B", prefix=[["<|assistant|>"], ["<|prompter|>x", "<|assistant|>"]]), "one prefix"),
        (release_row("A", rewards=(1,), prefix=[["A", "<|assistant|>"]]), "not a row of a released file of --task hh"),
        ({"chosen": "x"}, "not a row of a released file of --task hh"),
    ],
)
def test_not_the_authors_files(preparing, row, words):
    refused(preparing([row], "--task", "hh", "--from_release")[0], "in.jsonl:1", words)


# ----------------------------------------------------------------------------------------------------------------------
# Baselines


@pytest.fixture
def ranked(tmp_path):
    texts = [("worse", 1), ("best", 0), ("middle {x}", 0.5)]
    candidates = [{"text": t, "source": "m", "reward": -r} for t, r in texts]
    records = [{"id": f"r{i}", "prompt": f"Human: {i}\n\nAssistant:", "candidates": candidates} for i in range(3)]
    return write_jsonl(tmp_path / "d.jsonl", records)


def test_hindsight(monkeypatch, tmp_path, ranked):
    run(monkeypatch, "hindsight", "--input", ranked, "--output", tmp_path / "h.jsonl")
    one, two, three = load_candidates(tmp_path / "h.jsonl")
    assert one["prompt"] == three["prompt"].replace("2", "0") == "Human: 0\n\nAssistant: A good answer:"
    assert one["candidates"][0]["text"] == "best A bad answer: worse"
    assert two["prompt"] == "Human: 1\n\nAssistant: A bad answer:"
    assert two["candidates"][0]["text"] == "worse A good answer: best"


def test_export_trl(monkeypatch, tmp_path, ranked):
    run(monkeypatch, "export", "--format", "trl", "--input", ranked, "--output", tmp_path / "trl.jsonl")
    rows, prompts = read_jsonl(tmp_path / "trl.jsonl"), read_jsonl(tmp_path / "trl-prompts.jsonl")
    assert rows[1] == {"id": "r1", "prompt": "Human: 1\n\nAssistant:", "chosen": " best", "rejected": " worse"}
    assert prompts == [{"id": r["id"], "prompt": r["prompt"]} for r in rows] and len(rows) == 3
