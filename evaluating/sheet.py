"""The verb sheet: people compare systems' answers blindly on a page (sheet.html), and what they said is scored."""

import hashlib
import json
import pathlib
import random
import statistics

import pandas

from collecting.files import load_candidates, read_records, read_rows, write_atomically
from collecting.prompts import task_of
from common import UserError, in_range, say
from evaluating.intervals import paired_bootstrap, student, wilson
from evaluating.shared import EVAL_FOLDER
from evaluating.tables import markdown, read_document

PAGE = pathlib.Path(__file__).with_name("sheet.html")


# fmt: off
def sheet_flags(add):
    add("--systems", nargs="+", metavar="PREDICTIONS", help="2 to 9 files with id and text: runs/eval/A/nli.jsonl")
    add("--names", nargs="+", help="the systems' names (default: the files' folders)")
    add("--input", help="records with the prompts")
    add("--within", action="store_true", help="compare each record's own candidates, by rank (Tuna App. G)")
    add("--limit", type=in_range(int, 1), default=100, help="prompts on the sheet, drawn by --seed")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="which prompts, and the order of the responses")
    add("--output", default=str(EVAL_FOLDER / "sheet.html"), help="the page; who is who goes to OUTPUT.key.json")
    add("--score", nargs="+", metavar="RESULTS", help="the results that annotators saved for the page --output")
# fmt: on


