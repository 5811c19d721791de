"""collect_candidates.py, what Tuna asks of it: Alpaca's rows, the diversity rule, a teacher's likelihoods."""

import argparse
import json
from collections import Counter

import pytest
from api_server import Server
from conftest import read_jsonl, refused, run, write_jsonl

from collecting import prompts
from collecting.sample import keep_diverse, max_similarity
from collecting.server import read_reply
from evaluating import superni

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
        "I Add the numbers. N 2 and {3} R:",  # the released prompt ends so, without a line end
        "I Name a colour. R:",
        "I Name a fruit. R:",
    ]
    assert read_jsonl(tmp_path / "one.jsonl")[0]["prompt"] == "Q Add the numbers. A"


def test_the_released_prompt_is_a_file_of_the_users(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", ALPACA[1:2])
    flags = ["prepare", "--task", "alpaca", "--input", "d.jsonl", "--template", "alpaca", "--output", "o.jsonl"]
    refused(cli("collect_candidates", *flags), "save the released prompts", "templates/alpaca.txt", "---")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/alpaca.txt").write_text("T {instruction} I {input} R:\n---\nT {instruction}\n\n### R:\n")
    assert cli("collect_candidates", *flags).code == 0
    assert read_jsonl("o.jsonl")[0]["prompt"] == "T Name a colour.\n\n### R:"


def test_limas_dialogues(tmp_path, cli):
    """Tuna App. A: an expert's answer to the first turn."""
    rows = [{"conversations": ["Why?", "Because.", "And?", "So."], "source": "x"}, {"conversations": ["A?", "B."]}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    flags = ["--input", tmp_path / "d.jsonl", "--output", tmp_path / "o.jsonl"]
    assert cli("collect_candidates", "prepare", "--task", "alpaca", *flags).code == 0
    records = read_jsonl(tmp_path / "o.jsonl")
    assert [(r["instruction"], r["candidates"][0]["text"]) for r in records] == [("Why?", "Because."), ("A?", "B.")]


def test_template_own_is_the_prompt_that_training_reads(tmp_path, cli):
    """For the benchmarks: a model trained on prepare's prompts meets an instruction as it has learnt to."""
    write_jsonl(tmp_path / "d.jsonl", ALPACA)
    flags = ["prepare", "--task", "alpaca", "--input", tmp_path / "d.jsonl"]
    assert cli("collect_candidates", *flags, "--output", tmp_path / "o.jsonl").code == 0
    assert cli("collect_candidates", *flags, "--output", tmp_path / "own.jsonl", "--template", "own").code == 0
    records = read_jsonl(tmp_path / "o.jsonl")
    assert records == read_jsonl(tmp_path / "own.jsonl")
    assert [(r["instruction"], r["input"]) for r in records[:2]] == [
        ("Add the numbers.", "2 and {3}"),
        ("Name a colour.", ""),
    ]
    prompt = superni.superni_prompt("Add the numbers.", [], "2 and {3}", None, 9, prompts.ALPACA_TEMPLATE)
    assert prompt == records[0]["prompt"].replace("Add the", "Definition: Add the")


def test_the_authors_rankings_and_log_probabilities(tmp_path, cli):
    rows = {
        "p": {"orig": ALPACA[1], "text": ["\nBlue", "Red"], "avg_token_prob": [-1, -2], "length": [2, 1]}
        | {"logprob": [-2.0, -2.0]},
        "c": {"id": 7, "instruct": "I R:", "generation": ["a", "b", "b"], "ranks": [3, 1, 0], "gpt_eval": ""},
        "t": {"id": 1, "instruction": "I R:", "output": ["a", "b", "c"], "score": [0.5, 2, 0.5]},
    }  # fmt: skip
    got = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        flags = ["--input", tmp_path / f"{name}.json", "--output", tmp_path / f"{name}.jsonl", "--from_release"]
        assert cli("collect_candidates", "prepare", "--task", "alpaca", *flags).code == 0
        [got[name]] = read_jsonl(tmp_path / f"{name}.jsonl")
    by = {"source": "text-davinci-003", "teacher": "text-davinci-003"}
    assert got["p"]["candidates"] == [
        {"text": "Red.", "source": "reference"},
        {"text": "Blue", "logprob": -2.0, "num_tokens": 2} | by,
        {"text": "Red", "logprob": -2.0, "num_tokens": 1} | by,
    ]
    assert [c["rank"] for c in got["c"]["candidates"]] == [1, 0, None] and got["c"]["ranked_by"] == "gpt-4"
    assert [c["rank"] for c in got["t"]["candidates"]] == [1, 0, 1] and got["t"]["prompt"] == "I R:"
    (tmp_path / "bad.json").write_text(json.dumps([rows["p"] | {"length": [2]}]))
    flags = ["--input", tmp_path / "bad.json", "--output", tmp_path / "bad.jsonl", "--from_release"]
    result = cli("collect_candidates", "prepare", "--task", "alpaca", *flags)
    refused(result, "bad.json:1: not a row of the released files: 'length' must be a list")


def test_released_rankings_get_their_original_response(tmp_path, cli):
    """--references: Eq. 6's MLE term has what it wants; the prompts are in the template that all others have."""
    write_jsonl(tmp_path / "alpaca.jsonl", ALPACA)
    both = "Told.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n2 and {3}\n\n### Response:"
    one = "Told.\n\n### Instruction:\nName a colour.\n\n### Response:"
    rows = {
        "c": [
            {"id": 1, "instruct": both, "generation": ["5", "6"], "ranks": [1, 0]},
            {"id": 2, "instruct": "### Instruction:\nNot there.\n\n### Response:", "generation": ["a"], "rank": [0]},
        ],
        "t": [{"id": 1, "instruction": one, "output": ["Blue", "Red.", "Green"], "score": [2, 1, 0]}],
    }
    got = {}
    for name, some in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
        flags = ["--input", tmp_path / f"{name}.json", "--output", tmp_path / f"{name}.jsonl", "--from_release"]
        flags += ["--references", tmp_path / "alpaca.jsonl"]
        done = cli("collect_candidates", "prepare", "--task", "alpaca", *flags)
        assert f"left out: {len(some) - 1} rows without a response in --references" in done.out
        [got[name]] = read_jsonl(tmp_path / f"{name}.jsonl")
    model = {"source": "tuna-probabilistic"}
    reference = {"text": "5", "source": "reference"}  # what Tuna_p says in the same words stays Tuna_p's
    assert got["c"]["candidates"] == [reference, {"text": "5", "rank": 1} | model, {"text": "6", "rank": 0} | model]
    assert got["c"]["prompt"] == prompts.alpaca_prompt(prompts.ALPACA_TEMPLATE, ALPACA[0], "")
    assert got["c"]["id"] == "release-0" and got["c"]["ranked_by"] == "gpt-4"
    assert [(c["source"], c["rank"]) for c in got["t"]["candidates"]] == [("model", 0), ("reference", 1), ("model", 2)]
    flags = ["prepare", "--task", "alpaca", "--input", tmp_path / "alpaca.jsonl", "--references", tmp_path / "x"]
    refused(cli("collect_candidates", *flags), "--references belongs to --task alpaca --from_release")
    (tmp_path / "bad.json").write_text(json.dumps([{"id": 1, "instruct": "I R:", "generation": ["a"], "rank": [0]}]))
    flags = ["--input", tmp_path / "bad.json", "--from_release", "--references", tmp_path / "alpaca.jsonl"]
    result = cli("collect_candidates", "prepare", "--task", "alpaca", *flags, "--output", tmp_path / "bad.jsonl")
    refused(result, "bad.json:1: the prompt lacks ### Instruction: or ### Response:")


# ----------------------------------------------------------------------------------------------------------------------
# The diversity rule


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat": precision 3/4, recall 3/5, F1 2/3
    assert max_similarity("the cat sat down", ["the old cat sat there", "nothing"]) == pytest.approx(2 / 3)
    assert max_similarity("a b", []) == 0
    assert max_similarity("你好", ["你好"]) == 1 and max_similarity("", [""]) == 1


def diverse(first, later, **changes):
    """Run the rule on one prompt; `later` are the texts drawn at each trial -> (kept texts, temperatures, counts)."""
    settings = {"max_rouge_l": 0.8, "temperature": 1.0, "temperature_step": 0.1, "max_trials": 3} | changes
    asked, count, trials = [], Counter(), iter(later)

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n, temperature))
        return [[{"text": text} for text in next(trials)[:n]] for _ in numbers]

    [kept] = keep_diverse([[{"text": t} for t in first]], draw, argparse.Namespace(**settings), count)
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
    kept = keep_diverse(responses, draw, args, count)
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
    likelihood = {"logprob": -1.75, "num_tokens": 3, "finished": True, "source": "m", "teacher": "m"}
    assert record["candidates"][1:] == [{"text": "one"} | likelihood, {"text": "two"} | likelihood]


@pytest.mark.parametrize(
    "text, tokens, kept",
    [
        ("one two", ["one", " two"], 2),  # llama-cpp-python leaves EOS out
        ("one two", ["one", " two", "</s>"], 2),  # others report it
        ("one two", ["one", " two", ""], 2),  # as nothing
        ("one </s", ["one", " </s"], 2),  # the text's own end stays
        ("", ["</s>"], 1),  # an empty response is its EOS
        ("caf\u00e9", ["caf", "bytes:\\xc3", "bytes:\\xa9"], 3),
    ],
)
def test_eos_counts_in_no_log_probability(text, tokens, kept):
    values = [-0.5 - i for i in range(len(tokens))]
    old = {"text": text, "finish_reason": "stop", "logprobs": {"tokens": tokens, "token_logprobs": values}}
    content = [{"token": t, "logprob": v} for t, v in zip(tokens, values)]
    new = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}
    for choice in (old, new):
        [response], _ = read_reply(json.dumps({"choices": [choice]}))
        assert (response["num_tokens"], response["logprob"]) == (kept, sum(values[:kept]))


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
