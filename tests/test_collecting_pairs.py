"""collect_candidates.py prepare --task pairs: data of one's own, from its shapes to a training."""

import shlex

import datasets
import pytest
from conftest import read_jsonl, refused, write_jsonl
from test_cli import readme_commands

from collecting.pairs import prepare_pair
from recipes.tiny import make_tokenizer

TEMPLATE = r"{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
TEMPLATE += r"{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(3)]
LISTS = [{"instruction": f"Question {i}?", "responses": ["Best.", "Middle.", "Worst."]} for i in range(3)]
USER = [[{"role": "user", "content": f"Question {i}?"}] for i in range(3)]
MESSAGES = [
    {k: [*turns, {"role": "assistant", "content": text}] for k, text in (("chosen", "Yes."), ("rejected", "No."))}
    for turns in USER
]


def completion(model, text, *ratings):
    names = ("helpfulness", "honesty")
    return {"model": model, "response": text, "annotations": {k: {"Rating": r} for k, r in zip(names, ratings)}}


RATINGS = [
    {
        "instruction": f"Question {i}?",
        "completions": [completion("a", "Bad.", "1", "2"), completion("b", "Good.", "5", "4")]
        + [completion("c", "Unrated.", "N/A", "N/A"), completion("d", "Fair.", "3", "N/A")],
    }
    for i in range(3)
]
SCORED = [r | {"score_chosen": 8.0, "score_rejected": 2.5} for r in PAIRS]
RANKED = [{"messages": turns, "responses": ["Bad.", "Good."], "ranks": [2, 1], "reference": "Mine."} for turns in USER]


def parquet(path):
    datasets.Dataset.from_list(SCORED).to_parquet(path)
    return path


def hub_folder(path):
    (path / "data").mkdir(parents=True)
    datasets.Dataset.from_list(RANKED).to_parquet(path / "data/train-00000-of-00001.parquet")
    return path


