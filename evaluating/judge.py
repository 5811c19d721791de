"""The verb judge: a stronger model compares two systems' answers."""

import pathlib
import re
from collections import Counter

import common
from collecting import asking
from collecting.flags import api_flags
from collecting.journal import Journal, settings_of
from collecting.prompts import fill, read_template
from common import UserError, in_range
from evaluating.shared import EVAL_FOLDER, mean, write_metrics
from runtime import say

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
    add("--limit", type=in_range(int, 1), help="only the first questions")
    api_flags(add, 512)
# fmt: on


def judge(args):
    """A model compares two systems' answers in both orders, at temperature 0; only agreement of both is a win."""
    args.input = args.answers
    systems = [{row["id"]: row for _, row in common.read_rows(path)} for path in args.answers]
    ids = [i for i in systems[0] if i in systems[1]][: args.limit]
    if not ids:
        raise UserError(f"--answers {' '.join(args.answers)}: no question has an answer in both")
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
    todo = [key for key in prompts if key not in journal.done]
    for number, replies, error in asking.complete(args, [prompts[key] for key in todo]):
        if replies is None:
            say(f"question {todo[number]}: {error}")
            continue
        journal.write([{"id": todo[number], "verdict": verdict(replies[0]["text"]), "text": replies[0]["text"]}])
    if journal.finish() == len(prompts):
        verdicts = {row["id"]: row["verdict"] for _, row in common.read_rows(args.output)}
        figures = judge_metrics([(verdicts[f"{i}/12"], verdicts[f"{i}/21"]) for i in ids])
        for k in (0, 1):
            figures[f"mean_words_{k + 1}"] = mean(len(systems[k][i]["text"].split()) for i in ids)
        write_metrics(args, "judge", figures)


def verdict(text):
    """-> "A", "B", "C", or None where there is no verdict, or more than one."""
    found = set(re.findall(r"\[\[([ABC])\]\]", text))
    return found.pop() if len(found) == 1 else None


def judge_metrics(pairs):
    """[(verdict with system 1 as A, verdict with system 1 as B)] -> shares of all questions that system 1 wins, loses,
    ties, or that are unparsed (in either order); of the parsed ones, how many change with the order."""
    swapped = {"A": "B", "B": "A", "C": "C"}
    parsed = [(first, swapped[second]) for first, second in pairs if first and second]
    n, outcomes = len(pairs), Counter(a if a == b else "C" for a, b in parsed)
    shown = [v for pair in pairs for v in pair if v in ("A", "B")]
    return {
        "win": outcomes["A"] / n,
        "lose": outcomes["B"] / n,
        "tie": outcomes["C"] / n,
        "unparsed": 1 - len(parsed) / n,
        "flip_rate": mean(a != b for a, b in parsed) if parsed else 0.0,
        "first_place_preferred": mean(v == "A" for v in shown) if shown else 0.0,
        "questions": n,
    }
