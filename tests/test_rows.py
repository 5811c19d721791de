"""Rows as people have them: shapes and files keep their meaning and their texts; scores of texts in any script."""

import gzip
import json

import datasets
import pytest
import torch
from conftest import make_tokenizer, refused, write_jsonl

import common
import rescue
from collecting import sample
from evaluating import superni


def ranks(record):
    return {c["text"]: c["rank"] for c in record["candidates"] if "rank" in c}


# ------------------------------------------------------------------------------------------------- shapes of a row


LISTS = [{"prompt": "2 + 2 =", "chosen": "4", "rejected": ["5", "22"]}]  # TRL#1831, LlamaFactory#6509
BOTH = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"]}
OBJECTS = {"prompt": "Say hello.", "responses": [{"text": t, "rank": r} for t, r in zip("abc", (2, 0, 1))]}
FROM_1 = {"prompt": "p", "responses": [{"text": t, "rank": r} for t, r in zip("abc", (3, 1, 2))]}
ANSWERS = [("Seven.", "m1", 3.0), ("Blue.", "m2", 1.0), ("Red.", "m3", 1.0), ("Colour.", "m4", 2.0)]
NECTAR = {"prompt": "\n\nHuman: Name a colour.\n\nAssistant: ", "turns": 1}
NECTAR["answers"] = [dict(zip(("answer", "model", "rank"), a)) for a in ANSWERS]
OPO = {"prompt_id": "x", "prompt": "p", "all_responses": ["a", "b", "c"], "overall_scores": [0.25, 0.75, 0.5]}


@pytest.mark.parametrize(
    "row, flags, want",
    [
        (LISTS[0], [], {"4": 0, "5": 1, "22": 1}),
        (LISTS[0], ["--rejected_ordered"], {"4": 0, "5": 1, "22": 2}),
        (BOTH, [], {"a": 0, "b": 0, "c": 2, "d": 2}),
        (BOTH, ["--rejected_ordered"], {"a": 0, "b": 0, "c": 2, "d": 3}),
        (BOTH | {"chosen_reward": [3, 1], "rejected_reward": [2, 0.5]}, [], {"a": 0, "c": 1, "b": 2, "d": 3}),
        (OBJECTS, [], {"b": 0, "c": 1, "a": 2}),
        (
            OBJECTS | {"responses": [r | {"rank": r["rank"] + 1} for r in OBJECTS["responses"]]},
            [],
            {"b": 0, "c": 1, "a": 2},
        ),
        (NECTAR, [], {"Blue.": 0, "Red.": 0, "Colour.": 2, "Seven.": 3}),
        (NECTAR, ["--columns", "responses=answers"], {"Blue.": 0, "Red.": 0, "Colour.": 2, "Seven.": 3}),
        (OPO, [], {"b": 0, "c": 1, "a": 2}),  # ListUltraFeedback: unordered, and their scores
    ],
)
def test_lists(prepare, row, flags, want):
    """The record's candidates stand best first; equal ones share a rank, and rescue does not compare them."""
    [record] = prepare([row], *flags)
    assert ranks(record) == want and record["prompt"] == row["prompt"]
    assert [c["text"] for c in record["candidates"]] == [*want]
    levels = torch.tensor([float(x) for x in rescue.preference(record, "gpt")])
    assert int((levels[:, None] > levels).sum()) == sum(a < b for a in want.values() for b in want.values())


def said(*texts):
    return [{"role": "user", "content": "Why?"}, *({"role": "assistant", "content": t} for t in texts)]


@pytest.fixture
def chat(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path / "chat")
    return ["--chat_template", tmp_path / "chat"]


def test_the_prompt_is_in_the_messages(prepare, chat):
    """Of both, of each of a list; and a list of assistant messages is a list of responses."""
    for rejected in (said("No."), [said("No."), said("So.")]):
        [record] = prepare([{"chosen": said("Yes."), "rejected": rejected}], *chat)
        assert record["prompt"] == "[user]Why?[assistant]" and ranks(record)["Yes."] == 0
        assert {t for t, r in ranks(record).items() if r == 1} == (
            {"No."} if rejected == said("No.") else {"No.", "So."}
        )
    row = {"prompt": "Why?", "chosen": said("Yes.")[1:], "rejected": said("No.", "So.")[1:]}
    assert ranks(prepare([row])[0]) == {"Yes.": 0, "No.": 1, "So.": 1}


