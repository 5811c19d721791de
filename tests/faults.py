"""The fault rig: kills and stops training and collecting, tears files, fills the disk, serves hostile HTTP, feeds
malformed inputs.

    make faults                                          the long form, hours of a core
    make faults ARGS="--parts calls malformed"           some parts of it

tests/test_faults.py runs a short form in make test. Every run is a forked child of this process, in which everything
is imported already: a start costs no time, so kills fall into the work and not into the imports. Prints a table of what
was tried and lost; exit code 1 if anything was lost.
"""

import argparse
import builtins
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from api_server import Server  # noqa: E402
from conftest import launch, make_model, make_records, ranked_records, read_jsonl, saved, write_jsonl  # noqa: E402
from test_evaluating_lmentry import make_lmentry  # noqa: E402
from test_evaluating_superni import make_superni  # noqa: E402

import common  # noqa: E402
from recipes.tiny import make_reward_model  # noqa: E402

FORK = multiprocessing.get_context("fork")


def child(script, args, log, environment, file_limit, die_at):
    """In a forked process: run a script, its output to the file `log`. It ends with the script's exit code."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ |= environment
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    calls = count_calls(die_at) if die_at else ()
    code = launch(script, *args)
    print(f"CALLS {len(calls)}", flush=True)
    os._exit(code)


def count_calls(die_at):
    """From here on this process kills itself before its die_at-th call that opens, syncs, renames or deletes a file ->
    a list, one entry a call so far."""
    calls = []

    def counted(call):
        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(open)  # pathlib calls the latter
    return calls


def start(script, args, folder, world=1, file_limit=None, die_at=0):
    """Start a script on `world` processes -> these; the log of each is in folder / "log0", ..."""
    environment, children = {}, []
    if world > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}
        texts = {k: str(v) for k, v in (environment | own).items()}
        children.append(
            FORK.Process(target=child, args=(script, args, folder / f"log{rank}", texts, file_limit, die_at))
        )
        children[-1].log = folder / f"log{rank}"
        children[-1].start()
    return children


def wait(process, seconds=900):
    """-> the exit code, a signal's number below 0, or None when it still runs after `seconds`."""
    process.join(seconds)
    return process.exitcode


def finish(children, seconds=900):
    """-> the exit codes; None of those that still ran after `seconds` and are killed."""
    codes = [wait(c, seconds) for c in children]
    for c in children:
        c.kill()
        c.join()
    return codes


def output(children):
    return "".join(c.log.read_text(errors="replace") for c in children if c.log.exists())


def outcome(folder):
    """What a run leaves that another must leave too: weights, log without times, records, figures; and no litter."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(path)]
        elif path.name.endswith(".metrics.json"):
            found[name] = json.loads(path.read_text())["metrics"]
        else:
            named = path.name.endswith("args.json") or path.name == "README.md"  # both name the run's own folder
            found[name] = None if named else path.read_bytes()
    return found


def differences(found, wanted):
    return sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


def interrupted(script, args, folder, world, numbers, times, rng, damage=lambda: None):
    """Run a command over and over and send its processes one of the signals `numbers` at random moments, `times` in
    all, five a run -> (how many of the finished runs differ from an undisturbed one, a note)."""
    began = time.monotonic()
    assert finish(whole := start(script, args(folder / "whole"), folder, world)) == [0] * world, output(whole)
    duration, wanted, sent, runs, saved, lost = time.monotonic() - began, outcome(folder / "whole"), 0, 0, 0, 0
    while sent < times:
        place, left, runs = folder / f"run{runs}", min(5, times - sent), runs + 1
        while True:
            children = start(script, args(place), folder, world)
            if not left or wait(children[0], rng.uniform(0, duration)) is not None:
                break
            number = rng.choice(numbers)
            for c in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(c.pid, number)
            assert None not in finish(children, 300), f"deaf to signal {number}: {output(children)}"
            sent, left, saved = sent + 1, left - 1, saved + ("continue with" in output(children))
            damage()
        assert finish(children) == [0] * world, output(children)[-2000:]
        if differ := differences(outcome(place), wanted):
            lost += 1
            print(f"  {place}: {differ}", flush=True)
    return lost, f"{runs} runs" + f", {saved} times it saved and said how to continue" * (saved > 0)


# ----------------------------------------------------------------------------------------------------------------------
# Malformed inputs


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def spoilt(content, rng):
    """Bytes with one thing wrong: a piece cut out, doubled, zeroed, or a byte changed, or put in."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 64, 4096)))
    new = rng.choice((b"", content[a:b] * 2, bytes(b - a), bytes([rng.randrange(256)]), b'"', b"{", b"9" * 400, b"\n"))
    return content[:a] + new + content[b:]


