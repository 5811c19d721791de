"""collecting/prepare.py: e-SNLI, multi-document QA, Alpaca and LIMA, and what the papers' authors released."""

import csv
import gzip
import json
from types import SimpleNamespace

import pytest
from conftest import call, read_jsonl, refused, run, write_jsonl

import rescue
from collecting import prompts
from collecting.answers import parse_nli
from common import UserError
from evaluating import superni


class TestPrepareESNLI:
    def test_original_csv(self, cli, tmp_path):
        """The columns of the files at OanaMariaCamburu/e-SNLI; two files are read one after the other."""
        for k in (1, 2):
            with open(tmp_path / f"{k}.csv", "w", newline="") as f:
                writer = csv.writer(f)
                writer.writerow(["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1", "WorkerId"])
                writer.writerow(
                    [f"p{k}", "neutral", "A {man} sits.", "He, too, waits.", "Sitting is not\nwaiting.", "w"]
                )
        out = tmp_path / "out.jsonl"
        assert (
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                tmp_path / "1.csv",
                tmp_path / "2.csv",
                "--output",
                out,
            ).code
            == 0
        )
        records = read_jsonl(out)
        assert [r["id"] for r in records] == ["p1", "p2"] and records[0]["label"] == "neutral"
        assert "Premise: A {man} sits.\nHypothesis: He, too, waits." in records[0]["prompt"]
        assert records[0]["candidates"] == [{"text": "Sitting is not\nwaiting. #### Neutral", "source": "human"}]

    def test_skip_limit_and_prompt_file(self, cli, tmp_path):
        rows = [
            {"premise": f"p{i}", "hypothesis": "{premise}", "label": "neutral", "explanation_1": "e"} for i in range(6)
        ]
        source = write_jsonl(tmp_path / "in.jsonl", rows)
        (tmp_path / "t.txt").write_text("<{premise}|{hypothesis}>")
        result = cli(
            "collect_candidates",
            "prepare",
            "--task",
            "esnli",
            "--input",
            source,
            "--output",
            tmp_path / "o.jsonl",
            "--skip",
            2,
            "--limit",
            3,
            "--prompt_file",
            tmp_path / "t.txt",
        )
        assert result.code == 0, result.err
        records = read_jsonl(tmp_path / "o.jsonl")
        assert [r["prompt"] for r in records] == [
            "<p2|{premise}>",
            "<p3|{premise}>",
            "<p4|{premise}>",
        ]  # filled in once
        assert [r["id"] for r in records] == ["esnli-2", "esnli-3", "esnli-4"]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"label": "maybe"}, ["label", "maybe"]),
            ({"premise": " "}, ["premise"]),
            ({"hypothesis": None}, ["hypothesis"]),
        ],
    )
    def test_bad_rows(self, cli, tmp_path, change, words):
        row = {"premise": "p", "hypothesis": "h", "label": "neutral", "explanation_1": "e"}
        source = write_jsonl(tmp_path / "in.jsonl", [row, row | change])
        result = cli(
            "collect_candidates", "prepare", "--task", "esnli", "--input", source, "--output", tmp_path / "o.jsonl"
        )
        refused(result, "in.jsonl:2", *words)
        assert not (tmp_path / "o.jsonl").exists()

    def test_template_asks_for_what_is_not_there(self, cli, tmp_path):
        (tmp_path / "t.txt").write_text("{premise} {colour}")
        source = write_jsonl(
            tmp_path / "in.jsonl", [{"premise": "p", "hypothesis": "h", "label": "neutral", "explanation": "e"}]
        )
        refused(
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                source,
                "--prompt_file",
                tmp_path / "t.txt",
                "--output",
                tmp_path / "o.jsonl",
            ),
            "colour",
        )


def passage(title, text, gold=False):
    return {"title": title, "text": text, "hasanswer": gold, "isgold": gold}