def test_a_list_that_nothing_ranks(cli, prepare, tmp_path):
    """Only the name `responses` says best first. UltraFeedback's rows in which nothing is rated are left out."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "Who?", "answers": ["Ann", "Ann B."]}])
    flags = ["prepare", "--task", "pairs", "--input", source, "--output", tmp_path / "a.out.jsonl"]
    refused(cli("collect_candidates", *flags), "a.jsonl:1", "are they best first?", "--columns responses=COLUMN")
    [record] = prepare(source, "--columns", "responses=answers")
    assert ranks(record) == {"Ann": 0, "Ann B.": 1}
    rated = [[{"response": t, "overall_score": s} for t, s in zip("ab", scores)] for scores in ((None, None), (1, 2))]
    [record] = prepare([{"instruction": "p", "completions": c} for c in rated])
    assert record["id"] == "pairs-1" and ranks(record) == {"b": 0, "a": 1}


def test_instruction_and_input_are_the_prompt(prepare):
    row = {"instruction": "Add.", "input": "2 and 3", "chosen": "5", "rejected": "6"}
    assert [r["prompt"] for r in prepare([row, row | {"input": ""}])] == ["Add.\n2 and 3", "Add."]


ALPACA = {"instruction": "Write it.", "input": None, "output": "\n    def f():\n        return 1\n"}


def test_alpaca_look_alikes(prepare):
    dolly = {"instruction": "Who?", "context": "  It was Ann.", "response": " Ann", "category": "closed_qa"}
    code, qa = prepare([ALPACA | {"id": None}, dolly], "--task", "alpaca")
    assert code["candidates"][0]["text"] == "    def f():\n        return 1" and code["input"] == ""
    assert "Input" not in code["prompt"] and code["id"] == "alpaca-0"
    assert qa["candidates"][0]["text"] == "Ann" and "Input:\n  It was Ann.\n" in qa["prompt"]


def test_one_eos_a_response(prepare):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    row = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}
    [record] = prepare([row | {"chosen": "a man<|im_end|>\n", "rejected": "a dog<|im_end|>"}])
    plain = row | {"candidates": [{"text": "a man"}, {"text": "a dog"}]}
    for ids, other in zip(common.encode(tokenizer, record).responses, common.encode(tokenizer, plain).responses):
        assert ids == other and ids.count(tokenizer.eos_token_id) == 1


# ------------------------------------------------------------------------------------------------- files


ODD = ["NA", "None", "null", "0001", "4", "2024-01-01", "1e5", "nan", "true", " x", "1,5", "-", ""]
ODD_ROWS = [{"id": f"00{i}", "prompt": t or "p", "chosen": t, "rejected": "r"} for i, t in enumerate(ODD)]


def write_rows(path, rows):
    """rows as path's kind says: .jsonl, .json, .csv, .parquet, the first three also .gz"""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    text = "\n".join(map(json.dumps, rows))
    if ".json" in path.suffixes:
        text = json.dumps(rows)
    if ".csv" in path.suffixes:
        lines = [[*rows[0]], *([row[k] for k in rows[0]] for row in rows)]
        text = "\n".join(",".join(f'"{x}"' if "," in x else x for x in line) for line in lines)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as f:
        f.write(text)
    return path


