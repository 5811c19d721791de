"""The verb judge: a stronger model compares two systems' answers."""

import pathlib
import re

from collecting import asking
from collecting.files import read_rows
from collecting.flags import api_flags
from collecting.journal import Journal, settings_of
from collecting.prompts import fill, read_template
from common import UserError, in_range
from evaluating.shared import EVAL_FOLDER, by_subset, draw_per_subset, mean, write_metrics

JUDGE_TEMPLATE = """Two assistants, A and B, answered one question. Which answer serves the user better?

Question:
{question}

[A's answer]
{a}
[End of A's answer]

[B's answer]
{b}
[End of B's answer]

Weigh how correct, relevant, and helpful each answer is. Let neither its length nor its place sway you. Explain your
choice in a few sentences. Then end with your verdict: [[A]] if A is better, [[B]] if B is better, [[C]] for a tie.
"""


# fmt: off
def judge_flags(add):
    add("--answers", nargs=2, required=True, metavar="JSONL", help="two systems' answers, as vicuna writes them")
    add("--name", help="in reports (default: NAME-vs-NAME, the answers' folders)")
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
    systems = [{check_answer(*pair)["id"]: pair[1] for pair in read_rows(path)} for path in args.answers]
    shared = [row for i, row in systems[0].items() if i in systems[1]]
    if not shared:
        raise UserError(f"--answers {' '.join(args.answers)}: no question has an answer in both")
    ids = [row["id"] for row in draw_per_subset(shared, args.limit, args.seed)]
    args.name = args.name or "-vs-".join(pathlib.Path(p).resolve().parent.name for p in args.answers)
    args.output = args.output or str(EVAL_FOLDER / args.name / "judge.jsonl")
    template = read_template(args, JUDGE_TEMPLATE)
    prompts = {}
    for i in ids:
        for order in ((0, 1), (1, 0)):
            a, b = (systems[k][i]["text"] for k in order)
            fields = {"question": systems[0][i]["question"], "a": a, "b": b}
            prompts[f"{i}/{order[0] + 1}{order[1] + 1}"] = fill(template, fields, args.prompt_file or "the template")
    journal = Journal(args.output, prompts, settings_of(args))
    keys = [*prompts]
    for number, replies, error in asking.ask_records(args, journal, keys, [*prompts.values()]):
        if not error:
            journal.write([{"id": keys[number], "verdict": verdict(replies[0]["text"]), "text": replies[0]["text"]}])
    if journal.finish() == len(journal.ids):
        verdicts = {row["id"]: row["verdict"] for _, row in read_rows(args.output)}
        asked, ids = len(ids), [i for i in ids if {f"{i}/12", f"{i}/21"} <= verdicts.keys()]
        if not ids:
            raise UserError(f"--output {args.output}: no question has a verdict in both orders")
        rows = [
            {"subset": systems[0][i].get("subset"), "pair": (verdicts[f"{i}/12"], verdicts[f"{i}/21"])} for i in ids
        ]

        def figures(rows):
            return judge_metrics([row["pair"] for row in rows], args.verdicts)

        metrics = figures(rows) | {"refused": asked - len(ids)} | by_subset(rows, figures)
        for k in (0, 1):
            metrics[f"mean_words_{k + 1}"] = mean(len(systems[k][i]["text"].split()) for i in ids)
        write_metrics(args, "judge", metrics, judge_items(ids, [row["pair"] for row in rows], args.verdicts))


def check_answer(where, row):
    """-> the row; UserError unless it is an answer, as the verbs of evaluate.py write them."""
    for field in ("id", "question", "text"):
        if not isinstance(row.get(field), str):
            raise UserError(f"{where}: field {field!r} must be a string: give answers as evaluate.py writes them")
    return row


def verdict(text):
    """-> "A", "B", "C", or None where there is no verdict, or more than one."""
    found = set(re.findall(r"\[\[([ABC])\]\]", text))
    return found.pop() if len(found) == 1 else None


SWAPPED = {"A": "B", "B": "A", "C": "C", None: None}


def outcomes(pair, verdicts):
    """A question's verdicts with system 1 as A and as B -> those that count, as system 1 sees them: both of them where
    they are averaged; else one, which both gave, or the mean of both. It is None where an order is unparsed."""
    pair = [pair[0], SWAPPED[pair[1]]]
    if verdicts == "average":
        return pair
    sides = {*pair} - {"C"} if verdicts == "mean" else {*pair}
    return [None if None in pair else sides.pop() if len(sides) == 1 else "C"]


def judge_items(ids, pairs, verdicts):
    """-> {"win", "lose": {id: value}}, the mean of which is judge_metrics'."""
    found = {i: outcomes(pair, verdicts) for i, pair in zip(ids, pairs)}
    return {name: {i: x.count(v) / len(x) for i, x in found.items()} for name, v in (("win", "A"), ("lose", "B"))}


def judge_metrics(pairs, verdicts):
    """[(verdict with system 1 as A, verdict with system 1 as B)] -> shares that system 1 wins, ties and loses, and that
    are unparsed: of all questions where the orders must agree (one unparsed order is enough), of all verdicts where
    they are averaged; of the questions parsed in both orders, how many change with the order."""
    counted = [v for pair in pairs for v in outcomes(pair, verdicts)]
    parsed = [pair for pair in pairs if None not in pair]
    shown = [v == "A" for pair in pairs for v in pair if v in ("A", "B")]
    names = {"win": "A", "tie": "C", "lose": "B", "unparsed": None}
    return {name: counted.count(v) / len(counted) for name, v in names.items()} | {
        "flip_rate": mean(a != SWAPPED[b] for a, b in parsed) if parsed else 0.0,
        "first_place_preferred": mean(shown) if shown else 0.0,
        "questions": len(pairs),
    }
