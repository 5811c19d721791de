"""What recipes do to records beyond the verbs of collect_candidates.py. Prints JSONL; `mixed`: a number.

python recipes/records.py only SOURCE RECORDS           the candidates of one source
python recipes/records.py answered RECORDS              the candidates that are not empty, and the records that have one
python recipes/records.py passages FROM TO ROWS         questions whose longest passage has FROM to TO words
python recipes/records.py under CANDIDATES PROMPTS      the candidates of one file under the prompts of another, by id
python recipes/records.py original RECORDS              the first candidate becomes the original response: not ranked
python recipes/records.py with_original FROM RECORDS    the original responses of FROM in front
python recipes/records.py key RECORDS                   rank by the answer key, ties by `logprob` a token
python recipes/records.py unranked RECORDS              no candidate is ranked
python recipes/records.py shuffled RECORDS              rank by chance, seeded by the id
python recipes/records.py length RECORDS                rank by words, the longer one first
python recipes/records.py mixed RECORDS                 how many have both a right and a wrong candidate
"""

import json
import pathlib
import random
import sys


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def candidates_of(path):
    return {record["id"]: record["candidates"] for record in read(path)}


def ranked(path, by, worth):
    """Rank what is not the original response by worth(candidate, a record's random numbers), the larger the better;
    equals share one rank."""
    for record in read(path):
        draw = random.Random(record["id"])
        others = [c for c in record["candidates"] if c["source"] != "reference"]
        values = [worth(c, draw) for c in others]
        for c, own in zip(others, values):
            c["rank"] = sum(other > own for other in values)
        yield record | {"ranked_by": by}


def only(source, path):
    for r in read(path):
        yield r | {"candidates": [c for c in r["candidates"] if c["source"] == source]}


def answered(path):
    for r in read(path):
        if candidates := [c for c in r["candidates"] if c["text"].strip()]:
            yield r | {"candidates": candidates}


def passages(low, high, path):
    return [r for r in read(path) if int(low) <= max(len(c["text"].split()) for c in r["ctxs"]) <= int(high)]


def under(candidates, path):
    found = candidates_of(candidates)
    return [r | {"candidates": found[r["id"]]} for r in read(path)]


def original(path):
    for record in read(path):
        first, *others = record["candidates"]
        first = {"text": first["text"], "source": "reference", "finished": first["finished"]}
        yield record | {"candidates": [first, *others]}


def with_original(originals, path):
    found = candidates_of(originals)
    for r in read(path):
        yield r | {"candidates": [found[r["id"]][0], *r["candidates"]], "ranked_by": "the answer key"}


def key(path):
    return ranked(path, "key", lambda c, _: (c["correct"], c["logprob"] / c["num_tokens"]))


def unranked(path):
    return [r | {"candidates": [c | {"rank": None} for c in r["candidates"]]} for r in read(path)]


def shuffled(path):
    return ranked(path, "shuffled", lambda c, draw: draw.random())


def length(path):
    return ranked(path, "length", lambda c, _: len(c["text"].split()))


def mixed(path):
    return [sum(len({c["correct"] for c in r["candidates"]}) > 1 for r in read(path))]


if __name__ == "__main__":
    verbs = (only, answered, passages, under, original, with_original, key, unranked, shuffled, length, mixed)
    if not (verb := [v for v in verbs if [v.__name__] == sys.argv[1:2]]):
        sys.exit(__doc__)
    for line in verb[0](*sys.argv[2:]):
        print(json.dumps(line, ensure_ascii=False))
