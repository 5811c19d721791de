"""The rankers that run no model: rank --by label (RESCUE), and --by probabilistic (Tuna)."""

from collections import Counter, defaultdict

from collecting.answers import NLI_LABELS, has_answer, parse_nli
from common import HUMAN, UserError, length_normalized, say

OF_SAMPLE = ("logprob", "num_tokens", "teacher", "finished")  # said of the text as it was sampled


def rank_by_label(records, args):
    """Set every candidate's `label` and `correct`. What cannot be parsed is kept, with label null and correct false.

    Multi-document QA has no label: a candidate is correct where it holds an answer. It is counted by its passage.
    """
    count = defaultdict(Counter)  # source -> how many of each kind
    for record in records:
        qa = record.get("task") == "multidoc_qa"
        if not (isinstance(record.get("answers"), list) if qa else record.get("label") in NLI_LABELS):
            wanted = "list of answers" if qa else f"label of {', '.join(NLI_LABELS)}"
            raise UserError(f"{args.input}: record {record['id']!r} has no {wanted}")
        for c in record["candidates"]:
            if qa:
                c["correct"], kinds = has_answer(c["text"], record["answers"]), {}
                c["text"] += f" #### {'Correct' if c['correct'] else 'Incorrect'}" * args.mark_answers
            else:
                c["label"], well_formed = parse_nli(c["text"])
                c["correct"] = c["label"] == record["label"]
                kinds = {"well-formed": well_formed, "unparsed": not c["label"]}
            source = f"{c['source']} from {c['anchor']}" if "anchor" in c else c["source"]
            count[source].update({"total": 1, "correct": c["correct"]} | kinds)
        yield record
    for source, kinds in sorted(count.items()):
        say(f"{source}: " + ", ".join(f"{n:d} {kind}" for kind, n in kinds.items()))


def drop_malformed(records, min_candidates, per_source=None):
    """Yield the NLI records without the model responses that are not well-formed, except those that are left with
    fewer than min_candidates (RESCUE's released code: 5, the human response among them). The others get the human
    responses' form, one line: explanation #### Label. They are whole, and their likelihood is no longer known.
    per_source: of each model keep the first so many (the released code samples 6 and keeps 3)."""
    total, good, left_out = Counter(), Counter(), 0
    for record in records:
        kept, of_model = [], Counter()
        for c in record["candidates"]:
            if c["source"] in HUMAN:
                kept.append(c)
                continue
            label, well_formed = parse_nli(c["text"])
            total[c["source"]] += 1
            of_model[c["source"]] += well_formed
            if well_formed and of_model[c["source"]] <= (per_source or len(record["candidates"])):
                explanation = " ".join(c["text"].strip("` \n").partition("####")[0].split())
                text = {"text": f"{explanation} #### {label.capitalize()}"}
                kept.append({k: v for k, v in c.items() if k not in OF_SAMPLE} | text)
        good += of_model
        left_out += len(kept) < min_candidates
        if len(kept) >= min_candidates:
            yield record | {"candidates": kept}
    say("well-formed:", ", ".join(f"{good[s]} of {n} by {s}" for s, n in total.items()))
    say(f"left out: {left_out} prompts with fewer than --min_candidates {min_candidates}")


def rank_by_probabilistic(records, args):
    """Set `rank` by the teacher's likelihood, logprob / num_tokens ** --length_penalty (Tuna Eq. 3).

    It is null where the likelihood is not known; `ranked_by` is the teacher. tuna.py --stage probabilistic does this
    by itself; here it is for Table 4 and for mixtures.
    """
    for record in records:
        teachers, scores = set(), []
        for c in record["candidates"]:
            known = "logprob" in c and "num_tokens" in c
            teachers |= {c.get("teacher", "a teacher not named")} if known else set()
            scores.append(length_normalized(c["logprob"], c["num_tokens"], args.length_penalty) if known else None)
        if len(teachers) != 1:
            found = f"log-probabilities of {' and '.join(sorted(teachers))}" if teachers else "no logprob"
            raise UserError(f"{args.input}: record {record['id']!r} has {found}; rank --by logprob adds one teacher's")
        yield record | {"candidates": with_ranks(record["candidates"], scores), "ranked_by": teachers.pop()}


def with_ranks(candidates, scores):
    """The candidates, each with its `rank`: 0 has the highest score, equal ones share it, null has no score."""
    ranks = [None if s is None else sum(x > s for x in scores if x is not None) for s in scores]
    return [c | {"rank": rank} for c, rank in zip(candidates, ranks)]
