"""A corpus of malformed inputs: every reader, each with every way in which its file can be wrong."""

import gzip
import json
import random
import shutil

from conftest import ranked_records

PAIR = {"premise": "A man sits.", "hypothesis": "He rests.", "label": "neutral", "explanation_1": "One may stand."}
REFUSED, EITHER = {2}, {0, 2}
TRAINING = ("rescue", "pro", "tuna", "reward_model")
# what training takes: it reads its own fields alone, and a file of any name
TAKEN = ("lone surrogate", "NaN", "Infinity", "an 11 MB line", "unknown ending")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def readers(rig):
    """(name, a valid row, its second row, script, its arguments, the fields it needs, exit codes for wrong values of
    these) of each verb that reads a file."""
    model = ["--model", str(rig.folder / "tiny")]
    generation = [*model, "--max_new_tokens", "2"]
    record, other = ranked_records(2)
    for c in record["candidates"] + other["candidates"]:
        c |= {"logprob": -5.0, "num_tokens": 4, "similarity": 0.5}
    passage = {"title": "t", "text": "The cat sat.", "hasanswer": True, "isgold": True}
    asked = {"question": "who sat", "answers": ["cat"], "ctxs": [passage]}
    asked2 = {"question": "who ran", "answers": ["dog"], "ctxs": [passage | {"text": "The dog ran.", "title": "u"}]}
    alpaca = {"instruction": "Say hello.", "input": "", "output": "Hello."}
    vicuna = {"question_id": 1, "category": "generic", "turns": ["Why?"]}
    text, full = ["id", "prompt"], ["id", "prompt", "candidates"]
    verb = "collect_candidates {}".format
    # fmt: off
    table = [
        (verb("prepare --task esnli"), [], PAIR, PAIR | {"premise": "x"}, [*PAIR], REFUSED),
        (verb("prepare --task alpaca"), [], alpaca, alpaca | {"instruction": "Go."}, [*alpaca], EITHER),
        (verb("prepare --task multidoc_qa --num_documents 2"), [], asked, asked2, [*asked], REFUSED),
        (verb("sample"), generation, record, other, text, REFUSED),
        (verb("teacher"), generation, record, other, text, REFUSED),
        (verb("rank --by label"), [], record, other, [*full, "label"], REFUSED),
        (verb("rank --by probabilistic"), [], record, other, full, REFUSED),
        (verb("rank --by contextual"), generation, record, other, full, REFUSED),
        *[(f"rescue --ordering {x}", model, record, other, full, REFUSED) for x in ("label", "gpt", "reward")],
        *[(f"tuna --stage {x}", model, record, other, full, REFUSED) for x in ("sft", "probabilistic", "contextual")],
        ("evaluate ranking --by label", model, record, other, full, REFUSED),
        ("evaluate nli", generation, record, other, [*text, "label"], REFUSED),
        ("evaluate nll", model, record, other, full, REFUSED),
        ("evaluate vicuna", generation, vicuna, vicuna | {"question_id": 2}, [*vicuna], EITHER),
    ]
    # fmt: on
    for name, more, row, second, needed, wrong_value in table:
        script, *words = name.split()
        source, output = ("--data", "run") if script in ("rescue", "tuna") else ("--input", "out.jsonl")

        def args(file, place, flags=(*words, *more), source=source, output=output):
            return [*flags, source, file, "--output", place / output]

        yield name, row, second, script, args, needed, wrong_value


