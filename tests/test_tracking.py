"""--track: the figures of log.jsonl in TensorBoard and in Weights & Biases, each step once."""

import sys
import types

import pytest
from conftest import command, killed_in_step, read_jsonl, refused, stopped_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


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


def test_tensorboard_shows_the_log_and_a_resumed_run_doubles_no_step(train, data, tmp_path):
    """A checkpoint after step 2, an evaluation that is lost with the process, and the run goes on."""
    flags = ["--track", "tensorboard", "--eval_data", data, "--eval_every", 2, "--checkpoint_every", 1]
    with killed_in_step(3):
        train("run", *flags, code=2)
    assert [x["step"] for x in read_jsonl(tmp_path / "run/log.jsonl")] == [0, 1, 2, 2]
    train("run", "--resume", *flags)
    shown = tracked(tmp_path / "run")
    assert shown == logged(tmp_path / "run") and {"loss", "lr", "pair_accuracy", "eval_loss", "best"} <= shown.keys()
    assert [s for s, _ in shown["loss"]] == [1, 2, 3] and [s for s, _ in shown["eval_loss"]] == [0, 2, 3]


def test_a_tracker_from_the_second_start_on(train, tmp_path):
    with stopped_after(2):
        train("run")
    train("run", "--resume", "--track", "tensorboard")
    assert tracked(tmp_path / "run")["loss"] == logged(tmp_path / "run")["loss"][2:]


def test_two_processes_write_one_log(tiny, data, tmp_path):
    flags = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--batch_size", 6]
    command("torchrun", "--nproc_per_node", "2", "rescue.py", *flags, "--track", "tensorboard")
    assert tracked(tmp_path / "run") == logged(tmp_path / "run")
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_not_installed(train, tmp_path, name, monkeypatch):
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(train("run", "--track", name, code=2), f"--track {name}", f"pip install {name}")
    assert not (tmp_path / "run/model").exists()
    train("run")  # nothing of them is imported unasked


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_the_same_curves(train, tmp_path, monkeypatch, name):
    begun, steps = [], []

    def init(**about):
        begun.append(about)
        return types.SimpleNamespace(log=lambda figures, step: steps.append((step, figures["loss"])))

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    with stopped_after(2):
        train("run", "--track", name)
    train("run", "--track", name, "--resume")
    assert begun[0]["name"] == begun[1]["name"] == "run" and begun[1]["resume"] == "allow"
    assert steps == [(x["step"], x["loss"]) for x in read_jsonl(tmp_path / "run/log.jsonl")]
    if name == "wandb":
        assert begun[0]["id"] == begun[1]["id"]
        train("other/run", "--track", name)
        assert begun[2]["id"] != begun[0]["id"]
