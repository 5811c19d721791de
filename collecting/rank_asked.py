"""The rankers that ask a stronger model: rank --by gpt (RESCUE) and contextual (Tuna)."""

import random
import re
from collections import Counter

import common
from collecting import asking
from collecting.prompts import TEMPLATES, alpaca_prompt, fill, read_template, task_of
from common import HUMAN, UserError, say


def ask_rankings(records, args, journal, prompts, read, again):
    """Ask for a ranking of each record -> yields (index, what read(index, reply) makes of it, the reply); None where
    read raises ValueError after re-asking with `again`, which names its {reason}. Says how many were read."""
    count = Counter()

    def verdict(i, text):
        try:
            return read(i, text), None
        except ValueError as e:
            return None, again.format(reason=e)

    options = {"follow_up": lambda i, text: verdict(i, text)[1]}
    for i, replies in asking.ask_records(args, journal, [r["id"] for r in records], prompts, **options):
        found = verdict(i, replies[0]["text"])[0]
        count["unparsed" if found is None else "parsed"] += 1
        yield i, found, replies[0]["text"]
    say("replies:", ", ".join(f"{n} {kind}" for kind, n in sorted(count.items())) or "none")


def rank_by_gpt(records, args, journal):
    """Set every candidate's `rank` by a stronger model: 0 for the human response, which it is shown as the reference
    and does not rank, then the others, those with the human label first (RESCUE Sec. 4); null for all others where it
    gave no ranking after re-asking.

    The responses are shown in a seeded random order: models prefer some places. What the journal holds is not yielded.
    """
    records, template, orders, prompts = list(records), read_template(args, TEMPLATES["gpt"]), [], []
    for r in records:
        candidates = r["candidates"]
        humans = [c for c in candidates if c["source"] in HUMAN]
        others = [i for i, c in enumerate(candidates) if c["source"] not in HUMAN]
        if not humans or not others:
            raise UserError(f"{args.input}: record {r['id']!r}: --by gpt needs a human response and another one")
        orders.append(random.Random(f"{args.seed}-{r['id']}").sample(others, len(others)))
        shown = [f"Response {k}: {candidates[i]['text']}" for k, i in enumerate(orders[-1], 1)]
        fields = {"n": str(len(shown)), "example": example_ranking(len(shown)), "responses": "\n\n".join(shown)}
        fields |= {"prompt": r["prompt"], "reference": humans[0]["text"], "label": r.get("label") or ""}
        prompts.append(fill(template, fields, "--prompt_file"))
    read = lambda i, text: parse_ranking(text, len(orders[i]))  # noqa: E731
    for i, ranking, _ in ask_rankings(records, args, journal, prompts, read, "That could not be read. {reason}"):
        for c in records[i]["candidates"]:
            c["rank"] = 0 if c["source"] in HUMAN else None
        for place, number in enumerate(ranking or (), 1):
            records[i]["candidates"][orders[i][number - 1]]["rank"] = place
        yield records[i]


def example_ranking(n):
    return " > ".join(map(str, [*range(2, n + 1), 1]))