@pytest.fixture
def chat_model(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


INPUTS = {  # name -> (how it is written, the texts best first with rewards, sources, a training)
    "pairs": (lambda d: write_jsonl(d / "in.jsonl", PAIRS), {"Yes, 0.": None, "No.": None}, "pro --no_temperature"),
    "lists": (
        lambda d: write_jsonl(d / "in.json", LISTS),
        {"Best.": None, "Middle.": None, "Worst.": None},
        "rescue --ordering gpt --no_sft",
    ),
    "messages": (
        lambda d: write_jsonl(d / "in.jsonl", MESSAGES),
        {"Yes.": None, "No.": None},
        "tuna --stage contextual --mle_on all",
    ),
    "ratings": (
        lambda d: write_jsonl(d / "in.jsonl", RATINGS),
        {"Good.": 4.5, "Fair.": 3.0, "Bad.": 1.5},
        "rescue --ordering reward",
    ),
    "parquet": (lambda d: parquet(d / "in.parquet"), {"Yes, 0.": 8.0, "No.": 2.5}, "reward_model --ordering reward"),
    "folder": (lambda d: hub_folder(d / "hub"), {"Good.": None, "Bad.": None}, "tuna --stage contextual"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_six_inputs_train(cli, tiny, chat_model, tmp_path, name):
    write, best_first, training = INPUTS[name]
    chat = ["--chat_template", chat_model] if name in ("messages", "folder", "lists") else []
    data = tmp_path / "train.jsonl"
    done = cli("collect_candidates", "prepare", "--task", "pairs", "--input", write(tmp_path), "--output", data, *chat)
    assert done.code == 0, done.err
    records = read_jsonl(data)
    assert len(records) == 3
    assert records[0]["prompt"] == ("[user]Question 0?\n[assistant]\n" if chat else "Question 0?")
    ranked = [c for c in records[0]["candidates"] if c["source"] != "reference"]
    assert {c["text"]: c.get("reward") for c in sorted(ranked, key=lambda c: c["rank"])} == best_first
    assert [c["text"] for c in sorted(ranked, key=lambda c: c["rank"])] == [*best_first]
    script, *flags = training.split()
    flags += ["--data", data, "--model", tiny, "--output", tmp_path / "run", "--batch_size", 2, "--epochs", 1]
    done = cli(script, *flags)
    assert done.code == 0, done.err
    assert len(read_jsonl(tmp_path / "run/log.jsonl")) >= 2 and (tmp_path / "run/model/config.json").exists()


def prepare(cli, tmp_path, rows, *flags, name="in.jsonl"):
    source = write_jsonl(tmp_path / name, rows)
    output = tmp_path / f"{name}.out.jsonl"
    done = cli("collect_candidates", "prepare", "--task", "pairs", "--input", source, "--output", output, *flags)
    return done, output


def test_columns_of_another_name_and_csv(cli, tmp_path):
    (tmp_path / "in.csv").write_text('q,good,bad\n"One, two?",Yes,No\nThree?,Same,Same\n')
    flags = ["--input", tmp_path / "in.csv", "--columns", "prompt=q", "chosen=good", "rejected=bad"]
    done = cli("collect_candidates", "prepare", "--task", "pairs", *flags, "--output", tmp_path / "out.jsonl")
    assert done.code == 0 and "left out: 1 rows without two different responses" in done.out
    (record,) = read_jsonl(tmp_path / "out.jsonl")
    assert record["prompt"] == "One, two?"
    assert [(c["text"], c["source"], c["rank"]) for c in record["candidates"]] == [
        ("Yes", "chosen", 0),
        ("No", "rejected", 1),
    ]


def test_export_goes_back(cli, tmp_path):
    done, records = prepare(cli, tmp_path, PAIRS)
    assert done.code == 0
    flags = ["--input", records, "--output", tmp_path / "trl.jsonl", "--format", "trl"]
    assert (done := cli("collect_candidates", "export", *flags)).code == 0, done.err
    rows = read_jsonl(tmp_path / "trl.jsonl")
    assert rows[0]["chosen"] == " Yes, 0."
    done, again = prepare(cli, tmp_path, rows, name="again.jsonl")
    assert done.code == 0 and again.read_text() == records.read_text()


@pytest.mark.parametrize("name", INPUTS)
def test_ranked_lists_go_back(cli, tmp_path, chat_model, name):
    """prepare, export --format ranked, prepare: the same records."""
    flags = ["--input", INPUTS[name][0](tmp_path), "--output", tmp_path / "a.jsonl", "--chat_template", chat_model]
    assert cli("collect_candidates", "prepare", "--task", "pairs", *flags).code == 0
    flags = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl", "--format", "ranked"]
    assert (done := cli("collect_candidates", "export", *flags)).code == 0, done.err
    flags = ["--input", tmp_path / "out.jsonl", "--output", tmp_path / "b.jsonl"]
    assert cli("collect_candidates", "prepare", "--task", "pairs", *flags).code == 0

    def ranked(path):
        lines = [{k: v for k, v in r.items() if k != "messages"} for r in read_jsonl(path)]
        return [r | {"candidates": sorted(r["candidates"], key=lambda c: c.get("rank", -1))} for r in lines]

    assert ranked(tmp_path / "a.jsonl") == ranked(tmp_path / "b.jsonl")


def test_a_cut_response_goes_back_as_one(cli, tmp_path):
    candidates = [{"text": "a", "source": "m", "reward": 2.0, "finished": False}, {"text": "b", "source": "human"}]
    record = {"id": "x", "prompt": "p ", "candidates": [*candidates, {"text": "c", "source": "n", "reward": 1.0}]}
    write_jsonl(tmp_path / "a.jsonl", [record])
    flags = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl", "--format", "ranked"]
    assert (done := cli("collect_candidates", "export", *flags)).code == 0, done.err
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["rewards"] == [2.0, 1.0] and row["reference"] == "b"
    done, again = prepare(cli, tmp_path, [row])
    assert done.code == 0, done.err
    found = [(c["text"], c["source"], c.get("finished", True)) for c in read_jsonl(again)[0]["candidates"]]
    assert found == [("b", "reference", True), ("a", "m", False), ("c", "n", True)]


def test_a_part_of_a_data_set(cli, tmp_path):
    """A folder as the hub has it, with two configurations in its README."""
    folder = tmp_path / "hub"
    for name, rows in (("small", PAIRS[:1]), ("large", PAIRS)):
        (folder / name).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / name / "train.parquet")
    parts = "".join(f"- config_name: {n}\n  data_files: {n}/train.parquet\n" for n in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    flags = ["prepare", "--task", "pairs", "--input", folder, "--output", tmp_path / "out.jsonl"]
    refused(cli("collect_candidates", *flags), "--config")
    assert (done := cli("collect_candidates", *flags, "--config", "large")).code == 0, done.err
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize(
    "row, flags, words",
    [
        ({"q": "x", "chosen": "a", "rejected": "b"}, [], ["the columns are q, chosen, rejected", "Your own data"]),
        ({"prompt": "x", "a": "y"}, ["--columns", "chosen=b"], ["no column 'b'", "the columns are prompt, a"]),
        ({"prompt": "x"}, ["--columns", "best=b"], ["--columns best=b", "chosen, rejected"]),
        ({"prompt": USER[0], "chosen": "a", "rejected": "b"}, [], ["--chat_template"]),
        ({"prompt": "x", "responses": ["a", "b"], "rewards": [1]}, [], ["'rewards' must be a list of 2"]),
        ({"prompt": "x", "responses": ["a", "b"], "rewards": ["1", "good"]}, [], ["must be a number"]),
        ({"prompt": "x", "responses": [["a"], ["b"]]}, [], ["a response must be a text"]),
    ],
)
def test_a_wrong_shape_is_answered(cli, tmp_path, row, flags, words):
    done, output = prepare(cli, tmp_path, [row], *flags)
    refused(done, *words)
    assert not output.exists()


def test_unreadable_inputs(cli, tmp_path):
    (tmp_path / "torn.json").write_text('[{"prompt": ')
    (tmp_path / "data.txt").write_text("x")
    for name, word in (("torn.json", "cannot be read"), ("data.txt", ".parquet"), ("no.csv", "no such file")):
        flags = ["--input", tmp_path / name, "--output", tmp_path / "out.jsonl"]
        refused(cli("collect_candidates", "prepare", "--task", "pairs", *flags), name, word)


def test_what_a_method_cannot_use_is_said(cli, tiny, tmp_path):
    done, data = prepare(cli, tmp_path, PAIRS)
    assert done.code == 0
    flags = ["--data", data, "--model", tiny, "--output", tmp_path / "run"]
    refused(cli("rescue", "--ordering", "human", *flags), "source human or reference", "--ordering gpt")
    refused(cli("tuna", "--stage", "contextual", *flags), "source reference or human", "--mle_on all")
    refused(cli("pro", *flags), "--by reward", "--no_temperature")


def test_readme_own_data_runs(cli, tiny, chat_model, tmp_path, monkeypatch):
    """The section's commands as printed, but for the models."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "my.jsonl", [{k.replace("prompt", "question"): v for k, v in r.items()} for r in PAIRS])
    lines = list(readme_commands("Your own data"))
    assert len(lines) == 5
    for line in lines:
        model = str(chat_model if "prepare" in line else tiny)
        words = [model if w == "demo/model" else w for w in shlex.split(line)]
        done = cli(words[1].removesuffix(".py"), *words[2:])
        assert done.code == 0, (line, done.err)
    assert len(list(tmp_path.glob("runs/*/model/config.json"))) == 4


@pytest.mark.parametrize("null", ["chosen", "rejected"])
def test_a_row_with_a_null_for_a_response_is_left_out(null):
    row = {"prompt": "2 + 2 =", "chosen": "4", "rejected": ["5"]}
    assert prepare_pair(row, "f:1", 0, "{prompt}", {}, None)
    assert prepare_pair(row | {null: None}, "f:2", 1, "{prompt}", {}, None) is None
