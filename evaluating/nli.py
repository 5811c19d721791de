"""The verb nli: labels of generated answers (RESCUE, Tables 2 and 3)."""

import runtime
from collecting import generation
from collecting.answers import NLI_LABELS, parse_nli
from collecting.flags import generation_flags
from collecting.journal import read_records
from common import UserError, in_range
from evaluating.plots import plot_nli
from evaluating.shared import metrics_file, model_flags, predict, write_metrics
from runtime import say


def nli_flags(add):
    model_flags(add, "nli")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy")
    generation_flags(add, 64)


def nli(args):
    """Generate an answer to every prompt and compare its label with the record's (RESCUE, Tables 2 and 3, Fig. 6)."""
    rank, world, device = runtime.init_distributed()
    records = list(read_records(args.input))
    for record in records:
        if record.get("label") not in NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(NLI_LABELS)}")
    options = {k: getattr(args, k) for k in ("max_new_tokens", "max_prompt_length", "num_beams")}

    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        prompts = [r["prompt"] for r in batch]
        for record, [answer] in zip(
            batch, generation.generate(model, tokenizer, prompts, stop=generation.unescape(args.stop), **options)
        ):
            label, well_formed = parse_nli(answer["text"])
            yield {"label": record["label"], "prediction": label, "well_formed": well_formed} | answer

    rows = predict(args, "nli", records, compute, rank, world)
    if rank == 0:
        metrics = nli_metrics(rows)
        write_metrics(args, "nli", metrics)
        print_confusion(metrics)
        plot_nli(metrics, args.name, metrics_file(args.output).with_suffix("").with_suffix(".png"))


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
        "well_formed": sum(row["well_formed"] for row in rows) / n,
        "unparsed": predicted["unparsed"] / n,
        "mean_words": sum(len(row["text"].split()) for row in rows) / n,
        "prompts": n,
        "precision": {k: right[k] / predicted[k] if predicted[k] else 0.0 for k in right},
        "recall": {k: right[k] / max(1, sum(confusion[k].values())) for k in right},
        "predicted_share": {k: v / n for k, v in predicted.items()},
        "gold_share": {k: sum(confusion[k].values()) / n for k in right},
        "confusion": confusion,
    }


def print_confusion(metrics):
    columns = (*NLI_LABELS, "unparsed")
    say(
        "gold \\ predicted".ljust(18)
        + "".join(c.rjust(15) for c in columns)
        + "precision".rjust(12)
        + "recall".rjust(8)
    )
    for gold, row in metrics["confusion"].items():
        figures = f"{metrics['precision'][gold]:12.3f}{metrics['recall'][gold]:8.3f}"
        say(gold.ljust(18) + "".join(str(row[c]).rjust(15) for c in columns) + figures)
