"""common.py's run: a run's folder, steps and end, as README promises them: nothing stale, nothing lost, no code from
data."""

import fcntl
import pathlib
import re
import shlex
import shutil
import signal
import sys
import types

import pytest
import torch
from conftest import (
    ROOT,
    change,
    change_weights,
    command,
    difference,
    make_model,
    make_records,
    read_jsonl,
    refused,
    stopped_after,
    weights,
    write_jsonl,
)
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

import common
import rescue


@pytest.fixture
def half(train, tmp_path):
    """The folder of a run that was stopped after two of three steps."""
    with stopped_after(2):
        train("half")
    assert [p.name for p in (tmp_path / "half/checkpoints").iterdir()] == ["step-00000002"]
    return tmp_path / "half"


def losses(output):
    return [(x["step"], x["loss"]) for x in read_jsonl(output / "log.jsonl") if "loss" in x]


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


class TestTheFolder:
    def test_a_retrained_model_is_not_given_the_old_figures(self, cli, own, data, tmp_path):
        flags = ["--model", own, "--input", data, "--by", "label", "--output", tmp_path / "r.jsonl"]
        assert cli("evaluate", "ranking", *flags).code == 0 and cli("evaluate", "ranking", *flags).code == 0
        make_model(seed=5).save_pretrained(own)
        refused(cli("evaluate", "ranking", *flags), "content of", own)

    @pytest.mark.parametrize("changed", ["--data", "--eval_data", "--alpha"])
    def test_a_run_whose_arguments_or_data_changed_is_not_resumed(self, train, data, tmp_path, changed):
        held_out = write_jsonl(tmp_path / "e.jsonl", read_jsonl(data)[:3])
        flags = ["--eval_data", held_out, "--max_train_samples", 8]
        with stopped_after(1):
            train("run", *flags)
        if changed == "--alpha":
            refused(train("run", *flags, "--resume", "--alpha", "0.2", code=2), "--alpha 0.1 -> 0.2")
            train("run", *flags, "--resume", "--checkpoint_every", 1, "--max_tokens_per_row", 90)  # change no figure
        else:
            path = {"--data": data, "--eval_data": held_out}[changed]
            path.write_text(path.read_text() + "\n")
            refused(train("run", *flags, "--resume", code=2), "arguments differ from the run's", f"content of {path}")

    @pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"settings'])
    def test_an_empty_args_file_is_no_free_pass(self, train, half, content):
        (half / "args.json").write_text(content)
        refused(train("half", "--resume", "--lr", "1e-2", code=2))

    @pytest.mark.parametrize("flags", [[], ["--resume"]])
    def test_a_foreign_args_file_stays(self, train, tmp_path, flags):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/args.json").write_text('{"mine": 1}')
        refused(train("out", *flags, code=2), "something else than a run")
        assert (tmp_path / "out/args.json").read_text() == '{"mine": 1}'

    def test_two_runs_do_not_share_a_folder(self, train, half):
        with open(half / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            refused(train("half", "--resume", code=2), "another run is writing there")
        train("half", "--resume")

    @pytest.mark.parametrize("flags, word", [(["--model", "/none"], "--model"), (["--track", "wandb"], "pip")])
    def test_a_run_that_failed_at_its_start_can_be_begun_again(self, train, flags, word, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        refused(train("run", *flags, code=2), word)
        train("run")

    def test_a_finished_run_stays_as_it_is(self, train, tmp_path):
        train("run")
        before = contents(tmp_path / "run")
        assert "is finished" in train("run", "--resume").out
        refused(train("run", code=2), "is not empty", "--resume", "another folder")
        assert before == contents(tmp_path / "run")
        assert {p.name for p in (tmp_path / "run").iterdir()} == {"lock", "args.json", "log.jsonl", "model"}

    def test_nothing_deletes_its_own_input(self, train, tmp_path):
        """A model or data inside the output folder is refused, also with --resume, and stays as it is."""
        (tmp_path / "run").mkdir()
        data = write_jsonl(tmp_path / "run/data.jsonl", make_records(4))
        for more in ((), ("--resume",)):
            refused(train("run", "--data", data, *more, code=2), "holds something else than a run")
        assert len(read_jsonl(data)) == 4
        data = data.rename(tmp_path / "d.jsonl")
        train("run", "--data", data)
        before = contents(tmp_path / "run")
        for more, word in (((), "is not empty"), (("--resume",), "--model")):
            refused(train("run", "--data", data, "--model", tmp_path / "run/model", *more, code=2), word)
        assert before == contents(tmp_path / "run")


class TestNoCodeFromData:
    def test_a_model_folders_code_is_not_run(self, own, data, tmp_path):
        code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        change(own / "config.json", model_type="evil", auto_map=code)
        (own / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = None\n")
        flags = ["--model", own, "--data", data, "--output", tmp_path / "o"]
        done = command(sys.executable, "rescue.py", "--ordering", "label", *flags, check=False, input="y\n")
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "ran").exists()

    def test_a_checkpoint_holds_no_pickle(self, half):
        saved = [p for p in (half / "checkpoints").rglob("*") if p.is_file()]
        assert saved and {p.suffix for p in saved} <= {".safetensors", ".json"}

    @pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
    def test_a_torn_shard_is_not_resumed(self, train, half, part):
        [shard] = (half / "checkpoints").rglob("*.safetensors")
        content = shard.read_bytes()
        shard.write_bytes(content[: int(len(content) * part)])
        refused(train("half", "--resume", code=2), "is damaged", shard.parent)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_each_saves_and_says_how_to_continue(self, train, tmp_path, number, monkeypatch):
        monkeypatch.setattr(signal, "SIGTERM", number)  # what stopped_after raises
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and then a run ignores it too
        with stopped_after(2):
            out = train("a run").out
        assert (tmp_path / "a run/checkpoints/step-00000002").exists() and len(losses(tmp_path / "a run")) == 2
        [again] = re.findall("continue with: (python rescue.py .*)", out)
        assert "resuming after step 2" in command(*shlex.split(again)).stdout and (tmp_path / "a run/model").exists()

    def test_two_processes_stop_and_one_continues(self, train, tiny, data, tmp_path):
        stop = "import conftest; sys.argv[0] = 'rescue.py'; stop = conftest.stopped_after(2); stop.__enter__()"
        flags = ["--ordering", "label", "--lr", "1e-3", "--batch_size", 4, "--model", tiny, "--data", data]
        done = on_two(tmp_path, [*flags, "--output", tmp_path / "run"], stop)
        assert "continue with: torchrun --nproc_per_node 2 rescue.py" in done.stdout
        train("run", "--resume")
        train("one")
        assert difference(tmp_path / "run", tmp_path / "one") < 2e-6
        assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]

    def test_an_interrupted_evaluation_is_done_again(self, train, data, tmp_path, monkeypatch):
        flags = ["--eval_data", data, "--eval_every", 2]
        train("whole", *flags)
        evaluate, calls = rescue.evaluate, []

        def evaluate_and_stop(*args):
            calls.append(1)
            if len(calls) == 2:  # after step 2
                signal.raise_signal(signal.SIGTERM)
            return evaluate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(rescue, "evaluate", evaluate_and_stop)
            train("run", *flags)
        assert [x["step"] for x in read_jsonl(tmp_path / "run/log.jsonl")] == [0, 1, 2]
        assert not (tmp_path / "run/best").exists()
        train("run", *flags, "--resume")
        a, b = (read_jsonl(tmp_path / x / "log.jsonl") for x in ("whole", "run"))
        assert [x | {"seconds": 0} for x in a] == [x | {"seconds": 0} for x in b]
        assert [x["step"] for x in a if "eval_loss" in x] == [0, 2, 3]
        assert difference(tmp_path / "whole", tmp_path / "run", "best") == 0

    def test_an_ignored_signal_stays_ignored(self, train, tmp_path, monkeypatch):
        """As nohup sets SIGHUP: the run goes on when its terminal closes."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        monkeypatch.setattr(signal, "SIGTERM", signal.SIGHUP)  # what stopped_after raises
        with stopped_after(2):
            train("run")
        assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run/model").exists()


class TestTheEnd:
    def test_a_disk_full_at_the_final_save_loses_nothing(self, train, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise SafetensorError("Error while serializing: IoError(No space left on device)")

        train("whole", "--checkpoint_every", 0)
        with monkeypatch.context() as context:
            context.setattr(LlamaForCausalLM, "save_pretrained", full)
            done = train("run", "--checkpoint_every", 0, code=2)
        refused(done, tmp_path / "run/model", "could not be saved", "No space left")
        assert "resuming after step 3" in train("run", "--checkpoint_every", 0, "--resume").out
        assert difference(tmp_path / "run", tmp_path / "whole") == 0

    def test_killed_before_its_checkpoints_go_it_cleans_at_the_next_start(self, train, tmp_path, monkeypatch):
        with monkeypatch.context() as context:
            context.setattr(common, "drop_checkpoints", lambda output: (_ for _ in ()).throw(KeyboardInterrupt))
            train("run", code=130)
        assert (tmp_path / "run/checkpoints").exists() and (tmp_path / "run/model/config.json").exists()
        train("run", "--resume")
        assert not (tmp_path / "run/checkpoints").exists()

    def test_what_is_saved_is_synced_before_what_it_replaces_goes(self, train, tmp_path, monkeypatch):
        """Files, their folder, and after the renaming the folder that holds its name."""
        done, sync, remove, replace = [], common.sync, shutil.rmtree, common.os.replace
        monkeypatch.setattr(common, "sync", lambda path: (done.append(("sync", pathlib.Path(path))), sync(path)))
        monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (done.append(("gone", path)), remove(path, **more)))
        monkeypatch.setattr(common.os, "replace", lambda a, b: (done.append(("named", b)), replace(a, b)))
        train("run", "--checkpoint_every", 2)
        out, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
        for new, gone, files in (
            (checkpoints / "step-00000003", checkpoints / "step-00000002.part", 1),
            (out / "model", checkpoints, 5),
        ):
            before = done[: len(done) - done[::-1].index(("gone", gone)) - 1]
            named, part = before.index(("named", new)), new.with_name(f"{new.name}.part")
            first = [path for what, path in before[:named] if what == "sync"]
            assert part in first and sum(path.parent == part for path in first) >= files
            assert ("sync", new.parent) in before[named:]


def test_the_log_has_a_line_a_step(train, data, tmp_path):
    train("run", "--eval_data", data, "--eval_every", 2)
    lines = read_jsonl(tmp_path / "run/log.jsonl")
    figures = {"loss", "rank_loss", "sft_loss", "best_score", "pair_accuracy", "gap"}
    assert [x["step"] for x in lines] == [0, 1, 2, 2, 3, 3]
    for x in lines:
        more = {f"eval_{k}" for k in figures} | {"best"} if "best" in x else figures | {"grad_norm", "lr", "seconds"}
        assert x.keys() == {"step"} | more
    assert lines[1]["best_score"] < 0 < lines[1]["seconds"]
    assert not lines[0]["best"]  # the untrained model


def test_a_trained_model_has_a_card(train, data, tmp_path):
    train("run", "--alpha", 0.2)
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None  # a folder is no hub id
    said = ["https://arxiv.org/abs/2311.09136", "rescue.py --ordering label", '"alpha": 0.2', f"content of {data}"]
    assert all(text in card.text for text in said)


def test_a_torn_line_and_steps_after_the_checkpoint_leave_the_log(train, half):
    before = (half / "log.jsonl").read_text()
    with open(half / "log.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    train("half", "--resume")
    assert (half / "log.jsonl").read_text().startswith(before)
    assert [step for step, _ in losses(half)] == [1, 2, 3] and 99.0 not in dict(losses(half)).values()


TWO = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import common, rescue
sys.argv = ["rescue.py", *{argv!r}]
leave, os._exit = os._exit, lambda code: (print("exit code", code, file=sys.stderr, flush=True), leave(code))
if os.environ["RANK"] == "1":
    {change}
common.run_cli(rescue.main)
"""


def on_two(tmp_path, argv, change):
    """rescue.py on two gloo processes, the second after `change`."""
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT), argv=[*map(str, argv)], change=change))
    return command("torchrun", "--nproc_per_node", 2, tmp_path / "two.py", check=False)


