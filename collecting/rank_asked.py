"""rank --by gpt and contextual: a stronger model, asked for its ranking (RESCUE, Tuna)."""

import pathlib
import random
import re
from collections import Counter

import common
import runtime
from collecting import asking
from collecting.prompts import CONTEXTUAL_TEMPLATE, GPT_TEMPLATE, fill, read_template
from runtime import say

RANK_AGAIN = "That could not be read. Answer with one line naming each of the {n} responses once, best first: {example}"


def rank_by_gpt(records, args):
    """Set every candidate's `rank` (0 the best) by a stronger model's ranking; null where it gave none after re-asking.

    The responses are shown in a seeded random order: models prefer some places.
    """
    records, template = list(records), read_template(args, GPT_TEMPLATE)
    orders, prompts, count = [], [], Counter()
    for r in records:
        n = len(r["candidates"])
        orders.append(random.Random(f"{args.seed}-{r['id']}").sample(range(n), n))
        shown = [f"Response {k}: {r['candidates'][i]['text']}" for k, i in enumerate(orders[-1], 1)]
        fields = {"n": str(n), "example": example_ranking(n), "prompt": r["prompt"], "responses": "\n\n".join(shown)}
        prompts.append(fill(template, fields, "--prompt_file"))

    def unranked(i, text):
        n = len(orders[i])
        return None if parse_ranking(text, n) else RANK_AGAIN.format(n=n, example=example_ranking(n))

    for i, responses, error in asking.complete(args, prompts, follow_up=unranked):
        if error:
            count[error] += 1
            continue
        ranking = parse_ranking(responses[0]["text"], len(orders[i]))
        count["ranked" if ranking else "unranked"] += 1
        for c in records[i]["candidates"]:
            c["rank"] = None
        for place, number in enumerate(ranking or ()):
            records[i]["candidates"][orders[i][number - 1]]["rank"] = place
        yield records[i]
    say("by gpt:", ", ".join(f"{n} {what}" for what, n in count.items()))


def example_ranking(n):
    return " > ".join(map(str, [*range(2, n + 1), 1]))


