"""collect_candidates.py, what Tuna asks of it: Alpaca's rows, the diversity rule, rankings by a model that reads."""

import argparse
import json
import re
import sys
from collections import Counter

import pytest
from api_server import Server
from conftest import make_model, make_tokenizer, read_jsonl, refused, write_jsonl

import collect_candidates as collect
import common


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["collect_candidates.py", *map(str, argv)])
    common.run_cli(collect.main)


# ----------------------------------------------------------------------------------------------------------------------
# prepare

ALPACA = [
    {"instruction": "Add the numbers.", "input": "2 and {3}", "output": "5"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Name a fruit.", "output": " Pear "},
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_prepare_alpaca(tmp_path, monkeypatch, capsys, kind):
    source = tmp_path / f"alpaca_data.{kind}"
    source.write_text(json.dumps(ALPACA) if kind == "json" else "\n".join(map(json.dumps, ALPACA)))
    run(monkeypatch, "prepare", "--task", "alpaca", "--input", source, "--output", tmp_path / "o.jsonl")
    records = read_jsonl(tmp_path / "o.jsonl")
    assert [r["id"] for r in records] == ["alpaca-0", "alpaca-1", "alpaca-3"]
    assert "1 rows without a response" in capsys.readouterr().out
    with_input, without, fruit = (r["prompt"] for r in records)
    assert "Add the numbers.\n\nInput:\n2 and {3}\n" in with_input and with_input.endswith("Response:\n")
    assert "Input" not in without and "Task:\nName a colour.\n" in without and "---" not in with_input + without
    assert fruit.endswith("Response:\n")
    assert records[2]["candidates"] == [{"text": "Pear", "source": "reference"}]


def test_prepare_alpaca_with_a_template_of_ones_own(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", ALPACA)
    for name, text in (
        ("two", "I {instruction} N {input} R:\n---\nI {instruction} R:\n"),
        ("one", "Q {instruction} A"),
    ):
        (tmp_path / name).write_text(text)
        flags = [
            "--input",
            tmp_path / "d.jsonl",
            "--prompt_file",
            tmp_path / name,
            "--output",
            tmp_path / f"{name}.jsonl",
        ]
        run(monkeypatch, "prepare", "--task", "alpaca", *flags)
    assert [r["prompt"] for r in read_jsonl(tmp_path / "two.jsonl")] == [
        "I Add the numbers. N 2 and {3} R:\n",
        "I Name a colour. R:\n",
        "I Name a fruit. R:\n",
    ]
    assert read_jsonl(tmp_path / "one.jsonl")[0]["prompt"] == "Q Add the numbers. A\n"


# ----------------------------------------------------------------------------------------------------------------------
# The diversity rule


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat": precision 3/4, recall 3/5, F1 2/3
    assert collect.max_similarity("the cat sat down", ["the old cat sat there", "nothing"]) == pytest.approx(2 / 3)
    assert collect.max_similarity("a b", []) == 0
    assert collect.max_similarity("你好", ["你好"]) == 1 and collect.max_similarity("", [""]) == 1


def diverse(first, later, **changes):
    """Run the rule on one prompt; `later` are the texts drawn at each trial -> (kept texts, temperatures, counts)."""
    settings = {"max_rouge_l": 0.8, "temperature": 1.0, "temperature_step": 0.1, "max_trials": 3} | changes
    asked, count, trials = [], Counter(), iter(later)

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n, temperature))
        return [[{"text": text} for text in next(trials)[:n]] for _ in numbers]

    [kept] = collect.keep_diverse([[{"text": t} for t in first]], draw, argparse.Namespace(**settings), count)
    return [r["text"] for r in kept], asked, count


def test_diverse_responses_stay():
    kept, asked, count = diverse(["a b c", "d e f", "g h i", "j k l"], [])
    assert kept == ["a b c", "d e f", "g h i", "j k l"] and asked == []
    assert count == {"kept at once": 4, "pairs": 6, "similar pairs before": 0, "similar pairs after": 0}


def test_similar_responses_are_drawn_again_at_rising_temperatures():
    kept, asked, count = diverse(["a b c", "a b c", "a b c", "d e f"], [["a b c", "g h i"], ["j k l"]])
    assert kept == ["a b c", "d e f", "g h i", "j k l"]
    assert asked == [([0], 2, 1.1), ([0], 1, 1.2)]
    assert count["similar pairs before"] == 3 and count["similar pairs after"] == 0
    assert (count["kept at once"], count["too similar"], count["kept at trial 1"], count["kept at trial 2"]) == (
        2,
        3,
        1,
        1,
    )


def test_after_the_last_trial_the_least_similar_stays():
    first = ["a b c d e f g h i j", "a b c d e f g h i j"]
    # each shares 9 of 10 words in order with the first (F1 0.9), the third trial's 9 of 11 (F1 18/21)
    later = [["a b c d e f g h i x"], ["x b c d e f g h i j"], ["a b c d e f g h i x y"]]
    kept, asked, count = diverse(first, later)
    assert [temperature for _, _, temperature in asked] == [1.1, 1.2, 1.3]
    assert kept == [first[0], "a b c d e f g h i x y"]
    assert count["least similar kept"] == 1 and count["similar pairs after"] == 1
    kept, asked, count = diverse(first, [], max_trials=0)
    assert kept == first and asked == [] and count["least similar kept"] == 1


def test_each_prompt_gets_what_it_lacks():
    count, asked = Counter(), []

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n))
        return [[{"text": f"new {i} {k}"} for k in "xyz"[:n]] for i in numbers]

    responses = [[{"text": t} for t in texts] for texts in (["a b", "c d", "e f"], ["a", "a", "a"], ["a", "b", "b"])]
    args = argparse.Namespace(max_rouge_l=0.8, temperature=0.5, temperature_step=0.25, max_trials=3)
    kept = collect.keep_diverse(responses, draw, args, count)
    assert asked[0] == ([1, 2], 2)
    assert [[r["text"] for r in k] for k in kept] == [
        ["a b", "c d", "e f"],
        ["a", "new 1 x", "new 1 y"],
        ["a", "b", "new 2 x"],
    ]
    assert kept[2][2]["temperature"] == 0.75


