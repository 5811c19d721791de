"""Fixtures: a tiny random Llama with a tokenizer trained on the spot, records, and the scripts called in this process
or as commands."""

import atexit
import collections
import contextlib
import functools
import importlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
torch.set_num_threads(1)

import common  # noqa: E402
from recipes.tiny import ROWS, make_model, make_reward_model, make_tokenizer  # noqa: E402

LABELS = ("entailment", "neutral", "contradiction")


def pytest_collection_modifyitems(items):
    """The recipes first: they are the longest file, and a worker that begins it last works alone."""
    items.sort(key=lambda item: item.path.name != "test_recipes.py")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with the tiny model: what --model takes."""
    return saved(tmp_path_factory.mktemp("tiny"), make_model())


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    """A random sequence classifier with one output."""
    return saved(tmp_path_factory.mktemp("reward"), make_reward_model(3))


@pytest.fixture
def own(tiny, tmp_path):
    """A copy of the tiny model's folder to change."""
    return shutil.copytree(tiny, tmp_path / "own")


def saved(folder, model):
    """The folder with this model and the tiny tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change(file, **changes):
    """Change these fields of a JSON file."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def change_weights(folder, change):
    """change(weights) edits the dict of a folder's tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_records(n=12, candidates=3):
    """n records with a human and `candidates` model responses of different lengths, labels and correctness
    annotated."""
    records = []
    for i, row in enumerate(ROWS[:n]):
        human = {"text": f"{row['explanation']} #### {row['label'].capitalize()}", "source": "human"}
        others = []
        for j in range(candidates):
            other = ROWS[(7 * i + 3 * j + 1) % len(ROWS)]
            text = other["explanation"].split()[: 3 + 2 * j]
            label = LABELS[(i + j) % 3]
            others.append({"text": f"{' '.join(text)} #### {label.capitalize()}", "source": "tiny"})
        for c in [human, *others]:
            c["label"] = c["text"].rpartition("#### ")[2].lower()
            c["correct"] = c["label"] == row["label"]
        prompt = f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\nAnswer:\n"
        records.append(
            {"id": f"r{i}", "task": "esnli", "prompt": prompt, "label": row["label"], "candidates": [human, *others]}
        )
    return records


def ranked_records(n=12, candidates=3):
    """The same with a rank and a reward: the human response first, then as they stand."""
    records = make_records(n, candidates)
    for record in records:
        record["candidates"] = [c | {"rank": k, "reward": -float(k)} for k, c in enumerate(record["candidates"])]
    return records


def nli(i, *texts, label="neutral"):
    """A small record: the first text is the human response, the others are a model's."""
    candidates = [{"text": t, "source": "human" if k == 0 else "m"} for k, t in enumerate(texts)]
    return {"id": f"r{i}", "task": "esnli", "prompt": f"prompt {i}", "label": label, "candidates": candidates}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", make_records())


Result = collections.namedtuple("Result", "code out err")


def launch(script, *args):
    """A script's main in this process -> its exit code. Its signal handlers and its lock end as with a process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        try:
            common.run_cli(importlib.import_module(script).main)
        except SystemExit as e:
            return e.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            common.open_run.lock = None
    return 0


@pytest.fixture
def cli(capfd):
    """cli("rescue", "--ordering", ...) runs a script's main in this process -> Result(code, out, err)."""

    def run(script, *args):
        capfd.readouterr()
        return Result(launch(script, *args), *capfd.readouterr())

    return run


@pytest.fixture
def preparing(cli, tmp_path):
    """preparing(rows, a file or files, *flags) -> (Result, output) of prepare --task pairs, or another --task."""

    def run(source, *flags):
        source = source if isinstance(source, list) else [source]
        names = [write_jsonl(tmp_path / "in.jsonl", source)] if isinstance(source[0], dict) else source
        output = pathlib.Path(tempfile.mkdtemp(dir=tmp_path)) / "out.jsonl"
        task = [] if "--task" in flags else ["--task", "pairs"]
        return cli("collect_candidates", "prepare", *task, "--input", *names, "--output", output, *flags), output

    return run


