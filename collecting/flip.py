"""The verb flip: the opposite of each model response (RESCUE Sec. 5.1)."""

import argparse
import pathlib
from collections import Counter

from tqdm import tqdm

from collecting import asking
from collecting.answers import NLI_LABELS, Refusal, normalize_answer, one_label
from collecting.flags import api_flags, collected_flags
from collecting.journal import open_collected
from collecting.prompts import TEMPLATES, fill, read_template
from common import HUMAN, UserError, in_range, say

FLIP_AGAIN = "That is not what was asked for. Answer with one line: the sentence, rewritten to say the opposite."
LABEL_AGAIN = f"Answer with one word, the label that fits the explanation: {', '.join(NLI_LABELS)}."


def flip_flags(add):
    collected_flags(add, "sampled", "flipped")
    add("--replace", action="store_true", help="drop the model responses, as the released code does")
    add("--prompt_file", help="a template of your own for the rewriting, with {explanation}")
    add("--label_model", help="the model that labels the rewritten explanation (default: --model)")
    add("--label_base_url", help="its server; none: it runs here (default with no --label_model: --base_url)")
    add("--temperature", type=in_range(float, 0), default=1.0, help="of the rewriting; labels are greedy")
    api_flags(add, 128)


def flip(args):
    """Add the opposite of each model response (Sec. 5.1): one model rewrites its explanation, another labels that.

    The second reads the explanation in its context, after the record's own prompt. A response that has no
    "explanation #### label", or a rewriting or label that stays unusable after re-asking, adds no candidate.
    """
    args.label_base_url = args.label_base_url or (None if args.label_model else args.base_url)
    args.label_model = args.label_model or args.model
    records, journal = open_collected(args, "sampled", "flipped")
    if not any(c["source"] not in HUMAN for r in records for c in r.get("candidates", [])):
        raise UserError(f"{args.input}: no model response to flip: run sample or teacher first")
    template = read_template(args, TEMPLATES["flip"])
    labeler = argparse.Namespace(**vars(args) | {"model": args.label_model, "base_url": args.label_base_url})
    provenance = {"explanation_by": pathlib.Path(args.model).name, "label_by": pathlib.Path(labeler.model).name}
    source = "flip-{explanation_by}-{label_by}".format(**provenance)
    count, outcome = Counter(), Counter()
    todo = [r for r in records if not args.base_url or r["id"] not in journal.done]
    size = 16 * max(args.concurrency, args.batch_size)  # the work on so many prompts is lost where a run is killed
    for start in tqdm(range(0, len(todo), size), desc="flip"):
        chunk = todo[start : start + size]  # of a local model whole, as before a kill: batches, so draws, stay the same
        if all(r["id"] in journal.done for r in chunk):
            continue
        jobs, failed = [], set()  # what is to be flipped; ids that are left for another run
        for record in chunk:
            for c in (c for c in record.get("candidates", []) if c["source"] not in HUMAN):
                explanation = explanation_of(c["text"])
                jobs += [{"record": record, "flipped": c, "explanation": explanation}] if explanation else []
                outcome["malformed response"] += not explanation

        def ask(asked, field, jobs, prompts, read, again, temperature=0.0):
            """-> the jobs for which `read(job, answer)` makes something of an answer: that is the job's `field`."""
            options = {"temperature": temperature, "count": count}
            options["follow_up"] = lambda n, text: None if read(jobs[n], text) else again
            for n, responses, error in asking.complete(asked, prompts, **options):
                if error:
                    known = count[asked.model, asking.KNOWN] or journal.done  # else the request may be at fault
                    refused = isinstance(error, Refusal) and known
                    say(f"{jobs[n]['record']['id']} {'refused' if refused else 'failed'}: {error}")
                    outcome["refused"] += bool(refused)
                    failed.update([] if refused else [jobs[n]["record"]["id"]])
                else:
                    jobs[n][field] = read(jobs[n], responses[0]["text"])
                    outcome[f"unusable {field}"] += not jobs[n][field]
            return [job for job in jobs if job.get(field) and job["record"]["id"] not in failed]

        prompts = [fill(template, {"explanation": job["explanation"]}, "--prompt_file") for job in jobs]
        read = lambda job, text: clean_sentence(text, job["explanation"])  # noqa: E731
        jobs = ask(args, "rewriting", jobs, prompts, read, FLIP_AGAIN, args.temperature)
        contexts = [{"prompt": j["record"]["prompt"].rstrip(), "explanation": j["rewriting"]} for j in jobs]
        prompts = [fill(TEMPLATES["label"], context, "the template") for context in contexts]
        jobs = ask(labeler, "label", jobs, prompts, lambda _, text: one_label(text), LABEL_AGAIN)
        for record in (r for r in chunk if r["id"] not in failed | journal.done):
            old, new = record.get("candidates", []), []
            for job in (job for job in jobs if job["record"] is record):
                text = f"{job['rewriting']} #### {job['label'].capitalize()}"
                more = {"text": text, "source": source, "label": job["label"]} | provenance
                new.append(more | {"flip_of": job["flipped"]["source"]})
            outcome["labelled"] += len(new)
            kept = [c for c in old if not args.replace or c["source"] in HUMAN]
            journal.write([record | {"candidates": kept + new} if old else record])
    journal.finish()
    say("flipped:", ", ".join(f"{n} {what}" for what, n in outcome.items() if n) or "nothing")
    say(f"asked: {asking.counted(count) or 'nothing'}")


def explanation_of(text):
    """The explanation of a response, or "" where it has no `explanation #### label`."""
    explanation, mark, label = text.partition("####")
    return explanation.strip() if mark and one_label(label) else ""


def clean_sentence(text, original):
    """A model's rewriting, its quotation marks off -> the sentence, or None: not one line, a mark in it, unchanged."""
    text = text.strip().strip("\"'`“” ")
    same = normalize_answer(text) in ("", normalize_answer(original))
    return None if same or "\n" in text or "####" in text else text
