"""The verb sheet: people compare systems' answers blindly on a page (sheet.html), and what they said is scored."""

import hashlib
import json
import pathlib
import random
import statistics

from collecting.files import load_candidates, read_records, read_rows, write_atomically
from collecting.prompts import task_of
from collecting.rank_given import spearman
from common import UserError, in_range, say
from evaluating.intervals import normal_interval, paired_bootstrap, wilson
from evaluating.shared import EVAL_FOLDER
from evaluating.tables import markdown, read_document

PAGE = pathlib.Path(__file__).with_name("sheet.html")


# fmt: off
def sheet_flags(add):
    add("--systems", nargs="+", metavar="PREDICTIONS", help="2 to 9 files with id and text: runs/eval/A/nli.jsonl")
    add("--names", nargs="+", help="the systems' names (default: the files' folders)")
    add("--input", help="records with the prompts")
    add("--within", action="store_true", help="instead rank each prompt's own ranked candidates (Tuna App. G)")
    add("--limit", type=in_range(int, 1), default=100, help="prompts on the sheet, drawn by --seed")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="which prompts, and the order of the responses")
    add("--output", default=str(EVAL_FOLDER / "sheet.html"), help="the page; who is who goes to OUTPUT.key.json")
    add("--score", nargs="+", metavar="RESULTS", help="the results that annotators saved for the page --output")
# fmt: on


