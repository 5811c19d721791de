"""Evaluate models: every verb writes its predictions to runs/eval/NAME/VERB.jsonl and its figures to
VERB.metrics.json beside it.

    ranking   does the model rank a candidates file's responses as their annotations do: pair accuracy, Kendall's tau
    nli       generate answers to NLI prompts: accuracy, per-class figures, confusion matrix, share unparsed
    report    several NAMEs side by side as Markdown

Nothing is generated twice: killed and run again with the same arguments, a verb goes on from its predictions.
NAME is --name, else the model's folder (runs/rescue-label/model is rescue-label). Under torchrun prompts are shared
over ranks.

    python evaluate.py nli --model runs/rescue-label/model --input data/esnli/test.jsonl
    python evaluate.py ranking --model runs/rescue-label/model --input data/esnli/test_ranked.jsonl --by label
    python evaluate.py report model rescue-none rescue-label
"""

import json
import math
import pathlib
import platform

import torch
import transformers
from tqdm import tqdm

import collect_candidates as collect
import common
from common import UserError, in_range, say

EVAL_FOLDER = pathlib.Path("runs/eval")


# ----------------------------------------------------------------------------------------------------------------------
# What every verb does: flags, predictions that survive a kill, metrics


def model_flags(add, verb):
    add("--model", required=True, help="hub id or folder")
    add("--input", required=True, help="records, JSONL")
    add("--name", help="the system's name in reports (default: from --model)")
    add("--output", help=f"predictions (default: {EVAL_FOLDER}/NAME/{verb}.jsonl)")


def system_name(args):
    """--name, else the model's folder, or the run's where that is called `model`."""
    path = pathlib.Path(args.model)
    return args.name or (
        path.parent.name if path.name == "model" and (path.parent / "args.json").exists() else path.name
    )


def open_journal(args, verb, records, rank, world):
    args.name = system_name(args)
    args.output = args.output or str(EVAL_FOLDER / args.name / f"{verb}.jsonl")
    return collect.Journal(args.output, [r["id"] for r in records], collect.settings_of(args), rank, world)


def predict(args, verb, records, compute, rank, world):
    """Run `compute(list of records) -> list of predictions` over what is not done yet -> all predictions, in order,
    on rank 0."""
    journal = open_journal(args, verb, records, rank, world)
    batches = collect.batches_by_length(records, args.batch_size)[rank::world]
    for batch in tqdm(batches, desc=verb, disable=rank != 0):
        batch = [records[i] for i in batch if records[i]["id"] not in journal.done]
        if batch:
            journal.write({"id": r["id"]} | p for r, p in zip(batch, compute(batch)))
    journal.finish()
    return [row for _, row in common.read_rows(args.output)] if rank == 0 else []


