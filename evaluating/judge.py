"""The verb judge: a stronger model compares two systems' answers."""

import pathlib
import re

from collecting import asking
from collecting.files import read_rows
from collecting.flags import api_flags
from collecting.journal import Journal, settings_of
from collecting.prompts import TEMPLATES, fill, read_template
from common import UserError, in_range, say
from evaluating.shared import EVAL_FOLDER, by_subset, draw_per_subset, mean, num_words, write_metrics


# fmt: off
def judge_flags(add):
    add("--answers", nargs=2, required=True, metavar="JSONL", help="two systems' answers, as vicuna writes them")
    add("--name", help="the folder of the default --output (default: NAME-vs-NAME, the answers' folders)")
    add("--output", help=f"verdicts (default: {EVAL_FOLDER}/NAME/judge.jsonl)")
    add("--prompt_file", help="a template of your own with {question}, {a}, {b}")
    add("--limit", type=in_range(int, 1), help="so many questions of each subset, drawn by --seed")
    add("--verdicts", choices=["agree", "average", "mean"], default="agree", help="a win needs both orders; each order "
        "is half a verdict; a question goes to the mean of the two")
    api_flags(add, 512)
# fmt: on


def judge(args):
    """A model compares two systems' answers in both orders, at temperature 0. --verdicts agree: a win needs both, and
    all else is a tie; average: each order's verdict counts half (PRO Sec. 4.2, Table 3); mean: a question goes to the
    mean of its two verdicts, so a win and a tie are a win."""
    args.input = args.answers
    systems = [read_answers(path) for path in args.answers]
    shared = [row for i, row in systems[0].items() if i in systems[1]]
    if not shared:
        raise UserError(f"--answers {' '.join(args.answers)}: no question has an answer in both")
    asked = draw_per_subset(shared, args.limit, args.seed)
    args.name = args.name or "-vs-".join(pathlib.Path(p).resolve().parent.name for p in args.answers)
    args.output = args.output or str(EVAL_FOLDER / args.name / "judge.jsonl")
    template, prompts = read_template(args, TEMPLATES["judge"]), {}
    for row in asked:
        texts = [system[row["id"]]["text"] for system in systems]
        for order, (a, b) in (("12", texts), ("21", texts[::-1])):
            fields = {"question": row["question"], "a": a, "b": b}
            prompts[f"{row['id']}/{order}"] = fill(template, fields, args.prompt_file or "the template")
    journal, keys = Journal(args.output, prompts, settings_of(args)), [*prompts]
    for number, replies in asking.ask_records(args, journal, keys, [*prompts.values()]):
        journal.write([{"id": keys[number], "verdict": verdict(replies[0]["text"]), "text": replies[0]["text"]}])
    if journal.finish() < len(journal.ids):
        return
    verdicts = {row["id"]: row["verdict"] for _, row in read_rows(args.output)}
    rows = []
    for row in asked:
        keys = [f"{row['id']}/12", f"{row['id']}/21"]
        rows += [row | {"pair": [verdicts[k] for k in keys]}] if {*keys} <= verdicts.keys() else []
    if not rows:
        raise UserError(f"--output {args.output}: no question has a verdict in both orders")
    metrics = by_subset(rows, lambda some: judge_metrics([row["pair"] for row in some], args.verdicts))
    metrics["refused"] = len(asked) - len(rows)
    if metrics["unparsed"] > 0.5:
        say(f"WARNING: most verdicts cannot be read: look at the texts in {args.output}")
    for k, system in enumerate(systems, 1):
        metrics[f"mean_words_{k}"] = mean(num_words(system[row["id"]]) for row in rows)
    items = {row["id"]: outcome(row["pair"], args.verdicts) for row in rows}
    write_metrics(args, "judge", metrics, {k: {i: x[k] for i, x in items.items()} for k in ("win", "lose")})


def read_answers(path):
    """-> {id: row} of answers as the verbs of evaluate.py write them."""
    rows = {}
    for where, row in read_rows(path):
        for field in ("id", "question", "text"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: field {field!r} must be a string: give answers as evaluate.py writes them")
        rows[row["id"]] = row
    return rows


def verdict(text):
    """-> "A", "B", "C", or None where there is no verdict, or more than one."""
    found = set(re.findall(r"\[\[([ABC])\]\]", text))
    return found.pop() if len(found) == 1 else None


SWAPPED = {"A": "B", "B": "A", "C": "C", None: None}


def outcome(pair, verdicts):
    """A question's verdicts with system 1 as A and as B -> system 1's shares {win, tie, lose, unparsed}: of both where
    they are averaged; else of one, which both gave, or the mean of both. An order unparsed is no verdict."""
    counted = [pair[0], SWAPPED[pair[1]]]
    if verdicts != "average":
        sides = {*counted} - {"C"} if verdicts == "mean" else {*counted}
        counted = [None if None in pair else sides.pop() if len(sides) == 1 else "C"]
    names = {"win": "A", "tie": "C", "lose": "B", "unparsed": None}
    return {name: counted.count(v) / len(counted) for name, v in names.items()}


def judge_metrics(pairs, verdicts):
    """[(verdict with system 1 as A, with system 1 as B)] -> the mean outcome; of the questions with two verdicts, the
    share that changes with the order."""
    outcomes = [outcome(pair, verdicts) for pair in pairs]
    flips = [a != SWAPPED[b] for a, b in pairs if None not in (a, b)]
    return {name: mean(x[name] for x in outcomes) for name in outcomes[0]} | {
        "flip_rate": mean(flips or [0.0]),
        "questions": len(pairs),
    }