def questions():
    return [
        {"question": "who wrote hamlet", "answers": ["William Shakespeare"],
         "ctxs": [passage("Hamlet", "Hamlet is a play by William Shakespeare.", True)]},
        {"question": "who wrote faust", "answers": ["Goethe"],
         "ctxs": [passage("Faust", "Faust is a play by Goethe.", True)]},
        {"question": "where is oslo", "answers": ["Norway"],
         "ctxs": [passage("Oslo", "Oslo is a city of Norway.", True)]},
        {"question": "who else wrote a faust", "answers": ["Thomas Mann", "the Mann"],
         "ctxs": [passage("Doktor Faustus", "A novel; the play of Goethe came before Mann.", True)]},
    ]  # fmt: skip


def test_distractors_are_the_most_similar_passages_without_an_answer(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "nq.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(q) + "\n" for q in questions())
    call(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", tmp_path / "nq.jsonl.gz", "--num_documents", "3",
        "--gold_position", "1", "3", "--skip", "1", "--limit", "2", "--output", tmp_path / "o.jsonl")  # fmt: skip
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows] == ["nq-1-gold1", "nq-1-gold3", "nq-2-gold1", "nq-2-gold3"]
    # Doktor Faustus is the most similar to the second question, but names Goethe: Hamlet comes first, then Oslo
    assert [d["title"] for d in rows[0]["documents"]] == ["Faust", "Hamlet", "Oslo"]
    assert [d["title"] for d in rows[1]["documents"]] == ["Hamlet", "Oslo", "Faust"]
    assert [r["gold_position"] for r in rows] == [1, 3, 1, 3]
    assert [[d["gold"] for d in r["documents"]].index(True) + 1 for r in rows] == [1, 3, 1, 3]
    assert rows[0]["prompt"].index("Document 1 (Faust)") < rows[0]["prompt"].index("Document 2 (Hamlet)")
    assert rows[0]["prompt"].endswith("Question: who wrote faust\nAnswer:")


def test_a_files_own_distractors_come_first_in_its_order_and_the_gold_place_is_seeded(tmp_path, monkeypatch):
    own = [passage(t, f"about {t}") for t in ("c", "b", "a")] + [passage("x", "of Goethe")]
    rows = [q | {"ctxs": own[:1] + q["ctxs"] + own[1:]} for q in questions()[1:2] * 30]
    file = write_jsonl(tmp_path / "nq.jsonl", rows)
    places = []
    for name in ("one.jsonl", "two.jsonl"):
        call(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "4",
            "--output", tmp_path / name)  # fmt: skip
        places.append([r["gold_position"] for r in read_jsonl(tmp_path / name)])
    first = read_jsonl(tmp_path / "one.jsonl")[0]["documents"]
    assert [d["title"] for d in first if not d["gold"]] == ["c", "b", "a"]
    assert places[0] == places[1] and set(places[0]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ctxs": "x"}, "'ctxs'"),
        ({"ctxs": [{"title": 3, "text": "x"}]}, "'ctxs'"),
        ({"answers": []}, "'answers'"),
        ({"ctxs": [passage("x", "y")]}, "isgold"),
        ({}, "only 3 passages without the answer"),
    ],
)
def test_malformed_questions_are_named(tmp_path, monkeypatch, change, message):
    file = write_jsonl(tmp_path / "nq.jsonl", [*questions()[:2], questions()[2] | change, questions()[3]])
    with pytest.raises(UserError, match=message) as e:
        call(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "5", "--skip", "2",
            "--output", tmp_path / "o.jsonl")  # fmt: skip
    assert "nq.jsonl:3" in str(e.value)