def mutations(rows, rng):
    """(what is wrong, file name, content, whether every verb must refuse it) of a file of two rows."""
    good, text = lines(rows), json.dumps(rows[0])
    with_x = lambda value: text[:-1].encode() + b', "x": ' + value + b"}\n"  # noqa: E731
    for what, name, content in (
        ("empty file", "a.jsonl", b""),
        ("blank lines only", "a.jsonl", b"\n \n\t\n"),
        ("torn last line", "a.jsonl", good[: -len(text) // 2]),
        ("NUL byte", "a.jsonl", good.replace(b" ", b"\x00", 1)),
        ("Latin-1", "a.jsonl", text.replace("a", "\xe9").encode("latin-1")),
        ("UTF-16", "a.jsonl", text.encode("utf-16")),
        ("deep nesting", "a.jsonl", with_x(b"[" * 50_000 + b"]" * 50_000)),
        ("a number of 10,000 digits", "a.jsonl", with_x(b"9" * 10_000)),
        ("an array a line", "a.jsonl", json.dumps([rows[0]]).encode() + b"\n"),
        ("a string a line", "a.jsonl", b'"text"\n'),
        ("Python, not JSON", "a.jsonl", repr(rows[0]).encode() + b"\n"),
        ("two objects on a line", "a.jsonl", (text + text).encode() + b"\n"),
        ("JSON array of strings", "a.json", b'["a"]'),
        ("torn JSON array", "a.json", json.dumps(rows).encode()[:-20]),
        ("gz that is none", "a.jsonl.gz", good),
        ("torn gz", "a.jsonl.gz", gzip.compress(good)[:-12]),
        ("CSV without the columns", "a.csv", b"x,y\n1,2\n"),
    ):
        yield what, name, content, True
    yield "BOM and CRLF", "a.jsonl", b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n"), False
    yield "unknown ending", "a.parquet", good, False
    for value in (b'"\\ud800"', b"NaN", b"-Infinity", b'"' + b"y" * (11 << 20) + b'"'):
        yield f"x is {value[:20]}", "a.jsonl", with_x(value), False
    for k in range(40):
        yield f"spoilt bytes {k}", "a.jsonl", spoilt(good, rng), False
    candidates = rows[0].get("candidates", [{}])
    fields = ["text", "source", "label", "correct", "reward", "rank", "num_tokens", "logprob", "similarity"]
    for value in (None, 7, -1, 1.5, 1e300, True, "", " \n", "1", [], {}, [1], {"a": 1}):
        for field in rows[0]:
            yield f"{field} = {value!r}", "a.jsonl", lines([rows[1], rows[0] | {field: value}]), False
        for field in fields if "candidates" in rows[0] else ():
            row = rows[0] | {"candidates": [*candidates[:-1], candidates[-1] | {field: value}]}
            yield f"candidate {field} = {value!r}", "a.jsonl", lines([rows[1], row]), False
    for field in rows[0]:
        without = {k: v for k, v in rows[0].items() if k != field}
        yield f"no {field}", "a.jsonl", lines([rows[1], without]), False


class Rig:
    def __init__(self, folder, seed=0):
        self.folder, self.seed, self.rows, self.lost = folder, seed, [], 0
        self.tiny = saved(folder / "tiny", make_model())
        self.reward = saved(folder / "reward", make_reward_model(3))
        self.data = write_jsonl(folder / "data.jsonl", make_records(24))
        prompts = [r | {"candidates": r["candidates"][:1]} for r in make_records(24)]
        self.prompts = write_jsonl(folder / "prompts.jsonl", prompts)
        self.stopped = folder / "stopped"
        [run] = start("rescue", self.training(self.stopped), folder)
        while not common.checkpoints(self.stopped):
            assert wait(run, 0.005) is None, output([run])
        run.kill()
        run.join()

    def report(self, what, tried, lost, note=""):
        self.rows.append(f"| {what} | {tried} | {lost} | {note} |")
        self.lost += lost
        print(self.rows[-1], flush=True)

    def training(self, output):
        flags = "--ordering label --lr 1e-3 --batch_size 4 --epochs 2 --checkpoint_every 2 --resume"
        return [*flags.split(), "--data", self.data, "--model", self.tiny, "--output", output]

    def interrupt_training(self, world, times):
        """A kill or a signal while PRO trains, evaluates (its answers are scored) and bootstraps: weights, log, best
        model and answers are those of an undisturbed run."""
        (folder := self.folder / f"train{world}").mkdir()
        ranked = write_jsonl(folder / "ranked.jsonl", ranked_records(24))
        held_out = write_jsonl(folder / "held-out.jsonl", ranked_records(8))
        flags = "--lr 1e-3 --batch_size 8 --epochs 1 --checkpoint_every 2 --resume --bootstrap_splits 2 --eval_every 1"
        flags = [*flags.split(), "--max_new_tokens", "16", "--model", self.tiny, "--reward_model", self.reward]
        flags += ["--data", ranked, "--eval_data", held_out, "--output"]
        rng = random.Random(self.seed + world)
        numbers = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        found = interrupted("pro", lambda place: [*flags, place], folder, world, numbers, times, rng)
        self.report(f"SIGKILL, SIGTERM, SIGINT, SIGHUP of PRO, {world} process(es)", times, *found)

    def kill_collecting(self, times):
        (folder := self.folder / "collect").mkdir()
        rng = random.Random(self.seed)
        flags = "sample --source tiny --num_samples 2 --max_new_tokens 24 --batch_size 2 --model"
        flags = [*flags.split(), self.tiny, "--input", self.prompts, "--output"]

        def tear():
            for part in folder.glob("*/*.part0"):
                text = part.read_bytes()
                last = len(text) - text[:-1].rfind(b"\n") - 1
                if last > 1 and rng.random() < 0.5:
                    part.write_bytes(text[: len(text) - rng.randrange(1, last)])

        args = lambda place: [*flags, place / "out.jsonl"]  # noqa: E731
        found = interrupted("collect_candidates", args, folder, 1, [signal.SIGKILL], times, rng, tear)
        self.report("SIGKILL of collecting, torn lines", times, *found)

    def commands(self, folder):
        """{script and verb: its arguments without --output} of every script and verb that writes."""
        tiny, prompts, data, reward = self.tiny, self.prompts, self.data, self.reward
        train = ["--model", tiny, "--lr", "1e-3", "--batch_size", "8", "--checkpoint_every", "1", "--resume"]
        answers = ["--model", tiny, "--max_new_tokens", "4", "--batch_size", "4"]
        ranked = write_jsonl(folder / "ranked.jsonl", ranked_records(12))
        pairs = write_jsonl(folder / "pairs.jsonl", [{"instruction": f"Say {k}.", "output": f"{k}"} for k in range(8)])
        bootstrap = ["--bootstrap_splits", "2", "--reward_model", reward, "--max_new_tokens", "6", "--epochs", "1"]
        documents = [{"title": "t", "text": f"The cat sat {k} times.", "gold": k == 1} for k in range(3)]
        asked = {"question": "how often", "answers": ["1"], "documents": documents, "gold_position": 1}
        qa = write_jsonl(folder / "qa.jsonl", [asked | {"id": f"q{k}", "prompt": "how often" * k} for k in range(1, 9)])
        spoken = [{"question_id": k, "category": "c", "turns": ["Why? " * k]} for k in range(1, 9)]
        given = [{"id": f"a{k}", "question": "Why?", "text": "So. " * k} for k in range(1, 9)]
        spoken, given = write_jsonl(folder / "spoken.jsonl", spoken), write_jsonl(folder / "given.jsonl", given)
        shown = write_jsonl(folder / "shown.jsonl", [r | {"prompt": "Why?"} for r in read_jsonl(given)])
        figures = write_jsonl(folder / "nli.metrics.json", [{"name": "x", "verb": "nli", "metrics": {"accuracy": 0.5}}])
        ni, lm = make_superni(folder / "ni"), make_lmentry(folder / "lm")
        rank = ["--input", ranked]
        return {
            "rescue": ["--ordering", "label", "--data", data, *train],
            "pro": ["--data", ranked, *train, *bootstrap],
            "tuna": ["--stage", "contextual", "--data", ranked, *train],
            "reward_model": ["--ordering", "rank", "--data", ranked, *train],
            "collect_candidates prepare": ["--task", "alpaca", "--input", pairs, "--validation", "2"],
            "collect_candidates sample": ["--input", prompts, "--num_samples", "2", *answers],
            "collect_candidates teacher": ["--input", prompts, *answers],
            "collect_candidates flip": ["--input", data, *answers],
            "collect_candidates anchor": ["--input", qa, "--num_distractors", "1", *answers],
            "collect_candidates rank --by label": ["--input", data],
            "collect_candidates rank --by gpt": ["--input", data, *answers],
            "collect_candidates rank --by contextual": ["--input", data, *answers],
            "collect_candidates rank --by reward": ["--reward_model", reward, *rank],
            "collect_candidates rank --by logprob": ["--model", tiny, *rank],
            "collect_candidates rank --by prm": ["--model", tiny, *rank],
            "collect_candidates rank --by similarity": ["--encoder", tiny, *rank],
            "collect_candidates hindsight": ["--input", ranked],
            "collect_candidates export": rank,
            "evaluate ranking": ["--input", data, "--model", tiny, "--by", "label"],
            "evaluate nli": ["--input", prompts, *answers],
            "evaluate multidoc-qa": ["--input", qa, *answers],
            "evaluate nll": ["--input", data, "--model", tiny],
            "evaluate superni": ["--superni_dir", ni, *answers],
            "evaluate lmentry": ["--lmentry_dir", lm, *answers],
            "evaluate vicuna": ["--input", spoken, *answers],
            "evaluate hh": ["--input", data, "--reward_model", reward, *answers],
            "evaluate judge": ["--answers", given, given, "--name", "x", *answers],
            "evaluate sheet": ["--systems", given, given, "--names", "a", "b", "--input", shown],
            "evaluate report": [figures.parent],
        }

    def kill_at_calls(self, kills, some=None):
        """Every script and verb, killed just before a system call that touches its files, each time another: run again
        it gives what an undisturbed run gives."""
        (folder := self.folder / "calls").mkdir()
        commands = self.commands(folder)
        tried = lost = 0
        for what in sorted(random.Random(self.seed).sample(list(commands), some or len(commands))):
            script, *verb = what.split()
            rng, place = random.Random(f"{self.seed} {what}"), folder / what.replace(" ", "-")
            place.mkdir()

            def args(name, what=what, verb=verb, place=place):
                return [*verb, *commands[what], "--output", place / name / ("out.jsonl" if verb else "run")]

            whole = start(script, args("whole"), place, die_at=10**9)
            assert finish(whole) == [0], f"{what}: {output(whole)[-2000:]}"
            calls = int(output(whole).rpartition("CALLS ")[2])
            places = rng.sample(range(1, calls + 1), min(kills, calls))
            for at in places:
                killed = finish(start(script, args(f"at{at}"), place, die_at=at))
                codes = finish(again := start(script, args(f"at{at}"), place))
                differ = differences(outcome(place / f"at{at}"), outcome(place / "whole"))
                if killed != [-signal.SIGKILL] or codes != [0] or differ:
                    lost += 1
                    print(f"  {what}, call {at} of {calls}: {killed}, {codes}, {differ}: {output(again)[-300:]}")
                shutil.rmtree(place / f"at{at}", ignore_errors=True)
            tried += len(places)
        self.report("SIGKILL at system calls", tried, lost)

    def one_dies(self):
        """SIGKILL of one of two processes: the other ends at once and says so."""
        (folder := self.folder / "dies").mkdir()
        children = start("rescue", self.training(folder / "run"), folder, 2)
        while not common.checkpoints(folder / "run"):
            assert wait(children[0], 0.005) is None, output(children)
        children[1].kill()
        began, code = time.monotonic(), wait(children[0], 60)
        bad = code != 2 or "another process ended" not in output(children[:1])
        self.report("one process of two dies", 1, int(bad), f"the other ended after {time.monotonic() - began:.1f} s")
        finish(children, 0)

    def disk_full(self):
        """A file size limit stops a checkpoint: one sentence, and the run goes on from the checkpoint before."""
        (folder := self.folder / "full").mkdir()
        finish(start("rescue", self.training(folder / "whole"), folder))
        shutil.copytree(self.stopped, folder / "run")
        codes = finish(full := start("rescue", self.training(folder / "run"), folder, file_limit=50_000))
        said = output(full)
        finish(start("rescue", self.training(folder / "run"), folder))
        bad = codes != [2] or "could not be saved" not in said or outcome(folder / "run") != outcome(folder / "whole")
        self.report("disk full while saving", 1, int(bad), said.strip()[-90:] if bad else "")

    def hostile_server(self, kills):
        """`teacher` against a server that fails 12 prompts twice, each time in another way, and always refuses 4, each
        in another way, and SIGKILLs meanwhile: every prompt once and in order, the refused ones apart and not asked
        again, and the key in no file and no output."""
        (folder := self.folder / "hostile").mkdir()
        faults = [429, 500, b"<html>", b"[1]", b'{"choices": []}', b'{"choices": [{}]}', "half", "silence"]
        faults += ["flood", (503, {"Retry-After": "1"}), b'{"choices": [{"message": {"content": "\\ud800"}}]}']
        refusals = [403, (400, {}, b'{"error": {"message": "filtered"}}'), b'{"error": {"message": "too long"}}']
        refusals += [b'{"choices": [{"message": {"content": null, "refusal": "no"}, "finish_reason": "stop"}]}']
        records = [r | {"candidates": r["candidates"][:1]} for r in make_records(16)]
        numbers, rng = {r["prompt"]: number for number, r in enumerate(records)}, random.Random(self.seed)

        def behave(prompt, nth, body):
            if (number := numbers[prompt]) >= 12:
                return refusals[number - 12]
            return faults[(2 * number + nth) % len(faults)] if nth <= 2 else None

        source, out = write_jsonl(folder / "in.jsonl", records), folder / "out.jsonl"
        os.environ["OPENAI_API_KEY"] = key = "sk-the-rigs-own-secret"
        with Server(behave) as server:
            flags = f"teacher --model m --base_url {server.url} --timeout 0.8 --concurrency 4 --source t".split()
            args = [*flags, "--input", source, "--output", out]
            for _ in range(kills):
                finish(start("collect_candidates", args, folder), rng.uniform(0.1, 3))
            codes = finish(start("collect_candidates", args, folder))
            asked = sum(server.asked.values())
            codes += finish(start("collect_candidates", args, folder))
            again = sum(server.asked.values()) - asked
        done, refused = (read_jsonl(p) if p.exists() else [] for p in (out, folder / "out.jsonl.refused.jsonl"))
        whole = codes == [0, 0] and again == 0 and [r["id"] for r in done] == [r["id"] for r in records[:12]]
        whole = whole and {r["id"] for r in refused} == {r["id"] for r in records[12:]}
        whole = whole and all([c["text"][:4] for c in r["candidates"][1:]] == ["echo"] for r in done)
        leaks = [p.name for p in folder.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
        note = f"{asked} requests, {kills} kills; the key leaked into {leaks or 'nothing'}"
        self.report("hostile server", 16, 0 if whole and not leaks else 16, note)

    def malformed_files(self, folder, rng):
        """(what is wrong, write(place), script, args(place), whether it must be refused): the file that each script or
        verb reads, in every way in which it can be wrong."""
        for what, args in self.commands(folder).items():
            script, *verb = what.split()
            flag = next((x for x in ("--data", "--input") if x in args), None)
            if flag is None or "sheet" in verb:
                continue
            at = args.index(flag) + 1
            for wrong, name, content, must in mutations(read_jsonl(args[at])[:2], rng):

                def write(place, name=name, content=content):
                    (place / name).write_bytes(content)

                def given(place, name=name, at=at, args=args, verb=verb):
                    return [*verb, *args[:at], place / name, *args[at + 1 :], "--output", place / "out.jsonl"]

                yield f"{what}: {wrong}", write, script, given, must

    def malformed_folders(self, rng):
        """The same of a model folder and of a stopped run with one file wrong."""
        model = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        model, run = [*model, "model.safetensors"], ["args.json", "log.jsonl", "*-*/*.safetensors"]
        for source, file in [(self.tiny, file) for file in model] + [(self.stopped, file) for file in run]:
            for how in ("missing", b"", b"{}", b"[]", b"null", b"\xff\x00", *["spoilt"] * 26):

                def write(place, source=source, file=file, how=how):
                    path = next(shutil.copytree(source, place / "run").rglob(file))
                    content = path.read_bytes()
                    path.unlink()
                    if how != "missing":
                        path.write_bytes(spoilt(content, rng) if how == "spoilt" else how)

                def given(place, source=source):
                    new = ["--model", place / "run", "--output", place / "new"] if source == self.tiny else []
                    return [*self.training(place / "run"), *new]

                yield f"{source.name}: {file} {how!r}", write, "rescue", given, False

    def malformed(self, share):
        """Exit code 0, or 2 with one sentence; what else lies there stays."""
        (folder := self.folder / "malformed").mkdir()
        rng, draw, tried, bad, refused = random.Random(0), random.Random(self.seed), 0, 0, 0
        cases = itertools.chain(self.malformed_files(folder, rng), self.malformed_folders(rng))
        for what, write, script, args, must in cases:
            if draw.random() >= share:
                continue
            (place := folder / "case").mkdir()
            write(place)
            (place / "mine.txt").write_text("the user's")
            kept = {p: p.read_bytes() for p in place.glob("*") if p.is_file()}
            [code] = finish(run := start(script, args(place), folder), 600)
            said = output(run)
            changed = [p.name for p, content in kept.items() if not p.exists() or p.read_bytes() != content]
            sentences = sum("error: " in line for line in said.splitlines())
            tried, refused = tried + 1, refused + (code == 2)
            if code not in ({2} if must else {0, 2}) or "Traceback" in said or changed or code == 2 and sentences != 1:
                bad += 1
                print(f"  {what}: exit code {code}, changed {changed}: {said.strip()[-300:]}", flush=True)
            shutil.rmtree(place)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10  # this process's own share is in it
        self.report("malformed inputs", tried, bad, f"{refused} refused in one sentence; at most {peak} MB held")


PARTS = {
    "train1": lambda rig, args: rig.interrupt_training(1, args.kills),
    "train2": lambda rig, args: rig.interrupt_training(2, args.kills),
    "collect": lambda rig, args: rig.kill_collecting(args.kills),
    "calls": lambda rig, args: rig.kill_at_calls(max(1, args.kills // 5), args.verbs),
    "dies": lambda rig, args: rig.one_dies(),
    "full": lambda rig, args: rig.disk_full(),
    "hostile": lambda rig, args: rig.hostile_server(max(1, args.kills // 6)),
    "malformed": lambda rig, args: rig.malformed(args.malformed),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--kills", type=int, default=30, help="of each part; a fifth of it for each script and verb of `calls`")
    add("--verbs", type=int, help="kill only so many of the scripts and verbs at system calls")
    add("--malformed", type=float, default=1.0, help="share of the corpus of malformed inputs")
    add("--seed", type=int, default=0)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    # fmt: on
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(pathlib.Path(folder), args.seed)
        for part in args.parts:
            PARTS[part](rig, args)
    print("\n| fault | tried | lost | |\n| --- | --- | --- | --- |", *rig.rows, sep="\n")
    sys.exit(1 if rig.lost else 0)


if __name__ == "__main__":
    main()
