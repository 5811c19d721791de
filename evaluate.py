"""Evaluate models: every verb writes its predictions (JSONL) to runs/eval/NAME/VERB.jsonl and its figures to
VERB.metrics.json beside it.

    ranking   does the model rank a candidates file's responses as their annotations do: pair accuracy, Kendall's tau
    nli       generate answers to NLI prompts: accuracy, per-class figures, confusion matrix, share unparsed
    multidoc-qa   answer questions from several documents: accuracy by the place of the one that has the answer
    nll       token NLL of the reference responses (Tuna App. A chooses beta by it)
    superni   Super-NaturalInstructions from a clone: ROUGE-L and exact match
    lmentry   LMentry from a clone, scored by its own scorers: accuracy, robustness, LMentry score
    vicuna    answer Vicuna's 80 questions
    hh        answer HH-RLHF's dialogues: BLEU and the reward under a reward model (PRO, Table 2)
    judge     two systems' answers compared by a stronger model, in both orders
    sheet     a page for people to compare systems blindly, and the score of what they said
    report    several NAMEs side by side as Markdown, and RESCUE's figures as PNG

Nothing is generated twice: killed and run again with the same arguments, a verb goes on from its predictions.
NAME is --name, else the model's folder (runs/rescue-label/model is rescue-label). Under torchrun prompts are shared
over ranks.

    python evaluate.py nli --model runs/rescue-label/model --input data/esnli/test.jsonl
    python evaluate.py ranking --model runs/rescue-label/model --input data/esnli/test_ranked.jsonl --by label
    python evaluate.py vicuna --model runs/tuna/model --input question.jsonl
    python evaluate.py hh --model runs/pro-full/model --input data/hh/test.jsonl
    python evaluate.py judge --answers runs/eval/tuna/vicuna.jsonl runs/eval/tuna-sft/vicuna.jsonl --model gpt-4 \\
        --base_url https://api.openai.com/v1
    python evaluate.py report model rescue-none rescue-label
    python evaluate.py sheet --systems runs/eval/a/nli.jsonl runs/eval/b/nli.jsonl --input data/esnli/test.jsonl
    python evaluate.py sheet --score results-1.json results-2.json
"""

import functools
import hashlib
import itertools
import json
import math
import pathlib
import platform
import random
import re
import statistics
import string
import sys
from collections import Counter

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import common
import runtime
from collecting import asking, generation, reward_models
from collecting.answers import NLI_LABELS, has_answer, parse_nli
from collecting.flags import api_flags, generation_flags, run_verb, unescape
from collecting.journal import Journal, read_records, settings_of
from collecting.prompts import ALPACA_TEMPLATE, alpaca_prompt, fill, read_template
from collecting.sample import rouge_scorer
from common import UserError, in_range
from runtime import say

EVAL_FOLDER = pathlib.Path("runs/eval")


# ----------------------------------------------------------------------------------------------------------------------
# What every verb does: flags, predictions that survive a kill, metrics


def model_flags(add, verb, data="records, JSONL"):
    add("--model", required=True, help="hub id or folder")
    if data:
        add("--input", required=True, help=data)
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
    return Journal(args.output, [r["id"] for r in records], settings_of(args), rank, world)


def predict(args, verb, records, compute, rank, world):
    """Run `compute(list of records) -> list of predictions` over what is not done yet -> all predictions, in order,
    on rank 0."""
    if not records:
        raise UserError(f"{verb}: the input holds no records")
    journal = open_journal(args, verb, records, rank, world)
    batches = generation.batches_by_length(records, args.batch_size)[rank::world]
    for batch in tqdm(batches, desc=verb, disable=rank != 0):
        batch = [records[i] for i in batch if records[i]["id"] not in journal.done]
        if batch:
            journal.write({"id": r["id"]} | p for r, p in zip(batch, compute(batch)))
    journal.finish()
    return [row for _, row in common.read_rows(args.output)] if rank == 0 else []


def answer(args, verb, records, rank, world, device):
    """Generate an answer to every record's prompt, greedily or with --num_beams -> predictions: the record without
    candidates, and the answer (text, num_tokens, finished, logprob)."""
    names = ("max_new_tokens", "max_prompt_length", "num_beams")
    options = {k: getattr(args, k) for k in names if hasattr(args, k)}

    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        prompts = [r["prompt"] for r in batch]
        answers = generation.generate(model, tokenizer, prompts, stop=unescape(args.stop), **options)
        return [r | a for r, [a] in zip(batch, answers)]

    return predict(args, verb, records, compute, rank, world)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


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
        "settings": settings_of(args),
        "device": device,
        "versions": versions,
    }
    runtime.write_atomically(metrics_file(args.output), json.dumps(document, indent=1, ensure_ascii=False))
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
    "logprob": lambda c: c["teacher_score"],
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
    add(
        "--length_penalty",
        type=in_range(float, 0),
        default=1.3,
        help="logprob: beta of the teacher's score (Tuna Eq. 3)",
    )
    scoring_flags(add)


def scoring_flags(add):
    add("--max_length", type=in_range(int, 8), default=512, help="tokens of prompt + one response")
    add("--max_response_length", type=in_range(int, 2), help="tokens of a response with EOS")
    add("--batch_size", type=in_range(int, 1), default=2, help="prompts a packed row")