def test_sample_with_the_rule(tmp_path, tiny, monkeypatch, capsys):
    """At temperature 0 all four samples agree, so the rule must run; the first one stays as it was."""
    write_jsonl(tmp_path / "d.jsonl", [{"id": f"r{i}", "prompt": f"Word {i}:"} for i in range(3)])
    flags = ["--input", tmp_path / "d.jsonl", "--model", tiny, "--temperature", 0, "--max_new_tokens", 8]
    for name, extra in (("plain", []), ("diverse", ["--max_rouge_l", 0.5, "--temperature_step", 1])):
        run(monkeypatch, "sample", *flags, "--output", tmp_path / f"{name}.jsonl", *extra)
    out = capsys.readouterr().out
    assert "pairs 18, similar pairs before 18, similar pairs after 0" in out
    for plain, new in zip(read_jsonl(tmp_path / "plain.jsonl"), read_jsonl(tmp_path / "diverse.jsonl")):
        texts = [c["text"] for c in new["candidates"]]
        assert texts[0] == plain["candidates"][0]["text"] and len(set(texts)) == 4
        assert "temperature" not in new["candidates"][0] and new["candidates"][1]["temperature"] >= 1.0


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
    verdict = collect.parse_contextual(reply, 3)
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
        collect.parse_contextual(reply, 3)


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
    monkeypatch.setattr(collect, "complete", fake_complete(by_length))
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

    monkeypatch.setattr(collect, "complete", fake_complete(first))
    with pytest.raises(FileNotFoundError):  # one is missing, so the parts are not joined yet
        rank(monkeypatch, tmp_path, records, *flags)
    out = capsys.readouterr().out
    assert "1 failed, 1 open, 1 parsed, 1 unparsed, 1 unparsed (Type: stands there 0 times)" in out
    monkeypatch.setattr(collect, "complete", fake_complete(by_length))
    result = rank(monkeypatch, tmp_path, records, *flags)
    assert len(fake_complete.prompts) == 1 and "task 1" in fake_complete.prompts[0]
    assert result[0]["unparsed_reply"] == "2 is best" and {c["rank"] for c in result[0]["candidates"]} == {None}
    assert [c["rank"] for c in result[1]["candidates"]] == [None, 1, None, 2, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods and the proxy ranking model


def test_spearman_by_hand():
    assert collect.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert collect.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 - 6 * 4 / (4 * 15)
    assert collect.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # places .5 .5 2 against 0 1 2
    assert collect.spearman([1, 1], [1, 2]) == 0


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
        assert [c["rank"] for c in got["candidates"]] == ranks
    assert "mean words: 0: 2.0, 1: 1.0, unranked: 3.0" in capsys.readouterr().out


def test_rank_by_logprob_and_prm(tmp_path, tiny, monkeypatch, capsys):
    import torch

    records = [RANKABLE, RANKABLE | {"id": "r2", "prompt": "Another, longer prompt"}]
    flags = ["--model", tiny, "--batch_size", 2]
    scored = rank(monkeypatch, tmp_path, records, "--by", "logprob", *flags)
    model = common.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = common.load_tokenizer(tiny)
    for record in scored:
        for c in record["candidates"]:
            prompt = common.prompt_ids(tokenizer, record["prompt"])
            response = [*tokenizer(c["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logits.gather(-1, torch.tensor(response)[:, None]).sum().item()
            assert c["logprob"] == pytest.approx(expected, abs=1e-4) and c["num_tokens"] == len(response)

    labelled = rank(monkeypatch, tmp_path, records, "--by", "prm", *flags, output="prm.jsonl")
    for record, new in zip(scored, labelled):
        worth = [c["logprob"] / c["num_tokens"] for c in record["candidates"]]
        ranks = [c["rank"] for c in new["candidates"]]
        assert sorted(range(5), key=lambda i: -worth[i]) == sorted(range(5), key=lambda i: ranks[i])
    assert "Spearman" not in capsys.readouterr().out
    for record in labelled:  # the other way round: a record with ranks keeps them, and the agreement is -1
        record["candidates"] = [c | {"rank": 4 - c["rank"]} for c in record["candidates"]]
    again = rank(monkeypatch, tmp_path, labelled, "--by", "prm", *flags, output="again.jsonl")
    assert again == labelled
    assert "agreement with the ranking of 2 records: Spearman -1.000" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# A teacher's likelihoods through a server


def completion(*texts):
    """What /completions answers where log-probabilities are asked for: three tokens a response."""
    logprobs = {"tokens": ["a", "b", "c"], "token_logprobs": [-0.5, -0.25, -1.0]}
    choices = [{"index": i, "text": t, "finish_reason": "stop", "logprobs": logprobs} for i, t in enumerate(texts)]
    return json.dumps({"choices": choices, "usage": {"completion_tokens": 3 * len(texts)}}).encode()


def test_teacher_keeps_likelihoods(tmp_path, cli):
    write_jsonl(
        tmp_path / "d.jsonl", [{"id": "a", "prompt": "Task: x\n", "candidates": [{"text": "t", "source": "human"}]}]
    )
    flags = [
        "teacher",
        "--input",
        tmp_path / "d.jsonl",
        "--output",
        tmp_path / "o.jsonl",
        "--model",
        "m",
        "--num_samples",
        2,
    ]
    with Server(lambda prompt, times, body: completion(" one", " two")) as server:
        result = cli("collect_candidates", *flags, "--base_url", server.url, "--logprobs", "--completions")
    assert result.code == 0, result.err
    [body] = server.bodies
    assert body["prompt"] == "Task: x\n" and body["logprobs"] == 1 and body["n"] == 2 and "messages" not in body
    [record] = read_jsonl(tmp_path / "o.jsonl")
    likelihood = {"logprob": -1.75, "num_tokens": 3, "finished": True, "source": "m"}
    assert record["candidates"][1:] == [{"text": "one"} | likelihood, {"text": "two"} | likelihood]


def test_a_server_that_ignores_logprobs_is_named(tmp_path, cli):
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "prompt": "Task: x\n"}])
    flags = ["teacher", "--input", tmp_path / "d.jsonl", "--output", tmp_path / "o.jsonl", "--model", "m"]
    with Server(lambda prompt, times, body: None) as server:
        result = cli("collect_candidates", *flags, "--base_url", server.url, "--logprobs")
    refused(result, server.url, "ignores `logprobs`", "rank --by logprob")
    assert server.bodies[0]["logprobs"] is True


def test_a_local_teacher_continues_the_prompt(tmp_path, tiny, cli):
    write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "prompt": "Task: x\n"}])
    flags = ["--input", tmp_path / "d.jsonl", "--model", tiny, "--temperature", 0, "--max_new_tokens", 6]
    teacher = ["teacher", *flags, "--output", tmp_path / "t.jsonl", "--completions", "--logprobs"]
    assert cli("collect_candidates", *teacher).code == 0
    assert cli("collect_candidates", "sample", *flags, "--num_samples", 1, "--output", tmp_path / "s.jsonl").code == 0
    [one], [other] = (read_jsonl(tmp_path / f"{k}.jsonl")[0]["candidates"] for k in "ts")
    assert one["text"] == other["text"] and one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


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


def test_alpaca_from_the_hub(tmp_path, cli, monkeypatch):
    """Without --input the hub's data set is read; where it cannot be, the message says what to do."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir, split: ALPACA if data_dir is None else None)
    assert cli("collect_candidates", "prepare", "--task", "alpaca", "--output", tmp_path / "o.jsonl").code == 0
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 3

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    result = cli("collect_candidates", "prepare", "--task", "alpaca", "--output", tmp_path / "p.jsonl")
    refused(result, "tatsu-lab/alpaca", "no route", "--input")