def mutations(row, other, needed, wrong_value):
    """(what is wrong, file name, content, exit codes that are right)."""
    good = lines([row, other])
    text = json.dumps(row)
    yield "missing file", None, None, REFUSED
    yield "empty file", "a.jsonl", b"", REFUSED
    yield "blank lines only", "a.jsonl", b"\n \n\t\n", REFUSED
    yield "BOM and CRLF", "a.jsonl", b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n"), EITHER
    yield "no last newline", "a.jsonl", good[:-1], {0}
    yield "torn last line", "a.jsonl", good[: -len(text) // 2], REFUSED
    yield "NUL byte", "a.jsonl", good.replace(b" ", b"\x00", 1), REFUSED
    yield "NUL inside a string", "a.jsonl", good.replace(b"e", b"\x00", 1), REFUSED
    yield "Latin-1", "a.jsonl", text.replace("a", "\xe9").encode("latin-1"), REFUSED
    yield "UTF-16", "a.jsonl", text.encode("utf-16"), REFUSED
    yield "lone surrogate", "a.jsonl", text[:-1].encode() + b', "x": "\\ud800"}\n', REFUSED
    yield "NaN", "a.jsonl", text[:-1].encode() + b', "x": NaN}\n', REFUSED
    yield "Infinity", "a.jsonl", text[:-1].encode() + b', "x": -Infinity}\n', REFUSED
    yield "an 11 MB line", "a.jsonl", text[:-1].encode() + b', "x": "' + b"y" * (11 << 20) + b'"}\n', REFUSED
    yield "deep nesting", "a.jsonl", text[:-1].encode() + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n", REFUSED
    yield "a number of 10,000 digits", "a.jsonl", text[:-1].encode() + b', "x": ' + b"9" * 10_000 + b"}\n", REFUSED
    yield "an array a line", "a.jsonl", json.dumps([row]).encode() + b"\n", REFUSED
    yield "a string a line", "a.jsonl", b'"text"\n', REFUSED
    yield "Python, not JSON", "a.jsonl", repr(row).encode() + b"\n", REFUSED
    yield "trailing comma", "a.jsonl", text[:-1].encode() + b",}\n", REFUSED
    yield "two objects on a line", "a.jsonl", (text + text).encode() + b"\n", REFUSED
    yield "JSON, not an array", "a.json", json.dumps(row, indent=1).encode(), REFUSED
    yield "JSON array of strings", "a.json", b'["a"]', REFUSED
    yield "torn JSON array", "a.json", json.dumps([row, other]).encode()[:-20], REFUSED
    yield "gz that is none", "a.jsonl.gz", good, REFUSED
    yield "torn gz", "a.jsonl.gz", gzip.compress(good)[:-12], REFUSED
    yield "unknown ending", "a.parquet", good, REFUSED
    yield "CSV without the columns", "a.csv", b"x,y\n1,2\n", REFUSED
    yield "CSV with a short row", "a.csv", ",".join(needed).encode() + b"\n1\n", REFUSED
    yield "CSV with an open quote", "a.csv", ",".join(needed).encode() + b'\n"abc\n', REFUSED
    for field in needed:
        without = {k: v for k, v in row.items() if k != field}
        yield f"no {field}", "a.jsonl", lines([other, without]), wrong_value
        for value in (None, 7, 1.5, True, "", " \n", [], {}, [1], {"a": 1}):
            yield f"{field} = {value!r}", "a.jsonl", lines([other, row | {field: value}]), wrong_value


def candidate_mutations(row, other):
    human, model = row["candidates"][:2]
    # fmt: off
    wrong = {
        "text": [3, None, ["a"]], "source": [None, 1, ""], "label": [3, ["neutral"]], "correct": ["yes", 1, None],
        "reward": ["0.5", None, True], "rank": [-1, 1.5, "1"], "num_tokens": [0, -3, 1e300], "logprob": ["x"],
        "similarity": [[]],
    }
    # fmt: on
    for field, value in [(field, value) for field, values in wrong.items() for value in values]:
        spoilt_record = row | {"candidates": [human, model | {field: value}]}
        yield f"candidate {field} = {value!r}", lines([other, spoilt_record]), REFUSED
    yield "candidate = string", lines([row | {"candidates": ["text"]}]), REFUSED
    yield "empty human text", lines([row | {"candidates": [human | {"text": " "}, model]}]), REFUSED
    yield "duplicate id", lines([row, other, row]), REFUSED
    yield "one candidate", lines([other, row | {"candidates": [human]}]), {0}
    yield "candidates all equal", lines([other, row | {"candidates": [human] * 4}]), {0}
    yield "empty model text", lines([other, row | {"candidates": [human, model | {"text": ""}]}]), {0}


def spoilt(content, rng):
    """Bytes with one thing wrong: a piece cut out, doubled, zeroed, or a byte changed, or put in."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 64, 4096)))
    new = rng.choice((b"", content[a:b] * 2, bytes(b - a), bytes([rng.randrange(256)]), b'"', b"{", b"9" * 400, b"\n"))
    return content[:a] + new + content[b:]


def folders(rig, rng):
    """(name, write, script, args): model folders, metrics and checkpoints with one file wrong."""
    tiny, data = rig.folder / "tiny", rig.data
    flags = ["--ordering", "label", "--data", data, "--batch_size", "12", "--lr", "1e-3"]
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    wrong = ["missing", b"", b"{}", b"[]", b"null", b"\xff\x00", "half", *["spoilt"] * 25]

    def spoil(file, how):
        content = file.read_bytes()
        file.unlink()
        if how != "missing":
            ways = {"half": content[: len(content) // 2], "spoilt": spoilt(content, random.Random(rng.random()))}
            file.write_bytes(ways.get(how, how) if isinstance(how, str) else how)

    def changed(source, file, how):
        def write(place):
            folder = shutil.copytree(source, place / ("run" if source == rig.stopped else "model"))
            spoil(next(folder.rglob(file)), how)
            return folder

        return write

    train = ("rescue", lambda s, p: [*flags, "--model", s, "--output", p / "out"])
    resume = ("rescue", lambda s, p: rig.training(s))
    for how in wrong:
        for file in files:
            yield f"model folder: {file} {how!r}", changed(tiny, file, how), *train
        for file in ("args.json", "log.jsonl", "*.safetensors"):
            yield f"checkpoint: {file} {how!r}", changed(rig.stopped, file, how), *resume
    figures = json.dumps({"name": "x", "verb": "nli", "metrics": {"accuracy": 0.5, "f1": {"a": 1}}}).encode()
    for how in [*wrong[1:6], *["spoilt"] * 60]:

        def write(place, how=how):
            (place / "nli.metrics.json").write_bytes(figures if isinstance(how, str) else how)
            if isinstance(how, str):
                spoil(place / "nli.metrics.json", how)
            return place

        yield f"metrics {how!r}", write, "evaluate", lambda s, p: ["report", s, "--output", p / "new.md"]


def corpus(rig):
    """Yield (name, write(place) -> source file, script, args(source, place), allowed exit codes)."""
    rng = random.Random(0)

    def writer(file, content):
        def write(place):
            (place / "keep.txt").write_text("what else lies there stays as it is")
            if file is None:
                return place / "missing.jsonl"
            (place / file).write_bytes(content)
            return place / file

        return write

    for name, row, other, script, args, needed, wrong_value in readers(rig):
        for what, file, content, allowed in mutations(row, other, needed, wrong_value):
            allowed = {0} if script in TRAINING and what in TAKEN else allowed
            yield f"{name}: {what}", writer(file, content), script, args, allowed
        yield f"{name}: a folder", lambda place: place, script, args, REFUSED
        if "candidates" in row:
            for what, content, allowed in candidate_mutations(row, other):
                yield f"{name}: {what}", writer("a.jsonl", content), script, args, allowed
        for k in range(40):
            content = spoilt(lines([row, other]), rng)
            yield f"{name}: spoilt bytes {k}", writer("a.jsonl", content), script, args, EITHER
    for name, write, script, args in folders(rig, rng):
        yield name, write, script, args, EITHER