def write_metrics(args, verb, metrics):
    """Write VERB.metrics.json beside the predictions: the figures, the arguments, device and versions; print the
    plain figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    document = {
        "name": args.name,
        "verb": verb,
        "metrics": metrics,
        "settings": collect.settings_of(args),
        "device": device,
        "versions": versions,
    }
    common.write_atomically(metrics_file(args.output), json.dumps(document, indent=1, ensure_ascii=False))
    say(f"{args.name}:", "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if common.is_number(v)))


def metrics_file(output):
    return pathlib.Path(str(output).removesuffix(".jsonl") + ".metrics.json")


def new_figure(width=6.4, height=4.0, columns=1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    figure.savefig(path, dpi=150)
    say(f"plot: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# ranking

LEVELS = {  # --by -> a candidate's preference level, larger better
    "human": lambda c: c["source"] in common.HUMAN,
    "label": lambda c: c["correct"],
    "reward": lambda c: c["reward"],
    "rank": lambda c: -c["rank"],
    "similarity": lambda c: c["similarity"],
}


def ranking_flags(add):
    model_flags(add, "ranking")
    add("--by", required=True, choices=sorted(LEVELS), help="the annotation that says which candidate is better")
    add(
        "--length_scaling",
        type=in_range(float, 0),
        default=1.0,
        help="length exponent of model responses (RESCUE: 0.85)",
    )
    add("--human_length_scaling", type=in_range(float, 0), default=1.0, help="length exponent of human responses")
    add(
        "--margin", type=in_range(float, 0), default=0.1, help="a pair closer than this is a margin violation (Tuna: m)"
    )
    add("--max_length", type=in_range(int, 8), default=512)
    add("--max_response_length", type=in_range(int, 2))
    add("--batch_size", type=in_range(int, 1), default=2, help="prompts a packed row")


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    rank, world, device = common.init_distributed()
    field = {"label": "correct", "human": "source"}.get(args.by, args.by)
    records = common.load_candidates(args.input, need=[field], added_by=f"collect_candidates.py rank --by {args.by}")

    @torch.inference_mode()
    def compute(batch):
        model, tokenizer = collect.load_generator(args.model, device)
        encoded = [common.encode(tokenizer, r, args.max_length, args.max_response_length) for r in batch]
        logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        for record, logp, n in zip(
            batch,
            logprobs.split([len(e.responses) for e in encoded]),
            lengths.split([len(e.responses) for e in encoded]),
        ):
            human = torch.tensor([c["source"] in common.HUMAN for c in record["candidates"]], device=device)
            exponent = torch.where(human, args.human_length_scaling, args.length_scaling)
            levels = [float(LEVELS[args.by](c)) for c in record["candidates"]]
            yield {
                "scores": common.length_normalized(logp, n, exponent).tolist(),
                "levels": levels,
                "lengths": n.tolist(),
            }

    rows = predict(args, "ranking", records, compute, rank, world)
    if rank == 0:
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin))


def ranking_metrics(rows, margin):
    """-> pair accuracy, margin violations, mean margin over all ordered pairs, Kendall's tau-b averaged over prompts
    with pairs."""
    gaps, taus = [], []
    for row in rows:
        pairs = [
            (si - sj)
            for si, li in zip(row["scores"], row["levels"])
            for sj, lj in zip(row["scores"], row["levels"])
            if li > lj
        ]
        gaps += pairs
        if pairs:
            taus.append(kendall_tau(row["scores"], row["levels"]))
    if not gaps:
        raise UserError("no record has two candidates of different preference: nothing to compare")
    return {
        "pair_accuracy": sum(g > 0 for g in gaps) / len(gaps),
        "margin_violations": sum(g < margin for g in gaps) / len(gaps),
        "mean_margin": sum(gaps) / len(gaps),
        "kendall_tau": sum(taus) / len(taus),
        "pairs": len(gaps),
        "prompts": len(taus),
    }


def kendall_tau(a, b):
    """Kendall's tau-b of two lists: (concordant - discordant) / sqrt(pairs untied in a x pairs untied in b); 0 where
    one is all ties."""

    def sign(x):
        return (x > 0) - (x < 0)

    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    untied = sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs)
    return sum(x * y for x, y in pairs) / math.sqrt(untied) if untied else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# nli


def nli_flags(add):
    model_flags(add, "nli")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy")
    collect.generation_flags(add, 64)


def nli(args):
    """Generate an answer to every prompt and compare its label with the record's (RESCUE, Tables 2 and 3, Fig. 6)."""
    rank, world, device = common.init_distributed()
    records = list(collect.read_records(args.input))
    for record in records:
        if record.get("label") not in collect.NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(collect.NLI_LABELS)}")
    options = {k: getattr(args, k) for k in ("max_new_tokens", "max_prompt_length", "num_beams")}

    def compute(batch):
        model, tokenizer = collect.load_generator(args.model, device)
        prompts = [r["prompt"] for r in batch]
        for record, [answer] in zip(
            batch, collect.generate(model, tokenizer, prompts, stop=collect.unescape(args.stop), **options)
        ):
            label, well_formed = collect.parse_nli(answer["text"])
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
    confusion = {gold: dict.fromkeys((*collect.NLI_LABELS, "unparsed"), 0) for gold in collect.NLI_LABELS}
    for row in rows:
        confusion[row["label"]][row["prediction"] or "unparsed"] += 1
    n = len(rows)
    right = {k: confusion[k][k] for k in collect.NLI_LABELS}
    predicted = {k: sum(row[k] for row in confusion.values()) for k in (*collect.NLI_LABELS, "unparsed")}
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
    columns = (*collect.NLI_LABELS, "unparsed")
    say(
        "gold \\ predicted".ljust(18)
        + "".join(c.rjust(15) for c in columns)
        + "precision".rjust(12)
        + "recall".rjust(8)
    )
    for gold, row in metrics["confusion"].items():
        figures = f"{metrics['precision'][gold]:12.3f}{metrics['recall'][gold]:8.3f}"
        say(gold.ljust(18) + "".join(str(row[c]).rjust(15) for c in columns) + figures)


