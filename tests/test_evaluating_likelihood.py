"""evaluating/likelihood.py: nll against one by one, pairs by a teacher's score."""

import pytest
import torch
from conftest import make_records, metrics_of, refused, write_jsonl
from transformers import AutoModelForCausalLM

import common


def test_nll_against_one_by_one(cli, tiny, here):
    records = make_records(5)
    write_jsonl(here / "d.jsonl", records)
    assert cli("evaluate", "nll", "--model", tiny, "--name", "tiny", "--input", "d.jsonl").code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = common.load_tokenizer(tiny)
    values = []
    for record in records:
        prompt = common.prompt_ids(tokenizer, record["prompt"])
        response = [*tokenizer(record["candidates"][0]["text"], add_special_tokens=False).input_ids, 1]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values.append(-logits.gather(-1, torch.tensor(response)[:, None]).flatten())
    got = metrics_of(here, "nll")
    assert got["token_nll"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-4)
    assert got["response_nll"] == pytest.approx(sum(v.mean().item() for v in values) / 5, abs=1e-4)
    assert got["tokens"] == sum(map(len, values)) and got["prompts"] == 5
    assert got["cut_responses"] == got["cut_prompts"] == 0
    longest = max(map(len, values))
    short = ["--max_length", longest + 1, "--name", "short"]  # the longest leaves the prompt nothing beyond its BOS
    assert cli("evaluate", "nll", "--model", tiny, "--input", "d.jsonl", *short).code == 0
    cut = metrics_of(here, "nll", "short")
    assert cut["cut_responses"] == sum(len(v) == longest for v in values) > 0 and cut["cut_prompts"] == 5
    records[3]["candidates"].pop(0)
    write_jsonl(here / "e.jsonl", records)
    refused(cli("evaluate", "nll", "--model", tiny, "--input", "e.jsonl"), "record 'r3' has no reference response")


def test_ranking_by_the_teachers_score(cli, tiny, here):
    """The original response has no logprob and takes no part; beta decides which of the others is the better one."""
    record = {"id": "a", "prompt": "p", "candidates": [{"text": "original", "source": "reference"}]}
    for text, logprob, n in (("short", -4.0, 2), ("long", -15.0, 9)):
        record["candidates"].append({"text": text, "source": "t", "logprob": logprob, "num_tokens": n})
    write_jsonl(here / "d.jsonl", [record])
    accuracy = []
    for beta in (0.5, 1.3):  # -2.83 > -5; -1.62 < -0.86
        flags = ["--model", tiny, "--input", "d.jsonl", "--by", "logprob", "--length_penalty", beta]
        assert cli("evaluate", "ranking", *flags, "--name", f"beta{beta}").code == 0
        got = metrics_of(here, "ranking", f"beta{beta}")
        assert got["pairs"] == 1
        accuracy.append(got["pair_accuracy"])
    assert sorted(accuracy) == [0, 1]
    record["candidates"].append({"text": "short ", "source": "t", "logprob": -9.0, "num_tokens": 2})  # said already
    write_jsonl(here / "f.jsonl", [record])
    assert cli("evaluate", "ranking", "--model", tiny, "--input", "f.jsonl", "--by", "logprob", "--name", "f").code == 0
    assert metrics_of(here, "ranking", "f")["pairs"] == 1
    del record["candidates"][1]["logprob"]
    write_jsonl(here / "e.jsonl", [record])
    result = cli("evaluate", "ranking", "--model", tiny, "--input", "e.jsonl", "--by", "logprob")
    refused(result, "record 'a'", "'logprob'", "rank --by logprob")