def sheet(args):
    """A page to judge the systems' responses blindly, with the keyboard; or, with --score, what the judges said."""
    output, key_file = pathlib.Path(args.output), pathlib.Path(f"{args.output}.key.json")
    if args.score:
        table = score_sheet(args.score, read_document(key_file, sheet=str, orders=list, systems=list))
        write_atomically(pathlib.Path(f"{output}.score.json"), json.dumps(table, indent=1))
        say(markdown(table))
        return
    names, shown = (ranked if args.within else answered)(args)
    draw = random.Random(args.seed)
    shown = draw.sample(shown, min(args.limit, len(shown)))
    orders = [draw.sample(range(len(names)), len(names)) for _ in shown]
    items = [
        {"prompt": task_of(record), "responses": [texts[i] for i in order]}
        for (record, texts), order in zip(shown, orders)
    ]
    number = hashlib.sha256(json.dumps([items, args.seed]).encode()).hexdigest()[:12]
    key = {"sheet": number, "systems": names, "ids": [record["id"] for record, _ in shown], "orders": orders}
    key["within"] = args.within
    data = json.dumps({"sheet": number, "items": items}).replace("<", "\\u003c")  # no text can end the script element
    files = {key_file: json.dumps(key), output: PAGE.read_text(encoding="utf-8").replace("@DATA@", data)}
    for file, text in files.items():  # killed between the two, the same command writes the other
        if file.exists() and file.read_bytes() != text.encode():
            raise UserError(f"--output {output}: {file} is there already: name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        write_atomically(file, text)
    say(f"{len(items)} prompts, {len(names)} responses each: {output} (do not give {key_file} to the judges)")


def answered(args):
    """-> the systems' names, and [(record, each system's text)] of the records that all of them answered."""
    if not args.input or not 2 <= len(args.systems or []) <= 9:
        raise UserError("sheet needs --input and 2 to 9 --systems (or --score with the saved results)")
    names = args.names or [pathlib.Path(path).parent.name for path in args.systems]
    if not len(set(names)) == len(names) == len(args.systems):
        raise UserError(f"--names: {len(args.systems)} different names are needed, not {', '.join(names)}")
    systems = [{row.get("id"): row.get("text") for _, row in read_rows(path)} for path in args.systems]
    shown = [(r, [texts.get(r["id"]) for texts in systems]) for r in read_records(args.input)]
    shown = [(r, texts) for r, texts in shown if all(isinstance(text, str) for text in texts)]
    if not shown:
        raise UserError(f"{args.input}: no record has a text in each of {', '.join(args.systems)}")
    return names, shown


def ranked(args):
    """-> "rank 0", "rank 1", ..., and [(record, its ranked candidates' texts, best first)] of the records that have as
    many as most have."""
    if not args.input or args.systems:
        raise UserError("sheet --within needs --input, ranked records, and no --systems")
    shown = []
    for record in load_candidates(args.input):
        candidates = sorted((c for c in record["candidates"] if c.get("rank") is not None), key=lambda c: c["rank"])
        shown += [(record, [c["text"] for c in candidates])] if 2 <= len(candidates) <= 9 else []
    if not shown:
        raise UserError(f"{args.input}: no record has 2 to 9 candidates with a rank")
    n = statistics.mode(len(texts) for _, texts in shown)
    return [f"rank {k}" for k in range(n)], [x for x in shown if len(x[1]) == n]


def score_sheet(paths, key):
    """The annotators' results -> {system: its figures}. Two systems: win, tie, lose, and the win rate (a tie counts
    half); more: the mean of n + 1 - place (Tuna: 6 - i).

    Each annotator counts alike, each prompt once (its mean over annotators); 95% intervals over prompts: Wilson's for
    the win rate, which ties make too wide rather than too narrow, Student's for the mean score, with p against each
    other system by a paired bootstrap (the paper of Table 2, Tuna's, names no test). --within: also Spearman's
    correlation of people's order and the ranks, the mean over prompts (App. G does not say whether its 0.72 is one).
    """
    rows = []
    for path in paths:
        answers = read_document(path, answers=list, sheet=str)
        if answers["sheet"] != key["sheet"] or len(answers["answers"]) != len(key["orders"]):
            raise UserError(f"--score {path}: these are the results of another sheet")
        for i, (answer, order) in enumerate(zip(answers["answers"], key["orders"])):
            points = points_of(answer, len(order), f"{path}: answer {i + 1}")
            rows += [{"prompt": i, "system": x, "points": p} for x, p in zip(order, points)]
    if not rows:
        raise UserError(f"--score {' '.join(paths)}: nothing is judged there")
    judgements = pandas.DataFrame(rows)
    means = judgements.groupby(["prompt", "system"])["points"].mean().unstack()  # [prompts, systems]
    table = {}
    for s, name in enumerate(key["systems"]):
        mean = means[s].mean()
        if len(key["systems"]) == 2:
            low, high = wilson(mean, len(means))
            row = {"win rate": mean, "95% low": low, "95% high": high, "prompts": len(means)}
            points = judgements["points"][judgements["system"] == s]
            row |= {k: (points == x).mean() for k, x in (("win", 1), ("tie", 0.5), ("lose", 0))}
        else:
            half, _ = student(means[s].tolist())
            row = {"score": mean, "95% low": mean - half, "95% high": mean + half, "prompts": len(means)}
            for o, other in enumerate(key["systems"]):
                if o != s:
                    row[f"p, {other}"] = paired_bootstrap((means[s] - means[o]).tolist())[2]
        table[name] = row
    if key.get("within"):
        correlations = means.T.corrwith(-means.columns.to_series(), method="spearman").fillna(0)  # NaN: all are equal
        table["people against rank"] = {"spearman": correlations.mean(), "prompts": len(means)}
    return table


def points_of(answer, n, where):
    """One judgement, places of the shown responses best first (of two: the better one's, or "tie") -> points of each
    shown one: 1, 0.5 or 0 of two, else n + 1 - place; [] where none was given."""
    if isinstance(answer, list):
        if n == 2 and answer in (["tie"], [0], [1]):
            return {"tie": [0.5, 0.5], 0: [1, 0], 1: [0, 1]}[answer[0]]
        if n > 2 and sorted(map(str, answer)) == [*map(str, range(n))]:
            return [n - answer.index(shown) for shown in range(n)]
        if not answer or n > 2 and len(answer) < n:
            return []
    raise UserError(f"{where} is no judgement of {n} responses")
