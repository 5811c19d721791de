"""collect_candidates.py for PRO: HH-RLHF and its filter, hindsight, export."""

import pytest
from conftest import read_jsonl, refused, run, write_jsonl

from collecting.files import load_candidates


def pair(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


TWO_TURNS = "\n\nHuman: Hi {there}\n\nAssistant: Hello.\n\nSecond paragraph.\n\nHuman: Why?\n\nAssistant:"
HH = [
    pair("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No"),
    pair(TWO_TURNS + " Because.", TWO_TURNS + " "),  # an empty answer, braces
    pair("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Ho\n\nAssistant: No"),  # another context
    pair(TWO_TURNS + " Because.", "\n\nHuman: Hi\n\nAssistant: No"),  # fewer turns
    pair("\n\nHuman: Hi\n\nAssistant: A\n\nAssistant: B", "\n\nHuman: Hi\n\nAssistant: C"),  # one turn in two parts
    pair("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B", "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: C"),  # no answer
    pair("no dialogue at all", "\n\nHuman: Hi\n\nAssistant: C"),
]


def test_prepare_hh(prepare):
    one, two, merged = prepare(HH, "--task", "hh", "--subset", "helpful-base")
    assert one["id"] == "helpful-base-0" and one["subset"] == "helpful-base"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    found = [(c["text"], c["source"], c["rank"]) for c in one["candidates"]]
    assert found == [("Yes", "chosen", 0), ("No", "rejected", 1)]
    assert two["prompt"] == TWO_TURNS
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][1]["content"] == "Hello.\n\nSecond paragraph."
    assert [c["text"] for c in two["candidates"]] == ["Because.", ""]
    assert merged["candidates"][0]["text"] == "A\nB"


def test_a_file_for_each_subset_and_the_papers_filter(prepare, preparing, tmp_path):
    """Identical contexts but different responses (Sec. 4.1); what is read and kept is said of each subset (Table 1)."""
    same = pair("\n\nHuman: Hi\n\nAssistant: Same", "\n\nHuman: Hi\n\nAssistant: Same ")
    files = [write_jsonl(tmp_path / f"{k}.jsonl", [row, same]) for k, row in enumerate(HH[:2])]
    flags = ("--task", "hh", "--subset", "harmless-base", "helpful-base")
    result, output = preparing(files, *flags)
    assert [r["id"] for r in read_jsonl(output)] == ["harmless-base-0", "helpful-base-2"]
    assert "harmless-base: 2 rows read, 1 records\nhelpful-base: 2 rows read, 1 records" in result.out
    refused(preparing(files[:1], *flags)[0], "name a file a subset")


def release_row(*texts, rewards, **more):
    turns = ["<|prompter|>Hi", "<|assistant|>Hello.", "<|prompter|>Why?", "<|assistant|>"]
    meta = {"path": "../../data/raw_data/hhrlhf/helpful-rejection/train.jsonl"}
    return {"meta": meta, "prefix": [turns] * len(texts), "suffix": texts, "reward": rewards} | more


def test_the_authors_files(preparing, tmp_path):
    rows = [release_row("Because.", "No.", rewards=[1.5, 0.5]), release_row("A", "B", "C", rewards=[0.5, 2, -1])]
    source = write_jsonl(tmp_path / "train.json", rows)  # .json, and a row a line
    result, output = preparing(source, "--task", "hh", "--from_release")
    assert "hh: 2 rows read, 2 records" in result.out
    one, two = read_jsonl(output)
    assert one["id"] == "helpful-rejection-sampled-0"
    assert one["prompt"] == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    assert [m["role"] for m in one["messages"]] == ["user", "assistant", "user"]
    found = [(c["text"], c["reward"], c["rank"]) for c in two["candidates"]]
    assert found == [("A", 0.5, 0), ("B", 2, 1), ("C", -1, 2)]


@pytest.mark.parametrize(
    "row, words",
    [
        (release_row("A", rewards=[1, 2]), "argument 2 is longer"),
        (release_row("A", "B", rewards=[1, 2], prefix=[["<|assistant|>"], ["<|prompter|>x"]]), "one prefix"),
        (release_row("A", rewards=[1], prefix=[["A"]]), "one prefix"),
        (release_row("A", rewards=[1], prefix=[["A", "<|assistant|>"]]), "not a row of a file of --task hh"),
    ],
)
def test_not_the_authors_files(preparing, row, words):
    refused(preparing([row], "--task", "hh", "--from_release")[0], "in.jsonl:1", words)


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


def test_export(monkeypatch, tmp_path, ranked, prepare):
    """What TRL reads; `prepare --task pairs` reads it too."""
    run(monkeypatch, "export", "--input", ranked, "--output", tmp_path / "trl.jsonl")
    rows, prompts = read_jsonl(tmp_path / "trl.jsonl"), read_jsonl(tmp_path / "trl-prompts.jsonl")
    assert rows[1] == {"id": "r1", "prompt": "Human: 1\n\nAssistant:", "chosen": " best", "rejected": " worse"}
    assert prompts == [{"id": r["id"], "prompt": r["prompt"]} for r in rows] and len(rows) == 3
    assert [c["text"] for c in prepare(rows)[1]["candidates"]] == ["best", "worse"]
