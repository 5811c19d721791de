"""evaluate.py hh: the two BLEUs, rewards, subsets, the warning about one reward model for both."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, write_jsonl

from evaluating import hh


def test_char_bleu_by_hand():
    assert hh.char_bleu("same text", " same text ") == pytest.approx(1.0)
    # p = 4/5, 3/4, 2/3, 1/2: their product is 0.2
    assert hh.char_bleu("abcde", "abcdx") == pytest.approx(0.2**0.25)
    # every 1- to 4-gram of abcd stands in abcdefgh: the brevity penalty exp(1 - 8/4) alone
    assert hh.char_bleu("abcd", "abcdefgh") == pytest.approx(math.exp(-1))
    assert hh.char_bleu("abcdefgh", "abcd") == pytest.approx((4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25)
    assert hh.char_bleu("aaaa", "a") == 0  # clipped, and no 2-gram in common
    assert hh.char_bleu("", "abc") == hh.char_bleu("xyz", "abc") == 0


def test_metrics_by_hand():
    rows = [
        {"text": "one two three four five", "reference": "one two three four five", "reward": 0.25, "finished": True},
        {"text": "", "reference": "other", "reward": 0.75, "finished": False},
    ]
    metrics = hh.hh_metrics(rows)
    assert metrics["reward"] == 0.5 and metrics["char_bleu"] == pytest.approx(50.0)
    assert metrics["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))  # corpus BLEU: 5 tokens against 6
    assert (metrics["mean_words"], metrics["unfinished"], metrics["prompts"]) == (2.5, 0.5, 2)
    assert "reward" not in hh.hh_metrics([{k: v for k, v in r.items() if k != "reward"} for r in rows])


def test_reference():
    chosen, human = {"text": "c", "source": "chosen"}, {"text": "h", "source": "human"}
    sampled = [{"text": "b", "source": "m", "rank": 1}, {"text": "a", "source": "m", "rank": 0}]
    assert hh.chosen_text({"candidates": [*sampled, human, chosen]}) == "c"
    assert hh.chosen_text({"candidates": [*sampled, human]}) == "h"
    assert hh.chosen_text({"candidates": sampled}) == "a"


def dialogues(path, n=5):
    rows = []
    for i in range(n):
        candidates = [{"text": f"chosen {i}", "source": "chosen"}, {"text": "no", "source": "rejected"}]
        rows.append({"id": f"d{i}", "subset": ("harmless-base", "helpful-base")[i % 2]} | {"candidates": candidates})
        rows[-1]["prompt"] = f"Human: {'question ' * (i + 1)}\n\nAssistant:"
    return write_jsonl(path, rows)


def test_hh(cli, tiny, reward_folder, tmp_path):
    from collecting import reward_models

    data, output = dialogues(tmp_path / "d.jsonl"), tmp_path / "out" / "hh.jsonl"
    argv = ["hh", "--model", tiny, "--input", data, "--reward_model", reward_folder, "--max_new_tokens", 8]
    result = cli("evaluate", *argv, "--output", output)
    assert result.code == 0, result.err
    rows, records = read_jsonl(output), read_jsonl(data)
    assert [r["reference"] for r in rows] == [f"chosen {i}" for i in range(5)]
    logits = reward_models.reward_logits(
        str(reward_folder), torch.device("cpu"), [(r, row["text"]) for r, row in zip(records, rows)]
    )
    assert [r["reward"] for r in rows] == pytest.approx([1 / (1 + math.exp(-x)) for x in logits], abs=1e-4)
    metrics = json.loads((tmp_path / "out" / "hh.metrics.json").read_text())["metrics"]
    assert metrics["reward"] == pytest.approx(sum(r["reward"] for r in rows) / 5)
    assert metrics["harmless-base prompts"] == 3 and metrics["helpful-base prompts"] == 2
    assert 3 * metrics["harmless-base reward"] + 2 * metrics["helpful-base reward"] == pytest.approx(
        5 * metrics["reward"]
    )


def test_one_reward_model_for_both_is_said(cli, tiny, reward_folder, tmp_path):
    data = dialogues(tmp_path / "d.jsonl", 2)
    run = tmp_path / "run"
    run.mkdir()
    ranked = write_jsonl(tmp_path / "r.jsonl", [r | {"reward_model": str(reward_folder)} for r in read_jsonl(data)])
    (run / "args.json").write_text(json.dumps({"settings": {"data": str(ranked)}}))
    (run / "model").symlink_to(tiny)
    argv = ["hh", "--input", data, "--reward_model", reward_folder, "--max_new_tokens", 2]
    result = cli("evaluate", *argv, "--model", run / "model", "--output", tmp_path / "a" / "hh.jsonl")
    assert result.code == 0 and "its rewards flatter this model" in result.out
    result = cli("evaluate", *argv, "--model", tiny, "--output", tmp_path / "b" / "hh.jsonl")
    assert result.code == 0 and "flatter" not in result.out


def test_without_a_reward_model(cli, tiny, tmp_path):
    data, output = dialogues(tmp_path / "d.jsonl", 2), tmp_path / "out" / "hh.jsonl"
    argv = ["--model", tiny, "--input", data, "--reward_model", "none", "--max_new_tokens", 2, "--output", output]
    assert cli("evaluate", "hh", *argv).code == 0
    assert "reward" not in json.loads((tmp_path / "out" / "hh.metrics.json").read_text())["metrics"]