def parse_ranking(text, n):
    """The numbers 1..n, best first, from an answer such as `2 > 1 > 3` -> list. Raises ValueError.

    Strict: the last line that is nothing but numbers joined by > or , (`Ranking:`, `Response` and brackets may stand
    around them) must name every response once. Ties (=), gaps, doubles, and rankings inside a sentence are refused.
    """
    lines = [re.sub(r"(?i)ranking\s*:|response|[\[\]()*`.]", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if re.fullmatch(r"\d+(\s*[>,]\s*\d+)*", line)]
    numbers = [int(x) for x in re.findall(r"\d+", lines[-1])] if lines else []
    if sorted(numbers) != list(range(1, n + 1)):
        raise ValueError(f"Answer with one line that has all {n} responses once, best first: {example_ranking(n)}")
    return numbers


CONTEXTUAL_AGAIN = """That could not be read: {reason}. Reply once more in the form asked for, from first line to last:
a score for every response that is ranked, and the ranking in a line of its own at the end."""


def rank_by_contextual(records, args, journal):
    """Set `rank` and `score` as a stronger model sees them, reading all responses at once (Tuna Sec. 2.3, Table 9).

    Responses are numbered 0 to n - 1 in a seeded random order (the print is silent about the order), the ranker's own
    is n. The rank goes by the sum of its three scores, ties by the ranking it states. The original response is shown
    only with --rank_original; repetitions get rank null. So do all responses where the reply could not be read after
    re-asking; the record then has the reply as `unparsed`. What the journal holds is not yielded.
    """
    template, asked, orders = read_template(args, TEMPLATES["contextual"]), [], []
    by = {"ranked_by": common.run_name(args.model)}
    for record in records:
        candidates = record["candidates"]
        shown = [i for i, c in enumerate(candidates) if args.rank_original or c["source"] not in HUMAN]
        if len({candidates[i]["text"].strip() for i in shown}) < 2:  # nothing to rank
            yield record | {"candidates": [c | {"rank": None} for c in candidates]} | by
        else:
            random.Random(f"{args.seed}-{record['id']}").shuffle(shown)
            asked.append(record)
            orders.append(shown)
    where = args.prompt_file or "the template"
    prompts = [contextual_prompt(template, record, shown, where) for record, shown in zip(asked, orders)]
    read = lambda i, text: parse_contextual(text, len(orders[i]))  # noqa: E731
    for i, verdict, reply in ask_rankings(asked, args, journal, prompts, read, CONTEXTUAL_AGAIN):
        record = asked[i] | {"candidates": [c | {"rank": None} for c in asked[i]["candidates"]]} | by
        ranking, scores = verdict or ((), {})
        texts = set()
        for k in (k for k in ranking if k < len(orders[i])):  # the last is the ranker's own
            c = record["candidates"][orders[i][k]]
            if c["text"].strip() not in texts:  # of the same text twice only the better placed is ranked
                c |= {"rank": len(texts)} | ({"score": scores[k]} if scores else {})
                texts.add(c["text"].strip())
        yield record if verdict else record | {"unparsed": reply}


def contextual_prompt(template, record, shown, where):
    """The template with {task}, or {instruction} and {input} apart (Table 9; below a line --- for records without), or
    the record's {prompt}; all {responses} or each {response_0} ..., their {count}, the number of the {last} and that of
    the {reference}."""
    texts = [record["candidates"][i]["text"] for i in shown]
    fields = {f"response_{k}": text for k, text in enumerate(texts)}
    fields["responses"] = "\n\n".join(f"Response {k}:\n{text}" for k, text in enumerate(texts))
    fields |= {"count": str(len(texts)), "last": str(len(texts) - 1), "reference": str(len(texts))}
    fields |= {"task": task_of(record), "prompt": record["prompt"], "input": record.get("input") or ""}
    fields |= {"instruction": record.get("instruction") or record["prompt"]}
    return alpaca_prompt(template, fields, where)


def parse_contextual(reply, n):
    """A ranker's reply about responses 0..n-1, its own being n -> (their numbers, best first, by score, ties as stated;
    {number: score}).

    Reads our form and Table 9's: `k: 5 4 5` or `Response k: [14]` a line, then `Ranking: 2 > 0` or `rank: [2, 0]`.
    Emphasis, quotation marks, carriage returns, words around the form and other cases are let pass. What is not ranked
    is a repetition; a line `Duplicates:` must name it. A reply without any score is ranked as stated: the released code
    reads the ranking alone. ValueError with the reason where the ranking is missing, has a response without a score, or
    contradicts the duplicates.
    """
    lines = [re.sub(r"[*`#\"'‘’“”]+|^\s*[-•]\s+", "", line).strip() for line in reply.splitlines()]
    end, ranking = read_ranking(lines)
    lines = lines[:end]
    scores = {}  # the last line that gives a number's, below the heading if there is one
    heading = [i for i, line in enumerate(lines) if re.fullmatch(r"(?i)(scores|ratings)\s*:?", line)]
    for line in lines[heading[-1] if heading else 0 :]:
        if (m := SCORE_LINE.match(line)) and (score := read_score(m[2])) is not None:
            scores[int(m[1])] = score
    if len(set(ranking)) < len(ranking) or not set(ranking) <= set(range(n + 1)):
        raise ValueError("the ranking names a response twice, or one that is not there")
    if scores and (unscored := sorted(set(ranking) - scores.keys())):
        raise ValueError(f"response {unscored[0]} has no score (three numbers from 0 to 5, or their sum)")
    repeated, duplicates = set(range(n)) - set(ranking), [m[1] for m in map(DUPLICATES.match, lines) if m]
    named = {int(k) for k in re.findall(r"\d+", duplicates[-1])} if duplicates else repeated
    if not repeated <= named or bool(repeated) != bool(named):
        raise ValueError("the ranking leaves out a response, or holds one that repeats another")
    return sorted(ranking, key=lambda k: -scores[k]) if scores else ranking, scores


SCORE_LINE = re.compile(r"(?i)\|?\s*(?:response\s+)?(\d+)\s*(?:overall|total)?\s*(?:score|rating)?\s*[:.)|=-]\s*(.*)$")
ASPECTS = r"""(?ix)\b(level\ of|relevance|details?|justification|accuracy|clarity|overall|total|sum|scores?|and)\b
    | /\s*15\b | \bout\ of\ (5|15)\b"""
RANKING_LINE = re.compile(r"(?i)(?:.*\b)?rank(?:ing)?(?: order)?(?: is| would be)?\s*[:=](.*)")
DUPLICATES = re.compile(r"(?i)duplicates?(?: responses?)?\s*:(.*)")
NUMBERS = re.compile(r"\d+(?:(?:\s*(?:[>,;≥→]|>=|->)\s*|\s+)\d+)*\s*(?:$|[.;(])")


def read_ranking(lines):
    """-> (index of the last line with `ranking:` or `rank:` and numbers, these numbers, best first). The numbers may
    stand on the next line."""
    heads = [(i, m[1].strip()) for i, m in enumerate(map(RANKING_LINE.match, lines)) if m]
    if not heads:
        raise ValueError("there is no line with the ranking")
    for i, payload in reversed(heads):
        payload = payload or next(filter(None, lines[i + 1 :]), "")
        inner = re.match(r"\[([^\]]*)\]", payload)
        if m := NUMBERS.match(re.sub(r"(?i)responses?|[\[\]]", " ", inner[1] if inner else payload).strip()):
            return i, [int(k) for k in re.findall(r"\d+", m[0])]
    raise ValueError("the ranking is not numbers, best first")


def read_score(text):
    """What stands behind a response's number -> the sum of three ratings, or None where that is no score."""
    inner = re.match(r"\[([^\]]*)\]", text)
    inner = re.sub(ASPECTS, " ", inner[1] if inner else text)
    if len(re.findall(r"\d\s*/\s*5\b", inner)) == 3:  # 3/5 4/5 5/5; but 3/4/5 are three ratings
        inner = re.sub(r"/\s*5\b", " ", inner)
    numbers = re.findall(r"\d+(?:\.\d+)?", inner) if re.fullmatch(r"[\d\s,+/=:;|().]*", inner) else []
    values = [float(v) if "." in v else int(v) for v in numbers]
    if len(values) in (3, 4) and max(values[:3]) <= 5:  # a fourth is their sum, which is made here
        return sum(values[:3])
    return values[0] if len(values) == 1 and values[0] <= 15 else None
