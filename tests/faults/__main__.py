"""The fault rig: kills training and collecting at random moments, tears files, fills the disk, serves hostile HTTP,
feeds malformed inputs.

    make faults                                             the long form, hours of a core
    make faults ARGS="--parts calls --piece 2/8 --rows f"   a piece of it: every eighth command, its rows added to f
    make faults ARGS="--add f"                              the rows of such pieces as one table

tests/test_faults.py runs a short form in make test. Every run is a forked child of this process, in which everything
is imported already: a start costs no time, so that kills fall into the work and not into the imports. Prints a table
of what was tried, survived, lost; exit code 1 if anything was lost.
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
from conftest import make_model, make_records, make_tokenizer, read_jsonl, write_jsonl  # noqa: E402
from faults.malformed import corpus  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_evaluating_lmentry import make_lmentry  # noqa: E402
from test_evaluating_superni import make_superni  # noqa: E402

import common  # noqa: E402
from recipes.tiny import make_reward_model  # noqa: E402

PARTS = ("train1", "train2", "collect", "calls", "changed", "processes")
PARTS += ("signals", "dies", "full", "elsewhere", "hostile", "malformed")


class Child:
    """A forked run of `script.main()` with these arguments, as rank `rank` of `world`; its output goes to a file."""

    def __init__(self, script, args, log, rank=0, world=1, port=None, file_limit=None, die_at=0):
        self.log = pathlib.Path(log)
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
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

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

    for name in ("open", "fsync", "replace", "rename", "truncate", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(open)  # pathlib calls the latter
    return calls


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(script, args, folder, world=1, second=None, **kwargs):
    """A run on `world` ranks; of two the second gets the arguments `second` where they are given."""
    port, of_rank = free_port() if world > 1 else None, [args, second or args, *[args] * world]
    return [Child(script, of_rank[rank], folder / f"log{rank}", rank, world, port, **kwargs) for rank in range(world)]


def finish(children, seconds=900):
    codes = [c.wait(seconds) for c in children]
    for c, code in zip(children, codes):
        if code is None:
            c.kill()
            c.wait()
    return codes


def output(children):
    return "".join(c.log.read_text(errors="replace") for c in children if c.log.exists())


def random_kills(script, args, folder, world, kills, rng, damage=lambda: None):
    """Run a command over and over, SIGKILL it at random moments until `kills` are spent; yield each
    finished run's number."""
    began = time.monotonic()
    reference = start(script, args("reference"), folder, world)
    assert finish(reference) == [0] * world, output(reference)
    duration = time.monotonic() - began
    done = runs = 0
    while done < kills:
        runs += 1
        left = min(5, kills - done)  # kills of this run
        while True:
            children = start(script, args(f"run{runs}"), folder, world)
            code = children[0].wait(rng.uniform(0, duration)) if left else None
            if left and code is None:
                for c in children:
                    c.kill()
                for c in children:
                    c.wait()
                done, left = done + 1, left - 1
                damage()
                continue
            codes = [*([] if code is None else [code]), *(c.wait() for c in children[code is not None :])]
            if any(codes):
                raise AssertionError(f"exit codes {codes}: {output(children)[-2000:]}")
            break
        yield runs


