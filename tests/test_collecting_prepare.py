"""collecting/prepare.py: e-SNLI, multi-document QA, Alpaca and LIMA, and what RESCUE's and Tuna's authors released."""

import csv
import gzip
import json
from types import SimpleNamespace

import pytest
from conftest import read_jsonl, refused, write_jsonl

import rescue
from collecting import prompts
from evaluating import superni

ESNLI = {"premise": "p", "hypothesis": "h", "label": "neutral", "explanation_1": "e"}
ALPACA = [
    {"instruction": "Add the numbers.", "input": "2 and {3}", "output": "5"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Name a fruit.", "output": " Pear "},
]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_esnlis_csv_files(prepare, tmp_path):
    """The columns of the files at OanaMariaCamburu/e-SNLI; two files are read one after the other."""
    columns = ["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1", "WorkerId"]
    files = [tmp_path / "1.csv", tmp_path / "2.csv"]
    for file in files:
        with open(file, "w", newline="") as f:
            row = [f"p{file.stem}", "neutral", "A {man} sits.", "He, too, waits.", "Sitting is not\nwaiting.", "w"]
            csv.writer(f).writerows([columns, row])
    records = prepare(files, "--task", "esnli")
    assert [r["id"] for r in records] == ["p1", "p2"] and records[0]["label"] == "neutral"
    assert "Premise: A {man} sits.\nHypothesis: He, too, waits." in records[0]["prompt"]
    assert records[0]["candidates"] == [{"text": "Sitting is not\nwaiting. #### Neutral", "source": "human"}]


def test_skip_limit_and_prompt_file(prepare, tmp_path):
    rows = [ESNLI | {"premise": f"p{i}", "hypothesis": "{premise}"} for i in range(6)]
    template = write(tmp_path / "t.txt", "<{premise}|{hypothesis}>")
    records = prepare(rows, "--task", "esnli", "--skip", 2, "--limit", 3, "--prompt_file", template)
    assert [r["prompt"] for r in records] == [f"<p{i}|{{premise}}>" for i in (2, 3, 4)]  # filled in once
    assert [r["id"] for r in records] == ["esnli-2", "esnli-3", "esnli-4"]


def test_a_draw_is_of_all_rows_and_a_larger_one_has_the_smaller(prepare):
    rows = [ESNLI | {"premise": f"p{i}"} for i in range(60)]
    draws = ((0, 10), (0, 20), (1, 10))
    drawn = [prepare(rows, "--task", "esnli", "--shuffle", seed, "--limit", limit) for seed, limit in draws]
    ten, twenty, other = ([int(r["premise"][1:]) for r in records] for records in drawn)
    assert twenty[:10] == ten != other and max(ten) > 20 and len(set(twenty)) == 20


def test_held_out_rows_are_moved_or_copied(preparing):
    rows = [ESNLI | {"premise": f"p{i}"} for i in range(9)]
    for flags, kept in (([], 5), (["--keep_validation"], 9)):
        result, output = preparing(rows, "--task", "esnli", "--validation", 4, *flags)
        assert result.code == 0, result.err
        train, held_out = (
            {r["id"] for r in read_jsonl(output.with_name(f"{name}.jsonl"))} for name in ("out", "validation")
        )
        assert (len(train), len(held_out), len(train | held_out)) == (kept, 4, 9)


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


QA = ("--task", "multidoc_qa", "--num_documents")


def test_distractors_are_the_most_similar_passages_without_an_answer(prepare, tmp_path):
    with gzip.open(tmp_path / "nq.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(q) + "\n" for q in questions())
    rows = prepare(tmp_path / "nq.jsonl.gz", *QA, 3, "--gold_position", 1, 3, "--skip", 1, "--limit", 2)
    assert [r["id"] for r in rows] == ["nq-1-gold1", "nq-1-gold3", "nq-2-gold1", "nq-2-gold3"]
    # Doktor Faustus is the most similar to the second question, but names Goethe: Hamlet comes first, then Oslo
    assert [d["title"] for d in rows[0]["documents"]] == ["Faust", "Hamlet", "Oslo"]
    assert [d["title"] for d in rows[1]["documents"]] == ["Hamlet", "Oslo", "Faust"]
    assert [r["gold_position"] for r in rows] == [1, 3, 1, 3]
    assert [[d["gold"] for d in r["documents"]].index(True) + 1 for r in rows] == [1, 3, 1, 3]
    assert rows[0]["prompt"].index("Document 1 (Faust)") < rows[0]["prompt"].index("Document 2 (Hamlet)")
    assert rows[0]["prompt"].endswith("Question: who wrote faust\nAnswer:")


def test_equally_similar_passages_stand_in_the_files_order(prepare):
    """Whatever order Python gives a set's words."""
    rows = [{"question": f"q{i}", "answers": [f"a{i}"], "ctxs": [passage(f"t{i}", f"a{i} q", True)]} for i in range(40)]
    titles = [d["title"] for d in prepare(rows, *QA, 39, "--limit", 1)[0]["documents"] if not d["gold"]]
    assert titles == [f"t{i}" for i in range(1, 39)]


def test_a_files_own_distractors_come_first_in_its_order_and_the_gold_place_is_seeded(prepare):
    own = [passage(t, f"about {t}") for t in ("c", "b", "a")] + [passage("x", "of Goethe")]
    rows = [q | {"ctxs": own[:1] + q["ctxs"] + own[1:]} for q in questions()[1:2] * 30]
    records = prepare(rows, *QA, 4)
    assert [d["title"] for d in records[0]["documents"] if not d["gold"]] == ["c", "b", "a"]
    assert {r["gold_position"] for r in records} == {1, 2, 3, 4} and prepare(rows, *QA, 4) == records


def test_long_passages_can_be_left_out(prepare):
    records = prepare(questions(), *QA, 2, "--max_words", 6)
    assert [r["question"] for r in records] == ["who wrote faust", "where is oslo"]
    assert all(len(d["text"].split()) <= 6 for r in records for d in r["documents"])


def changed(change):
    return [*questions()[:2], questions()[2] | change, questions()[3]]


@pytest.mark.parametrize(
    "task, rows, flags, words",
    [
        ("esnli", [ESNLI, ESNLI | {"label": "maybe"}], [], [":2", "label", "maybe"]),
        ("esnli", [ESNLI, ESNLI | {"premise": " "}], [], [":2", "premise"]),
        ("esnli", [ESNLI], ["--from_release"], [":1", "not a row", "data_dict"]),
        ("pairs", ALPACA, ["--from_release"], ["--from_release reads no --task pairs"]),
        ("esnli", [{"data_dict": ESNLI, "responses": ["a"], "scores": []}], ["--from_release"], [":1", "shorter"]),
        ("esnli", [ESNLI], ["--validation", 1], ["1 records", "--validation 1"]),
        ("alpaca", [{"orig": ALPACA[1], "text": ["a"], "logprob": [-1], "length": []}], ["--from_release"], [":1"]),
        ("alpaca", [{"instruct": "I R:", "generation": ["a"], "rank": [0]}], ["--from_release"], [":1", "Instruction"]),
        ("multidoc_qa", changed({"ctxs": "x"}), [], [":3", "'ctxs'"]),
        ("multidoc_qa", changed({"answers": []}), [], [":3", "'answers'"]),
        ("multidoc_qa", changed({"ctxs": [passage("x", "y")]}), ["--num_documents", 3], [":3", "isgold"]),
        ("multidoc_qa", questions(), ["--num_documents", 5], [":1", "only 3 passages without the answer"]),
    ],
)
def test_what_cannot_be_read_is_named(preparing, task, rows, flags, words):
    result, output = preparing(rows, "--task", task, *flags)
    refused(result, *words)
    assert not output.exists()


def test_a_template_that_asks_for_what_is_not_there(preparing, tmp_path):
    template = write(tmp_path / "t.txt", "{premise} {colour}")
    refused(preparing([ESNLI], "--task", "esnli", "--prompt_file", template)[0], "in.jsonl:1", "colour")


def test_alpaca(preparing, tmp_path):
    result, output = preparing(write(tmp_path / "alpaca_data.json", ALPACA), "--task", "alpaca")
    assert "alpaca: 4 rows read, 3 records" in result.out
    records = read_jsonl(output)
    assert [r["id"] for r in records] == ["alpaca-0", "alpaca-1", "alpaca-3"]
    with_input, without, fruit = (r["prompt"] for r in records)
    assert "Add the numbers.\n\nInput:\n2 and {3}\n" in with_input and with_input.endswith("Response:\n")
    assert "Input" not in without and "Task:\nName a colour.\n" in without and "---" not in with_input + without
    assert fruit.endswith("Response:\n")
    assert records[2]["candidates"] == [{"text": "Pear", "source": "reference"}]


def test_alpaca_with_a_template_of_ones_own(prepare, preparing, here):
    """--prompt_file; --template alpaca is a file of the user's too. LIMA's dialogues are read as their first turn (Tuna
    App. A)."""
    flags = ["--task", "alpaca", "--template", "alpaca"]
    refused(preparing(ALPACA[1:2], *flags)[0], "save the released prompts", "templates/alpaca.txt", "---")
    (here / "templates").mkdir()
    two = write(here / "templates/alpaca.txt", "I {instruction} N {input} R:\n---\nI {instruction} R:\n")
    records = prepare([*ALPACA[:2], {"conversations": ["Why?", "Because.", "And?", "So."]}], *flags)
    assert [r["prompt"] for r in records] == [
        "I Add the numbers. N 2 and {3} R:",  # the released prompt ends so, without a line end
        "I Name a colour. R:",
        "I Why? R:",
    ]
    assert records[2]["candidates"][0]["text"] == "Because."
    assert prepare(ALPACA[:1], "--task", "alpaca", "--prompt_file", two)[0]["prompt"] == records[0]["prompt"]
    one = write(here / "one", "Q {instruction} A")
    assert prepare(ALPACA, "--task", "alpaca", "--prompt_file", one)[0]["prompt"] == "Q Add the numbers. A"


def test_template_own_is_the_prompt_that_training_reads(prepare):
    """For the benchmarks: a model trained on prepare's prompts meets an instruction as it has learnt to."""
    record = prepare(ALPACA, "--task", "alpaca", "--template", "own")[0]
    assert (record["instruction"], record["input"]) == ("Add the numbers.", "2 and {3}")
    prompt = superni.superni_prompt("Add the numbers.", [], "2 and {3}", None, 9, prompts.TEMPLATES["alpaca"])
    assert prompt == record["prompt"].replace("Add the", "Definition: Add the")


def test_what_rescues_authors_released(prepare):
    """Their records train as they are: --ordering reward chooses y* and the pairs by their scores."""
    responses = ["```e #### Contradiction```", "```No. #### Neutral```", "```Never. #### Contradiction```"]
    row = {"data_dict": ESNLI | {"label": "contradiction", "index": 7}, "responses": responses, "scores": [2, 1, 2]}
    [record] = prepare([row], "--task", "esnli", "--from_release")
    assert [(c["text"], c["source"]) for c in record["candidates"]] == list(zip(responses, ["human", "model", "model"]))
    levels = rescue.preference(record, "reward")
    assert levels == [2, 1, 2] and rescue.sft_target(record, levels, "reward") == 0

    question = questions()[0] | {"ctxs": [passage("Faust", "A play by Goethe."), *questions()[0]["ctxs"]]}
    row = {"data_dict": question, "responses": ["Shakespeare #### Correct", "Goethe"], "scores": [2, 1]}
    flags = ("--task", "multidoc_qa", "--from_release")
    [whole], [gold] = prepare([row], *flags), prepare([row], *flags, "--gold_prompt")
    assert whole["gold_position"] == 2 and [c["reward"] for c in whole["candidates"]] == [2, 1]
    assert (whole["id"], whole["candidates"][0]["source"]) == ("release-0", "model")
    assert "Goethe" in whole["prompt"] and "Goethe" not in gold["prompt"] and "Shakespeare" in gold["prompt"]


def test_what_tunas_authors_released(prepare, tmp_path):
    """--references: Eq. 6's MLE term has what it wants; the prompts are in the template that all others have."""
    log_probabilities = {"orig": ALPACA[1], "text": ["\nBlue", "Red"], "logprob": [-2.0, -2.0], "length": [2, 1]}
    by = {"source": "text-davinci-003", "teacher": "text-davinci-003"}
    [record] = prepare([log_probabilities], "--task", "alpaca", "--from_release")
    assert record["candidates"] == [
        {"text": "Red.", "source": "reference"},
        {"text": "Blue", "logprob": -2.0, "num_tokens": 2} | by,
        {"text": "Red", "logprob": -2.0, "num_tokens": 1} | by,
    ]
    both = "Told.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n2 and {3}\n\n### Response:"
    one, absent = "### Instruction:\nName a colour.\n\n### Response:", "### Instruction:\nNo.\n\n### Response:"
    rows = [
        {"id": 7, "instruct": both, "generation": ["5", "6", "6"], "ranks": [3, 1, 0]},
        {"id": 8, "instruct": absent, "generation": ["a"], "rank": [0]},
        {"id": 9, "instruct": one, "generation": ["Blue"], "rank": [0]},
    ]
    flags = ("--from_release", "--references", write_jsonl(tmp_path / "alpaca.jsonl", ALPACA))
    first, second = prepare(rows, "--task", "alpaca", *flags)
    assert [(c["text"], c.get("rank")) for c in first["candidates"]] == [("5", None), ("5", 1), ("6", 0), ("6", None)]
    assert [c["source"] for c in first["candidates"]] == ["reference"] + ["tuna-probabilistic"] * 3
    assert first["prompt"] == prompts.alpaca_prompt(prompts.TEMPLATES["alpaca"], ALPACA[0], "")
    assert (first["id"], second["id"], second["ranked_by"]) == ("release-0", "release-2", "gpt-4")

    rows = [{"instruction": one, "output": ["Blue", "Red.", "Green"], "score": [2, 0.5, 0.5]}]
    for more, source, prompt in (((), "model", one), (flags[1:], "reference", second["prompt"])):
        [record] = prepare(rows, "--task", "alpaca", "--from_release", *more)
        found = [(c["text"], c["source"], c["rank"]) for c in record["candidates"]]
        assert found == [("Blue", "model", 0), ("Red.", source, 1), ("Green", "model", 1)]
        assert (record["prompt"], record["ranked_by"]) == (prompt, "score")


def test_alpaca_from_the_hub(tmp_path, cli, monkeypatch):
    """Without --input the hub's data set is read; where it cannot be, the message says what to do."""
    import datasets

    write_jsonl(tmp_path / "train.jsonl", ALPACA)

    def builder(name, config, data_dir):
        assert (name, config, data_dir) == ("tatsu-lab/alpaca", None, None)
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/x@0/train.jsonl"]}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, file: str(tmp_path / file[-11:]))
    flags = ["prepare", "--task", "alpaca", "--output"]
    assert cli("collect_candidates", *flags, tmp_path / "o.jsonl").code == 0
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 3
    monkeypatch.undo()  # offline, as tests are
    refused(cli("collect_candidates", *flags, tmp_path / "p.jsonl"), "tatsu-lab/alpaca", "--input")
