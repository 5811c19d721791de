"""--track: the figures of log.jsonl in TensorBoard and in Weights & Biases, each step once."""

import subprocess
import sys
import types

import pytest
from conftest import ROOT, command, read_jsonl, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import stop_after, train


def tracked(folder):
    """What TensorBoard shows of a run: {figure: [(step, value)]}."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def logged(folder):
    figures = {}
    for line in read_jsonl(folder / "log.jsonl"):
        for name in line.keys() - {"step"}:
            figures.setdefault(name, []).append((line["step"], pytest.approx(float(line[name]), rel=1e-6)))
    return figures


def test_tensorboard_shows_the_log(cli, tiny, data, tmp_path):
    flags = ["--track", "tensorboard", "--eval_data", data, "--eval_every", 2]
    assert train(cli, tiny, data, tmp_path / "run", *flags).code == 0
    shown = tracked(tmp_path / "run")
    assert shown == logged(tmp_path / "run") and {"loss", "lr", "pair_accuracy", "eval_loss", "best"} <= shown.keys()
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_doubles_no_step(cli, tiny, data, tmp_path):
    """A checkpoint after step 2, two more steps that are lost with the process, and the run goes on: with a tracker
    from its first step on, or from the second start."""
    for before, after in (("tensorboard", "tensorboard"), (None, "tensorboard")):
        run, flags = tmp_path / f"{before}", ["--track", before] if before else []
        patch = stop_after(2)
        assert train(cli, tiny, data, run, *flags).code == 0
        patch.undo()
        with open(run / "log.jsonl", "a") as f:  # as a kill leaves it: a step beyond the checkpoint
            f.write('{"step": 3, "loss": 99.0}\n')
        assert train(cli, tiny, data, run, "--resume", "--track", after).code == 0
        assert tracked(run) == logged(run) and [s for s, _ in tracked(run)["loss"]] == [1, 2, 3, 4, 5, 6]


def test_two_processes_write_one_log(tiny, data, tmp_path):
    flags = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--batch_size", 4]
    command("torchrun", "--nproc_per_node", "2", "rescue.py", *flags, "--track", "tensorboard")
    assert tracked(tmp_path / "run") == logged(tmp_path / "run")
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_not_installed(cli, tiny, data, tmp_path, name, monkeypatch):
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(train(cli, tiny, data, tmp_path / "run", "--track", name), f"--track {name}", f"pip install {name}")
    assert not (tmp_path / "run").exists()


def test_wandb_goes_on_with_the_same_run(cli, tiny, data, tmp_path, monkeypatch):
    begun, steps = [], []

    def init(**about):
        begun.append(about)
        return types.SimpleNamespace(log=lambda figures, step: steps.append((step, figures["loss"])))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    patch = stop_after(2)
    assert train(cli, tiny, data, tmp_path / "run", "--track", "wandb").code == 0
    patch.undo()
    assert train(cli, tiny, data, tmp_path / "run", "--track", "wandb", "--resume").code == 0
    assert begun[0]["id"] == begun[1]["id"] and begun[1]["resume"] == "allow" and begun[0]["name"] == "run"
    assert steps == [(x["step"], x["loss"]) for x in read_jsonl(tmp_path / "run/log.jsonl")]
    assert train(cli, tiny, data, tmp_path / "run", "--track", "wandb", "--overwrite").code == 0
    assert begun[2]["id"] != begun[0]["id"]


def test_nothing_is_imported_unasked(tiny, data, tmp_path):
    code = "import sys, rescue; rescue.main(); assert not {'tensorboard', 'wandb'} & sys.modules.keys()"
    flags = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--batch_size", 8]
    subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, check=True)
