"""--track: the figures of log.jsonl in TensorBoard and in Weights & Biases, each step once."""

import subprocess
import sys
import types

import pytest
from conftest import ROOT, command, killed_in_step, read_jsonl, refused, stopped_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import train


def tracked(folder):
    """What TensorBoard shows of a run: {figure: [(step, value)]}."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = {*events.Tags()["scalars"]} - {"step"}
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


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
    """A checkpoint after step 2, a step and an evaluation that are lost with the process, and the run goes on."""
    flags = ["--track", "tensorboard", "--eval_data", data, "--eval_every", 3, "--checkpoint_every", 2]
    with killed_in_step(4):
        assert train(cli, tiny, data, tmp_path / "run", *flags).code == 2
    assert [x["step"] for x in read_jsonl(tmp_path / "run/log.jsonl")] == [0, 1, 2, 3, 3]
    assert train(cli, tiny, data, tmp_path / "run", "--resume", *flags).code == 0
    shown = tracked(tmp_path / "run")
    assert shown == logged(tmp_path / "run") and [s for s, _ in shown["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [s for s, _ in shown["eval_loss"]] == [0, 3, 6]


def test_a_tracker_from_the_second_start_on(cli, tiny, data, tmp_path):
    with stopped_after(2):
        assert train(cli, tiny, data, tmp_path / "run").code == 0
    assert train(cli, tiny, data, tmp_path / "run", "--resume", "--track", "tensorboard").code == 0
    assert tracked(tmp_path / "run")["loss"] == logged(tmp_path / "run")["loss"][2:]


def test_two_processes_write_one_log(tiny, data, tmp_path):
    flags = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--batch_size", 4]
    command("torchrun", "--nproc_per_node", "2", "rescue.py", *flags, "--track", "tensorboard")
    assert tracked(tmp_path / "run") == logged(tmp_path / "run")
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_not_installed(cli, tiny, data, tmp_path, name, monkeypatch):
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(train(cli, tiny, data, tmp_path / "run", "--track", name), f"--track {name}", f"pip install {name}")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_the_same_curves(cli, tiny, data, tmp_path, monkeypatch, name):
    begun, steps = [], []

    def init(**about):
        begun.append(about)
        return types.SimpleNamespace(log=lambda figures, step: steps.append((step, figures["loss"])))

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    with stopped_after(2):
        assert train(cli, tiny, data, tmp_path / "run", "--track", name).code == 0
    assert train(cli, tiny, data, tmp_path / "run", "--track", name, "--resume").code == 0
    assert begun[0]["name"] == begun[1]["name"] == "run" and begun[1]["resume"] == "allow"
    assert steps == [(x["step"], x["loss"]) for x in read_jsonl(tmp_path / "run/log.jsonl")]
    if name == "wandb":
        assert begun[0]["id"] == begun[1]["id"]
        assert train(cli, tiny, data, tmp_path / "other/run", "--track", name).code == 0
        assert begun[2]["id"] != begun[0]["id"]


def test_nothing_is_imported_unasked(tiny, data, tmp_path):
    code = "import sys, rescue; rescue.main(); assert not {'tensorboard', 'wandb', 'trackio'} & sys.modules.keys()"
    flags = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--batch_size", 8]
    subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, check=True)
