"""The verb flip: the opposite of each human response (RESCUE Sec. 5.1)."""

import argparse
import pathlib
from collections import Counter

from tqdm import tqdm

import common
from collecting import asking
from collecting.answers import NLI_LABELS, normalize_answer, one_label
from collecting.flags import api_flags, collected_flags
from collecting.journal import open_collected
from collecting.prompts import FLIP_TEMPLATE, LABEL_TEMPLATE, fill, read_template
from common import in_range
from runtime import say

FLIP_AGAIN = "That is not what was asked for. Answer with one line: the sentence, rewritten to say the opposite."
LABEL_AGAIN = f"Answer with one word, the label that fits the explanation: {', '.join(NLI_LABELS)}."


def flip_flags(add):
    collected_flags(add, "train", "flipped")
    add("--prompt_file", help="a template of your own for the rewriting, with {explanation}")
    add("--label_model", help="the model that labels the rewritten explanation (default: --model)")
    add("--label_base_url", help="its server; none: it runs here (default with no --label_model: --base_url)")
    add("--temperature", type=in_range(float, 0), default=1.0, help="of the rewriting; labels are greedy")
    api_flags(add, 128)


def flip(args):
    """Add the opposite of each human response (Sec. 5.1): one model rewrites its explanation, another labels that.

    The second reads the explanation in its context, after the record's own prompt. A human response that has no
    "explanation #### label", or a rewriting or label that stays unusable after re-asking, adds no candidate.
    """
    args.label_base_url = args.label_base_url if args.label_model else args.base_url
    args.label_model = args.label_model or args.model
    records, journal = open_collected(args, "train", "flipped")
    template = read_template(args, FLIP_TEMPLATE)
    labeler = argparse.Namespace(**vars(args) | {"model": args.label_model, "base_url": args.label_base_url})
    provenance = {"explanation_by": pathlib.Path(args.model).name, "label_by": pathlib.Path(labeler.model).name}
    source = "flip-{explanation_by}-{label_by}".format(**provenance)
    count, outcome = Counter(), Counter()
    todo = [r for r in records if r["id"] not in journal.done]
    size = 16 * max(args.concurrency, args.batch_size)  # the rewritings of so many are lost where a run is killed
    for start in tqdm(range(0, len(todo), size), desc="flip"):
        chunk = todo[start : start + size]
        explanations = {r["id"]: human_explanation(r) for r in chunk}
        outcome["malformed human response"] += sum(e is None for e in explanations.values())
        journal.write(r for r in chunk if explanations[r["id"]] is None)
        jobs = [r for r in chunk if explanations[r["id"]] is not None]
        flipped = {}
        prompts = [fill(template, {"explanation": explanations[r["id"]]}, "--prompt_file") for r in jobs]

        def unlike(i, text):
            return None if clean_sentence(text, explanations[jobs[i]["id"]]) else FLIP_AGAIN

        options = {"temperature": args.temperature, "follow_up": unlike, "count": count}
        for i, responses, error in asking.complete(args, prompts, **options):
            sentence = responses and clean_sentence(responses[0]["text"], explanations[jobs[i]["id"]])
            if sentence:
                flipped[jobs[i]["id"]] = sentence
            elif error:
                say(f"{jobs[i]['id']} failed: {error}")
            else:
                outcome["unusable rewriting"] += 1
                journal.write([jobs[i]])
        jobs = [r for r in jobs if r["id"] in flipped]
        contexts = [{"prompt": r["prompt"].rstrip(), "explanation": flipped[r["id"]]} for r in jobs]
        prompts = [fill(LABEL_TEMPLATE, context, "the template") for context in contexts]

        def labeled(i, text):
            return None if one_label(text) else LABEL_AGAIN

        for i, responses, error in asking.complete(labeler, prompts, follow_up=labeled, count=count):
            label = responses and one_label(responses[0]["text"])
            outcome["unusable label" if responses and not label else "labelled" if label else "failed"] += 1
            if error:
                say(f"{jobs[i]['id']} failed: {error}")
                continue
            outcome["label differs from the human one"] += bool(label) and label != jobs[i]["label"]
            text = f"{flipped[jobs[i]['id']]} #### {(label or '').capitalize()}"
            more = [{"text": text, "source": source, "label": label} | provenance] if label else []
            journal.write([jobs[i] | {"candidates": jobs[i]["candidates"] + more}])
    journal.finish()
    say("flipped:", ", ".join(f"{n} {what}" for what, n in outcome.items()))


def human_explanation(record):
    """The explanation of a record's first human response, or None where that has no `explanation #### label`."""
    texts = [c["text"] for c in record.get("candidates", []) if c["source"] in common.HUMAN]
    explanation, mark, label = texts[0].partition("####") if texts else ("", "", "")
    return explanation.strip() if explanation.strip() and mark and one_label(label) else None


def clean_sentence(text, original):
    """A model's rewriting, its quotation marks off -> the sentence, or None: not one line, a mark in it, unchanged."""
    text = text.strip().strip("\"'`“” ")
    same = normalize_answer(text) in ("", normalize_answer(original))
    return None if same or "\n" in text or "####" in text else text
