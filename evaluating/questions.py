"""The verbs nli, multidoc-qa and vicuna: a model answers questions.

nli: labels of generated answers (RESCUE, Table 1). multidoc-qa: gold answers in generated ones, by the gold passage's
place (RESCUE Sec. 6.3, Table 2). vicuna: answers to Vicuna's 80 questions, for a judge (Tuna).
"""

import itertools

from collecting.answers import NLI_LABELS, has_answer, parse_nli
from collecting.files import read_records, read_rows
from collecting.flags import alpaca_flags, generation_flags, prompt_flags
from collecting.prompts import ALPACA_TEMPLATE, alpaca_prompt, read_template, shown_prompts
from common import UserError, in_range, say
from evaluating.plots import plot_nli, plot_positions
from evaluating.shared import (
    answer,
    beside,
    generate_answers,
    length_figures,
    mean,
    model_flags,
    predict,
    write_metrics,
)
from evaluating.tables import markdown


def nli_flags(add):
    multidoc_qa_flags(add, "nli")
    prompt_flags(add)


def nli(args):
    """Generate an answer to every prompt and compare its label with the record's (RESCUE, Table 1, Fig. 6)."""
    records = list(read_records(args.input))
    for record in records:
        if record.get("label") not in NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(NLI_LABELS)}")

    def compute(records, device):
        shown = [{"prompt": prompt} for prompt in shown_prompts(args, records)]
        for record, found in zip(records, generate_answers(args, shown, device)):
            label, well_formed = parse_nli(found["text"])
            yield {"label": record["label"], "prediction": label, "well_formed": well_formed} | found

    if rows := predict(args, "nli", records, compute):
        metrics = nli_metrics(rows)
        write_metrics(args, "nli", metrics, {"accuracy": {r["id"]: float(r["prediction"] == r["label"]) for r in rows}})
        more = {k: {x: metrics[x][k] for x in ("precision", "recall")} for k in NLI_LABELS}
        say(markdown({f"gold {k}": row | more[k] for k, row in metrics["confusion"].items()}))
        plot_nli(metrics, args.name, beside(args, ".png"))


def nli_metrics(rows):
    """Accuracy (an unparsed answer is wrong), shares, and per class: precision, recall, confusion row (gold ->
    predicted or unparsed)."""
    confusion = {gold: dict.fromkeys((*NLI_LABELS, "unparsed"), 0) for gold in NLI_LABELS}
    for row in rows:
        confusion[row["label"]][row["prediction"] or "unparsed"] += 1
    n = len(rows)
    right = {k: confusion[k][k] for k in NLI_LABELS}
    predicted = {k: sum(row[k] for row in confusion.values()) for k in (*NLI_LABELS, "unparsed")}
    return {
        "accuracy": sum(right.values()) / n,
        "well_formed": mean(row["well_formed"] for row in rows),
        "unparsed": predicted["unparsed"] / n,
        "mean_words": mean(len(row["text"].split()) for row in rows),
        "prompts": n,
        "precision": {k: right[k] / max(1, predicted[k]) for k in right},
        "recall": {k: right[k] / max(1, sum(confusion[k].values())) for k in right},
        "predicted_share": {k: v / n for k, v in predicted.items()},
        "gold_share": {k: sum(confusion[k].values()) / n for k in right},
        "confusion": confusion,
    }


def multidoc_qa_flags(add, verb="multidoc-qa"):
    model_flags(add, verb)
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    add("--min_new_tokens", type=in_range(int, 0), default=0, help="1: EOS cannot be the first token")
    generation_flags(add, 64)


def multidoc_qa(args):
    """Generate an answer to every question and look for a gold answer in it, by the gold passage's place (Sec. 6.3).

    An answer counts if any gold answer, normalised, is a substring of it so normalised. Both readings are reported:
    the whole answer (as the RESCUE authors do) and its first non-empty line (as Liu et al. do).
    """
    records = list(read_records(args.input))
    for r in records:
        if not isinstance(r.get("answers"), list) or not isinstance(r.get("gold_position"), int):
            where = f"{args.input}: record {r['id']!r}"
            raise UserError(f"{where} has no answers or gold_position; see prepare multidoc_qa")
    if rows := answer(args, "multidoc-qa", records):
        items = by_question(rows)
        metrics = multidoc_qa_metrics(rows) | {"questions": len(items)}
        write_metrics(args, "multidoc-qa", metrics, {"accuracy": items, "empty": by_question(rows, is_empty)})
        plot_positions({args.name: {"multidoc-qa": {"metrics": metrics}}}, beside(args, ".png"))


def is_right(row):
    return has_answer(row["text"], row["answers"])


def is_empty(row):
    return not row["text"].strip()


def by_question(rows, what=is_right):
    """-> {question: the share of its gold positions at which the whole answer is right}: one item, not one a place."""
    questions = {}
    for r in rows:
        questions.setdefault(r["id"].partition("-gold")[0], []).append(what(r))
    return {question: mean(right) for question, right in questions.items()}


def multidoc_qa_metrics(rows):
    """Accuracy at every gold position, whole answer and first line, and the mean of the positions' accuracies."""
    positions = {p: [r for r in rows if r["gold_position"] == p] for p in sorted({r["gold_position"] for r in rows})}
    metrics = {"prompts": len(rows), "unfinished": mean(not row["finished"] for row in rows)}
    metrics["empty"] = mean(map(is_empty, rows))
    for kind, lines in (("accuracy", None), ("first_line", 1)):
        at = {}
        for p, some in positions.items():
            at[p] = mean(has_answer("\n".join(r["text"].split("\n")[:lines]), r["answers"]) for r in some)
        metrics |= {kind: mean(at.values())} | {f"{kind}_at_{p}": x for p, x in at.items()}
    metrics |= {f"prompts_at_{p}": len(positions[p]) for p in sorted(positions)}
    return metrics | {"positions": {p: len(some) for p, some in positions.items()}}


# fmt: off
def vicuna_flags(add):
    model_flags(add, "vicuna", "FastChat's question.jsonl: question_id, category, turns (or text)")
    alpaca_flags(add)
    add("--limit", type=in_range(int, 1), help="only the first questions")
    generation_flags(add, 512)
# fmt: on


def vicuna(args):
    """Answer the questions' first turns, greedily."""
    template, records = read_template(args, ALPACA_TEMPLATE), []
    for where, row in itertools.islice(read_rows(args.input), args.limit):
        turns = row.get("turns", [row.get("text")])  # text: of FastChat's first files
        if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
            raise UserError(f"{where}: field 'turns' must be a list of strings (or 'text' a string)")
        prompt = alpaca_prompt(template, {"instruction": turns[0], "input": ""}, where)
        record = {"id": str(row.get("question_id")), "category": row.get("category"), "question": turns[0]}
        records.append(record | {"instruction": turns[0], "prompt": prompt})
    if rows := answer(args, "vicuna", records):
        write_metrics(args, "vicuna", length_figures(rows))
