"""collecting/rank_given.py and rank_local.py: by a teacher's log-probabilities, and a proxy ranking model."""

import pytest
from conftest import RANKABLE, make_model, make_tokenizer, read_jsonl, run, write_jsonl
from transformers import AutoModelForCausalLM

import common
from collecting.rank_given import spearman
from collecting.scoring import score_candidates


def rank(monkeypatch, tmp_path, records, *flags, output="o.jsonl"):
    write_jsonl(tmp_path / "d.jsonl", records)
    run(monkeypatch, "rank", "--input", tmp_path / "d.jsonl", "--output", tmp_path / output, *flags)
    return read_jsonl(tmp_path / output)


def test_responses_of_512_tokens_are_scored_whole(tmp_path, tiny, cli):
    """--by logprob and --by prm read 1,024 tokens, as tuna.py does, and say what did not fit."""
    tokenizer = common.load_tokenizer(tiny)
    ids = tokenizer(" ".join(["Two men play"] * 400), add_special_tokens=False).input_ids
    text = tokenizer.decode(ids[:512]).strip()
    record = RANKABLE | {"candidates": [{"text": text, "source": "m"}, {"text": "a", "source": "m"}]}
    write_jsonl(tmp_path / "d.jsonl", [record])
    whole = len(tokenizer(" " + text, add_special_tokens=False).input_ids)
    flags = ["rank", "--by", "logprob", "--model", tiny, "--input", tmp_path / "d.jsonl", "--output"]
    done = cli("collect_candidates", *flags, tmp_path / "o.jsonl")
    assert "cut to fit --max_length 1024: 0 prompts (left), 0 responses (right)" in done.out
    assert read_jsonl(tmp_path / "o.jsonl")[0]["candidates"][0]["num_tokens"] == whole >= 500
    done = cli("collect_candidates", *flags, tmp_path / "p.jsonl", "--max_length", 512)
    assert "1 prompts (left), 1 responses (right)" in done.out


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 - 6 * 4 / (4 * 15)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # places .5 .5 2 against 0 1 2
    assert spearman([1, 1], [1, 2]) == 0


def test_rank_by_probabilistic(tmp_path, monkeypatch, capsys):
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
    assert "mean words: 0: 2.0, 1: 1.0, unranked: 3.0" in capsys.readouterr().out
    candidates[1]["teacher"] = "davinci"  # two teachers in one record: two scales
    with pytest.raises(SystemExit):
        rank(monkeypatch, tmp_path, [record], "--by", "probabilistic", output="two.jsonl")
    assert "log-probabilities of a teacher not named and davinci: two scales" in capsys.readouterr().err


def scored_with_eos(model, tokenizer, record):
    [(logprobs, lengths)] = score_candidates(model, tokenizer, [record])
    return [{"logprob": p, "num_tokens": n} for p, n in zip(logprobs.tolist(), lengths.tolist())]


def test_rank_by_logprob_and_prm(tmp_path, tiny, monkeypatch, capsys):
    import torch

    records = [RANKABLE, RANKABLE | {"id": "r2", "prompt": "Another, longer prompt"}]
    flags = ["--model", tiny, "--batch_size", 2]
    scored = rank(monkeypatch, tmp_path, records, "--by", "logprob", *flags)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = common.load_tokenizer(tiny)
    for record in scored:
        for c in record["candidates"]:
            prompt = common.prompt_ids(tokenizer, record["prompt"])
            text = common.space_before(record["prompt"], c["text"]) + c["text"]
            response = tokenizer(text, add_special_tokens=False).input_ids  # EOS does not count
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logits.gather(-1, torch.tensor(response)[:, None]).sum().item()
            assert c["logprob"] == pytest.approx(expected, abs=1e-4) and c["num_tokens"] == len(response)

    labelled = rank(monkeypatch, tmp_path, records, "--by", "prm", *flags, output="prm.jsonl")
    for record, new in zip(scored, labelled):
        [original, *own] = new["candidates"]
        assert original["rank"] is None and new["ranked_by"] == tiny.name  # the original is not ranked
        worth = [c["logprob"] / c["num_tokens"] for c in scored_with_eos(model, tokenizer, record)[1:]]
        ranks = [c["rank"] for c in own]
        assert sorted(range(4), key=lambda i: -worth[i]) == sorted(range(4), key=lambda i: ranks[i])
    assert "Spearman" not in capsys.readouterr().out
    for record in labelled:  # the other way round: a record with ranks keeps them, and the agreement is -1
        record["candidates"][1:] = [c | {"rank": 3 - c["rank"]} for c in record["candidates"][1:]]
    again = rank(monkeypatch, tmp_path, labelled, "--by", "prm", *flags, output="again.jsonl")
    assert again == labelled
    assert "agreement with the ranking of 2 records: Spearman -1.000" in capsys.readouterr().out


def test_a_reward_model_as_proxy_ranking_model(tmp_path, cli):
    """A sequence classifier's logits order the candidates, whatever its likelihoods would say."""
    import torch
    from transformers import LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    config = make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(type(make_model().config)(**config)).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    record = {"id": "a", "prompt": "p: ", "candidates": [{"text": t, "source": "m"} for t in ("x y", "zz", "hello q")]}
    flags = ["--input", write_jsonl(tmp_path / "d.jsonl", [record]), "--output", tmp_path / "o.jsonl"]
    result = cli("collect_candidates", "rank", "--by", "prm", "--model", tmp_path / "rm", *flags)
    assert result.code == 0, result.err
    ids = [
        tokenizer("p: ").input_ids + tokenizer(c["text"], add_special_tokens=False).input_ids + [1]
        for c in record["candidates"]
    ]
    logits = [model(torch.tensor([i])).logits.item() for i in ids]
    [got] = read_jsonl(tmp_path / "o.jsonl")
    assert [c["rank"] for c in got["candidates"]] == [sum(b > a for b in logits) for a in logits]
