"""rank --by label: what each candidate answers, and whether that is right."""

from collections import Counter

from collecting.answers import NLI_LABELS, has_answer, parse_nli
from common import UserError
from runtime import say


def rank_by_label(records, args):
    """Set every candidate's `label` and `correct`; what cannot be parsed is kept, with label null and correct false."""
    count = Counter()
    for record in records:
        if record.get("task") == "multidoc_qa":
            rank_by_answer(record, count, args.input)
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


def rank_by_answer(record, count, where):
    """Multi-document QA: a candidate is correct where it holds an answer; counts by the passage it came from."""
    if not isinstance(record.get("answers"), list) or not all(isinstance(a, str) for a in record["answers"]):
        raise UserError(f"{where}: record {record['id']!r} has no list of answers")
    for c in record["candidates"]:
        c["correct"] = has_answer(c["text"], record["answers"])
        group = f"{c['source']} from {c['anchor']}" if "anchor" in c else c["source"]
        count.update([(group, "total"), (group, "correct" if c["correct"] else "wrong")])
