"""collecting/rank*.py for Tuna: a ranking by a model that reads all responses at once, likelihoods, the proxy model."""

import re

import pytest
from conftest import make_model, make_tokenizer, read_jsonl, run, write_jsonl
from transformers import AutoModelForCausalLM

import common
import runtime
from collecting.rank_asked import parse_contextual
from collecting.rank_likelihood import spearman
from collecting.scoring import score_candidates

# ----------------------------------------------------------------------------------------------------------------------
# Contextual ranking: the strict parser, and the whole way through a server

CLEAN = """Type: closed
Reference: Paris.
Duplicates: none
Ratings:
0: 5 4 5
1: 3 2 0
2: 5 5 5
3: 1 0 1
Ranking: 2 > 0 > 1 > 3"""


def without(line):
    return CLEAN.replace(line + "\n", "")


@pytest.mark.parametrize(
    "reply, ranking, repeated, reference",
    [
        (CLEAN, [2, 0, 1, 3], [], "Paris."),
        ("Let me compare them.\n\n" + CLEAN + "\nI hope this helps!", [2, 0, 1, 3], [], "Paris."),  # chatty
        (CLEAN.replace("Paris.", "It is\n\nParis."), [2, 0, 1, 3], [], "It is\n\nParis."),  # on several lines
        (CLEAN.replace("none", "3=1.").replace(" > 3", ""), [2, 0, 1], [3], "Paris."),
        (
            without("3: 1 0 1").replace("none", "2 = 3, ").replace("3, ", "3").replace(" > 3", ""),
            [2, 0, 1],
            [3],
            "Paris.",
        ),
        (CLEAN.replace("none", "1=2=3").replace("2 > 0 > 1 > 3", "0 > 1"), [0, 1], [2, 3], "Paris."),
    ],
)
def test_replies_that_parse(reply, ranking, repeated, reference):
    verdict = parse_contextual(reply, 3)
    assert (verdict["ranking"], verdict["repeated"], verdict["reference"]) == (ranking, repeated, reference)
    assert verdict["type"] == "closed" and verdict["ratings"][1] == [3, 2, 0]


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "Type: stands there 0 times"),
        ("All of them are good; 2 is the best.", "Type: stands there 0 times"),
        (CLEAN[: CLEAN.index("Ranking")], "Ranking: stands there 0 times"),  # truncated
        (CLEAN[:-4], "leave out"),  # truncated: ends with "> 1"
        (CLEAN[:-2], "not in the form"),  # truncated: ends with ">"
        (CLEAN + "\nRanking: 0 > 1 > 2 > 3", "Ranking: stands there 2 times"),
        (without("1: 3 2 0"), "leave out"),  # a rating is missing
        (CLEAN.replace("1: 3 2 0", "1: 3 2"), "three numbers"),
        (CLEAN.replace("1: 3 2 0", "1: 3 2 6"), "three numbers"),
        (CLEAN.replace("1: 3 2 0", "2: 3 2 0"), "each response once"),
        (CLEAN.replace("> 3", "> 4"), "invent"),
        (CLEAN.replace("> 3", "> 1"), "repeat"),
        (CLEAN.replace("none", "1=3"), "leave out, repeat"),  # a repetition is ranked all the same
        (CLEAN.replace("none", "1=4"), "not there"),
        (CLEAN.replace("none", "1 and 3"), "no groups"),
        (CLEAN.replace("closed", "unclear"), "not in the form"),
    ],
)
def test_replies_that_do_not_parse(reply, reason):
    with pytest.raises(ValueError, match=reason):
        parse_contextual(reply, 3)


RANKABLE = {
    "id": "q",
    "prompt": "Task: name the capital. Response:",
    "instruction": "name the capital {city}",
    "candidates": [
        {"text": "The original", "source": "reference"},
        {"text": "bb", "source": "m"},
        {"text": "bb ", "source": "m"},
        {"text": "a", "source": "m"},
        {"text": "cccc", "source": "m"},
    ],
}


def fake_complete(replies):
    """Stands for the model: replies by the number of words it was shown, in an order that is not the prompts'."""

    def complete(args, prompts, **options):
        fake_complete.prompts = prompts
        for i in reversed(range(len(prompts))):
            reply = replies(prompts[i])
            yield i, reply and [{"text": reply, "finished": True}], None if reply else "it broke"

    return complete


