"""The fault rig: kills and stops training and collecting, tears files, fills the disk, serves hostile HTTP,
feeds malformed inputs.

    make faults                                                  the long form, hours of a core
    make faults ARGS="--parts calls --piece 2/8 --rows f"        a piece of it: every eighth case, its rows added to f
    make faults ARGS="--add f"                                   the rows of such pieces as one table

tests/test_faults.py runs a short form in make test. Every run is a forked child of this process, in which everything
is imported already: a start costs no time, so kills fall into the work and not into the imports. Prints a table of what
was tried and lost; exit code 1 if anything was lost.
"""

import argparse
import builtins
import contextlib
import importlib
import io
import json
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

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from api_server import Server  # noqa: E402
from conftest import make_model, make_records, ranked_records, read_jsonl, saved, write_jsonl  # noqa: E402
from faults.malformed import corpus  # noqa: E402
from test_evaluating_lmentry import make_lmentry  # noqa: E402
from test_evaluating_superni import make_superni  # noqa: E402

import common  # noqa: E402
from recipes.tiny import make_reward_model  # noqa: E402


class Child:
    """A forked run of `script.main()` with these arguments, as process `rank` of `world`; its output goes to a file."""

    def __init__(self, script, args, log, rank=0, world=1, port=None, file_limit=None, die_at=0):
        self.log, self.code = pathlib.Path(log), None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.argv = [f"{script}.py", *map(str, args)]
            if port:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if file_limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            calls = count_calls(die_at) if die_at else ()
            common.run_cli(importlib.import_module(script).main)
            code = 0
            print(f"CALLS {len(calls)}")
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds=900):
        """-> the exit code, or None when it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0.002)
        return self.code

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(script, args, folder, world=1, **kwargs):
    port = free_port() if world > 1 else None
    return [Child(script, args, folder / f"log{rank}", rank, world, port, **kwargs) for rank in range(world)]


def finish(children, seconds=900):
    codes = [c.wait(seconds) for c in children]
    for c, code in zip(children, codes):
        if code is None:
            c.kill()
            c.wait()
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
            if not left or children[0].wait(rng.uniform(0, duration)) is not None:
                break
            number = rng.choice(numbers)
            for c in children:
                c.kill(number)
            assert None not in finish(children, 300), f"deaf to signal {number}: {output(children)}"
            sent, left, saved = sent + 1, left - 1, saved + ("continue with" in output(children))
            damage()
        assert finish(children) == [0] * world, output(children)[-2000:]
        found = outcome(place)
        if differ := sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)):
            lost += 1
            print(f"  {place}: {differ}", flush=True)
    return lost, f"{runs} runs" + f", {saved} times it saved and said how to continue" * (saved > 0)


class Rig:
    def __init__(self, folder, seed=0, piece=(1, 1)):
        self.folder, self.seed, self.piece, self.rows = folder, seed, piece, []
        saved(folder / "tiny", make_model())
        self.reward = saved(folder / "reward", make_reward_model(3))
        self.data = write_jsonl(folder / "data.jsonl", make_records(24))
        prompts = [r | {"candidates": r["candidates"][:1]} for r in make_records(24)]
        self.prompts = write_jsonl(folder / "prompts.jsonl", prompts)
        self.stopped = folder / "stopped"
        children = start("rescue", self.training(self.stopped), folder)
        while not common.checkpoints(self.stopped):
            assert children[0].wait(0.005) is None, output(children)
        children[0].kill()
        finish(children)

    def report(self, what, tried, lost, note=""):
        self.rows.append({"fault": what, "tried": tried, "lost": lost, "note": note})
        print(f"{what:38} tried {tried:4}  survived {tried - lost:4}  lost {lost:3}  {note}", flush=True)

    def share(self, cases):
        """The cases of this --piece."""
        return [*cases][self.piece[0] - 1 :: self.piece[1]]

    def training(self, output):
        flags = "--ordering label --lr 1e-3 --batch_size 4 --epochs 2 --checkpoint_every 2 --resume"
        return [*flags.split(), "--data", self.data, "--model", self.folder / "tiny", "--output", output]

    def kill_training(self, world, times):
        """Weights and log of a killed run are those of an undisturbed one."""
        (folder := self.folder / f"train{world}").mkdir()
        rng = random.Random(self.seed + world)
        found = interrupted("rescue", self.training, folder, world, [signal.SIGKILL], times, rng)
        self.report(f"SIGKILL of training, {world} process(es)", times, *found)

    def stop_training(self, world, times):
        """A signal while PRO trains, evaluates (its answers are scored) and bootstraps: also the best model and the
        answers are those of an undisturbed run."""
        (folder := self.folder / f"stop{world}").mkdir()
        ranked = write_jsonl(folder / "ranked.jsonl", ranked_records(24))
        held_out = write_jsonl(folder / "held-out.jsonl", ranked_records(8))
        flags = "--lr 1e-3 --batch_size 8 --epochs 1 --checkpoint_every 2 --resume --bootstrap_splits 2 --eval_every 1"
        flags = [*flags.split(), "--max_new_tokens", "16", "--model", self.folder / "tiny"]
        flags += ["--reward_model", self.reward, "--data", ranked, "--eval_data", held_out, "--output"]
        rng, numbers = random.Random(self.seed + world), [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        found = interrupted("pro", lambda place: [*flags, place], folder, world, numbers, times, rng)
        self.report(f"SIGTERM, SIGINT, SIGHUP of PRO, {world} process(es)", times, *found)

    def kill_collecting(self, times):
        (folder := self.folder / "collect").mkdir()
        rng = random.Random(self.seed)
        flags = "sample --source tiny --num_samples 2 --max_new_tokens 24 --batch_size 2 --model"
        flags = [*flags.split(), self.folder / "tiny", "--input", self.prompts, "--output"]

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
        tiny, prompts, data, reward = self.folder / "tiny", self.prompts, self.data, self.reward
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
            "collect_candidates export": ["--input", ranked, "--format", "trl"],
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
        folder = self.folder / "calls"
        folder.mkdir()
        commands = self.commands(folder)
        tried = lost = 0
        chosen = random.Random(self.seed).sample(list(commands), some or len(commands))
        for what in self.share(sorted(chosen)):
            script, *verb = what.split()
            rng, place = random.Random(f"{self.seed} {what}"), folder / what.replace(" ", "-")
            place.mkdir()

            def args(name, what=what, verb=verb, place=place):
                return [*verb, *commands[what], "--output", place / name / ("out.jsonl" if verb else "run")]

            whole = start(script, args("whole"), place, die_at=10**9)
            assert finish(whole) == [0], f"{what}: {output(whole)[-2000:]}"
            calls = int(output(whole).rpartition("CALLS ")[2])
            wanted, before = outcome(place / "whole"), lost
            places = rng.sample(range(1, calls + 1), min(kills, calls))
            for at in places:
                killed = finish(start(script, args(f"at{at}"), place, die_at=at))
                again = start(script, args(f"at{at}"), place)
                codes, found = finish(again), outcome(place / f"at{at}")
                if killed != [-signal.SIGKILL] or codes != [0] or found != wanted:
                    lost += 1
                    differ = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
                    print(f"  {what}, call {at} of {calls}: {killed}, {codes}, {differ}: {output(again)[-300:]}")
                shutil.rmtree(place / f"at{at}", ignore_errors=True)
            tried += len(places)
            print(f"  {what}: {len(places)} of {calls} calls, {lost - before} lost", flush=True)
        self.report("SIGKILL at system calls", tried, lost)

    def one_dies(self):
        """SIGKILL of one of two processes: the other ends at once and says so."""
        (folder := self.folder / "dies").mkdir()
        children = start("rescue", self.training(folder / "run"), folder, 2)
        while not common.checkpoints(folder / "run"):
            assert children[0].wait(0.005) is None, output(children)
        children[1].kill()
        began, code = time.monotonic(), children[0].wait(60)
        bad = code != 2 or "another process ended" not in output(children[:1])
        self.report("one process of two dies", 1, int(bad), f"the other ended after {time.monotonic() - began:.1f} s")
        finish(children, 0)

    def disk_full(self):
        """A file size limit stops a checkpoint: one sentence, and the run goes on from the checkpoint before."""
        (folder := self.folder / "full").mkdir()
        finish(start("rescue", self.training(folder / "whole"), folder))
        shutil.copytree(self.stopped, folder / "run")
        codes = finish(full := start("rescue", self.training(folder / "run"), folder, file_limit=50_000))
        said = "could not be saved" in output(full) and "Traceback" not in output(full)
        finish(start("rescue", self.training(folder / "run"), folder))
        bad = codes != [2] or not said or outcome(folder / "run") != outcome(folder / "whole")
        self.report("disk full while saving", 1, int(bad), output(full).strip().splitlines()[-1][:90] if bad else "")

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
                children = start("collect_candidates", args, folder)
                if children[0].wait(rng.uniform(0.1, 3)) is None:
                    children[0].kill()
                    children[0].wait()
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

    def malformed(self, share, rng):
        folder = self.folder / "malformed"
        folder.mkdir()
        cases = self.share(c for c in corpus(self) if rng.random() < share)
        bad = refused = 0
        for k, (name, write, script, args, allowed) in enumerate(cases):
            place = folder / str(k)
            place.mkdir()
            source = write(place)
            kept = {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.parts[-2:-1] != ("run",)}
            kept = {p: content for p, content in kept.items() if "checkpoints" not in p.parts}  # a resumed run's own
            child = Child(script, args(source, place), folder / f"{k}.log")
            code = child.wait(600)
            if code is None:
                child.kill()
                child.wait()
            text = child.log.read_text(errors="replace")
            child.log.unlink()
            message = [line for line in text.splitlines() if "error: " in line]
            changed = [p.name for p, content in kept.items() if not p.exists() or p.read_bytes() != content]
            ok = code in allowed and "Traceback" not in text and not changed and (code == 0 or len(message) == 1)
            refused += code == 2
            if not ok:
                bad += 1
                print(f"  {name}: exit code {code}, changed {changed}: {text.strip()[-300:]}", flush=True)
            shutil.rmtree(place)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10  # this process's own share is in it
        self.report("malformed inputs", len(cases), bad, f"{refused} refused in one sentence; at most {peak} MB held")


def table(rows):
    """Rows of one fault added up -> the exit code."""
    print("\n| fault | tried | lost | |\n| --- | --- | --- | --- |")
    for fault in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == fault]
        notes = "; ".join(row["note"] for row in some if row["note"])
        print(f"| {fault} | {sum(row['tried'] for row in some)} | {sum(row['lost'] for row in some)} | {notes} |")
    lost = sum(row["lost"] for row in rows)
    print(json.dumps({"tried": sum(row["tried"] for row in rows), "lost": lost}))
    return 1 if lost else 0


PARTS = {
    "train1": lambda rig, args: rig.kill_training(1, args.kills),
    "train2": lambda rig, args: rig.kill_training(2, args.kills),
    "stop1": lambda rig, args: rig.stop_training(1, args.kills),
    "stop2": lambda rig, args: rig.stop_training(2, args.kills),
    "collect": lambda rig, args: rig.kill_collecting(args.kills),
    "calls": lambda rig, args: rig.kill_at_calls(max(1, args.kills // 5), args.verbs),
    "dies": lambda rig, args: rig.one_dies(),
    "full": lambda rig, args: rig.disk_full(),
    "hostile": lambda rig, args: rig.hostile_server(max(1, args.kills // 6)),
    "malformed": lambda rig, args: rig.malformed(args.malformed, random.Random(args.seed)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--kills", type=int, default=30, help="of each part; a fifth of it for each script and verb of `calls`")
    add("--verbs", type=int, help="kill only so many of the scripts and verbs at system calls")
    add("--malformed", type=float, default=1.0, help="share of the corpus of malformed inputs")
    add("--seed", type=int, default=0)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--piece", type=lambda text: tuple(map(int, text.split("/"))), default=(1, 1), metavar="K/N")
    add("--rows", help="append the table's rows to this file, JSONL")
    add("--add", nargs="+", help="run nothing: one table of such files")
    # fmt: on
    args = parser.parse_args(argv)
    if args.add:
        return table([row for file in args.add for row in read_jsonl(file)])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(pathlib.Path(folder), args.seed, args.piece)
        for part in args.parts:
            PARTS[part](rig, args)
    if args.rows:
        with open(args.rows, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rig.rows)
    return table(rig.rows)


if __name__ == "__main__":
    sys.exit(main())
