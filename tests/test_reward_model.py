"""reward_model.py: the loss by hand, packed scores against AutoModelForSequenceClassification, from end to end."""

import argparse
import json
import math
import sys

import pytest
import torch
from conftest import command, read_jsonl, write_jsonl

import common
import reward_model
from collecting.files import load_candidates


def test_two_responses_by_hand():
    levels = torch.tensor([0.0, 1.0])
    loss = reward_model.ranking_loss(torch.tensor([1.0, 3.0]), levels)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-6)
    loss = reward_model.ranking_loss(torch.tensor([90.0, -10.0]), levels)
    assert loss.item() == pytest.approx(100.0, abs=1e-4)


def test_three_responses_by_hand():
    rewards, levels = torch.tensor([2.0, 1.0, 0.0], requires_grad=True), torch.tensor([2.0, 1.0, 0.0])
    loss = reward_model.ranking_loss(rewards, levels)  # (2 log(1 + e^-1) + log(1 + e^-2)) / 3
    assert loss.item() == pytest.approx((2 * 0.313262 + 0.126928) / 3, abs=1e-5)
    loss.backward()
    assert rewards.grad[1].item() == pytest.approx(0.0, abs=1e-7)  # as far from one as from the other


def test_ties_are_not_compared():
    levels = torch.tensor([1.0, 1.0, 0.0])
    loss = reward_model.ranking_loss(torch.tensor([5.0, -5.0, 0.0]), levels)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-5)) + 5 + math.log1p(math.exp(-5))) / 2, abs=1e-5)
    assert reward_model.ranking_loss(torch.tensor([5.0, -5.0]), torch.ones(2)).item() == 0
    best, right, pairs, gap = common.pair_statistics(torch.tensor([5.0, -4.0, 0.0]), levels)
    assert (best.item(), right.item(), pairs.item(), gap.item()) == (0.5, 1, 2, 1.0)


def write_data(path, num_records=8):
    with open(path, "w") as f:
        for i in range(num_records):
            texts = [f"yes {i}", "", f"no, never {i}"][: 2 + i % 2]
            candidates = [{"text": t, "source": "m", "rank": (i + k) % 3} for k, t in enumerate(texts)]
            f.write(json.dumps({"id": f"r{i}", "prompt": f"Question {'x' * i}? ", "candidates": candidates}) + "\n")
    return path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *map(str, argv)])
    common.run_cli(reward_model.main)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of 30 steps that must learn its few pairs by heart."""
    folder = tmp_path_factory.mktemp("reward")
    data = write_data(folder / "d.jsonl")
    tokenizer = common.load_tokenizer(tiny)
    tokenizer.pad_token = tokenizer.eos_token  # as many have it: the saved model needs another
    tokenizer.save_pretrained(folder / "base")
    for name in ("config.json", "model.safetensors"):
        (folder / "base" / name).write_bytes((tiny / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--model", folder / "base", "--data", data, "--eval_data", data, "--output", folder / "run"]
        run(patch, *argv, "--lr", 5e-3, "--epochs", 30, "--batch_size", 4, "--max_length", 64)
    return folder / "run"


def test_it_learns_and_reports(trained):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    first, last = (line for line in log if "eval_loss" in line)
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(math.log(2), abs=1e-6))
    assert last["eval_pair_accuracy"] > 0.9
    log = [line for line in log if "loss" in line]
    assert log[-1]["loss"] < 0.3 and (trained / "best" / "config.json").exists()


@pytest.mark.parametrize("padded", [False, True])
def test_the_saved_folder_gives_the_same_logits(trained, padded):
    """Packed or padded rows against the plain class of transformers, responses without text among them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert (
        plain.config.num_labels == 1 and plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    )
    ours = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    reward_model.add_score_forward(ours)
    records = load_candidates(write_data(trained.parent / "again.jsonl"))
    encoded = [common.encode(tokenizer, r, 64) for r in records]
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
    write_data(tmp_path / "d.jsonl")
    records = read_jsonl(tmp_path / "d.jsonl")
    for record in records:
        record["candidates"][0] |= {"rank": None}
        record["candidates"].insert(0, {"text": "the original", "source": "reference"})
    write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--model", tiny, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "run", "--ordering", "rank"]
    result = cli("reward_model", *flags)
    assert result.code == 0 and "8 prompts, 4 ordered pairs" in result.out


def test_a_human_response_is_right_unless_marked(tmp_path):
    """As rescue.py --ordering label reads it."""
    texts = [{"text": t, "source": s} for t, s in (("a", "human"), ("b", "m"), ("c", "m"))]
    texts[1]["correct"], texts[2]["correct"] = True, False
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": "1", "prompt": "p", "candidates": texts}))
    [(record, levels)] = reward_model.load_data(argparse.Namespace(ordering="label"), path)
    assert levels.tolist() == [1.0, 1.0, 0.0] and len(record["candidates"]) == 3


@pytest.mark.parametrize("ordering, words", [("label", ["has no 'correct'", "rank --by label"])])
def test_missing_annotation(monkeypatch, capsys, tiny, tmp_path, ordering, words):
    data = write_data(tmp_path / "d.jsonl")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", tiny, "--data", data, "--output", tmp_path / "run", "--ordering", ordering)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(w in message for w in words), message


def test_two_ranks_take_the_same_steps(monkeypatch, tiny, tmp_path):
    """Sharded weights, the head in the root: the losses and the held-out figures of one process."""
    data = write_data(tmp_path / "d.jsonl", 7)
    argv = ["--model", tiny, "--data", data, "--eval_data", data, "--lr", 1e-3, "--epochs", 2, "--batch_size", 4]
    run(monkeypatch, *argv, "--output", tmp_path / "one")
    command("torchrun", "--standalone", "--nproc_per_node", 2, "reward_model.py", *argv, "--output", tmp_path / "two")
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        figures = [k for k in a if k == "loss" or k.startswith("eval_")]
        assert {k: b[k] for k in figures} == pytest.approx({k: a[k] for k in figures}, rel=1e-3)
    assert [line["step"] for line in one if "eval_loss" in line] == [0, len(one) - 2]