def parse_ranking(text, n):
    """The numbers 1..n, best first, from an answer such as `2 > 1 > 3` -> list, or None.

    Strict: the last line that is nothing but numbers joined by > or , (`Ranking:`, `Response` and brackets may stand
    around them) must name every response once. Ties (=), gaps, doubles, and rankings inside a sentence are refused.
    """
    lines = [re.sub(r"(?i)ranking\s*:|response|[\[\]()*`.]", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if re.fullmatch(r"\d+(\s*[>,]\s*\d+)*", line)]
    numbers = [int(x) for x in re.findall(r"\d+", lines[-1])] if lines else []
    return numbers if sorted(numbers) == list(range(1, n + 1)) else None


CONTEXTUAL_REPLY = re.compile(
    r"^Type: *(?P<type>open|closed)[ .]*\n+Reference:(?P<reference>.*?)\n+Duplicates: *(?P<duplicates>[^\n]*?)[ .]*\n+"
    r"Ratings: *\n+(?P<ratings>(?: *\d+:[ \d]+\n+)+)Ranking: *(?P<ranking>\d+(?: *> *\d+)*)[ .]*$",
    re.MULTILINE | re.DOTALL,
)


def parse_contextual(reply, n):
    """A ranker's reply about responses 1..n -> {type, reference, repeated, ratings {number: [3]}, ranking [numbers]}.

    0 is the ranker's own response. Strict: ValueError with the reason unless every field stands there once and ratings
    and ranking hold exactly the numbers that repeat no earlier response. Text before and after the form is let pass.
    """
    for field in ("Type", "Reference", "Duplicates", "Ratings", "Ranking"):
        if (times := len(re.findall(rf"^{field}:", reply, re.MULTILINE))) != 1:
            raise ValueError(f"{field}: stands there {times} times")
    found = CONTEXTUAL_REPLY.search(reply)
    if not found:
        raise ValueError("not in the form asked for")
    groups = [] if found["duplicates"].lower() == "none" else found["duplicates"].split(",")
    if not all(re.fullmatch(r" *\d+(?: *= *\d+)+ *", group) for group in groups):
        raise ValueError("duplicates are no groups of numbers")
    groups = [sorted(map(int, group.split("="))) for group in groups]
    repeated = [i for group in groups for i in group[1:]]
    members = [i for group in groups for i in group]
    if len(set(members)) < len(members) or not set(members) <= set(range(1, n + 1)):
        raise ValueError("duplicates name a response twice, or one that is not there")
    rows = [line.replace(":", " ").split() for line in found["ratings"].splitlines() if line.strip()]
    ratings = {int(number): list(map(int, values)) for number, *values in rows}
    ranking = [int(i) for i in found["ranking"].split(">")]
    if len(ratings) < len(rows) or not all(len(v) == 3 and max(v) <= 5 for v in ratings.values()):
        raise ValueError("ratings are not three numbers from 0 to 5 for each response once")
    asked = sorted({*range(n + 1)} - {*repeated})
    if sorted(ranking) != asked or sorted(ratings.keys() - repeated) != asked:
        raise ValueError("ratings or ranking leave out, repeat, or invent a response")
    return {
        "type": found["type"],
        "reference": found["reference"].strip(),
        "repeated": repeated,
        "ratings": ratings,
        "ranking": ranking,
    }


def rank_by_contextual(records, args):
    """Set `rank` (and `ratings`) as a stronger model sees them, reading all responses at once (Tuna Sec. 2.3, Table 9).

    The original response is shown only with --rank_original; repetitions get rank null. A reply that cannot be parsed
    leaves every rank null and stays in the record as `unparsed_reply`; a request that failed is made again next time.
    """
    template, count, asked, prompts = read_template(args, CONTEXTUAL_TEMPLATE), Counter(), [], []
    for record in records:
        texts = {}  # text -> its first candidate
        for i, c in enumerate(record["candidates"]):
            if args.rank_original or c["source"] not in common.HUMAN:
                texts.setdefault(c["text"].strip(), i)
        shown = random.Random(f"{args.seed}-{record['id']}").sample(list(texts.values()), len(texts))
        if len(shown) < 2:
            count["all the same"] += 1
            yield record | {"candidates": contextual_candidates(record["candidates"], shown, None, args)}
            continue
        responses = [f"Response {k}:\n{record['candidates'][i]['text']}" for k, i in enumerate(shown, 1)]
        fields = {"count": str(len(shown)), "responses": "\n\n".join(responses)}
        fields["task"] = record.get("instruction") or record["prompt"]
        asked.append((record, shown))
        prompts.append(fill(template, fields, args.prompt_file or "the template"))
    for number, replies, error in asking.complete(args, prompts):
        (record, shown), verdict = asked[number], None
        if replies is None:
            count["failed"] += 1
            say(f"record {record['id']!r}: {error}")
            continue
        try:
            verdict = parse_contextual(replies[0]["text"], len(shown))
            count.update(["parsed", verdict["type"]] + ["repeated"] * len(verdict["repeated"]))
        except ValueError as e:
            record = record | {"unparsed_reply": replies[0]["text"]}
            count.update(["unparsed", f"unparsed ({e})"])
        by = {"ranked_by": runtime.run_name(args.model)}
        yield record | {"candidates": contextual_candidates(record["candidates"], shown, verdict, args)} | by
    say("replies:", ", ".join(f"{n} {kind}" for kind, n in sorted(count.items())) or "none asked for")


def contextual_candidates(candidates, shown, verdict, args):
    """The candidates with the verdict's ranks and ratings; response k + 1 of the verdict is candidate shown[k]."""
    candidates = [c | {"rank": None} for c in candidates]
    if verdict is None:
        return candidates
    ranking = [i for i in verdict["ranking"] if i > 0 or args.keep_reference]
    for place, i in enumerate(ranking):
        if i == 0:
            candidates.append({"text": verdict["reference"], "source": pathlib.Path(args.model).name})
        c = candidates[shown[i - 1] if i else -1]
        c |= {"rank": place, "ratings": verdict["ratings"][i]}
    return candidates
