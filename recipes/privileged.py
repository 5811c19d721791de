"""What tuna_multidoc.sh does to records: a teacher that reads another prompt, and rankings that need no model.

python recipes/privileged.py under PROMPTS CANDIDATES   the candidates of one file under the prompts of another, by id
python recipes/privileged.py original RECORDS           the first candidate becomes the original response: not ranked
python recipes/privileged.py key RECORDS                rank by the answer key, ties by the teacher's log p / tokens
python recipes/privileged.py shuffled RECORDS           rank by chance, seeded by the id
python recipes/privileged.py length RECORDS             rank by words, the longer one first

Each prints JSONL. `key` wants `correct` (rank --by label) and `logprob` (rank --by logprob) on what it ranks.
"""

import json
import pathlib
import random
import sys


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def original(record):
    first, *others = record["candidates"]
    first = {"text": first["text"], "source": "reference", "finished": first["finished"]}
    return record | {"candidates": [first, *others]}


def ranked(record, worth, by):
    """Rank what is not the original response by worth(candidate), the larger the better."""
    candidates = [c for c in record["candidates"] if c["source"] != "reference"]
    values = {id(c): worth(c) for c in candidates}
    ranks = {i: sum(other > value for other in values.values()) for i, value in values.items()}
    candidates = [c | {"rank": ranks[id(c)]} if id(c) in ranks else c for c in record["candidates"]]
    return record | {"candidates": candidates, "ranked_by": by}


def main(verb, path, other=None):
    records = read(path)
    if verb == "under":
        candidates = {r["id"]: r["candidates"] for r in read(other)}
        records = [r | {"candidates": candidates[r["id"]]} for r in records]
    for record in records:
        chance = random.Random(record["id"])
        worth = {
            "key": lambda c: (c["correct"], c["logprob"] / c["num_tokens"]),
            "shuffled": lambda c: chance.random(),
            "length": lambda c: len(c["text"].split()),
        }
        if verb in worth:
            record = ranked(record, worth[verb], verb)
        elif verb == "original":
            record = original(record)
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