def ranking(args):
    """Score every candidate by its length-normalised log-likelihood and compare the order with the annotation's."""
    rank, world, device = runtime.init_distributed()
    field = {"label": "correct", "human": "source"}.get(args.by, args.by)
    records = [annotated(r, field, args) for r in common.load_candidates(args.input)]
    records = [r for r in records if r["candidates"]]
    if not records:
        raise UserError(f"{args.input}: no candidate is ranked by {field!r}")

    @torch.inference_mode()
    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
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
                "logprobs": logp.tolist(),
                "sources": [c["source"] for c in record["candidates"]],
            }

    rows = predict(args, "ranking", records, compute, rank, world)
    if rank == 0:
        write_metrics(args, "ranking", ranking_metrics(rows, args.margin))


def annotated(record, field, args):
    """The record with those of its candidates that carry the annotation; the original response may lack it."""
    for i, c in enumerate(record["candidates"]):
        if field not in c and c["source"] not in common.HUMAN:
            raise UserError(
                f"{args.input}: record {record['id']!r}: candidates[{i}] has no {field!r}; "
                f"add it with: collect_candidates.py rank --by {args.by}"
            )
    candidates = [c for c in record["candidates"] if c.get(field) is not None]  # rank null: not ranked
    if field == "logprob":
        score = common.length_normalized
        candidates = [
            c | {"teacher_score": score(c["logprob"], c["num_tokens"], args.length_penalty)} for c in candidates
        ]
    return record | {"candidates": candidates}


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
            batch, generation.generate(model, tokenizer, prompts, stop=unescape(args.stop), **options)
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


def plot_nli(metrics, name, path):
    """The confusion matrix, and the share of each label among answers and gold: a model that leans to the middle
    answers 'neutral'."""
    figure, (left, right) = new_figure(10, 4, 2)
    columns = (*NLI_LABELS, "unparsed")
    counts = [[metrics["confusion"][g][c] for c in columns] for g in NLI_LABELS]
    left.imshow(counts, cmap="Blues")
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            left.text(
                x, y, value, ha="center", va="center", color="white" if value > max(map(max, counts)) / 2 else "black"
            )
    left.set(
        xticks=range(4), xticklabels=columns, yticks=range(3), yticklabels=NLI_LABELS, xlabel="predicted", ylabel="gold"
    )
    left.set_title(f"{name}: accuracy {metrics['accuracy']:.3f}")
    for offset, key, colour in ((-0.2, "gold_share", "0.75"), (0.2, "predicted_share", "tab:blue")):
        shares = [metrics[key].get(c, 0) for c in columns]
        right.bar([x + offset for x in range(4)], shares, 0.4, color=colour, label=key.split("_")[0])
    right.set(xticks=range(4), xticklabels=columns, ylabel="share of prompts", ylim=(0, 1), title="central tendency")
    right.legend(frameon=False)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# multidoc-qa


def multidoc_qa_flags(add):
    model_flags(add, "multidoc-qa")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    generation_flags(add, 64)


def multidoc_qa(args):
    """Generate an answer to every question and look for a gold answer in it, by the gold passage's place (RESCUE 5.2).

    An answer counts if any gold answer, normalised, is a substring of it so normalised. Both readings are reported:
    the whole answer (as the RESCUE authors do) and its first non-empty line (as Liu et al. do).
    """
    rank, world, device = runtime.init_distributed()
    records = list(read_records(args.input))
    for r in records:
        if not isinstance(r.get("answers"), list) or not isinstance(r.get("gold_position"), int):
            raise UserError(
                f"{args.input}: record {r['id']!r} has no answers or gold_position; see prepare multidoc_qa"
            )
    rows = answer(args, "multidoc-qa", records, rank, world, device)
    if rank == 0:
        metrics = multidoc_qa_metrics(rows)
        write_metrics(args, "multidoc-qa", metrics)
        plot_positions({args.name: metrics}, metrics_file(args.output).with_suffix("").with_suffix(".png"))


def multidoc_qa_metrics(rows):
    """Accuracy at every gold position, whole answer and first line, and the mean of the positions' accuracies."""
    positions = {}
    for row in rows:
        positions.setdefault(row["gold_position"], []).append(row)
    metrics = {"prompts": len(rows), "unfinished": mean(not row["finished"] for row in rows)}
    for kind, cut in (("accuracy", None), ("first_line", "\n")):
        texts = {
            p: [(r["text"].split(cut)[0] if cut else r["text"], r["answers"]) for r in positions[p]] for p in positions
        }
        at = {p: mean(has_answer(*pair) for pair in texts[p]) for p in sorted(positions)}
        metrics |= {kind: mean(at.values())} | {f"{kind}_at_{p}": x for p, x in at.items()}
    return metrics | {"positions": {p: len(positions[p]) for p in sorted(positions)}}