@pytest.mark.parametrize(
    "change, words",
    [
        ("sys.argv[sys.argv.index('--output') + 1] += 'x'", "process 1: error: --output"),
        ("sys.argv += ['--alpha', '0.5']", "other arguments, or sees another folder, than process 0\nexit code 2\n"),
        ("torch.Tensor.backward = lambda *a, **k: 1 / 0", "process 1: error: ZeroDivisionError"),
        (
            "score = rescue.candidate_logprobs\n"
            "    rescue.candidate_logprobs = lambda *more: [x * torch.nan for x in score(*more)]",
            "rescue.py: error: the loss is not finite for records r",
        ),
    ],
)
def test_a_process_that_differs_says_so(tiny, data, tmp_path, change, words):
    argv = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "out", "--batch_size", 4]
    done = on_two(tmp_path, argv, change)
    assert done.returncode != 0 and done.stderr.count(words) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr.partition(words)[0].rpartition("rescue.py")[0]
    assert not (tmp_path / "out/model").exists()


def test_learning_rate():
    args = types.SimpleNamespace(lr=1.0, warmup=2, schedule="cosine")
    rates = [common.learning_rate(s, 10, args) for s in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[6] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    args = types.SimpleNamespace(lr=1.0, warmup=0.25, schedule="constant")
    assert [common.learning_rate(s, 8, args) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_bf16_on_a_cpu(train, tmp_path):
    """--bf16 computes otherwise than fp32, to a bf16's precision alike, resumes bit by bit and keeps fp32 masters. A
    next stage moves at --lr 1e-6, as Tuna's: written in bf16, nearly every weight would come out as it went in."""
    train("fp32")
    train("bf16", "--bf16")
    with stopped_after(2):
        train("half", "--bf16")
    train("half", "--bf16", "--resume")
    assert difference(tmp_path / "bf16", tmp_path / "half") == 0
    full, coarse = ([loss for _, loss in losses(tmp_path / name)] for name in ("fp32", "bf16"))
    assert full != coarse and coarse == pytest.approx(full, rel=0.02)
    train("second", "--model", tmp_path / "bf16/model", "--bf16", "--lr", "1e-6")
    first, second = weights(tmp_path / "bf16"), weights(tmp_path / "second")
    a, b = (torch.cat([w[k].flatten() for k in w if "proj" in k]) for w in (first, second))  # few embeddings are read
    assert (
        b.dtype == torch.float32 and (a != b).float().mean() > 0.9 > 0.1 > (a.bfloat16() != b.bfloat16()).float().mean()
    )


@pytest.mark.parametrize(
    "verb",
    [
        ("collect_candidates", "sample", "--max_new_tokens", 4),
        ("collect_candidates", "rank", "--by", "prm"),
        ("collect_candidates", "rank", "--by", "logprob"),
        ("evaluate", "nll"),
    ],
    ids=lambda verb: verb[-1] if "--by" in verb else verb[1],
)
def test_a_model_that_gives_nan_stops(cli, own, data, tmp_path, verb):
    """Its weights are NaN in one place that every token reads."""
    change_weights(own, lambda weights: weights["model.norm.weight"][0].fill_(torch.nan))
    records = [r | {"candidates": [c | {"rank": None} for c in r["candidates"]]} for r in read_jsonl(data)]
    data = write_jsonl(tmp_path / "unranked.jsonl", records)
    refused(cli(*verb, "--model", own, "--input", data, "--output", tmp_path / "o.jsonl"), "not finite")
    assert not (tmp_path / "o.jsonl").exists()


def test_counts_that_no_text_has_or_no_memory_holds(train, tmp_path):
    refused(train("run", "--epochs", 10_001, code=2), "out of range")
    [record] = make_records(1)
    record["candidates"] = [c | {"num_tokens": 1e300, "logprob": -1.0} for c in record["candidates"]]
    data = write_jsonl(tmp_path / "d.jsonl", [record])
    refused(train("run", "--data", data, code=2), "d.jsonl:1", "num_tokens")