@pytest.fixture
def prepare(preparing):
    """prepare(rows, a file or files, *flags) -> the records."""

    def run(*args):
        result, output = preparing(*args)
        assert result.code == 0, result.err
        return read_jsonl(output)

    return run


@pytest.fixture
def train(cli, tiny, data, tmp_path):
    """train(name, *flags) -> Result: three steps of rescue.py, into tmp_path / name. Flags stand above the defaults."""

    def run(name, *flags, code=0):
        own = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / name]
        result = cli("rescue", *own, "--lr", 1e-3, "--batch_size", 4, *flags)
        assert result.code == code, result.err
        return result

    return run


@contextlib.contextmanager
def at_step(step, do):
    """Within it a run calls do() in the gradient of this step; 0: before the first."""
    calls = itertools.count()

    def then(function):
        def call(*args):
            result = function(*args)
            if next(calls) == step:
                do()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("on_stop", "clip_grad_norm"):  # on_stop is called once
            patch.setattr(common, name, then(getattr(common, name)))
        yield


def stopped_after(steps):
    """Within it a run gets SIGTERM when it has taken so many steps: it stops in its next row."""
    return at_step(steps, lambda: signal.raise_signal(signal.SIGTERM))


def killed_in_step(step):
    """Within it a run ends, as if killed, in this step's gradient: its process saves nothing more."""

    def die():
        raise ConnectionError("the machine went away")

    return at_step(step, die)


def weights(output, name="model"):
    return load_file(output / name / "model.safetensors")


def difference(one, other, name="model"):
    """The largest absolute difference of two runs' weights."""
    a, b = weights(one, name), weights(other, name)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def refused(result, *words):
    """Assert a user's error: one line on stderr (bars apart), exit code 2, each of `words` in it."""
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    message = result.err[result.err.index("error: ") :]
    for word in words:
        assert str(word) in message, (word, message)
    return message


@functools.cache
def warm_environment():
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="warm"))
    return stack.enter_context(warm.python(pathlib.Path(folder)))


def command(*args, check=True, cold=False, **kwargs):
    """Run a command line in the project's root, as a user does; python and torchrun are warm.py's, which start at once,
    or, cold, this environment's own."""
    args = [*map(str, args)]
    if args[0] == "torchrun" and "--standalone" not in args:
        args.insert(1, "--standalone")  # a free port
    env = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    if not cold:
        env |= {k: warm_environment()[k] for k in ("PATH", "PYTHON_EXEC")}
        args[0] = f"{env['PATH'].partition(':')[0]}/{'python' if args[0] == sys.executable else args[0]}"
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **kwargs)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def call(monkeypatch, *argv):
    """collect_candidates.py with these arguments, in this process; what it raises goes to the caller."""
    monkeypatch.setattr(sys, "argv", ["collect_candidates.py", *map(str, argv)])
    importlib.import_module("collect_candidates").main()


def run(monkeypatch, *argv):
    """The same as a command: an error is a sentence and an exit code."""
    common.run_cli(lambda: call(monkeypatch, *argv))


def rank(monkeypatch, folder, records, *flags, output="o.jsonl"):
    """collect_candidates.py rank of these records -> the records of its output."""
    source = write_jsonl(folder / "d.jsonl", records)
    run(monkeypatch, "rank", "--input", source, "--output", folder / output, *flags)
    return read_jsonl(folder / output)


def metrics_of(folder, verb, name="tiny"):
    return json.loads((folder / f"runs/eval/{name}/{verb}.metrics.json").read_text())["metrics"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


RANKABLE = {
    "id": "q",
    "prompt": "Task: name the capital. Response:",
    "instruction": "name the capital {city}",
    "candidates": [
        {"text": "The original", "source": "reference"},
        {"text": "bb", "source": "m"},
        {"text": "bb ", "source": "m"},
        {"text": "a", "source": "m"},
        {"text": "cccc", "source": "m"},
    ],
}
