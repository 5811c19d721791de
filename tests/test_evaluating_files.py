"""evaluate.py on files that are not what they should be: one sentence, and no file lost."""

import json

import pytest
from conftest import refused, write_jsonl
from test_evaluating_lmentry import make_lmentry
from test_evaluating_superni import make_superni

from evaluating.tables import markdown


class TestFigures:
    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"metrics": 3}', "\x00"])
    def test_foreign_metrics(self, cli, tmp_path, text):
        (tmp_path / "nli.metrics.json").write_text(text)
        refused(cli("evaluate", "report", tmp_path), "nli.metrics.json")

    def test_two_folders_of_one_name(self, cli, here):
        """Neither hides the other in a table; a name may hold any text."""
        for folder in ("a/x", "b/x"):
            (here / folder).mkdir(parents=True)
            (here / folder / "nli.metrics.json").write_text('{"metrics": {"accuracy": 0.5}}')
        refused(cli("evaluate", "report", "a/x", "b/x"), "b/x", "two folders are called 'x'")
        assert cli("evaluate", "report", "a/x").code == 0

    def test_a_name_breaks_no_table(self):
        last = markdown({"a|b\nc": {"accuracy": 0.5}}).splitlines()[2:]
        assert last == [r"| a\|b c | 0.5 |"]

    def test_report_overwrites_only_its_own(self, cli, tmp_path):
        (tmp_path / "nli.metrics.json").write_text('{"metrics": {"accuracy": 0.5}, "name": "x"}')
        mine = tmp_path / "mine.md"
        mine.write_text("mine")
        refused(cli("evaluate", "report", tmp_path, "--output", mine), "mine.md")
        assert mine.read_text() == "mine"
        for _ in range(2):
            assert cli("evaluate", "report", tmp_path, "--output", tmp_path / "r.md").code == 0

    def test_the_key_of_a_sheet_stays(self, cli, tmp_path):
        rows = [{"id": "r0", "prompt": "p", "text": "t"}]
        files = [write_jsonl(tmp_path / f"{n}.jsonl", rows) for n in "ab"]
        flags = ["--systems", *files, "--names", "a", "b", "--input", files[0], "--output", tmp_path / "s.html"]
        (tmp_path / "s.html.key.json").write_text("mine")
        refused(cli("evaluate", "sheet", *flags), "key.json")
        assert (tmp_path / "s.html.key.json").read_text() == "mine"
        for key in ("mine", '{"orders": [], "systems": 3}', '{"orders": [[0, 5]], "systems": ["a", "b"]}'):
            (tmp_path / "s.html.key.json").write_text(key)
            refused(cli("evaluate", "sheet", "--score", files[0], "--output", tmp_path / "s.html"), "key.json")

    @pytest.mark.parametrize("row", [{"x": 1}, {"id": "a", "text": 3, "question": "q"}, {"id": ["a"]}])
    def test_judge_on_foreign_files(self, cli, tmp_path, row):
        file = write_jsonl(tmp_path / "a.jsonl", [row])
        flags = ["--answers", file, file, "--model", "m", "--base_url", "http://127.0.0.1:9", "--name", "n"]
        refused(cli("evaluate", "judge", *flags, "--output", tmp_path / "o.jsonl"), "a.jsonl:1")


class TestForeignClones:
    """Super-NaturalInstructions and LMentry as somebody changed them."""

    @pytest.mark.parametrize(
        "change",
        [
            {"Definition": []},
            {"Definition": [7]},
            {"Definition": None},
            {"Positive Examples": {}},
            {"Positive Examples": [7, 7]},
            {"Instances": {"a": 1}},
            {"Instances": ["text"]},
            {"Instances": [{"input": 7, "output": ["a"]}]},
            {"Instances": [{"input": "a", "output": [5]}]},
            {"Instances": [{"input": "a", "output": []}]},
        ],
    )
    def test_superni(self, cli, tiny, tmp_path, change):
        file = make_superni(tmp_path / "ni") / "tasks/task2_say.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        flags = ["--model", tiny, "--superni_dir", tmp_path / "ni", "--shots", 2, "--output", tmp_path / "o.jsonl"]
        refused(cli("evaluate", "superni", *flags), "task2_say.json: not a task")

    @pytest.mark.parametrize("content", [[], {"examples": []}, {"examples": {"1": {"input": "a"}}}, {"examples": 7}])
    def test_lmentry(self, cli, tiny, tmp_path, content):
        file = make_lmentry(tmp_path / "lm") / "data/word_after.json"
        flags = ["--model", tiny, "--lmentry_dir", tmp_path / "lm", "--output", tmp_path / "o.jsonl"]
        file.write_text(json.dumps(content))
        refused(cli("evaluate", "lmentry", *flags), "word_after.json: no examples")

    def test_a_scorer_that_fails(self, cli, tiny, tmp_path):
        file = make_lmentry(tmp_path / "lm") / "data/word_after.json"
        file.write_text(file.read_text().replace('"answer": "e"', '"answer": 7'))
        flags = ["--lmentry_dir", tmp_path / "lm", "--output", tmp_path / "o.jsonl", "--tasks", "word_after"]
        refused(cli("evaluate", "lmentry", "--model", tiny, *flags, "--max_new_tokens", 2), "its scorer fails on word_")
