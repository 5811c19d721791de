"""rank --by label: what each candidate answers, and whether that is right."""

from collections import Counter

from collecting.answers import NLI_LABELS, has_answer, parse_nli
from common import HUMAN, UserError, say


def rank_by_label(records, args):
    """Set every candidate's `label` and `correct`; what cannot be parsed is kept, with label null and correct false."""
    count = Counter()
    for record in records:
        if record.get("task") == "multidoc_qa":
            rank_by_answer(record, count, args.input)
            if args.mark_answers:
                for c in record["candidates"]:
                    c["text"] += f" #### {'Correct' if c['correct'] else 'Incorrect'}"
            yield record
            continue
        if record.get("label") not in NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(NLI_LABELS)}")
        for c in record["candidates"]:
            c["label"], well_formed = parse_nli(c["text"])
            c["correct"] = c["label"] == record["label"]
            outcome = "correct" if c["correct"] else "wrong" if c["label"] else "unparsed"
            count.update((c["source"], k) for k in ("total", "well-formed" if well_formed else "malformed", outcome))
        yield record
    kinds = ("total", "well-formed", "malformed", "correct", "wrong", "unparsed")
    kinds = [k for k in kinds if any(count[s, k] for s, _ in list(count))]
    for source in sorted({s for s, _ in count}):
        say(f"{source}: " + ", ".join(f"{count[source, kind]} {kind}" for kind in kinds))
        warn_of_form(source, count[source, "unparsed"], count[source, "total"], "can be read")


def warn_of_form(source, bad, total, what):
    """A loud line where fewer than a fifth of a source's responses are of use."""
    if 5 * bad > 4 * total:
        share = f"of the responses by {source} {1 - bad / total:.0%} {what}"
        say(f"WARNING: {share}: it was asked for another form, or cut")
        say("         short. Look at its texts; ask with --shots 3, a --stop, a larger --max_new_tokens")


def rank_by_answer(record, count, where):
    """Multi-document QA: a candidate is correct where it holds an answer; counts by the passage it came from."""
    if not isinstance(record.get("answers"), list) or not all(isinstance(a, str) for a in record["answers"]):
        raise UserError(f"{where}: record {record['id']!r} has no list of answers")
    for c in record["candidates"]:
        c["correct"] = has_answer(c["text"], record["answers"])
        group = f"{c['source']} from {c['anchor']}" if "anchor" in c else c["source"]
        count.update([(group, "total"), (group, "correct" if c["correct"] else "wrong")])


OF_SAMPLE = ("logprob", "num_tokens", "teacher", "finished")  # said of the text as it was sampled


def drop_malformed(records, min_candidates, per_source=None):
    """Yield the NLI records without the model responses that are not well-formed, except those that are left with
    fewer than min_candidates (RESCUE's released code: 5, the human response among them). The others get the human
    responses' form, one line: explanation #### Label. They are whole, and their likelihood is no longer known.
    per_source: of each model keep the first so many (the released code samples 6 and keeps 3)."""
    total, malformed, left_out = Counter(), Counter(), 0
    for record in records:
        kept, good = [], Counter()
        for c in record["candidates"]:
            label, well_formed = parse_nli(c["text"])
            good[c["source"]] += well_formed
            if c["source"] not in HUMAN and well_formed:
                explanation = " ".join(c["text"].strip("` \n").partition("####")[0].split())
                c = {k: v for k, v in c.items() if k not in OF_SAMPLE}
                c["text"] = f"{explanation} #### {label.capitalize()}"
            fits = not per_source or good[c["source"]] <= per_source
            kept += [c] * (c["source"] in HUMAN or well_formed and fits)
            if c["source"] not in HUMAN:
                total[c["source"]] += 1
                malformed[c["source"]] += not well_formed
        left_out += len(kept) < min_candidates
        if len(kept) >= min_candidates:
            yield record | {"candidates": kept}
    say("malformed and left out:", ", ".join(f"{malformed[s]} of {n} by {s}" for s, n in total.items()))
    say(f"left out: {left_out} prompts with fewer than --min_candidates {min_candidates}")
    for source, n in total.items():
        warn_of_form(source, malformed[source], n, "are well-formed")
