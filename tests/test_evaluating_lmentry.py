"""evaluating/lmentry.py: the verb on a small clone of the benchmark, its score by hand."""

import json

import pytest
from conftest import metrics_of, read_jsonl, refused

from evaluating import lmentry

SCORERS = """
class Contains:
    def score_prediction(self, prediction, example, truncate_prediction=False):
        return int(example["metadata"]["answer"] in prediction), 1
"""


def make_lmentry(folder):
    """A clone's layout with two core tasks, one of them with two further files, and a scorer of our own."""
    (folder / "data").mkdir(parents=True)
    (folder / "lmentry/scorers").mkdir(parents=True)
    for file in ("lmentry/__init__.py", "lmentry/scorers/__init__.py"):
        (folder / file).write_text("")
    mapping = SCORERS + "task_name_to_scorer = {'more_letters': Contains, 'word_after': Contains}\n"
    (folder / "lmentry/scorers/scorer_mapping.py").write_text(mapping)
    for name in ("more_letters", "more_letters_length_diff_1", "more_letters_length_diff_3plus", "word_after"):
        examples = {}
        for i in range(6):
            metadata = {"template_id": i // 2, "answer": "e", "answer_index": i % 2}
            examples[str(i + 1)] = {"input": f"Q {i}:", "metadata": metadata}
        (folder / f"data/{name}.json").write_text(json.dumps({"settings": {}, "examples": examples}))
    return folder


def test_lmentry(cli, tiny, here):
    make_lmentry(here / "lm")
    flags = ["--model", tiny, "--name", "tiny", "--lmentry_dir", "lm", "--max_new_tokens", 6]
    tasks = ["--tasks", "word_after", "more_letters_length_diff_1"]
    assert cli("evaluate", "lmentry", *flags, *tasks).code == 0
    (here / "t.txt").write_text("T {instruction} I {input}\n---\nT {instruction} R:\n")
    told = [*flags, *tasks, "--prompt_file", "t.txt", "--output", "told.jsonl"]
    assert cli("evaluate", "lmentry", *told).code == 0
    plain, wrapped = read_jsonl(here / "runs/eval/tiny/lmentry.jsonl"), read_jsonl("told.jsonl")
    assert [r["prompt"] for r in wrapped] == [f"T {r['prompt']} R:" for r in plain]
    rows = read_jsonl(here / "runs/eval/tiny/lmentry.jsonl")
    got = metrics_of(here, "lmentry")
    right = sum("e" in r["text"] for r in rows if r["task"] == "word_after")
    assert got["accuracy"] == pytest.approx(100 * right / 6) and "lmentry_score" not in got
    assert got["core_tasks"] == 1 and got["files"] == 2
    items = json.loads((here / "runs/eval/tiny/lmentry.items.json").read_text())["accuracy"]
    assert items.keys() == {r["id"] for r in rows if r["task"] == "word_after"}
    assert sum(items.values()) / len(items) == pytest.approx(got["accuracy"])
    refused(cli("evaluate", "lmentry", *flags, "--tasks", "nope"), "lm", "nope")


def test_lmentry_score_by_hand():
    """Every task is all right, but more_letters: right where answer_index is 0, so a gap of 100 in argument order;
    its two files differ by 50; templates 0, 1, 2 of word_after have 100, 100, 0."""
    rows = []
    core = {t for pair in lmentry.ADJACENT for t in pair} | {*lmentry.ARGUMENT_ORDER}
    assert len(core) == 25 and len(lmentry.ADJACENT) == 17
    for task in [*core, "more_letters_length_diff_1", "more_letters_length_diff_3plus"]:
        for template in range(3):
            for index in (0, 1):
                score = 1
                if task == "more_letters" or task == "more_letters_length_diff_1":
                    score = int(index == 0)
                elif task == "word_after":
                    score = int(template < 2)
                row = {"task": task, "template_id": template, "answer_index": index, "score": score}
                rows.append(row | {"core": "more_letters" if task.startswith("more") else task})
    got = lmentry.lmentry_metrics(rows, complete=True)
    assert got["accuracy"] == pytest.approx((23 * 100 + 50 + 200 / 3) / 25)
    assert got["argument_order"] == pytest.approx((6 * 100 + 0) / 7)
    assert got["argument_content"] == pytest.approx(50)
    assert got["template"] == pytest.approx((24 * 100 + 0) / 25)
    assert got["adjacent_tasks"] == pytest.approx((15 * 100 + 50 + 200 / 3) / 17)
    more = [{"task": "word_after", "core": "word_after", "score": 0, "template_id": 0, "answer_index": 0}] * 3
    uneven = [r | {"id": str(i)} for i, r in enumerate(rows + more)]  # a task of nine examples counts as one of six
    items = lmentry.lmentry_items(uneven)["accuracy"].values()
    assert sum(items) / len(items) == pytest.approx(lmentry.lmentry_metrics(uneven, complete=False)["accuracy"])
    parts = ("argument_order", "argument_content", "template", "adjacent_tasks")
    assert got["robustness"] == pytest.approx(sum(got[k] for k in parts) / 4)
    assert got["lmentry_score"] == pytest.approx(got["accuracy"] * got["robustness"] / 100)
    assert "lmentry_score" not in lmentry.lmentry_metrics(rows, complete=False)
