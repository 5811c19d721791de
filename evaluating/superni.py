"""The verb superni: Super-NaturalInstructions from a clone: ROUGE-L and exact match."""

import json
import pathlib
import string

import pandas

import common
from collecting.flags import alpaca_flags, generation_flags
from collecting.prompts import alpaca_prompt, read_template
from collecting.sample import rouge_scorer
from common import UserError, in_range
from evaluating.shared import answer, mean, model_flags, num_words, write_metrics

SCORES = ["rouge_l", "exact_match"]


# fmt: off
def superni_flags(add):
    model_flags(add, "superni", None)
    add("--superni_dir", required=True, help="clone of allenai/natural-instructions: tasks/, splits/default/")
    add("--shots", type=in_range(int, 0, 2), default=0, help="positive examples, while they fit: 0 or 2")
    add("--max_instances", type=in_range(int, 1), default=100, help="the first of each task (the benchmark's: 100)")
    add("--tasks", nargs="+", help="these tasks instead of the 119 test tasks")
    alpaca_flags(add, "{instruction} (definition and examples) and {input}, or {prompt}, all of the benchmark's own")
    generation_flags(add, 128)
# fmt: on


def superni(args):
    """Greedy answers to the benchmark's test tasks: ROUGE-L and exact match against the best reference, x 100."""
    args.max_prompt_length = args.max_prompt_length or 1024
    root = pathlib.Path(args.superni_dir)
    args.input = str(root / "splits/default/test_tasks.txt")
    tokenizer, records = common.load_tokenizer(args.model), []
    for name in args.tasks or pathlib.Path(args.input).read_text().split():
        records += superni_records(root / f"tasks/{name}.json", tokenizer, args)
    verb = f"superni-{args.shots}shot" if args.shots else "superni"
    if rows := answer(args, verb, records):
        suffix = f"_{args.shots}shot" if args.shots else ""  # so that both settings stand in one table
        figures = {k + suffix * (k in SCORES): v for k, v in superni_metrics(rows).items()}
        write_metrics(args, verb, figures, {f"rouge_l{suffix}": {r["id"]: r["rouge_l"] for r in rows}})


def superni_records(file, tokenizer, args):
    """A task's file -> records with prompt, task, and the references in `answers`."""
    template, records = read_template(args, "{prompt}"), []
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
        definition, examples, instances = task["Definition"], task["Positive Examples"], task["Instances"]
        definition = definition if isinstance(definition, str) else definition[0]
        for i, instance in enumerate(instances[: args.max_instances]):
            outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
            if not outputs or not all(isinstance(text, str) for text in outputs):
                raise ValueError(f"instance {i} has no output")
            shots = examples[: args.shots]
            prompt = superni_prompt(definition, shots, instance["input"], tokenizer, args.max_prompt_length, template)
            records.append({"id": f"{file.stem}-{i}", "task": file.stem, "prompt": prompt, "answers": outputs})
        return records
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: not a task of Super-NaturalInstructions ({type(e).__name__}: {e})") from e


def superni_prompt(definition, examples, text, tokenizer, max_tokens, template="{prompt}"):
    """The benchmark's prompt, in a template for models that expect one; positive examples are added one by one while
    all of it stays within max_tokens."""

    def closed(x):  # a full stop where final punctuation lacks
        return x.strip() + ("" if x.strip()[-1:] in string.punctuation and x.strip() else ".")

    def whole(head):
        fields = {"prompt": head + tail, "instruction": head.strip(), "input": closed(text)}
        return alpaca_prompt(template, fields, "--prompt_file")

    head = f"Definition: {closed(definition)}\n\n"
    tail = f"Now complete the following example -\nInput: {closed(text)}\nOutput: "
    for k, example in enumerate(examples, 1):
        shot = f"Positive Example {k} -\nInput: {closed(example['input'])}\nOutput: {closed(example['output'])}\n\n"
        if len(common.prompt_ids(tokenizer, whole(head + shot))) > max_tokens:
            break
        head += shot
    return whole(head)


def exact_form(text):
    """Lower case, no punctuation, single spaces; articles stay, unlike SQuAD's."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def superni_metrics(rows):
    """Mean over instances x 100 of the maximum over references; the same by task."""
    score = rouge_scorer(use_stemmer=True).score
    for row in rows:
        row["rouge_l"] = 100 * max(score(a, row["text"])["rougeL"].fmeasure for a in row["answers"])
        row["exact_match"] = 100.0 * any(exact_form(a) == exact_form(row["text"]) for a in row["answers"])
    frame = pandas.DataFrame(rows)
    by_task = frame.groupby("task", sort=False)[SCORES].mean().to_dict("index")
    figures = frame[SCORES].mean().to_dict() | {"mean_words": mean(map(num_words, rows))}
    return figures | {"tasks": len(by_task), "prompts": len(rows), "by_task": by_task}