def test_from_release(tmp_path, monkeypatch):
    """Their records train as they are: --ordering reward chooses y* and the pairs by their scores."""
    data = {
        "premise": "A man sits.",
        "hypothesis": "He stands.",
        "label": "contradiction",
        "explanation": "e",
        "index": 7,
    }
    responses = ["```e #### Contradiction```", "```No. #### Neutral```", "```Never. #### Contradiction```"]
    rows = [{"data_dict": data, "responses": responses, "scores": [2.0, 1.0, 2.0]}]
    (tmp_path / "rank_1k.json").write_text(json.dumps(rows))
    flags = ("--from_release", "--output", tmp_path / "o.jsonl", "--input", tmp_path / "rank_1k.json")
    call(monkeypatch, "prepare", "--task", "esnli", *flags)
    [record] = read_jsonl(tmp_path / "o.jsonl")
    assert [c["text"] for c in record["candidates"]] == responses and record["label"] == "contradiction"
    assert [c["source"] for c in record["candidates"]] == ["human", "model", "model"]
    levels = rescue.preference(record, "reward")
    assert levels == [2.0, 1.0, 2.0] and rescue.sft_target(record, levels, "reward") == 0
    assert [parse_nli(r) for r in responses] == [(x, True) for x in ("contradiction", "neutral", "contradiction")]

    qa = {
        "data_dict": questions()[0],
        "responses": ["It was William Shakespeare #### Correct", "Goethe"],
        "scores": [2.0, 1.0],
    }
    qa["data_dict"]["ctxs"].insert(0, passage("Faust", "Faust is a play by Goethe."))
    (tmp_path / "rank_1k.json").write_text(json.dumps([qa]))
    (tmp_path / "o.jsonl").unlink()
    for more in ((), ("--gold_prompt",)):
        output = ("--output", tmp_path / f"qa{len(more)}.jsonl")
        call(monkeypatch, "prepare", "--task", "multidoc_qa", *flags, *output, *more)
    whole, gold = (read_jsonl(tmp_path / f"qa{k}.jsonl")[0] for k in range(2))
    assert whole["gold_position"] == 2 and [c["reward"] for c in whole["candidates"]] == [2.0, 1.0]
    assert "Goethe" in whole["prompt"] and "Goethe" not in gold["prompt"] and "Shakespeare" in gold["prompt"]

    (tmp_path / "rank_1k.json").write_text(json.dumps([qa | {"scores": [1.0]}]))
    with pytest.raises(UserError, match="as many scores"):
        call(monkeypatch, "prepare", "--task", "multidoc_qa", *flags, "--output", tmp_path / "bad.jsonl")


def test_shuffle_draws_from_all_rows_and_long_passages_can_be_left_out(tmp_path, monkeypatch):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": "neutral", "explanation": "e"} for i in range(60)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    drawn = {}
    for seed, limit in ((0, 10), (0, 20), (1, 10)):
        out = tmp_path / f"{seed}-{limit}.jsonl"
        run(
            monkeypatch,
            "prepare",
            "--task",
            "esnli",
            "--input",
            source,
            "--shuffle",
            seed,
            "--limit",
            limit,
            "--output",
            out,
        )
        drawn[seed, limit] = [r["id"] for r in read_jsonl(out)]
    assert drawn[0, 20][:10] == drawn[0, 10] != drawn[1, 10]  # subsets of one draw
    assert max(int(i.removeprefix("esnli-")) for i in drawn[0, 10]) > 20 and len(set(drawn[0, 20])) == 20
    file, out = write_jsonl(tmp_path / "nq.jsonl", questions()), tmp_path / "short.jsonl"
    flags = ("--num_documents", 2, "--max_words", 6, "--output", out)
    call(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, *flags)
    assert [r["question"] for r in read_jsonl(out)] == ["who wrote faust", "where is oslo"]
    assert all(len(d["text"].split()) <= 6 for r in read_jsonl(out) for d in r["documents"])


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


def test_alpaca_from_the_hub(tmp_path, cli, monkeypatch):
    """Without --input the hub's data set is read; where it cannot be, the message says what to do."""
    import datasets

    write_jsonl(tmp_path / "train.jsonl", ALPACA)

    def builder(name, config, data_dir):
        assert (name, config, data_dir) == ("tatsu-lab/alpaca", None, None)
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/x@0/train.jsonl"]}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, file: str(tmp_path / file[-11:]))
    assert cli("collect_candidates", "prepare", "--task", "alpaca", "--output", tmp_path / "o.jsonl").code == 0
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 3

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    result = cli("collect_candidates", "prepare", "--task", "alpaca", "--output", tmp_path / "p.jsonl")
    refused(result, "tatsu-lab/alpaca", "no route", "--input")
