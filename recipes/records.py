"""What recipes do to records beyond the verbs of collect_candidates.py. Each prints JSONL, `mixed` and `best` a number.

python recipes/records.py only SOURCE RECORDS           without the candidates of other sources
python recipes/records.py answered RECORDS              without the empty candidates
python recipes/records.py passages FROM TO ROWS         questions whose longest passage has FROM to TO words
Tuna with a teacher that reads another prompt (tuna_multidoc.sh), and rankings that need no model:
python recipes/records.py under CANDIDATES PROMPTS      the candidates of one file under the prompts of another, by id
python recipes/records.py original RECORDS              the first candidate becomes the original response: not ranked
python recipes/records.py with_original FROM RECORDS    the original responses of FROM in front
python recipes/records.py mixed RECORDS                 how many have both a right and a wrong candidate
python recipes/records.py key RECORDS                   rank by the answer key, ties by the teacher's log p / tokens
python recipes/records.py shuffled RECORDS              rank by chance, seeded by the id
python recipes/records.py length RECORDS                rank by words, the longer one first
Of figures:
python recipes/records.py best FIGURE METRICS...        which *.metrics.json, from 0, has the largest figure

`key` wants `correct` (rank --by label) and `logprob` (rank --by logprob).
"""

import json
import pathlib
import random
import sys


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def candidates_of(path):
    return {r["id"]: r["candidates"] for r in read(path)}


def original(record):
    first, *others = record["candidates"]
    first = {"text": first["text"], "source": "reference", "finished": first["finished"]}
    return record | {"candidates": [first, *others]}


def ranked(record, worth, by):
    """Rank what is not the original response by worth(candidate), the larger the better."""
    values = {i: worth(c) for i, c in enumerate(record["candidates"]) if c["source"] != "reference"}
    ranks = {i: sum(other > value for other in values.values()) for i, value in values.items()}
    candidates = [c | {"rank": ranks[i]} if i in ranks else c for i, c in enumerate(record["candidates"])]
    return record | {"candidates": candidates, "ranked_by": by}


def by_chance(seed):
    draw = random.Random(seed)
    return lambda candidate: draw.random()


def best(figure, *paths):
    values = [json.loads(pathlib.Path(path).read_text())["metrics"][figure] for path in paths]
    return values.index(max(values))


def main(verb, *given):
    if verb == "best":
        print(best(*given))
        return
    *given, path = given
    records = read(path)
    if verb == "mixed":
        print(sum(len({c["correct"] for c in r["candidates"]}) > 1 for r in records))
        return
    if verb == "only":
        records = [r | {"candidates": [c for c in r["candidates"] if c["source"] == given[0]]} for r in records]
    elif verb == "answered":
        records = [r | {"candidates": [c for c in r["candidates"] if c["text"].strip()]} for r in records]
    elif verb == "passages":
        low, high = map(int, given)
        records = [r for r in records if low <= max(len(c["text"].split()) for c in r["ctxs"]) <= high]
    elif verb == "under":
        found = candidates_of(given[0])
        records = [r | {"candidates": found[r["id"]]} for r in records]
    elif verb == "original":
        records = map(original, records)
    elif verb == "with_original":
        found = candidates_of(given[0])
        records = [
            r | {"candidates": [found[r["id"]][0], *r["candidates"]], "ranked_by": "the answer key"} for r in records
        ]
    elif verb == "key":
        records = [ranked(r, lambda c: (c["correct"], c["logprob"] / c["num_tokens"]), verb) for r in records]
    elif verb == "shuffled":
        records = [ranked(r, by_chance(r["id"]), verb) for r in records]
    elif verb == "length":
        records = [ranked(r, lambda c: len(c["text"].split()), verb) for r in records]
    else:
        sys.exit(__doc__)
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