def plot_nli(metrics, name, path):
    """The confusion matrix, and the share of each label among answers and gold: a model that leans to the middle
    answers 'neutral'."""
    figure, (left, right) = new_figure(10, 4, 2)
    columns = (*collect.NLI_LABELS, "unparsed")
    counts = [[metrics["confusion"][g][c] for c in columns] for g in collect.NLI_LABELS]
    left.imshow(counts, cmap="Blues")
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            left.text(
                x, y, value, ha="center", va="center", color="white" if value > max(map(max, counts)) / 2 else "black"
            )
    left.set(
        xticks=range(4),
        xticklabels=columns,
        yticks=range(3),
        yticklabels=collect.NLI_LABELS,
        xlabel="predicted",
        ylabel="gold",
    )
    left.set_title(f"{name}: accuracy {metrics['accuracy']:.3f}")
    for offset, key, colour in ((-0.2, "gold_share", "0.75"), (0.2, "predicted_share", "tab:blue")):
        shares = [metrics[key].get(c, 0) for c in columns]
        right.bar([x + offset for x in range(4)], shares, 0.4, color=colour, label=key.split("_")[0])
    right.set(xticks=range(4), xticklabels=columns, ylabel="share of prompts", ylim=(0, 1), title="central tendency")
    right.legend(frameon=False)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# report


def report_flags(add):
    add("names", nargs="+", help=f"systems: folders under {EVAL_FOLDER}, or paths")
    add("--columns", nargs="+", help="one table with just these figures, whichever verbs they come from")
    add("--output", help="also write the Markdown there")


def report(args):
    """Every plain figure of several systems side by side: a Markdown table a verb."""
    tables = {}
    for name in args.names:
        folder = pathlib.Path(name) if pathlib.Path(name).is_dir() else EVAL_FOLDER / name
        files = sorted(folder.glob("*.metrics.json"))
        if not files:
            raise UserError(f"{folder}: no *.metrics.json; evaluate {name} first")
        for file in files:
            document = json.loads(file.read_text())
            plain = {k: v for k, v in document["metrics"].items() if common.is_number(v)}
            tables.setdefault(file.name.removesuffix(".metrics.json"), {})[document["name"]] = plain
    if args.columns:
        merged = {name: {} for rows in tables.values() for name in rows}
        for name, row in ((name, row) for rows in tables.values() for name, row in rows.items()):
            merged[name] |= {k: v for k, v in row.items() if k in args.columns}
        if unknown := set(args.columns) - {k for row in merged.values() for k in row}:
            raise UserError(f"--columns {' '.join(sorted(unknown))}: no such figure of {' '.join(args.names)}")
        tables = {"": {name: {k: row[k] for k in args.columns if k in row} for name, row in merged.items()}}
    text = "\n\n".join((f"### {verb}\n\n" if verb else "") + markdown(rows) for verb, rows in tables.items())
    say(text)
    if args.output:
        common.write_atomically(pathlib.Path(args.output), text + "\n")


def markdown(rows):
    """{row name: {column: number}} -> a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


VERBS = {"ranking": (ranking_flags, ranking), "nli": (nli_flags, nli), "report": (report_flags, report)}


def main():
    collect.run_verb(VERBS, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