def plot_positions(systems, path):
    """The U-shaped curve: accuracy by the gold passage's place, with 95% intervals; first lines are dashed."""
    figure, axes = new_figure()
    for colour, (name, metrics) in enumerate(systems.items()):
        counts = {int(p): n for p, n in metrics["positions"].items()}
        for kind, style in (("accuracy", "-"), ("first_line", "--")):
            values = [metrics[f"{kind}_at_{p}"] for p in counts]
            spans = [wilson(v, n) for v, n in zip(values, counts.values())]
            bars = [[v - low for v, (low, _) in zip(values, spans)], [high - v for v, (_, high) in zip(values, spans)]]
            label = f"{name}, {'whole answer' if kind == 'accuracy' else 'first line'}"
            axes.errorbar(list(counts), values, bars, fmt=style + "o", color=f"C{colour}", capsize=3, label=label)
    axes.set(xlabel="place of the gold passage", ylabel="accuracy", xticks=list(counts), ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def wilson(share, n):
    """Wilson's 95% interval of a share of n -> (low, high)."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ----------------------------------------------------------------------------------------------------------------------
# nll


def nll_flags(add):
    model_flags(add, "nll", "records with a reference (or human) response, JSONL")
    scoring_flags(add)


def nll(args):
    """Token NLL of the reference responses under a model, EOS included."""
    rank, world, device = runtime.init_distributed()
    records = []
    for record in common.load_candidates(args.input):
        references = [c for c in record["candidates"] if c["source"] in common.HUMAN]
        if not references:
            raise UserError(f"{args.input}: record {record['id']!r} has no reference response")
        records.append(record | {"candidates": references[:1]})

    @torch.inference_mode()
    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        encoded = [common.encode(tokenizer, r, args.max_length, args.max_response_length) for r in batch]
        logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        return [{"nll": -logp, "tokens": int(n)} for logp, n in zip(logprobs.tolist(), lengths.tolist())]

    rows = predict(args, "nll", records, compute, rank, world)
    if rank == 0:
        token_nll = sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
        by_response = mean(r["nll"] / r["tokens"] for r in rows)
        figures = {"token_nll": token_nll, "perplexity": math.exp(token_nll), "response_nll": by_response}
        write_metrics(args, "nll", figures | {"tokens": sum(r["tokens"] for r in rows), "prompts": len(rows)})


# ----------------------------------------------------------------------------------------------------------------------
# superni: Super-NaturalInstructions


def superni_flags(add):
    model_flags(add, "superni", None)
    add("--superni_dir", required=True, help="clone of allenai/natural-instructions: tasks/, splits/default/")
    add(
        "--shots",
        type=in_range(int, 0, 2),
        default=0,
        help="positive examples before the input, while they fit: 0 or 2",
    )
    add(
        "--max_instances", type=in_range(int, 1), default=100, help="the first ones of each task (the benchmark's: 100)"
    )
    add("--tasks", nargs="+", help="only these of the 119 test tasks")
    add("--bertscore", metavar="MODEL", help="also BERTScore F1 under this encoder, a hub id or folder: roberta-large")
    add("--bertscore_layer", type=int, default=17, help="whose states are compared (roberta-large: 17); -1 the last")
    generation_flags(add, 128)


def superni(args):
    """Greedy answers to the benchmark's test tasks: ROUGE-L and exact match against the best reference, x 100."""
    rank, world, device = runtime.init_distributed()
    args.max_prompt_length = args.max_prompt_length or 1024
    root = pathlib.Path(args.superni_dir)
    args.input = str(root / "splits/default/test_tasks.txt")
    if not pathlib.Path(args.input).is_file():
        raise UserError(
            f"--superni_dir {root}: has no splits/default/test_tasks.txt, so it is no clone of the benchmark"
        )
    listed = pathlib.Path(args.input).read_text().split()
    if unknown := set(args.tasks or ()) - set(listed):
        raise UserError(f"--tasks {' '.join(sorted(unknown))}: not among the test tasks of {args.input}")
    tokenizer = runtime.load_tokenizer(args.model)
    records = [
        r for name in args.tasks or listed for r in superni_records(root / f"tasks/{name}.json", tokenizer, args)
    ]
    rows = answer(args, "superni", records, rank, world, device)
    if rank == 0:
        write_metrics(args, "superni", superni_metrics(rows, args.bertscore, args.bertscore_layer))


def superni_records(file, tokenizer, args):
    """A task's file -> records with prompt, task, and the references in `answers`."""
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
        definition, examples, instances = task["Definition"], task["Positive Examples"], task["Instances"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not a task of Super-NaturalInstructions ({type(e).__name__}: {e})") from e
    definition = definition if isinstance(definition, str) else definition[0]
    for i, instance in enumerate(instances[: args.max_instances]):
        outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
        prompt = superni_prompt(
            definition, examples[: args.shots], instance["input"], tokenizer, args.max_prompt_length
        )
        yield {"id": f"{file.stem}-{i}", "task": file.stem, "prompt": prompt, "answers": outputs}


def superni_prompt(definition, examples, text, tokenizer, max_tokens):
    """The benchmark's prompt; positive examples are added one by one while all of it stays within max_tokens."""

    def closed(x):  # a full stop where final punctuation lacks
        return x.strip() + ("" if x.strip()[-1:] in string.punctuation and x.strip() else ".")

    head = f"Definition: {closed(definition)}\n\n"
    tail = f"Now complete the following example -\nInput: {closed(text)}\nOutput: "
    for k, example in enumerate(examples, 1):
        shot = f"Positive Example {k} -\nInput: {closed(example['input'])}\nOutput: {closed(example['output'])}\n\n"
        if len(common.prompt_ids(tokenizer, head + shot + tail)) > max_tokens:
            break
        head += shot
    return head + tail


def exact_form(text):
    """Lower case, no punctuation, single spaces; articles stay, unlike SQuAD's."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def superni_metrics(rows, bertscore=None, layer=-1):
    """Mean over instances x 100 of the maximum over references; the same by task."""
    score = rouge_scorer(use_stemmer=True).score
    for row in rows:
        row["rouge_l"] = 100 * max(score(a, row["text"])["rougeL"].fmeasure for a in row["answers"])
        row["exact_match"] = 100.0 * any(exact_form(a) == exact_form(row["text"]) for a in row["answers"])
    names = ["rouge_l", "exact_match"]
    if bertscore:
        names.append("bertscore")
        texts, answers = [r["text"] for r in rows], [r["answers"] for r in rows]
        for row, f1 in zip(rows, bert_f1(texts, answers, bertscore, layer)):
            row["bertscore"] = 100 * f1
    tasks = {row["task"]: [r for r in rows if r["task"] == row["task"]] for row in rows}
    figures = {name: mean(row[name] for row in rows) for name in names}
    figures |= {"mean_words": mean(len(row["text"].split()) for row in rows), "tasks": len(tasks), "prompts": len(rows)}
    by_task = {task: {name: mean(row[name] for row in some) for name in names} for task, some in tasks.items()}
    return figures | {"by_task": by_task}


@torch.inference_mode()
def bert_f1(texts, references, name, layer):
    """BERTScore F1 of each text, the best over its references: every token is matched with the most similar one of the
    other text, by the cosine of their states in `layer`; no idf weights, special tokens left out, no rescaling."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = runtime.load_pretrained(AutoModel, name, "--bertscore").to(device).eval()
    tokenizer = runtime.load_pretrained(AutoTokenizer, name, "--bertscore")

    @functools.cache
    def states(text):  # -> [tokens, d] unit vectors
        inputs = tokenizer(text, truncation=True, max_length=512, return_tensors="pt", return_special_tokens_mask=True)
        special = inputs.pop("special_tokens_mask")[0].bool()
        hidden = model(**inputs.to(device), output_hidden_states=True).hidden_states[layer][0].float()
        return torch.nn.functional.normalize(hidden[~special.to(device)], dim=-1)

    def f1(text, reference):
        if not (text.strip() and reference.strip()):
            return float(text.strip() == reference.strip())
        cosines = states(text) @ states(reference).T  # [tokens of the text, of the reference]
        precision, recall = cosines.amax(1).mean(), cosines.amax(0).mean()
        return (2 * precision * recall / (precision + recall)).item()

    return [max(f1(text, r) for r in some) for text, some in zip(texts, references)]


# ----------------------------------------------------------------------------------------------------------------------
# lmentry

ARGUMENT_ORDER = {  # core tasks whose two arguments may change places
    *("more_letters", "less_letters", "first_alphabetically", "rhyming_word", "homophones"),
    *("bigger_number", "smaller_number"),
}
ADJACENT = [  # pairs of tasks that one skill solves (LMentry Sec. 3.2)
    *(("bigger_number", "smaller_number"), ("more_letters", "less_letters"), ("word_after", "word_before")),
    *(("most_associated_word", "least_associated_word"), ("any_words_from_category", "all_words_from_category")),
    *(("sentence_containing", "sentence_not_containing"), ("word_containing", "word_not_containing")),
    *(("starts_with_word", "starts_with_letter"), ("ends_with_word", "ends_with_letter")),
    *(("sentence_containing", "word_containing"), ("sentence_not_containing", "word_not_containing")),
    *(("first_word", "first_letter"), ("last_word", "last_letter"), ("starts_with_word", "ends_with_word")),
    *(("starts_with_letter", "ends_with_letter"), ("first_word", "last_word"), ("first_letter", "last_letter")),
]


def lmentry_flags(add):
    model_flags(add, "lmentry", None)
    add("--lmentry_dir", required=True, help="clone of aviaefrat/lmentry: data/ and its scorers")
    add("--tasks", nargs="+", help="only these of the 41 files in data/ (no LMentry score then)")
    add("--max_examples", type=in_range(int, 1), help="only so many of each file, equally many a template")
    generation_flags(add, 50)


def lmentry(args):
    """Greedy answers to LMentry, written in its layout (predictions/TASK/NAME.json beside the output) and scored by
    the clone's own scorers."""
    rank, world, device = runtime.init_distributed()
    root = pathlib.Path(args.lmentry_dir)
    files = {p.stem: p for p in sorted((root / "data").glob("*.json"))}
    if unknown := set(args.tasks or ()) - files.keys() or (not files and {"data/*.json"}):
        raise UserError(f"--lmentry_dir {root}: has no {', '.join(sorted(unknown))}")
    scorers = lmentry_scorers(root)
    args.input = [str(files[name]) for name in args.tasks or files]
    records, examples = [], {}
    for name in args.tasks or files:
        examples[name] = json.loads(files[name].read_text(encoding="utf-8"))["examples"]
        templates = {}
        for number, example in examples[name].items():
            templates.setdefault(example["metadata"]["template_id"], []).append(number)
        spread = [n for numbers in itertools.zip_longest(*templates.values()) for n in numbers if n is not None]
        numbers = spread[: args.max_examples]
        records += [{"id": f"{name}/{n}", "task": name, "prompt": examples[name][n]["input"]} for n in numbers]
    rows = answer(args, "lmentry", records, rank, world, device)
    if rank == 0:
        for row in rows:
            core = max((t for t in scorers if row["task"].startswith(t)), key=len)
            example = examples[row["task"]][row["id"].partition("/")[2]]
            row["score"], row["certainty"] = scorers[core].score_prediction(row["text"], example)
            row |= {"core": core, "template": example["metadata"]["template_id"]}
            row["answer_index"] = example["metadata"].get("answer_index")
        write_lmentry_layout(rows, pathlib.Path(args.output).parent / "predictions", args.name)
        complete = len(rows) == sum(map(len, examples.values())) and not args.tasks
        write_metrics(args, "lmentry", lmentry_metrics(rows, complete))


def lmentry_scorers(root):
    """-> {core task: a scorer of the clone's}; they need the num2words package."""
    sys.path.insert(0, str(root))
    try:
        from lmentry.scorers.scorer_mapping import task_name_to_scorer
    except ImportError as e:
        raise UserError(
            f"--lmentry_dir {root}: its scorers cannot be loaded ({e}); they need pip install num2words"
        ) from e
    finally:
        sys.path.remove(str(root))
    return {task: scorer() for task, scorer in task_name_to_scorer.items()}


def write_lmentry_layout(rows, folder, name):
    for task in {row["task"] for row in rows}:
        (folder / task).mkdir(parents=True, exist_ok=True)
        predictions = {
            row["id"].partition("/")[2]: {"input": row["prompt"], "prediction": row["text"]}
            | {"score": row["score"], "certainty": row["certainty"]}
            for row in rows
            if row["task"] == task
        }
        runtime.write_atomically(folder / task / f"{name}.json", json.dumps(predictions, indent=1, ensure_ascii=False))


def lmentry_metrics(rows, complete):
    """Accuracy: mean over core tasks. With all 41 files also robustness, the mean of four, each the mean over its
    comparisons of 100 minus the largest accuracy gap; LMentry score = accuracy x robustness / 100."""

    def accuracy(task, **conditions):
        some = [r for r in rows if r["task"] == task and all(r[k] == v for k, v in conditions.items())]
        return 100 * mean(r["score"] for r in some) if some else 0.0

    def robustness(comparisons):
        return mean(100 - (max(accuracies) - min(accuracies)) for accuracies in comparisons)

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    core = [t for t in tasks if any(r["core"] == t for r in rows if r["task"] == t)]
    by_task = {t: accuracy(t) for t in tasks}
    figures = {"accuracy": mean(by_task[t] for t in core)} if core else {}
    if complete:
        contents = {}  # core task -> its further files
        for row in rows:
            if row["task"] != row["core"]:
                contents.setdefault(row["core"], set()).add(row["task"])
        parts = {
            "argument_order": [[accuracy(t, answer_index=i) for i in (0, 1)] for t in ARGUMENT_ORDER],
            "argument_content": [[by_task[t] for t in files] for files in contents.values()],
            "template": [[accuracy(t, template=i) for i in range(3)] for t in core],
            "adjacent_tasks": [[by_task[a], by_task[b]] for a, b in ADJACENT],
        }
        figures |= {name: robustness(comparisons) for name, comparisons in parts.items()}
        figures["robustness"] = mean(figures[name] for name in parts)
        figures["lmentry_score"] = figures["accuracy"] * figures["robustness"] / 100
    return figures | {"core_tasks": len(core), "files": len(tasks), "prompts": len(rows), "by_task": by_task}


# ----------------------------------------------------------------------------------------------------------------------
# vicuna, judge


def vicuna_flags(add):
    model_flags(add, "vicuna", "FastChat's question.jsonl: question_id, category, turns")
    add("--prompt_file", help="a template of your own with {instruction} (default: Alpaca's of `prepare`)")
    add("--limit", type=in_range(int, 1), help="only the first questions")
    generation_flags(add, 512)


def vicuna(args):
    """Answer the questions' first turns, greedily."""
    rank, world, device = runtime.init_distributed()
    template, records = read_template(args, ALPACA_TEMPLATE), []
    for where, row in itertools.islice(common.read_rows(args.input), args.limit):
        if not (isinstance(row.get("turns"), list) and row["turns"] and isinstance(row["turns"][0], str)):
            raise UserError(f"{where}: field 'turns' must be a list of strings")
        prompt = alpaca_prompt(template, {"instruction": row["turns"][0], "input": ""}, where)
        record = {"id": str(row.get("question_id")), "category": row.get("category"), "question": row["turns"][0]}
        records.append(record | {"prompt": prompt})
    rows = answer(args, "vicuna", records, rank, world, device)
    if rank == 0:
        words = mean(len(r["text"].split()) for r in rows)
        unfinished = mean(not r["finished"] for r in rows)
        write_metrics(args, "vicuna", {"mean_words": words, "unfinished": unfinished, "prompts": len(rows)})


# ----------------------------------------------------------------------------------------------------------------------
# hh

EVALUATION_REWARD_MODEL = "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"  # PRO's; its training data's is the 1.4B


def hh_flags(add):
    model_flags(add, "hh", "records of `prepare --task hh`, JSONL")
    add(
        "--reward_model",
        default=EVALUATION_REWARD_MODEL,
        help="hub id or folder, another one than trained with; or none",
    )
    add("--dialogue", choices=["auto", *reward_models.DIALOGUE_FORMS], default="auto", help="how it reads dialogues")
    add("--allow_pickle", action="store_true", help="load the reward model's .bin weights too: they can run code")
    add("--limit", type=in_range(int, 1), help="only the first records")
    generation_flags(add, 128)


def hh(args):
    """Answer dialogues greedily; BLEU against the chosen response and the mean reward (PRO, Table 2).

    Defaults as in PRO: 128 new tokens, prompts cut to their last 384, answers cut where a new turn begins.
    """
    rank, world, device = runtime.init_distributed()
    args.max_prompt_length, args.stop = args.max_prompt_length or 384, args.stop or list(generation.TURNS)
    records = common.load_candidates(args.input, limit=args.limit)
    trained_with = reward_models_of_training(args.model)
    if args.reward_model in trained_with:
        say(f"{args.reward_model} also scored the training data of {args.model}: its rewards flatter this model")
    options = {k: getattr(args, k) for k in ("max_new_tokens", "max_prompt_length")}

    def compute(batch):
        model, tokenizer = generation.load_generator(args.model, device)
        prompts = [r["prompt"] for r in batch]
        answers = generation.generate(model, tokenizer, prompts, stop=unescape(args.stop), **options)
        rows = [
            {"subset": r.get("subset"), "question": r["prompt"], "reference": chosen_text(r)} | a
            for r, [a] in zip(batch, answers)
        ]
        if args.reward_model != "none":
            pairs = [(r, row["text"]) for r, row in zip(batch, rows)]
            load = {"form": args.dialogue, "allow_pickle": args.allow_pickle}
            for row, logit in zip(rows, reward_models.reward_logits(args.reward_model, device, pairs, **load)):
                row |= {"reward_logit": logit, "reward": 1 / (1 + math.exp(-logit))}
        return rows

    rows = predict(args, "hh", records, compute, rank, world)
    if rank == 0:
        metrics = hh_metrics(rows)
        subsets = sorted({row["subset"] for row in rows if row["subset"]})
        for subset in subsets if len(subsets) > 1 else []:
            figures = hh_metrics([row for row in rows if row["subset"] == subset])
            metrics |= {f"{subset} {k}": v for k, v in figures.items()}
        write_metrics(args, "hh", metrics)


def chosen_text(record):
    """The response that people preferred: the chosen one, else a human one, else the best ranked."""
    candidates = record["candidates"]
    preferred = [c for source in ("chosen", *common.HUMAN) for c in candidates if c["source"] == source]
    return (preferred or sorted(candidates, key=lambda c: c.get("rank") or 0))[0]["text"]


def reward_models_of_training(model):
    """The reward models that a run of ours was trained with, from its args.json and its data, where they are there."""
    file = pathlib.Path(model).parent / "args.json"
    if not file.exists():
        return set()
    settings = json.loads(file.read_text())["settings"]
    names = {settings.get("reward_model")}
    if pathlib.Path(settings["data"]).exists():
        names |= {row.get("reward_model") for _, row in itertools.islice(common.read_rows(settings["data"]), 1)}
    return names - {None}


def hh_metrics(rows):
    """-> sacreBLEU's corpus BLEU and the authors' char_bleu, 0-100, the mean sigmoid reward, mean words. Over several
    subsets these are means over samples, as in Table 2."""
    import sacrebleu

    texts, references = [r["text"] for r in rows], [r["reference"] for r in rows]
    metrics = {"bleu": sacrebleu.corpus_bleu(texts, [references]).score}
    metrics["char_bleu"] = 100 * mean(map(char_bleu, texts, references))
    if all("reward" in r for r in rows):
        metrics["reward"] = mean(r["reward"] for r in rows)
    words, unfinished = mean(len(t.split()) for t in texts), mean(not r["finished"] for r in rows)
    return metrics | {"mean_words": words, "unfinished": unfinished, "prompts": len(rows)}


def char_bleu(text, reference):
    """What PRO's code calls BLEU: sentence BLEU of two raw strings, so over characters; up to 4-grams, unsmoothed."""
    text, reference = text.strip(), reference.strip()
    if not text:
        return 0.0
    product = 1.0
    for n in range(1, 5):
        grams, others = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (text, reference))
        product *= (grams & others).total() / max(1, grams.total())
    brevity = math.exp(min(0.0, 1 - len(reference) / len(text)))
    return brevity * product**0.25


# ----------------------------------------------------------------------------------------------------------------------
# judge

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


def judge_flags(add):
    add("--answers", nargs=2, required=True, metavar="JSONL", help="two systems' answers, as vicuna writes them")
    add("--name", help="in reports (default: NAME-vs-NAME, the answers' folders)")
    add("--output", help=f"verdicts (default: {EVAL_FOLDER}/NAME/judge.jsonl)")
    add("--prompt_file", help="a template of your own with {question}, {a}, {b}")
    add("--limit", type=in_range(int, 1), help="only the first questions")
    api_flags(add, 512)


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


# ----------------------------------------------------------------------------------------------------------------------
# sheet: people as judges

SHEET = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Which response is better?</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
script-src 'unsafe-inline'">
<style>
body { font: 16px/1.5 sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border: 1px solid #bbb; padding: .8em; margin: 0 }
#prompt { max-height: 16em; overflow: auto; background: #f4f4f4 }
#responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(20em, 1fr)); gap: 1em; margin: 1em 0 }
.chosen pre { border: 3px solid #06c } kbd { border: 1px solid #888; border-radius: 4px; padding: 0 .4em }
</style></head><body>
<p id="progress" aria-live="polite"></p><pre id="prompt"></pre><div id="responses"></div><p id="keys"></p>
<p><button id="back">Back</button> <button id="save">Save the results</button></p>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), items = data.items, store = "sheet-" + data.sheet;
const n = items[0].responses.length, show = id => document.getElementById(id);
let answers = items.map(() => []), at = 0;  // an answer: places of the responses best first; a tie of two: ["tie"]
try { answers = JSON.parse(localStorage.getItem(store)) || answers; } catch (e) { /* private window: nothing kept */ }
const done = a => a.length === (n === 2 ? 1 : n), judged = () => answers.filter(done).length;
while (at < items.length - 1 && done(answers[at])) at++;
function draw() {
  show("progress").textContent = `${at + 1} of ${items.length}; judged: ${judged()}`;
  show("prompt").textContent = items[at].prompt;
  show("responses").replaceChildren(...items[at].responses.map((text, i) => {
    const box = document.createElement("div"), head = document.createElement("p"), pre = document.createElement("pre");
    const place = answers[at].indexOf(i);
    head.textContent = `Response ${i + 1}` + (place < 0 ? "" : n === 2 ? ": better" : `: place ${place + 1}`);
    pre.textContent = text;
    box.className = place < 0 ? "" : "chosen";
    box.append(head, pre);
    return box;
  }));
  show("keys").textContent = (n === 2 ? "Keys: 1 the left one is better, 0 a tie, 2 the right one is better"
    : `Keys: the numbers of all ${n} responses, the best first`) + "; Backspace goes back, S saves the results."
    + (n === 2 && answers[at][0] === "tie" ? " Judged: a tie." : "");
}
function choose(choice) {
  if (n === 2 || done(answers[at])) answers[at] = [];
  if (!answers[at].includes(choice)) answers[at].push(choice);
  if (done(answers[at]) && at < items.length - 1) at++;
  try { localStorage.setItem(store, JSON.stringify(answers)); } catch (e) { /* as above */ }
  draw();
}
function back() {
  if (n > 2 && answers[at].length && !done(answers[at])) answers[at].pop(); else at = Math.max(0, at - 1);
  draw();
}
function save() {
  const link = document.createElement("a"), text = JSON.stringify({sheet: data.sheet, answers: answers}, null, 1);
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = `results-${data.sheet}.json`;
  link.click();
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const number = /^[0-9]$/.test(event.key) ? Number(event.key) : -1;
  if (number >= 1 && number <= n) choose(number - 1);
  else if (number === 0 && n === 2) choose("tie");
  else if (event.key === "Backspace") back();
  else if (event.key.toLowerCase() === "s") save();
  else return;
  event.preventDefault();
});
show("back").onclick = back;
show("save").onclick = save;
draw();
</script></body></html>
"""


def sheet_flags(add):
    add(
        "--systems",
        nargs="+",
        metavar="PREDICTIONS",
        help="2 to 9 files with id and text, such as runs/eval/A/nli.jsonl",
    )
    add("--names", nargs="+", help="the systems' names (default: the files' folders)")
    add("--input", help="records with the prompts")
    add("--limit", type=in_range(int, 1), default=100, help="prompts on the sheet, drawn by --seed")
    add("--seed", type=int, default=0, help="which prompts, and the order of the responses")
    add("--output", default=str(EVAL_FOLDER / "sheet.html"), help="the page; who is who goes to OUTPUT.key.json")
    add("--score", nargs="+", metavar="RESULTS", help="the results that annotators saved for the page --output")


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
    if output.exists():
        raise UserError(f"--output {output} is there already: name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_atomically(key_file(output), json.dumps(key))
    runtime.write_atomically(output, SHEET.replace("@DATA@", data))
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
    names, n = key["systems"], len(key["systems"])
    judged = [{} for _ in key["orders"]]  # per prompt: system -> its scores, one an annotator
    for path in args.score:
        results = read_sheet_file(path, "answers")
        if results.get("sheet") != key["sheet"] or len(results["answers"]) != len(judged):
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
    runtime.write_atomically(pathlib.Path(f"{args.output}.score.json"), json.dumps(table, indent=1))
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
    if not isinstance(answer, list) or (
        n > 2 and len(answer) == n and sorted(map(str, answer)) != list(map(str, range(n)))
    ):
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


def normal_interval(values):
    """Mean of values +- 1.96 standard errors; the mean alone for one value."""
    mean = statistics.fmean(values)
    half = 1.959964 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half


# ----------------------------------------------------------------------------------------------------------------------
# report


# Figures of several runs (RESCUE Fig. 4-6): each takes {system: {verb: its metrics document}} and a path


def plot_setting(systems, path, setting):
    """Fig. 4: label accuracy against a training argument (alpha, number of candidates), a line for each ordering."""
    lines = {}
    for name, documents in systems.items():
        args_file = pathlib.Path(need_verb(documents, name, "nli")["settings"]["--model"]).parent / "args.json"
        if not args_file.is_file():
            raise UserError(f"--plot {setting}: {name} is no run of rescue.py ({args_file} is not there)")
        trained = json.loads(args_file.read_text())["settings"]
        metrics = documents["nli"]["metrics"]
        point = (trained[setting], metrics["accuracy"], *wilson(metrics["accuracy"], metrics["prompts"]))
        lines.setdefault(trained.get("ordering", ""), []).append(point)
    figure, axes = new_figure()
    for ordering, points in sorted(lines.items()):
        x, y, low, high = zip(*sorted(points))
        bars = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        axes.errorbar(x, y, bars, fmt="-o", capsize=3, label=ordering)
    axes.set(xlabel=setting.replace("_", " "), ylabel="accuracy")
    values = sorted({x for points in lines.values() for x, *_ in points})
    if setting == "alpha" and values[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.minorticks_off()
    figure.legend(frameon=False, title="ordering", loc="outside right upper")
    save_figure(figure, path)


def plot_sources(systems, path):
    """Fig. 5 and 6: by source, log p / |y| and log p / |y| ** lambda of each response, and its length in tokens."""
    for name, documents in systems.items():
        predictions = need_verb(documents, name, "ranking")["folder"] / "ranking.jsonl"
        values = {}
        for where, row in common.read_rows(predictions):
            if "sources" not in row:
                raise UserError(f"{where}: has no sources; delete {predictions} and run evaluate.py ranking again")
            for source, logp, n, score in zip(*(row[k] for k in ("sources", "logprobs", "lengths", "scores"))):
                values.setdefault(source, []).append((logp / n, score, n))
        figure, axes = new_figure(13, 3.6, 3)
        labels = ("log p / |y|", r"log p / |y|$^\lambda$", "|y|, tokens")
        for column, (ax, label) in enumerate(zip(axes, labels)):
            bins = torch.linspace(*(f(v[column] for rows in values.values() for v in rows) for f in (min, max)), 25)
            for source, rows in sorted(values.items()):
                column_values = [v[column] for v in rows]
                ax.hist(
                    column_values, bins=bins.tolist(), density=True, histtype="step", label=f"{source} ({len(rows)})"
                )
            ax.set(xlabel=label, ylabel="density", title=name)
        axes[-1].legend(frameon=False, fontsize=8)
        save_figure(figure, predictions.with_name(path.name))


def need_verb(documents, name, verb):
    if verb not in documents:
        raise UserError(f"{name} has no {verb}.metrics.json: run evaluate.py {verb} first")
    return documents[verb]


PLOTS = {
    "alpha": functools.partial(plot_setting, setting="alpha"),
    "num_candidates": functools.partial(plot_setting, setting="num_candidates"),
    "sources": plot_sources,
    "gold_position": lambda systems, path: plot_positions(
        {name: need_verb(documents, name, "multidoc-qa")["metrics"] for name, documents in systems.items()}, path
    ),
}


def report_flags(add):
    add("names", nargs="+", help=f"systems: folders under {EVAL_FOLDER}, or paths")
    add("--columns", nargs="+", help="one table with just these figures, whichever verbs they come from")
    add(
        "--plot",
        nargs="+",
        choices=sorted(PLOTS),
        default=[],
        help="RESCUE's Fig. 4 (alpha, num_candidates), 5 and 6 "
        "(sources), and accuracy by gold_position; PLOT.png beside --output, sources in each system's folder",
    )
    add("--output", help="also write the Markdown there")


def report(args):
    """Every plain figure of several systems side by side: a Markdown table a verb."""
    tables, systems = {}, {}
    for name in args.names:
        folder = pathlib.Path(name) if pathlib.Path(name).is_dir() else EVAL_FOLDER / name
        files = sorted(folder.glob("*.metrics.json"))
        if not files:
            raise UserError(f"{folder}: no *.metrics.json; evaluate {name} first")
        for file in files:
            document = json.loads(file.read_text())
            plain = {k: v for k, v in document["metrics"].items() if common.is_number(v)}
            verb = file.name.removesuffix(".metrics.json")
            tables.setdefault(verb, {})[document["name"]] = plain
            systems.setdefault(document["name"], {})[verb] = document | {"folder": folder}
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
        runtime.write_atomically(pathlib.Path(args.output), text + "\n")
    for plot in args.plot:
        PLOTS[plot](systems, (pathlib.Path(args.output).parent if args.output else EVAL_FOLDER) / f"{plot}.png")


def markdown(rows):
    """{row name: {column: number}} -> a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


VERBS = {
    "ranking": (ranking_flags, ranking),
    "nli": (nli_flags, nli),
    "multidoc-qa": (multidoc_qa_flags, multidoc_qa),
    "nll": (nll_flags, nll),
    "superni": (superni_flags, superni),
    "lmentry": (lmentry_flags, lmentry),
    "vicuna": (vicuna_flags, vicuna),
    "hh": (hh_flags, hh),
    "judge": (judge_flags, judge),
    "sheet": (sheet_flags, sheet),
    "report": (report_flags, report),
}


def main():
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    runtime.run_cli(main)
