"""The verb lmentry: LMentry from a clone, scored by its own scorers."""

import json
import pathlib
import sys
from collections import Counter

import pandas

from collecting.flags import alpaca_flags, generation_flags
from collecting.prompts import alpaca_prompt, read_template
from common import UserError
from evaluating.shared import answer, mean, model_flags, write_metrics

ARGUMENT_ORDER = {  # core tasks whose two arguments may change places
    *("more_letters", "less_letters", "first_alphabetically", "rhyming_word", "homophones"),
    *("bigger_number", "smaller_number"),
}
ADJACENT = [  # pairs of tasks that one skill solves (LMentry Sec. 3.2)
    *(("bigger_number", "smaller_number"), ("more_letters", "less_letters"), ("word_after", "word_before")),
    *(("most_associated_word", "least_associated_word"), ("any_words_from_category", "all_words_from_category")),
    *(("sentence_containing", "sentence_not_containing"), ("word_containing", "word_not_containing")),
    *(("starts_with_word", "starts_with_letter"), ("ends_with_word", "ends_with_letter")),
    *(("sentence_containing", "word_containing"), ("sentence_not_containing", "word_not_containing")),
    *(("first_word", "first_letter"), ("last_word", "last_letter"), ("starts_with_word", "ends_with_word")),
    *(("starts_with_letter", "ends_with_letter"), ("first_word", "last_word"), ("first_letter", "last_letter")),
]


# fmt: off
def lmentry_flags(add):
    model_flags(add, "lmentry", None)
    add("--lmentry_dir", required=True, help="clone of aviaefrat/lmentry: data/ and its scorers")
    add("--tasks", nargs="+", help="only these of the 41 files in data/ (no LMentry score then)")
    alpaca_flags(add, "{instruction}, the task's own prompt")
    generation_flags(add, 50)
# fmt: on


def lmentry(args):
    """Greedy answers to LMentry, scored by the clone's own scorers."""
    root = pathlib.Path(args.lmentry_dir)
    scorers, template, records, examples = lmentry_scorers(root), read_template(args, "{instruction}"), [], {}
    names = args.tasks or sorted(p.stem for p in (root / "data").glob("*.json"))
    args.input = [str(root / f"data/{name}.json") for name in names]
    for task, file in zip(names, args.input):
        try:
            for number, example in json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["examples"].items():
                prompt = alpaca_prompt(template, {"instruction": example["input"], "input": ""}, "--prompt_file")
                core = max((core for core in scorers if task.startswith(core)), key=len)  # some files are parts of one
                record = {"id": f"{task}/{number}", "task": task, "core": core, "prompt": prompt}
                record |= {k: example["metadata"].get(k) for k in ("template_id", "answer_index")}
                records.append(record)
                examples[record["id"]] = example
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise UserError(f"{file}: no examples of LMentry ({type(e).__name__}: {e})") from e
    if rows := answer(args, "lmentry", records):
        try:
            for row in rows:
                row["score"], _ = scorers[row["core"]].score_prediction(row["text"], examples[row["id"]])
        except Exception as e:  # another project's code
            raise UserError(f"--lmentry_dir {root}: its scorer fails on {row['id']} ({e})") from e
        needed = {task for pair in ADJACENT for task in pair} | ARGUMENT_ORDER  # a clone may have lost files
        metrics = lmentry_metrics(rows, complete=needed <= {*names})
        write_metrics(args, "lmentry", metrics, lmentry_items(rows))


def lmentry_scorers(root):
    """-> {core task: a scorer of the clone's}; they need the num2words package."""
    sys.path.insert(0, str(root))
    try:
        from lmentry.scorers.scorer_mapping import task_name_to_scorer

        return {task: scorer() for task, scorer in task_name_to_scorer.items()}
    except Exception as e:  # another project's code
        raise UserError(f"--lmentry_dir {root}: no scorers ({e}); they need pip install num2words") from e
    finally:
        sys.path.remove(str(root))


def lmentry_items(rows):
    """-> {"accuracy": {id: value}} of the core tasks' examples: 100 x the score, weighted so that each task counts
    alike and the mean is lmentry_metrics'."""
    core = [r for r in rows if r["task"] == r["core"]]
    size = Counter(r["task"] for r in core)
    return {"accuracy": {r["id"]: 100 * r["score"] * len(core) / (len(size) * size[r["task"]]) for r in core}}


def lmentry_metrics(rows, complete):
    """Accuracy: mean over core tasks. With all 41 files also robustness, the mean of four, each the mean over its
    comparisons of 100 minus the largest accuracy gap; LMentry score = accuracy x robustness / 100."""
    frame = pandas.DataFrame(rows)
    frame["score"] *= 100
    core, further = frame[frame["task"] == frame["core"]], frame[frame["task"] != frame["core"]]
    by_task = frame.groupby("task", sort=False)["score"].mean().to_dict()

    def robustness(some, by, of="task"):
        accuracies = some.groupby([of, by])["score"].mean().groupby(of)
        return float((100 - accuracies.max() + accuracies.min()).mean())

    cores = core["task"].unique()
    figures = {"accuracy": mean(by_task[t] for t in cores)} if len(cores) else {}
    if complete:
        parts = {
            "argument_order": robustness(frame[frame["task"].isin(ARGUMENT_ORDER)], "answer_index"),
            "argument_content": robustness(further, "task", of="core"),
            "template": robustness(core, "template_id"),
            "adjacent_tasks": mean(100 - abs(by_task[a] - by_task[b]) for a, b in ADJACENT),
        }
        figures |= parts | {"robustness": mean(parts.values())}
        figures["lmentry_score"] = figures["accuracy"] * figures["robustness"] / 100
    return figures | {"core_tasks": len(cores), "files": len(by_task), "prompts": len(rows), "by_task": by_task}
