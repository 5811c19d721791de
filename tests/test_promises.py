"""What README promises of every command: inputs stay, bad models and files end early, tables are whole."""

import json
import shutil

import pytest
import torch
from conftest import make_records, read_jsonl, refused, write_jsonl
from safetensors.torch import load_file, save_file

from evaluating.tables import markdown


def train(cli, model, data, output, *more):
    return cli("rescue", "--ordering", "label", "--model", model, "--data", data, "--output", output, *more)


def test_nothing_deletes_its_own_input(cli, tiny, tmp_path):
    """A model or data inside the output folder is refused, also with --resume, and stays as it is."""
    (tmp_path / "run").mkdir()
    data = write_jsonl(tmp_path / "run/data.jsonl", make_records(4))
    for more in ((), ("--resume",)):
        refused(train(cli, tiny, data, tmp_path / "run", *more), "holds something else than a run")
    assert len(read_jsonl(data)) == 4
    data = data.rename(tmp_path / "data.jsonl")
    assert train(cli, tiny, data, tmp_path / "run").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}
    for more, words in (((), "is not empty"), (("--resume",), "--model")):
        refused(train(cli, tmp_path / "run/model", data, tmp_path / "run", *more), words)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}


@pytest.fixture
def broken(tiny, tmp_path):
    """A model whose weights are NaN in one place that every token reads."""
    folder = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        ("collect_candidates", "sample", "--max_new_tokens", 4),
        ("collect_candidates", "rank", "--by", "prm"),
        ("collect_candidates", "rank", "--by", "logprob"),
        ("evaluate", "nll"),
    ],
    ids=lambda verb: verb[-1] if "--by" in verb else verb[1],
)
def test_a_model_that_gives_nan_stops(cli, broken, data, tmp_path, verb):
    records = [r | {"candidates": [c | {"rank": None} for c in r["candidates"]]} for r in read_jsonl(data)]
    data = write_jsonl(tmp_path / "unranked.jsonl", records)
    done = cli(*verb, "--model", broken, "--input", data, "--output", tmp_path / "o.jsonl")
    refused(done, "not finite")
    assert not (tmp_path / "o.jsonl").exists()


def test_two_folders_of_one_name(cli, here):
    """Neither hides the other in a table; a name may hold any text."""
    for folder in ("a", "b"):
        (here / folder).mkdir()
        document = {"name": "x", "verb": "nli", "metrics": {"accuracy": 0.5}}
        (here / folder / "nli.metrics.json").write_text(json.dumps(document))
    refused(cli("evaluate", "report", "a", "b"), "a and b are both called 'x'")
    assert cli("evaluate", "report", "a").code == 0


def test_a_name_breaks_no_table():
    last = markdown({"a|b\nc": {"accuracy": 0.5}}).splitlines()[2:]
    assert last == [r"| a\|b c | 0.5 |"]


@pytest.mark.parametrize("flag, value", [("--epochs", 10**9), ("--epochs", 10_001)])
def test_counts_that_would_fill_the_memory(cli, tiny, data, tmp_path, flag, value):
    refused(train(cli, tiny, data, tmp_path / "run", flag, value), "out of range")


def test_a_count_of_tokens_that_no_text_has(cli, tiny, tmp_path):
    record = make_records(1)[0]
    record["candidates"] = [c | {"num_tokens": 1e300, "logprob": -1.0} for c in record["candidates"]]
    data = write_jsonl(tmp_path / "d.jsonl", [record])
    refused(train(cli, tiny, data, tmp_path / "run"), "d.jsonl:1", "num_tokens")
