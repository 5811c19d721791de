"""evaluate.py hh: the two BLEUs, rewards, subsets."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, refused, write_jsonl

from collecting import generation, reward_models
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
    metrics = hh.hh_metrics([row | {"char_bleu": k} for k, row in enumerate(rows)])
    assert metrics["reward"] == metrics["char_bleu"] == 50.0
    # 25 and 75: standard deviation 25 sqrt(2), so 25 for the mean of two; t(0.975, 1) = 12.7062
    assert metrics["reward 95% low"] == pytest.approx(50 - 12.7062 * 25, abs=0.01)
    assert metrics["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))  # corpus BLEU: 5 tokens against 6
    assert (metrics["mean_words"], metrics["unfinished"], metrics["prompts"]) == (2.5, 0.5, 2)


def dialogues(path, n=5):
    rows = []
    for i in range(n):
        candidates = [{"text": f"chosen {i}", "source": "chosen"}, {"text": "no", "source": "rejected"}]
        rows.append({"id": f"d{i}", "subset": ("harmless-base", "helpful-base")[i % 2]} | {"candidates": candidates})
        rows[-1]["prompt"] = f"Human: {'question ' * (i + 1)}\n\nAssistant:"
    return write_jsonl(path, rows)


def test_hh(cli, tiny, reward_folder, tmp_path):
    data, output = dialogues(tmp_path / "d.jsonl"), tmp_path / "out" / "hh.jsonl"
    argv = ["hh", "--model", tiny, "--input", data, "--reward_model", reward_folder, "--max_new_tokens", 8]
    result = cli("evaluate", *argv, "--output", output)
    assert result.code == 0, result.err
    rows, records = read_jsonl(output), read_jsonl(data)
    assert [r["reference"] for r in rows] == [f"chosen {i}" for i in range(5)]
    logits = reward_models.reward_logits(str(reward_folder), torch.device("cpu"), list(zip(records, rows)))
    assert [r["reward"] for r in rows] == pytest.approx([1 / (1 + math.exp(-x)) for x in logits], abs=1e-4)
    metrics = json.loads((tmp_path / "out" / "hh.metrics.json").read_text())["metrics"]
    assert metrics["reward"] == pytest.approx(100 * sum(r["reward"] for r in rows) / 5)
    assert metrics["harmless-base prompts"] == 3 and metrics["helpful-base prompts"] == 2
    by_subset = 3 * metrics["harmless-base reward"] + 2 * metrics["helpful-base reward"]
    assert by_subset == pytest.approx(5 * metrics["reward"])


def test_responses_that_are_there_already(cli, reward_folder, tmp_path):
    """--source: the golden responses, or a teacher's, as one more system; --limit draws in each subset."""
    data = dialogues(tmp_path / "d.jsonl", 8)
    argv = ["hh", "--input", data, "--reward_model", reward_folder, "--output", tmp_path / "gold" / "hh.jsonl"]
    assert cli("evaluate", *argv, "--source", "chosen", "--limit", 2).code == 0
    rows = read_jsonl(tmp_path / "gold" / "hh.jsonl")
    assert [r["subset"] for r in rows] == ["harmless-base", "helpful-base"] * 2
    assert all(r["text"] == r["reference"] for r in rows)
    document = json.loads((tmp_path / "gold" / "hh.metrics.json").read_text())
    assert document["name"] == "chosen" and document["metrics"]["char_bleu"] == pytest.approx(100)
    refused(cli("evaluate", *argv[:-1], tmp_path / "x.jsonl", "--source", "gpt-4"), "has no response of 'gpt-4'")
    refused(cli("evaluate", *argv), "--model, or --source")


def test_a_cue_is_for_the_model_alone(cli, tiny, reward_folder, tmp_path, monkeypatch):
    asked, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, t, p, **o: asked.extend(p) or generate(m, t, p, **o))
    data, output = dialogues(tmp_path / "d.jsonl", 2), tmp_path / "out" / "hh.jsonl"
    argv = ["--model", tiny, "--input", data, "--reward_model", reward_folder, "--max_new_tokens", 3]
    assert cli("evaluate", "hh", *argv, "--cue", " A good answer:", "--output", output).code == 0
    assert sorted(asked) == sorted(r["prompt"] + " A good answer:" for r in read_jsonl(data))
    rows = read_jsonl(output)
    want = reward_models.reward_logits(str(reward_folder), torch.device("cpu"), list(zip(read_jsonl(data), rows)))
    assert [r["reward_logit"] for r in rows] == pytest.approx(want, abs=1e-5)


def test_a_batch_begun_is_computed_whole(cli, tiny, tmp_path, monkeypatch):
    """Killed inside a batch: the rest is padded as it would have been, so that its digits are the same."""
    sizes, data = [], dialogues(tmp_path / "d.jsonl", 4)
    argv = ["hh", "--model", tiny, "--input", data, "--reward_model", "none", "--max_new_tokens", 2]
    assert cli("evaluate", *argv, "--output", tmp_path / "a.jsonl").code == 0
    assert "reward" not in json.loads((tmp_path / "a.metrics.json").read_text())["metrics"]
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl.part0").write_text("".join(lines[:1]))
    (tmp_path / "b.jsonl.args.json").write_text((tmp_path / "a.jsonl.args.json").read_text())
    generate = generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, t, p, **o: sizes.append(len(p)) or generate(m, t, p, **o))
    assert cli("evaluate", *argv, "--output", tmp_path / "b.jsonl").code == 0
    assert sizes == [4] and read_jsonl(tmp_path / "b.jsonl") == read_jsonl(tmp_path / "a.jsonl")
