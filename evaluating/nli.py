"""The verb nli: labels of generated answers (RESCUE, Table 1)."""

from collecting.answers import NLI_LABELS, parse_nli
from collecting.files import read_records
from collecting.flags import generation_flags, prompt_flags
from collecting.prompts import shown_prompts
from common import UserError, in_range, say
from evaluating.plots import plot_nli
from evaluating.shared import beside, generate_answers, mean, model_flags, predict, write_metrics


def nli_flags(add):
    model_flags(add, "nli")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    prompt_flags(add)
    generation_flags(add, 64)


def nli(args):
    """Generate an answer to every prompt and compare its label with the record's (RESCUE, Table 1, Fig. 6)."""
    records = list(read_records(args.input))
    for record in records:
        if record.get("label") not in NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(NLI_LABELS)}")

    def compute(records, device):
        shown = [{"prompt": prompt} for prompt in shown_prompts(args, records)]
        for record, answer in zip(records, generate_answers(args, shown, device)):
            label, well_formed = parse_nli(answer["text"])
            yield {"label": record["label"], "prediction": label, "well_formed": well_formed} | answer

    if rows := predict(args, "nli", records, compute):
        metrics = nli_metrics(rows)
        write_metrics(args, "nli", metrics, {"accuracy": {r["id"]: float(r["prediction"] == r["label"]) for r in rows}})
        print_confusion(metrics)
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


def print_confusion(metrics):
    say("gold \\ predicted  " + "".join(f"{c:>15}" for c in (*NLI_LABELS, "unparsed")) + "   precision  recall")
    for gold, row in metrics["confusion"].items():
        figures = f"{metrics['precision'][gold]:12.3f}{metrics['recall'][gold]:8.3f}"
        say(f"{gold:18}" + "".join(f"{count:15}" for count in row.values()) + figures)
