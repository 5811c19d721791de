"""rank --by gpt: a stronger model, asked for its ranking (RESCUE)."""

import random
import re
from collections import Counter

from collecting import asking
from collecting.prompts import GPT_TEMPLATE, fill, read_template
from common import HUMAN, UserError, say

RANK_AGAIN = "That could not be read. Answer with one line naming each of the {n} responses once, best first: {example}"


def rank_by_gpt(records, args, journal):
    """Set every candidate's `rank` by a stronger model: 0 for the human response, which it is shown as the reference
    and does not rank, then the others, those with the human label first (RESCUE Sec. 4); null for all others where it
    gave no ranking after re-asking.

    The responses are shown in a seeded random order: models prefer some places. What the journal holds is not yielded.
    """
    records, template = list(records), read_template(args, GPT_TEMPLATE)
    orders, prompts, count = [], [], Counter()
    for r in records:
        human = next((i for i, c in enumerate(r["candidates"]) if c["source"] in HUMAN), None)
        others = [i for i, c in enumerate(r["candidates"]) if c["source"] not in HUMAN]
        if human is None or not others:
            raise UserError(f"{args.input}: record {r['id']!r}: --by gpt needs a human response and another one")
        orders.append(random.Random(f"{args.seed}-{r['id']}").sample(others, len(others)))
        shown = [f"Response {k}: {r['candidates'][i]['text']}" for k, i in enumerate(orders[-1], 1)]
        fields = {"n": str(len(shown)), "example": example_ranking(len(shown)), "responses": "\n\n".join(shown)}
        fields |= {"prompt": r["prompt"], "reference": r["candidates"][human]["text"], "label": r.get("label") or ""}
        prompts.append(fill(template, fields, "--prompt_file"))

    def unranked(i, text):
        n = len(orders[i])
        return None if parse_ranking(text, n) else RANK_AGAIN.format(n=n, example=example_ranking(n))

    ids = [r["id"] for r in records]
    for i, responses, error in asking.ask_records(args, journal, ids, prompts, follow_up=unranked):
        if error:
            continue
        ranking = parse_ranking(responses[0]["text"], len(orders[i]))
        count["ranked" if ranking else "unranked"] += 1
        for c in records[i]["candidates"]:
            c["rank"] = 0 if c["source"] in HUMAN else None
        for place, number in enumerate(ranking or (), 1):
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
