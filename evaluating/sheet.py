"""The verb sheet: people compare systems' answers blindly on a page (sheet.html), and what they said is scored."""

import hashlib
import json
import pathlib
import random

import common
from collecting.journal import read_records
from common import UserError, in_range
from evaluating.report import markdown
from evaluating.shared import EVAL_FOLDER, normal_interval, wilson
from run import write_atomically
from runtime import say

PAGE = pathlib.Path(__file__).with_name("sheet.html")


# fmt: off
def sheet_flags(add):
    add("--systems", nargs="+", metavar="PREDICTIONS", help="2 to 9 files with id and text: runs/eval/A/nli.jsonl")
    add("--names", nargs="+", help="the systems' names (default: the files' folders)")
    add("--input", help="records with the prompts")
    add("--limit", type=in_range(int, 1), default=100, help="prompts on the sheet, drawn by --seed")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="which prompts, and the order of the responses")
    add("--output", default=str(EVAL_FOLDER / "sheet.html"), help="the page; who is who goes to OUTPUT.key.json")
    add("--score", nargs="+", metavar="RESULTS", help="the results that annotators saved for the page --output")
# fmt: on


def sheet(args):
    """A page to judge the systems' responses blindly, with the keyboard; or, with --score, what the judges said."""
    if args.score:
        return score_sheet(args)
    if not args.input or not 2 <= len(args.systems or []) <= 9:
        raise UserError("sheet needs --input and 2 to 9 --systems (or --score with the saved results)")
    names = args.names or [pathlib.Path(path).parent.name for path in args.systems]
    if len(set(names)) < len(args.systems) or len(names) > len(args.systems):
        raise UserError(f"--names: {len(args.systems)} different names are needed, not {', '.join(names)}")
    texts = [{row.get("id"): row.get("text") for _, row in common.read_rows(path)} for path in args.systems]
    records = [r for r in read_records(args.input) if all(isinstance(t.get(r["id"]), str) for t in texts)]
    if not records:
        raise UserError(f"{args.input}: no record has a text in each of {', '.join(args.systems)}")
    draw = random.Random(args.seed)
    records = draw.sample(records, min(args.limit, len(records)))
    orders = [draw.sample(range(len(names)), len(names)) for _ in records]
    items = [{"prompt": r["prompt"], "responses": [texts[s][r["id"]] for s in o]} for r, o in zip(records, orders)]
    number = hashlib.sha256(json.dumps([items, args.seed]).encode()).hexdigest()[:12]
    data = json.dumps({"sheet": number, "items": items}).replace("<", "\\u003c")  # no text can end the script element
    key = {"sheet": number, "systems": names, "ids": [r["id"] for r in records], "orders": orders}
    output = pathlib.Path(args.output)
    for file in (output, key_file(output)):
        if file.exists():
            raise UserError(f"--output {output}: {file} is there already: name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(key_file(output), json.dumps(key))
    write_atomically(output, PAGE.read_text(encoding="utf-8").replace("@DATA@", data))
    say(f"{len(records)} prompts, {len(names)} systems: {output} (do not give {key_file(output)} to the judges)")
    return None


def key_file(output):
    return pathlib.Path(f"{output}.key.json")


def score_sheet(args):
    """Two systems: win, tie, lose, and the win rate (a tie counts half); more: the mean of n + 1 - place (Tuna: 6 - i).

    Each annotator counts alike, each prompt once (its mean over annotators); 95% intervals over prompts: Wilson's for
    the win rate, which ties make too wide rather than too narrow, the normal one for the mean score.
    """
    key = read_sheet_file(key_file(args.output), "orders")
    orders, n = key["orders"], len(key["systems"]) if isinstance(key.get("systems"), list) else 0
    if n < 2 or any(not isinstance(o, list) or sorted(map(str, o)) != [*map(str, range(n))] for o in orders):
        raise UserError(f"{key_file(args.output)}: not a key that this script has written")
    names, n = key["systems"], len(key["systems"])
    judged = [{} for _ in key["orders"]]  # per prompt: system -> its scores, one an annotator
    for path in args.score:
        results = read_sheet_file(path, "answers")
        if results.get("sheet") != key.get("sheet") or len(results["answers"]) != len(judged):
            raise UserError(f"--score {path}: these are the results of another sheet than {args.output}")
        for i, (answer, order) in enumerate(zip(results["answers"], key["orders"])):
            for system, points in sheet_points(answer, order, f"{path}: answer {i + 1}").items():
                judged[i].setdefault(system, []).append(points)
    judged = [scores for scores in judged if scores]
    if not judged:
        raise UserError(f"--score {' '.join(args.score)}: nothing is judged there")
    table = {}
    for s, name in enumerate(names):
        means = [sum(scores[s]) / len(scores[s]) for scores in judged]
        mean = sum(means) / len(means)
        low, high = wilson(mean, len(means)) if n == 2 else normal_interval(means)
        row = {"win rate" if n == 2 else "score": mean, "95% low": low, "95% high": high, "prompts": len(means)}
        if n == 2:
            every = [points for scores in judged for points in scores[s]]
            row |= {k: every.count(v) / len(every) for k, v in (("win", 1), ("tie", 0.5), ("lose", 0))}
        table[name] = row
    write_atomically(pathlib.Path(f"{args.output}.score.json"), json.dumps(table, indent=1))
    say(markdown(table))


def read_sheet_file(path, field):
    try:
        document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
    if not isinstance(document, dict) or not isinstance(document.get(field), list):
        raise UserError(f"{path}: has no list {field!r}")
    return document


def sheet_points(answer, order, where):
    """One judgement -> {system: points}: 1, 0.5 or 0 for two systems, else n + 1 - place; {} where none was given."""
    n = len(order)
    if not isinstance(answer, list) or (n > 2 and len(answer) == n and {*map(str, answer)} != {*map(str, range(n))}):
        raise UserError(f"{where} is not a ranking of {n} responses")
    if len(answer) < (1 if n == 2 else n):
        return {}
    if n > 2:
        return {order[shown]: n - place for place, shown in enumerate(answer)}
    if answer not in (["tie"], [0], [1]):
        raise UserError(f"{where} is not 0, 1 or tie")
    if answer == ["tie"]:
        return dict.fromkeys(order, 0.5)
    return {order[answer[0]]: 1, order[1 - answer[0]]: 0}
