"""reward_model.py: packed scores against AutoModelForSequenceClassification, from end to end."""

import argparse
import math
import shutil

import pytest
import torch
from conftest import launch, read_jsonl, refused, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import reward_model


def write_data(path):
    """8 prompts, with 2 and 3 responses in turn, some of them without text."""
    records = []
    for i in range(8):
        texts = [f"yes {i}", "", f"no, never {i}"][: 2 + i % 2]
        candidates = [{"text": t, "source": "m", "rank": (i + k) % 3} for k, t in enumerate(texts)]
        records.append({"id": f"r{i}", "prompt": f"Question {'x' * i}? ", "candidates": candidates})
    return write_jsonl(path, records)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of 30 steps that must learn its few pairs by heart."""
    folder = tmp_path_factory.mktemp("reward")
    data, base = write_data(folder / "d.jsonl"), shutil.copytree(tiny, folder / "base")
    tokenizer = common.load_tokenizer(tiny)
    tokenizer.pad_token = tokenizer.eos_token  # as many have it: the saved model needs another
    tokenizer.save_pretrained(base)
    argv = ["--model", base, "--data", data, "--eval_data", data, "--output", folder / "run"]
    assert launch("reward_model", *argv, "--lr", 5e-3, "--epochs", 30, "--batch_size", 4, "--max_length", 64) == 0
    return folder / "run"


def test_it_learns_and_reports(trained):
    log = read_jsonl(trained / "log.jsonl")
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    first, last = (line for line in log if "eval_loss" in line)
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(math.log(2), abs=1e-6))
    assert last["eval_pair_accuracy"] > 0.9
    assert log[-2]["loss"] < 0.3 and (trained / "best" / "config.json").exists()


@pytest.mark.parametrize("padded", [False, True])
def test_the_saved_folder_gives_the_same_logits(trained, padded):
    """Packed or padded rows against the plain class of transformers, responses without text among them."""
    plain, ours = (AutoModelForSequenceClassification.from_pretrained(trained / "model").eval() for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    reward_model.add_score_forward(ours)
    encoded = [common.encode(tokenizer, r, 64) for r in read_jsonl(trained.parent / "d.jsonl")]
    batch = common.pack_padded(encoded, tokenizer.pad_token_id) if padded else common.pack(encoded)
    sequences = [{"input_ids": e.prompt_ids + r} for e in encoded for r in e.responses]
    with torch.no_grad():
        got = reward_model.candidate_rewards(ours, batch)
        want = plain(**tokenizer.pad(sequences, return_tensors="pt")).logits[:, 0]
    assert got.shape == want.shape == (20,)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.std() > 0.1


def test_unranked_responses_are_left_out(tmp_path, tiny, cli):
    """A contextual ranking: the original response carries no rank or null, a repetition null."""
    records = read_jsonl(write_data(tmp_path / "d.jsonl"))
    for record in records:
        record["candidates"][0] |= {"rank": None}
        record["candidates"].insert(0, {"text": "the original", "source": "reference"})
    data = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--model", tiny, "--data", data, "--output", tmp_path / "run", "--ordering"]
    refused(cli("reward_model", *flags, "label"), "has no 'correct'", "rank --by label")
    result = cli("reward_model", *flags, "rank")
    assert result.code == 0 and "8 prompts, 4 ordered pairs" in result.out


def test_a_human_response_is_right_unless_marked(tmp_path):
    """As rescue.py --ordering label reads it."""
    marks = {"human": {}, "right": {"correct": True}, "wrong": {"correct": False}}
    candidates = [{"text": source, "source": source} | mark for source, mark in marks.items()]
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": "1", "prompt": "p", "candidates": candidates}])
    [(record, levels)] = reward_model.load_data(argparse.Namespace(ordering="label"), data)
    assert levels.tolist() == [1.0, 1.0, 0.0] and len(record["candidates"]) == 3
