"""collect_candidates.py prepare --task pairs: data of one's own, from its shapes to a training."""

import datasets
import pytest
from conftest import read_jsonl, refused, write_jsonl
from test_cli import readme_commands

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
SCORED = [r | {"score_chosen": 8.0, "score_rejected": 2.5} for r in PAIRS]
RANKED = [{"messages": turns, "responses": ["Bad.", "Good."], "ranks": [2, 1], "reference": "Mine."} for turns in USER]


def completion(model, text, *ratings):
    names = ("helpfulness", "honesty")
    return {"model": model, "response": text, "annotations": {k: {"Rating": r} for k, r in zip(names, ratings)}}


RATED = [completion("a", "Bad.", "1", "2"), completion("b", "Good.", "5", "4")]
RATED += [completion("c", "Unrated.", "N/A", "N/A"), completion("d", "Fair.", "3", "N/A")]
RATINGS = [{"instruction": f"Question {i}?", "completions": RATED} for i in range(3)]
INPUTS = {  # file or folder -> (its rows, the texts best first with rewards, a training)
    "pairs.jsonl": (PAIRS, {"Yes, 0.": None, "No.": None}, "pro --no_temperature"),
    "lists.json": (LISTS, {"Best.": None, "Middle.": None, "Worst.": None}, "rescue --ordering gpt --no_sft"),
    "messages.jsonl": (MESSAGES, {"Yes.": None, "No.": None}, "tuna --stage contextual --mle_on all"),
    "ratings.jsonl": (RATINGS, {"Good.": 4.5, "Fair.": 3.0, "Bad.": 1.5}, "rescue --ordering reward"),
    "scored.parquet": (SCORED, {"Yes, 0.": 8.0, "No.": 2.5}, "reward_model --ordering reward"),
    "folder": (RANKED, {"Good.": None, "Bad.": None}, "tuna --stage contextual"),
}


@pytest.fixture(params=INPUTS)
def source(request, tmp_path):
    """-> (a file or folder, its row of INPUTS)."""
    path, (rows, *_) = tmp_path / request.param, INPUTS[request.param]
    if path.suffix.startswith(".json"):
        write_jsonl(path, rows)
    else:
        file = path if path.suffix else path / "data/train-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
    return path, INPUTS[request.param]


@pytest.fixture
def chat_model(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_six_inputs_train(cli, preparing, tiny, chat_model, tmp_path, source):
    path, (rows, best_first, training) = source
    chat = ["--chat_template", chat_model] if rows in (MESSAGES, RANKED, LISTS) else []
    result, data = preparing(path, *chat)
    assert result.code == 0, result.err
    records = read_jsonl(data)
    assert len(records) == 3
    assert records[0]["prompt"] == ("[user]Question 0?\n[assistant]\n" if chat else "Question 0?")
    ranked = [c for c in records[0]["candidates"] if c["source"] != "reference"]
    ranked.sort(key=lambda c: c["rank"])
    assert [(c["text"], c.get("reward")) for c in ranked] == [*best_first.items()]
    script, *flags = training.split()
    flags += ["--data", data, "--model", tiny, "--output", tmp_path / "run", "--batch_size", 2, "--epochs", 1]
    result = cli(script, *flags)
    assert result.code == 0, result.err
    assert len(read_jsonl(tmp_path / "run/log.jsonl")) >= 2 and (tmp_path / "run/model/config.json").exists()


def test_columns_of_another_name_and_csv(preparing, tmp_path):
    (tmp_path / "in.csv").write_text('q,good,bad\n"One, two?",Yes,No\nThree?,Same,Same\n')
    result, output = preparing(tmp_path / "in.csv", "--columns", "prompt=q", "chosen=good", "rejected=bad")
    assert result.code == 0 and "pairs: 2 rows read, 1 records" in result.out
    [record] = read_jsonl(output)
    assert record["prompt"] == "One, two?"
    found = [(c["text"], c["source"], c["rank"]) for c in record["candidates"]]
    assert found == [("Yes", "chosen", 0), ("No", "rejected", 1)]


@pytest.mark.parametrize("null", ["chosen", "rejected"])
def test_a_row_with_a_null_for_a_response_is_left_out(prepare, null):
    row = {"prompt": "2 + 2 =", "chosen": "4", "rejected": ["5"]}
    assert [r["id"] for r in prepare([row | {null: None}, row])] == ["pairs-1"]


def test_a_response_that_was_cut_and_a_subset_that_is_no_text(preparing):
    row = {"prompt": "2 + 2 =", "responses": [{"text": "4", "finished": False}, {"text": "5"}], "rewards": [1, 0]}
    result, output = preparing([row | {"subset": ["hard"]}])
    assert result.code == 0 and "pairs: 1 rows read, 1 records" in result.out
    assert [c.get("finished") for c in read_jsonl(output)[0]["candidates"]] == [False, None]


def test_a_part_of_a_data_set(prepare, preparing, tmp_path):
    """A folder as the hub has it, with two configurations in its README."""
    folder = tmp_path / "hub"
    for name, rows in (("small", PAIRS[:1]), ("large", PAIRS)):
        (folder / name).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / name / "train.parquet")
    parts = "".join(f"- config_name: {n}\n  data_files: {n}/train.parquet\n" for n in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    refused(preparing(folder)[0], "--config")
    assert len(prepare(folder, "--config", "large")) == 3


@pytest.mark.parametrize(
    "row, flags, words",
    [
        ({"q": "x", "chosen": "a", "rejected": "b"}, [], ["the columns are q, chosen, rejected", "Your own data"]),
        ({"prompt": "x", "responses": "a text"}, [], ["a list of responses", "--columns"]),
        ({"prompt": "x", "a": "y"}, ["--columns", "chosen=b"], ["no column 'b'", "the columns are prompt, a"]),
        ({"prompt": "x"}, ["--columns", "best=b"], ["--columns best: write NAME=COLUMN", "chosen, rejected"]),
        ({"prompt": USER[0], "chosen": "a", "rejected": "b"}, [], ["--chat_template"]),
        ({"prompt": "x", "responses": ["a", "b"], "rewards": ["1", "good"]}, [], ["in.jsonl:1", "'good'"]),
        ({"prompt": "x", "responses": [["a"], ["b"]]}, [], ["a response must be a text"]),
    ],
)
def test_a_wrong_shape_is_answered(preparing, row, flags, words):
    result, output = preparing([row], *flags)
    refused(result, *words)
    assert not output.exists()


def test_what_a_method_cannot_use_is_said(cli, preparing, tiny, tmp_path):
    flags = ["--data", preparing(PAIRS)[1], "--model", tiny, "--output", tmp_path / "run"]
    refused(cli("rescue", "--ordering", "human", *flags), "source human or reference", "--ordering gpt")
    refused(cli("tuna", "--stage", "contextual", *flags), "source reference or human", "--mle_on all")
    refused(cli("pro", *flags), "--by reward", "--no_temperature")


def test_readme_own_data_runs(cli, tiny, chat_model, here):
    """The section's commands as printed, but for the models."""
    write_jsonl(here / "my.jsonl", [{k.replace("prompt", "question"): v for k, v in r.items()} for r in PAIRS])
    for line in readme_commands(section="Your own data"):
        line = line.replace("--chat_template demo/model", f"--chat_template {chat_model}")
        script, *flags = line.replace("demo/model", str(tiny)).partition("python ")[2].split()
        assert cli(script.removesuffix(".py"), *flags).code == 0, line
    assert len(list(here.glob("runs/*/model/config.json"))) == 4
