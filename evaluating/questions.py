"""The verbs nli, multidoc-qa and vicuna: a model answers questions.

nli: labels of generated answers (RESCUE, Table 1). multidoc-qa: gold answers in generated ones, by the gold passage's
place (RESCUE Sec. 6.3, Table 2). vicuna: answers to Vicuna's 80 questions, for a judge (Tuna).
"""

import itertools

import pandas

from collecting.answers import NLI_LABELS, has_answer, parse_nli
from collecting.files import read_records, read_rows
from collecting.flags import alpaca_flags, generation_flags, prompt_flags
from collecting.prompts import TEMPLATES, alpaca_prompt, read_template, shown_prompts
from common import UserError, in_range, say
from evaluating.plots import plot_nli, plot_positions
from evaluating.shared import (
    answer,
    beside,
    generate_answers,
    length_figures,
    mean,
    model_flags,
    num_words,
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
        say(markdown({f"gold {k}": row for k, row in metrics["confusion"].items()}))
        plot_nli(metrics, args.name, beside(args, ".png"))


def nli_metrics(rows):
    """Accuracy (an unparsed answer is wrong), shares, and the confusion matrix: gold -> predicted or unparsed."""
    frame, labels = pandas.DataFrame(rows), list(NLI_LABELS)
    confusion = pandas.crosstab(frame["label"], frame["prediction"].fillna("unparsed"))
    confusion = confusion.reindex(index=labels, columns=[*labels, "unparsed"], fill_value=0)
    return {
        "accuracy": (frame["label"] == frame["prediction"]).mean(),
        "well_formed": frame["well_formed"].mean(),
        "unparsed": frame["prediction"].isna().mean(),
        "mean_words": mean(map(num_words, rows)),
        "prompts": len(rows),
        "predicted_share": (confusion.sum() / len(rows)).to_dict(),
        "confusion": confusion.to_dict("index"),
    }


def multidoc_qa_flags(add, verb="multidoc-qa"):
    model_flags(add, verb)
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    add("--min_new_tokens", type=in_range(int, 0), default=0, help="1: no response is empty")
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
        frame = judged(rows)
        questions = frame["id"].str.partition("-gold")[0]  # one item, not one a place
        items = frame.groupby(questions, sort=False)[["accuracy", "empty", "words"]].mean().to_dict()
        metrics = multidoc_qa_metrics(frame) | {"questions": questions.nunique()}
        write_metrics(args, "multidoc-qa", metrics, items)
        plot_positions({args.name: {"multidoc-qa": {"metrics": metrics}}}, beside(args, ".png"))


def judged(rows):
    """-> DataFrame of the rows with accuracy, first_line and empty, all True or False, and words."""
    frame = pandas.DataFrame(rows)
    frame["accuracy"] = [has_answer(r["text"], r["answers"]) for r in rows]
    frame["first_line"] = [has_answer(r["text"].partition("\n")[0], r["answers"]) for r in rows]
    frame["words"] = [num_words(r) for r in rows]
    frame["empty"] = frame["words"] == 0
    return frame


def multidoc_qa_metrics(frame):
    """Accuracy at every gold position, whole answer and first line, and the mean of the positions' accuracies."""
    places = frame.groupby("gold_position")
    counts = places.size().to_dict()
    metrics = length_figures(frame.to_dict("records")) | {"empty": frame["empty"].mean()}
    for kind in ("accuracy", "first_line"):
        at = places[kind].mean()
        metrics |= {kind: at.mean()} | {f"{kind}_at_{p}": x for p, x in at.items()}
    return metrics | {f"prompts_at_{p}": n for p, n in counts.items()} | {"positions": counts}


# fmt: off
def vicuna_flags(add):
    model_flags(add, "vicuna", "FastChat's question.jsonl: question_id, category, turns (or text)")
    alpaca_flags(add)
    add("--limit", type=in_range(int, 1), help="only the first questions")
    generation_flags(add, 512)
# fmt: on


def vicuna(args):
    """Answer the questions' first turns, greedily."""
    template, records = read_template(args, TEMPLATES["alpaca"]), []
    for where, row in itertools.islice(read_rows(args.input), args.limit):
        turns = row.get("turns", [row.get("text")])  # text: of FastChat's first files
        if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
            raise UserError(f"{where}: field 'turns' must be a list of strings (or 'text' a string)")
        prompt = alpaca_prompt(template, {"instruction": turns[0], "input": ""}, where)
        record = {"id": str(row.get("question_id")), "category": row.get("category"), "question": turns[0]}
        records.append(record | {"instruction": turns[0], "prompt": prompt})
    if rows := answer(args, "vicuna", records):
        write_metrics(args, "vicuna", length_figures(rows))