def sheet(args):
    """A page to judge the systems' responses blindly, with the keyboard; or, with --score, what the judges said."""
    if args.score:
        return score_sheet(args)
    draw = random.Random(args.seed)
    items, key = (within if args.within else between)(args, draw)
    number = hashlib.sha256(json.dumps([items, args.seed]).encode()).hexdigest()[:12]
    data = json.dumps({"sheet": number, "items": items}).replace("<", "\\u003c")  # no text can end the script element
    output = pathlib.Path(args.output)
    page = PAGE.read_text(encoding="utf-8").replace("@DATA@", data)
    files = {key_file(output): json.dumps({"sheet": number} | key), output: page}
    for file, text in files.items():  # killed between the two, the same command writes the other
        if file.exists() and file.read_bytes() != text.encode():
            raise UserError(f"--output {output}: {file} is there already: name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        write_atomically(file, text)
    what = f"{len(items)} prompts, {len(items[0]['responses'])} {'candidates' if args.within else 'systems'}"
    say(f"{what}: {output} (do not give {key_file(output)} to the judges)")
    return None


def between(args, draw):
    """-> ([{prompt, responses}], {systems, ids, orders}): the systems' responses to the same prompts, shuffled."""
    if not args.input or not 2 <= len(args.systems or []) <= 9:
        raise UserError("sheet needs --input and 2 to 9 --systems (or --score with the saved results)")
    names = args.names or [pathlib.Path(path).parent.name for path in args.systems]
    if len(set(names)) < len(args.systems) or len(names) > len(args.systems):
        raise UserError(f"--names: {len(args.systems)} different names are needed, not {', '.join(names)}")
    texts = [{row.get("id"): row.get("text") for _, row in read_rows(path)} for path in args.systems]
    records = [r for r in read_records(args.input) if all(isinstance(t.get(r["id"]), str) for t in texts)]
    if not records:
        raise UserError(f"{args.input}: no record has a text in each of {', '.join(args.systems)}")
    records = draw.sample(records, min(args.limit, len(records)))
    orders = [draw.sample(range(len(names)), len(names)) for _ in records]
    items = [{"prompt": task_of(r), "responses": [texts[s][r["id"]] for s in o]} for r, o in zip(records, orders)]
    return items, {"systems": names, "ids": [r["id"] for r in records], "orders": orders}


def within(args, draw):
    """-> ([{prompt, responses}], {ids, orders, ranks}): each prompt's own ranked candidates, shuffled. A page asks for
    as many as most prompts have; the others stay out."""
    if not args.input or args.systems:
        raise UserError("sheet --within needs --input, ranked records, and no --systems")
    ranked = []
    for record in load_candidates(args.input):
        ranks = {i: c["rank"] for i, c in enumerate(record["candidates"]) if c.get("rank") is not None}
        ranked += [(record, ranks)] if 2 <= len(ranks) <= 9 else []
    if not ranked:
        raise UserError(f"{args.input}: no record has 2 to 9 candidates with a rank")
    n = statistics.mode(len(ranks) for _, ranks in ranked)
    ranked = [x for x in ranked if len(x[1]) == n]
    ranked = draw.sample(ranked, min(args.limit, len(ranked)))
    orders = [draw.sample(list(ranks), n) for _, ranks in ranked]
    items = [
        {"prompt": task_of(r), "responses": [r["candidates"][i]["text"] for i in order]}
        for (r, _), order in zip(ranked, orders)
    ]
    ranks = [[ranks[i] for i in order] for (_, ranks), order in zip(ranked, orders)]
    return items, {"ids": [r["id"] for r, _ in ranked], "orders": orders, "ranks": ranks}


def key_file(output):
    return pathlib.Path(f"{output}.key.json")


def score_sheet(args):
    """Two systems: win, tie, lose, and the win rate (a tie counts half); more: the mean of n + 1 - place (Tuna: 6 - i).

    Each annotator counts alike, each prompt once (its mean over annotators); 95% intervals over prompts: Wilson's for
    the win rate, which ties make too wide rather than too narrow, the normal one for the mean score, with p against
    each other system by a paired bootstrap (the paper of Table 2, Tuna's, names no test). --within: score_within.
    """
    key = read_document(key_file(args.output), orders=list)
    check_key(key, args)
    judged = [{} for _ in key["orders"]]  # per prompt: system -> its scores, one an annotator
    for path in args.score:
        results = read_document(path, answers=list)
        if results.get("sheet") != key.get("sheet") or len(results["answers"]) != len(judged):
            raise UserError(f"--score {path}: these are the results of another sheet than {args.output}")
        for i, (answer, order) in enumerate(zip(results["answers"], key["orders"])):
            for system, points in sheet_points(answer, order, f"{path}: answer {i + 1}").items():
                judged[i].setdefault(system, []).append(points)
    if not any(judged):
        raise UserError(f"--score {' '.join(args.score)}: nothing is judged there")
    table = {"people against rank": score_within(judged, key)} if "ranks" in key else score_systems(judged, key)
    write_atomically(pathlib.Path(f"{args.output}.score.json"), json.dumps(table, indent=1))
    say(markdown(table))


def check_key(key, args):
    """Raise UserError unless the key has the form that `sheet` writes, between systems or within prompts."""
    orders, systems, ranks = key["orders"], key.get("systems"), key.get("ranks")
    lists = all(isinstance(o, list) for o in orders)
    if isinstance(ranks, list):
        good = lists and [len(o) for o in orders] == [len(r) if isinstance(r, list) else 0 for r in ranks]
    else:
        n = len(systems) if isinstance(systems, list) else 0
        good = lists and n > 1 and all(sorted(map(str, o)) == [*map(str, range(n))] for o in orders)
    if not good:
        raise UserError(f"{key_file(args.output)}: not a key that this script has written")


def score_within(judged, key):
    """Spearman's correlation of people's order of a prompt's candidates with their stored ranks, averaged over a
    prompt's annotators (their mean points are ordered), then over prompts (Tuna App. G: 0.72; whether it is a mean
    over prompts, the paper does not say)."""
    values = []
    for scores, order, ranks in zip(judged, key["orders"], key["ranks"]):
        if scores:
            points = [statistics.fmean(scores[i]) for i in order]
            values.append(spearman(points, [-rank for rank in ranks]))
    low, high = normal_interval(values)
    return {"spearman": statistics.fmean(values), "95% low": low, "95% high": high, "prompts": len(values)}


def score_systems(judged, key):
    names, n, judged = key["systems"], len(key["systems"]), [scores for scores in judged if scores]
    table = {}
    for s, name in enumerate(names):
        means = [sum(scores[s]) / len(scores[s]) for scores in judged]
        mean = sum(means) / len(means)
        low, high = wilson(mean, len(means)) if n == 2 else normal_interval(means)
        row = {"win rate" if n == 2 else "score": mean, "95% low": low, "95% high": high, "prompts": len(means)}
        if n == 2:
            every = [points for scores in judged for points in scores[s]]
            row |= {k: every.count(v) / len(every) for k, v in (("win", 1), ("tie", 0.5), ("lose", 0))}
        for o in range(len(names)) if n > 2 else ():
            differences = [statistics.fmean(x[s]) - statistics.fmean(x[o]) for x in judged]
            row |= {f"p, {names[o]}": paired_bootstrap(differences)[2]} if o != s else {}
        table[name] = row
    return table


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