def same_weights(a, b):
    a, b = load_file(a / "model/model.safetensors"), load_file(b / "model/model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def outcome(folder):
    """What a run leaves that another must leave too: weights, log without times, records, figures; and no litter."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            found[name] = [(line["step"], line.get("loss")) for line in read_jsonl(path)]
        elif path.name.endswith(".metrics.json"):
            found[name] = json.loads(path.read_text())["metrics"]
        else:
            found[name] = None if path.name.endswith("args.json") else path.read_bytes()
    return found


def with_ranks(record):
    candidates = [c | {"rank": k, "reward": -float(k)} for k, c in enumerate(record["candidates"])]
    return record | {"candidates": candidates}


class Rig:
    def __init__(self, folder, seed=0, piece=(1, 1)):
        self.folder, self.seed, self.piece, self.rows = folder, seed, piece, []
        make_model().save_pretrained(folder / "tiny")
        make_tokenizer().save_pretrained(folder / "tiny")
        self.data = write_jsonl(folder / "data.jsonl", make_records(24))
        prompts = [r | {"candidates": r["candidates"][:1]} for r in make_records(24)]
        self.prompts = write_jsonl(folder / "prompts.jsonl", prompts)
        self.reward = folder / "reward"
        make_reward_model(3).save_pretrained(self.reward)
        make_tokenizer().save_pretrained(self.reward)
        self.stopped = folder / "stopped"
        children = start("rescue", self.training_args("stopped"), folder)
        wait_for(lambda: common.checkpoints(self.stopped))
        children[0].kill()
        finish(children)

    def report(self, what, tried, lost, note=""):
        self.rows.append({"fault": what, "tried": tried, "lost": lost, "note": note})
        print(f"{what:38} tried {tried:4}  survived {tried - lost:4}  lost {lost:3}  {note}", flush=True)

    def share(self, cases):
        """The cases of this --piece."""
        return [*cases][self.piece[0] - 1 :: self.piece[1]]

    def training_args(self, name, *more):
        flags = [
            "--ordering",
            "label",
            "--lr",
            "1e-3",
            "--batch_size",
            "4",
            "--epochs",
            "4",
            "--checkpoint_every",
            "2",
            "--resume",
        ]
        paths = ["--data", self.data, "--model", self.folder / "tiny", "--output", self.folder / name]
        return [*flags, *paths, *more]

    def kill_training(self, world, kills):
        folder = self.folder / f"train{world}"
        folder.mkdir()
        lost = 0
        name = lambda run: self.training_args(f"train{world}/{run}")  # noqa: E731
        for run in random_kills("rescue", name, folder, world, kills, random.Random(self.seed + world)):
            steps = [line["step"] for line in read_jsonl(folder / f"run{run}/log.jsonl")]
            whole = same_weights(folder / "reference", folder / f"run{run}") and steps == list(range(1, 25))
            lost += not whole
        self.report(f"SIGKILL of training, {world} rank(s)", kills, lost)

    def kill_collecting(self, kills):
        folder = self.folder / "collect"
        folder.mkdir()
        rng, lost = random.Random(self.seed), 0

        def args(run):
            flags = ["--source", "tiny", "--num_samples", "2", "--max_new_tokens", "24", "--batch_size", "2"]
            paths = ["--model", self.folder / "tiny", "--input", self.prompts, "--output", folder / f"{run}.jsonl"]
            return ["sample", *flags, *paths]

        def tear():
            for part in folder.glob("*.part0"):
                text = part.read_bytes()
                last = len(text) - text[:-1].rfind(b"\n") - 1
                if text and rng.random() < 0.5:
                    part.write_bytes(text[: len(text) - rng.randrange(1, last)] if last > 1 else text)

        for run in random_kills("collect_candidates", args, folder, 1, kills, rng, tear):
            lost += (folder / f"run{run}.jsonl").read_bytes() != (folder / "reference.jsonl").read_bytes()
        self.report("SIGKILL of collecting, torn lines", kills, lost)

    def commands(self, folder):
        """{script and verb: its arguments without --output} of every script and verb that writes."""
        tiny, prompts, data, reward = self.folder / "tiny", self.prompts, self.data, self.reward
        train = ["--model", tiny, "--lr", "1e-3", "--batch_size", "8", "--checkpoint_every", "1", "--resume"]
        answers = ["--model", tiny, "--max_new_tokens", "4", "--batch_size", "4"]
        ranked = write_jsonl(folder / "ranked.jsonl", [with_ranks(r) for r in make_records(12)])
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

    def changed_files(self):
        """A file that a half-done command has read is another when it goes on: refused, naming it, with nothing
        touched; with the old one back it ends as an undisturbed run."""
        folder = self.folder / "changed"
        folder.mkdir()
        tiny, reward = self.folder / "tiny", self.reward
        (folder / "template.txt").write_text("Say: {prompt}")
        commands = self.commands(folder)
        commands["collect_candidates teacher"] += ["--prompt_file", folder / "template.txt"]
        model = [tiny / name for name in ("config.json", "tokenizer.json", "generation_config.json")]
        files = {
            "rescue": [self.data],  # of training alone the data is compared, not the model
            "pro": [folder / "ranked.jsonl"],
            "collect_candidates sample": [*model, tiny / "model.safetensors", self.prompts],
            "collect_candidates teacher": [folder / "template.txt"],
            "collect_candidates rank --by reward": [reward / "model.safetensors", folder / "ranked.jsonl"],
            "evaluate hh": [tiny / "model.safetensors", reward / "tokenizer.json"],
        }
        tried = lost = 0
        for what in self.share(files):
            script, *verb = what.split()
            last = "out.jsonl" if verb else "run"
            args = lambda name: [*verb, *commands[what], "--output", folder / name / last]  # noqa: E731
            name = what.replace(" ", "-")
            whole = start(script, args(f"{name}-whole"), folder, die_at=10**9)
            assert finish(whole) == [0], output(whole)[-2000:]
            calls = int(output(whole).rpartition("CALLS ")[2])
            finish(start(script, args(name), folder, die_at=2 * calls // 3))
            for file in files[what]:
                content, half = file.read_bytes(), outcome(folder / name)
                file.write_bytes(content[:-1] + (b"\1" if file.suffix == ".safetensors" else content[-1:] + b"\n"))
                refused = start(script, args(name), folder)
                codes = finish(refused)
                said = "error: " in output(refused) and "content of" in output(refused)
                bad = codes != [2] or not said or outcome(folder / name) != half
                file.write_bytes(content)
                tried, lost = tried + 1, lost + bad
                if bad:
                    print(f"  {what}, another {file.name}: {codes}: {output(refused)[-300:]}", flush=True)
            again = start(script, args(name), folder)
            bad = finish(again) != [0] or outcome(folder / name) != outcome(folder / f"{name}-whole")
            lost += bad
            if bad:
                print(f"  {what}, the old files again: {output(again)[-300:]}", flush=True)
        self.report("files that change under a resume", tried, lost)

    def processes_differ(self):
        """The second of two processes has another setting, data or folder: one sentence, no result."""
        folder = self.folder / "differ"
        folder.mkdir()
        commands, more = self.commands(folder), write_jsonl(folder / "more.jsonl", make_records(23))
        cases = [
            ("rescue", ["--alpha", "0.5"]),
            ("rescue", ["--data", more]),
            ("rescue", ["--data", folder / "missing.jsonl"]),
            ("rescue", ["--model", self.reward]),
            ("rescue", ["--output", folder / "elsewhere"]),
            ("pro", ["--seed", "3"]),
            ("tuna", ["--lr", "1e-2"]),
            ("reward_model", ["--batch_size", "4"]),
            ("collect_candidates sample", ["--temperature", "0.5"]),
            ("collect_candidates sample", ["--input", more]),
            ("evaluate nll", ["--input", more]),
            ("collect_candidates rank --by reward", ["--reward_model", self.folder / "tiny"]),
        ]
        lost, cases = 0, self.share(cases)
        for k, (what, change) in enumerate(cases):
            script, *verb = what.split()
            args = [*verb, *commands[what], "--output", folder / f"{k}" / ("out.jsonl" if verb else "run")]
            children = start(script, args, folder, 2, second=[*args, *change])
            codes = [children[k].wait(300) for k in (1, 0)]
            for c in children:  # torchrun ends the others
                c.kill()
            text = output(children)
            results = [p for p in (folder / f"{k}").rglob("*") if p.name in ("model", "out.jsonl")]
            bad = codes[0] in (0, None) or codes[1] == 0 or "error: " not in text or "Traceback" in text or results
            lost += bool(bad)
            if bad:
                print(f"  {what} {change}: {codes}: {text[-300:]}", flush=True)
        self.report("processes that differ", len(cases), lost)

    def signals(self):
        """Each signal saves and leaves with 0 and the resume command, two at once too; a resumed run is the whole
        one."""
        folder = self.folder / "signals"
        folder.mkdir()
        bad = 0
        finish(start("rescue", self.training_args("signals/reference"), folder))
        numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for k, (world, number) in enumerate(zip((1, 2, 1, 2), numbers)):
            children = start("rescue", self.training_args(f"signals/run{k}", "--checkpoint_every", "0"), folder, world)
            wait_for(lambda run=k: len(lines(folder / f"run{run}/log.jsonl")) >= 3 + run)
            children[-1].kill(number)
            codes = finish(children)
            told = "--resume" in output(children)
            again = finish(
                start("rescue", self.training_args(f"signals/run{k}", "--checkpoint_every", "0"), folder, world)
            )
            bad += codes != [0] * world or not told or again != [0] * world
            bad += world == 1 and not same_weights(folder / "reference", folder / f"run{k}")
        children = start("rescue", self.training_args("signals/twice", "--epochs", "400"), folder)
        wait_for(lambda: len(lines(folder / "twice/log.jsonl")) >= 2)
        os.kill(children[0].pid, signal.SIGSTOP)  # both signals before its next micro-batch
        children[0].kill(signal.SIGTERM)
        children[0].kill(signal.SIGINT)
        os.kill(children[0].pid, signal.SIGCONT)
        bad += finish(children, 60) != [0]
        self.report("SIGTERM, SIGINT, SIGHUP", 5, bad)

    def one_rank_dies(self):
        folder = self.folder / "dies"
        folder.mkdir()
        children = start("rescue", self.training_args("dies/run", "--epochs", "400"), folder, 2)
        wait_for(lambda: len(lines(folder / "run/log.jsonl")) >= 3)
        began = time.monotonic()
        children[1].kill()
        codes = finish(children, 60)
        seconds = time.monotonic() - began
        again = finish(
            start("rescue", self.training_args("dies/run", "--epochs", "400"), folder, 1), 1
        )  # it can be read
        bad = codes[0] is None or again not in ([None], [0])
        self.report("one rank of two dies", 1, int(bad), f"the other ended after {seconds:.1f} s")

    def disk_full(self):
        """A file size limit stops the second checkpoint: the first is whole, the message says so, and the run goes on
        from it."""
        folder = self.folder / "full"
        folder.mkdir()
        finish(start("rescue", self.training_args("full/reference"), folder))
        children = start("rescue", self.training_args("full/run"), folder)
        wait_for(lambda: common.checkpoints(folder / "run"))
        children[0].kill()
        finish(children)
        full = start("rescue", self.training_args("full/run"), folder, file_limit=50_000)
        codes = finish(full)
        said = "could not be saved" in output(full) and "Traceback" not in output(full)
        finish(start("rescue", self.training_args("full/run"), folder))
        bad = codes != [2] or not said or not same_weights(folder / "reference", folder / "run")
        self.report("disk full while saving", 1, int(bad), output(full).strip().splitlines()[-1][:90] if bad else "")

    def resume_elsewhere(self):
        """One checkpoint of 2 ranks, continued on 1, 2 and 4: the losses agree to rounding."""
        folder = self.folder / "elsewhere"
        folder.mkdir()
        children = start("rescue", self.training_args("elsewhere/run"), folder, 2)
        wait_for(lambda: common.checkpoints(folder / "run"))
        children[0].kill(signal.SIGTERM)
        finish(children)
        losses = {}
        for world in (1, 2, 4):
            shutil.copytree(folder / "run", folder / f"on{world}")
            args = self.training_args("elsewhere/run")
            args[args.index("--output") + 1] = folder / f"on{world}"
            codes = finish(start("rescue", args, folder, world))
            losses[world] = (
                [line["loss"] for line in read_jsonl(folder / f"on{world}/log.jsonl")] if not any(codes) else []
            )
        worst = max((abs(a - b) / abs(a) for w in (2, 4) for a, b in zip(losses[1], losses[w])), default=1.0)
        bad = int(not (len(losses[1]) == len(losses[2]) == len(losses[4]) == 24 and worst < 1e-4))
        self.report("resume on 1, 2 and 4 ranks", 3, 3 * bad, f"largest relative difference of a loss {worst:.1e}")

    def hostile_server(self, kills, rng):
        """`teacher` against a server that fails every prompt twice, each time in another way, and SIGKILLs meanwhile:
        every prompt once and in order, and the key in no file and no output."""
        folder = self.folder / "hostile"
        folder.mkdir()
        faults = [
            429,
            500,
            b"<html>",
            b"[1]",
            b'{"choices": []}',
            b'{"choices": [{}]}',
            "half",
            "silence",
            "flood",
            "drip",
        ]
        faults += [(503, {"Retry-After": "1"}), b'{"choices": [{"message": {"content": "\\ud800"}}]}']
        turns = {}

        def behave(prompt, nth, body):
            number = turns.setdefault(prompt, len(turns))
            return faults[(2 * number + nth) % len(faults)] if nth <= 2 else None

        records = [r | {"candidates": r["candidates"][:1]} for r in make_records(12)]
        source = write_jsonl(folder / "in.jsonl", records)
        os.environ["OPENAI_API_KEY"] = key = "sk-the-rigs-own-secret"
        with Server(behave) as server:
            flags = f"teacher --model m --base_url {server.url} --timeout 0.8 --concurrency 4 --source t"
            args = [*flags.split(), "--input", source, "--output", folder / "out.jsonl"]
            for _ in range(kills):
                children = start("collect_candidates", args, folder)
                if children[0].wait(rng.uniform(0.1, 3)) is None:
                    children[0].kill()
                    children[0].wait()
            again = start("collect_candidates", args, folder)
            codes = finish(again)
        done = read_jsonl(folder / "out.jsonl") if codes == [0] else []
        whole = [r["id"] for r in done] == [r["id"] for r in records]
        whole = whole and all(len(r["candidates"]) == 2 and r["candidates"][1]["text"].startswith("echo") for r in done)
        leaks = [p.name for p in folder.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
        bad = 0 if whole and not leaks else len(records)
        note = f"{sum(server.asked.values())} requests, {kills} kills; the key leaked into {leaks or 'nothing'}"
        self.report("hostile server", len(records), bad, note)

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


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


def table(rows):
    """Rows of one fault added up."""
    print("\n| fault | tried | survived | lost | |\n| --- | --- | --- | --- | --- |")
    for fault in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == fault]
        tried, lost = (sum(row[k] for row in some) for k in ("tried", "lost"))
        print(
            f"| {fault} | {tried} | {tried - lost} | {lost} | {'; '.join(row['note'] for row in some if row['note'])} |"
        )
    lost = sum(row["lost"] for row in rows)
    print(json.dumps({"tried": sum(row["tried"] for row in rows), "lost": lost}))
    return 1 if lost else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--kills", type=int, default=30, help="SIGKILLs each of training on 1 rank, on 2, of collecting; a fifth a verb"
    )
    add("--verbs", type=int, help="kill only so many of the scripts and verbs at system calls")
    add("--malformed", type=float, default=1.0, help="share of the corpus of malformed inputs")
    add("--seed", type=int, default=0)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--piece", type=lambda text: tuple(map(int, text.split("/"))), default=(1, 1), metavar="K/N")
    add("--rows", help="append the table's rows to this file, JSONL")
    add("--add", nargs="+", help="run nothing: one table of such files")
    args = parser.parse_args(argv)
    if args.add:
        return table([row for file in args.add for row in read_jsonl(file)])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rig, rng = Rig(pathlib.Path(folder), args.seed, args.piece), random.Random(args.seed)
        parts = {
            "train1": lambda: rig.kill_training(1, args.kills),
            "train2": lambda: rig.kill_training(2, args.kills),
            "collect": lambda: rig.kill_collecting(args.kills),
            "calls": lambda: rig.kill_at_calls(max(1, args.kills // 5), args.verbs),
            "changed": rig.changed_files,
            "processes": rig.processes_differ,
            "signals": rig.signals,
            "dies": rig.one_rank_dies,
            "full": rig.disk_full,
            "elsewhere": rig.resume_elsewhere,
            "hostile": lambda: rig.hostile_server(max(1, args.kills // 6), rng),
            "malformed": lambda: rig.malformed(args.malformed, rng),
        }
        for part in args.parts:
            parts[part]()
    if args.rows:
        with open(args.rows, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rig.rows)
    return table(rig.rows)


if __name__ == "__main__":
    sys.exit(main())