def by_length(prompt):
    """A ranking of what a prompt shows, the longest first, its own last."""
    texts = dict(re.findall(r"^Response (\d+):\n(.*)$", prompt, re.M))
    ranking = sorted(texts, key=lambda i: -len(texts[i])) + ["0"]
    ratings = "\n".join(f"{i}: {min(5, len(texts.get(i, '')))} 1 2" for i in ranking)
    return f"Type: open\nReference: mine\nDuplicates: none\nRatings:\n{ratings}\nRanking: {' > '.join(ranking)}"


def rank(monkeypatch, tmp_path, records, *flags, output="o.jsonl"):
    write_jsonl(tmp_path / "d.jsonl", records)
    run(monkeypatch, "rank", "--input", tmp_path / "d.jsonl", "--output", tmp_path / output, *flags)
    return read_jsonl(tmp_path / output)


def test_rank_by_contextual(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("collecting.asking.complete", fake_complete(by_length))
    flags = ["--by", "contextual", "--model", "judge"]
    same = RANKABLE | {"id": "same", "candidates": RANKABLE["candidates"][:3]}
    one, two = rank(monkeypatch, tmp_path, [RANKABLE, same], *flags)
    assert [c["rank"] for c in one["candidates"]] == [None, 1, None, 2, 0]
    assert one["candidates"][4]["ratings"] == [4, 1, 2]
    assert [c["rank"] for c in two["candidates"]] == [None] * 3  # one different response: nothing to rank
    [prompt] = fake_complete.prompts
    assert "name the capital {city}" in prompt and "The original" not in prompt and "Compare 3 responses" in prompt
    out = capsys.readouterr().out
    assert "1 all the same, 1 open, 1 parsed" in out and "mean words: 0: 1.0, 1: 1.0, 2: 1.0, unranked: 1.4" in out

    [record] = rank(
        monkeypatch, tmp_path, [RANKABLE], *flags, "--rank_original", "--keep_reference", output="all.jsonl"
    )
    assert [c["rank"] for c in record["candidates"]] == [0, 2, None, 3, 1, 4]
    assert record["candidates"][5] == {"text": "mine", "source": "judge", "rank": 4, "ratings": [0, 1, 2]}


def test_unparsed_replies_are_kept_and_failures_asked_again(tmp_path, monkeypatch, capsys):
    records = [RANKABLE | {"id": f"q{i}", "instruction": f"task {i}"} for i in range(3)]
    flags = ["--by", "contextual", "--model", "judge"]
    replies = {"task 0": "2 is best", "task 1": None, "task 2": "ok"}

    def first(prompt):
        reply = replies[prompt.partition("The task:\n")[2].partition("\n")[0]]
        return by_length(prompt) if reply == "ok" else reply

    monkeypatch.setattr("collecting.asking.complete", fake_complete(first))
    with pytest.raises(FileNotFoundError):  # one is missing, so the parts are not joined yet
        rank(monkeypatch, tmp_path, records, *flags)
    out = capsys.readouterr().out
    assert "1 failed, 1 open, 1 parsed, 1 unparsed, 1 unparsed (Type: stands there 0 times)" in out
    monkeypatch.setattr("collecting.asking.complete", fake_complete(by_length))
    result = rank(monkeypatch, tmp_path, records, *flags)
    assert len(fake_complete.prompts) == 1 and "task 1" in fake_complete.prompts[0]
    assert result[0]["unparsed_reply"] == "2 is best" and {c["rank"] for c in result[0]["candidates"]} == {None}
    assert [c["rank"] for c in result[1]["candidates"]] == [None, 1, None, 2, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods and the proxy ranking model


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 - 6 * 4 / (4 * 15)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # places .5 .5 2 against 0 1 2
    assert spearman([1, 1], [1, 2]) == 0


def test_rank_by_probabilistic(tmp_path, monkeypatch, capsys):
    """Eq. 3 as in tuna.py: beta decides; the original response, whose likelihood is not known, is not ranked."""
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
    tokenizer = runtime.load_tokenizer(tiny)
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
