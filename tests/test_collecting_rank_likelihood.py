"""collecting/rank_given.py and rank_local.py: by a teacher's log-probabilities, and a proxy ranking model."""

import pytest
import torch
from conftest import RANKABLE, make_reward_model, rank, refused, saved, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common


def test_responses_of_512_tokens_are_scored_whole(tmp_path, tiny, monkeypatch, capsys):
    """--by logprob and --by prm read 1,024 tokens, as tuna.py does, and say what did not fit."""
    tokenizer = common.load_tokenizer(tiny)
    ids = tokenizer(" ".join(["Two men play"] * 400), add_special_tokens=False).input_ids
    text = tokenizer.decode(ids[:512]).strip()
    record = RANKABLE | {"candidates": [{"text": text, "source": "m"}, {"text": "a", "source": "m"}]}
    whole = len(tokenizer(" " + text, add_special_tokens=False).input_ids)
    flags = ["--by", "logprob", "--model", tiny]
    [got] = rank(monkeypatch, tmp_path, [record], *flags)
    assert got["candidates"][0]["num_tokens"] == whole >= 500
    assert "cut to fit --max_length 1024: 0 prompts (left), 0 responses (right)" in capsys.readouterr().out
    rank(monkeypatch, tmp_path, [record], *flags, "--max_length", 512, output="cut.jsonl")
    assert "1 prompts (left), 1 responses (right)" in capsys.readouterr().out


def test_rank_by_probabilistic(tmp_path, monkeypatch, capfd, cli):
    """Tuna Eq. 3, as in tuna.py: beta decides; the original response, whose likelihood is not known, is not ranked."""
    candidates = [{"text": "the original one", "source": "reference"}]
    candidates += [
        {"text": t, "source": "t", "logprob": p, "num_tokens": n} for t, p, n in (("s", -4, 2), ("l l", -15, 9))
    ]
    record = {"id": "a", "prompt": "p", "candidates": candidates}
    for beta, ranks in ((0.5, [None, 0, 1]), (1.3, [None, 1, 0])):
        flags = ["--by", "probabilistic", "--length_penalty", beta]
        [got] = rank(monkeypatch, tmp_path, [record], *flags, output=f"{beta}.jsonl")
        assert got["ranked_by"] == "a teacher not named" and [c["rank"] for c in got["candidates"]] == ranks
    assert "mean words: 0: 2.0, 1: 1.0, unranked: 3.0" in capfd.readouterr().out
    candidates[1]["teacher"] = "davinci"
    records = [record | {"id": i, "candidates": some} for i, some in (("none", candidates[:1]), ("two", candidates))]
    flags = ("rank", "--by", "probabilistic", "--input", write_jsonl(tmp_path / "in.jsonl", records), "--output")
    refused(cli("collect_candidates", *flags, tmp_path / "a.jsonl", "--limit", 1), "no logprob")
    refused(cli("collect_candidates", *flags, tmp_path / "b.jsonl", "--skip", 1), "a teacher not named and davinci")


def log_probabilities(model, tokenizer, record, candidate, eos):
    """A response's token log-probabilities, by a plain forward."""
    prompt = common.prompt_ids(tokenizer, record["prompt"])
    text = common.space_before(record["prompt"], candidate["text"]) + candidate["text"]
    response = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * eos
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits[range(len(response)), response]


def test_rank_by_logprob_and_prm(tmp_path, tiny, monkeypatch):
    records = [RANKABLE, RANKABLE | {"id": "r2", "prompt": "Another, longer prompt"}]
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), common.load_tokenizer(tiny)
    for record in rank(monkeypatch, tmp_path, records, "--by", "logprob", "--model", tiny):
        for c in record["candidates"]:
            want = log_probabilities(*plain, record, c, eos=False)
            assert c["logprob"] == pytest.approx(want.sum().item(), abs=1e-4) and c["num_tokens"] == len(want)

    flags = ["--by", "prm", "--model", tiny]
    labelled = rank(monkeypatch, tmp_path, records, *flags, output="prm.jsonl")
    for record in labelled:
        [original, *own] = record["candidates"]
        assert original["rank"] is None and record["ranked_by"] == tiny.name  # the original is not ranked
        worth = [log_probabilities(*plain, record, c, eos=True).mean().item() for c in own]
        assert sorted(range(4), key=lambda i: -worth[i]) == sorted(range(4), key=lambda i: own[i]["rank"])


def test_a_reward_model_as_proxy_ranking_model(tmp_path, monkeypatch):
    """A sequence classifier's logits order the candidates, whatever its likelihoods would say."""
    (tmp_path / "rm").mkdir()
    folder = saved(tmp_path / "rm", make_reward_model(1))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = common.load_tokenizer(folder)
    record = {"id": "a", "prompt": "p: ", "candidates": [{"text": t, "source": "m"} for t in ("x y", "zz", "hello q")]}
    [got] = rank(monkeypatch, tmp_path, [record], "--by", "prm", "--model", folder)
    ids = [common.prompt_ids(tokenizer, "p: ") + common.response_ids(tokenizer, "p: ", c["text"]) + [1]
           for c in record["candidates"]]  # fmt: skip
    logits = [model(torch.tensor([i])).logits.item() for i in ids]
    assert [c["rank"] for c in got["candidates"]] == [sum(b > a for b in logits) for a in logits]