KINDS = ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_guessed(prepare, tmp_path, kind):
    records = prepare(write_rows(tmp_path / f"in.{kind}", ODD_ROWS))
    assert [r["id"] for r in records] == [row["id"] for row in ODD_ROWS]
    assert [r["candidates"][0]["text"] for r in records] == [t.removeprefix(" ") for t in ODD]
    assert [r["prompt"] for r in records] == [row["prompt"] for row in ODD_ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_what_the_first_shard_or_megabytes_do_not_show(prepare, tmp_path, kind):
    """A column that is null, then objects, then numbers written 2.5: 12 MB later, and in a second shard."""
    first = {"prompt": "a", "responses": ["x", "y"], "ratings": [2, 1], "reference": None}
    last = {"prompt": "b", "responses": ["x", "y"], "ratings": [1, 2.5], "reference": "mine"}
    (tmp_path / "data").mkdir()
    for i, row in enumerate((first, last)):
        write_rows(tmp_path / f"data/train-0000{i}-of-00002.{kind}", [row])
    found = [prepare(tmp_path / "data")]
    if kind != "parquet":  # a Parquet column has one type
        long = first | {"prompt": "a" * 10**6}
        found.append([prepare(write_rows(tmp_path / f"in.{kind}", [long] * 12 + [last]))[k] for k in (0, -1)])
    for one, two in found:
        assert ranks(one) == {"x": 0, "y": 1} and ranks(two) == {"y": 0, "x": 1}
        assert two["candidates"][0] == {"text": "mine", "source": "reference"} and len(one["candidates"]) == 2


def test_names_are_names(cli, prepare, tmp_path):
    """No pattern, and no file outside the folder that is named."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for name, text in (("x1.jsonl", "wrong"), ("x[1].jsonl", "right"), ("secret.jsonl", "wrong")):
        write_jsonl(tmp_path / name, [row | {"chosen": text}])
    assert "right" in ranks(prepare(tmp_path / "x[1].jsonl")[0])
    flags = ["prepare", "--task", "pairs", "--output", tmp_path / "o.jsonl", "--input"]
    refused(cli("collect_candidates", *flags, tmp_path / "s*.jsonl"), "s*.jsonl: cannot be read")
    for name, files in (("one", "../secret.jsonl"), ("two", tmp_path / "secret.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {files}\n---\n")
        refused(cli("collect_candidates", *flags, tmp_path / name), "names a file outside of it", "secret.jsonl")
    (tmp_path / "d1").mkdir()
    write_jsonl(tmp_path / "d1/train.jsonl", [row])
    (tmp_path / "d[1]").mkdir()
    refused(cli("collect_candidates", *flags, tmp_path / "d[1]"), "names a file outside of it")
    refused(cli("collect_candidates", *flags, tmp_path / "d1", "--split", "test"), "has the splits train", "--split")


def test_the_working_directory_is_no_data_set(cli, here):
    """datasets reads it for the names of its own builders, such as text."""
    write_jsonl(here / "train.jsonl", LISTS)
    done = cli("collect_candidates", "prepare", "--task", "pairs", "--input", "text", "--output", "o.jsonl")
    refused(done, "text names a file outside of it")


# ------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "one, two, expected",
    [
        ("今天天气很好", "今天天气很好。", 1),
        ("今天", "明天", 0.5),  # a character is a word
        ("Москва 2020", "Москва 2021", 0.5),
        ("Вчера 2020", "Москва 2020", 0.5),  # by rouge-score's tokens alone they would be the same
        ("안녕 세상", "안녕 세계", 0.5),
        ("?", "?", 1),
        ("?", "!", 0),
    ],
)
def test_rouge_in_other_scripts(one, two, expected):
    for stemmed in (False, True):
        assert sample.rouge_scorer(stemmed).score(one, two)["rougeL"].fmeasure == pytest.approx(expected)
    assert sample.max_similarity(one, ["x", two]) == pytest.approx(expected)  # copies are similar
    got = superni.superni_metrics([{"task": "t", "text": one, "answers": ["-", two]}])
    assert got["rouge_l"] == pytest.approx(100 * expected)


def test_rouge_of_latin_text_is_rouge_scores():
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["The running cats, café!", "the run cat cafe", "Über 3.5 km_h", "", "naïve co-op's x²"]
    for stemmed in (False, True):
        ours, theirs = sample.rouge_scorer(stemmed), RougeScorer(["rougeL"], use_stemmer=stemmed)
        for a in texts:
            assert [ours.score(a, b) for b in texts] == [theirs.score(a, b) for b in texts]
