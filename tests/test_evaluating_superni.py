"""evaluating/superni.py: prompts, metrics by hand, the verb on a small clone of the benchmark."""

import json

import pytest
from conftest import metrics_of, read_jsonl, refused

import common
from evaluating import superni


def make_superni(folder):
    (folder / "splits/default").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "splits/default/test_tasks.txt").write_text("task1_add\ntask2_say\n")
    for name in ("task1_add", "task2_say"):
        task = {
            "Definition": ["Do the thing"],
            "Positive Examples": [{"input": f"in {k}", "output": f"out {k}!", "explanation": "-"} for k in range(3)],
            "Negative Examples": [],
            "Instances": [{"id": f"{name}-x{i}", "input": f"case {i}?", "output": ["one", "two"]} for i in range(5)],
        }
        (folder / f"tasks/{name}.json").write_text(json.dumps(task))
    return folder


def test_superni_in_a_template(tokenizer):
    """An instruction-tuned model meets definition and examples as its instruction, the input as its input."""
    examples = [{"input": "x", "output": "y"}]
    template = "T {instruction} I {input} R:\n---\nT {instruction} R:\n"
    prompt = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000, template)
    assert prompt == "T Definition: Do it.\n\nPositive Example 1 -\nInput: x.\nOutput: y. I a b. R:"
    own = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000)
    assert superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000, "[{prompt}]") == f"[{own}]"


def test_superni_prompt(tokenizer):
    examples = [{"input": f"in {k}", "output": f"out {k}!"} for k in range(2)]
    plain = "Definition: Do it.\n\nNow complete the following example -\nInput: a b.\nOutput: "
    assert superni.superni_prompt("Do it", [], " a b ", tokenizer, 1000) == plain
    both = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000)
    shots = [f"Positive Example {k} -\nInput: in {k - 1}.\nOutput: out {k - 1}!\n\n" for k in (1, 2)]
    assert both == plain.replace("Now", "".join(shots) + "Now")
    room = len(common.prompt_ids(tokenizer, both)) - 1  # the second one no longer fits
    assert superni.superni_prompt("Do it", examples, "a b", tokenizer, room) == plain.replace("Now", shots[0] + "Now")


def test_superni_metrics_by_hand():
    rows = [
        {"task": "a", "text": "The running cats.", "answers": ["a dog", "the run cat"]},  # stemmed: 1; not exact
        {"task": "a", "text": "Yes!", "answers": ["no", "yes"]},  # 1; exact but for case and punctuation
        {"task": "b", "text": "one two", "answers": ["one three four"]},  # P 1/2, R 1/3: 0.4
        {"task": "b", "text": "the cat", "answers": ["cat"]},  # P 1/2, R 1: 2/3; articles stay, so not exact
    ]
    got = superni.superni_metrics(rows)
    assert got["rouge_l"] == pytest.approx(100 * (1 + 1 + 0.4 + 2 / 3) / 4)
    assert got["exact_match"] == 25 and got["tasks"] == 2 and got["prompts"] == 4
    assert got["by_task"]["b"]["rouge_l"] == pytest.approx(100 * (0.4 + 2 / 3) / 2)


def test_superni(cli, tiny, here):
    make_superni(here / "ni")
    flags = ["--model", tiny, "--name", "tiny", "--superni_dir", "ni", "--max_new_tokens", 4]
    assert cli("evaluate", "superni", *flags, "--max_instances", 3, "--shots", 2).code == 0
    rows = read_jsonl(here / "runs/eval/tiny/superni-2shot.jsonl")
    assert [r["id"] for r in rows] == [f"{t}-{i}" for t in ("task1_add", "task2_say") for i in range(3)]
    assert "Positive Example 2 -" in rows[0]["prompt"] and "Example 3" not in rows[0]["prompt"]
    got = metrics_of(here, "superni-2shot")
    assert got["tasks"] == 2 and "rouge_l_2shot" in got and "rouge_l" not in got
    [items] = json.loads((here / "runs/eval/tiny/superni-2shot.items.json").read_text()).items()
    assert items[0] == "rouge_l_2shot" and sum(items[1].values()) / 6 == pytest.approx(got["rouge_l_2shot"])
    refused(cli("evaluate", "superni", *flags, "--tasks", "task9"), "task9.json")
    flags[flags.index("ni")] = "."
    refused(cli("evaluate", "superni", *flags), "splits/default/test_tasks.txt")
