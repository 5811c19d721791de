"""--track: the figures of log.jsonl in TensorBoard, Weights & Biases and trackio, each step once."""

import sys
import types

import pytest
from conftest import killed_in_step, read_jsonl, refused, stopped_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_shows_the_log_and_a_resumed_run_doubles_no_step(train, data, tmp_path):
    """A checkpoint after step 2, an evaluation that is lost with the process, and the run goes on."""
    flags = ["--track", "tensorboard", "--eval_data", data, "--eval_every", 2, "--checkpoint_every", 1]
    with killed_in_step(3):
        train("run", *flags, code=2)
    train("run", "--resume", *flags)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0}).Reload()
    lines = read_jsonl(tmp_path / "run/log.jsonl")
    assert {"step", "loss", "eval_loss", "best"} <= {*events.Tags()["scalars"]}
    for name in {*events.Tags()["scalars"]} - {"step"}:
        logged = [(x["step"], pytest.approx(float(x[name]), rel=1e-6)) for x in lines if name in x]
        assert [(e.step, e.value) for e in events.Scalars(name)] == logged
    assert [e.step for e in events.Scalars("eval_loss")] == [0, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_not_installed(train, name, monkeypatch):
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(train("run", "--track", name, code=2), f"--track {name}", f"pip install {name}")
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
    assert begun[0].get("id") == begun[1].get("id")
    assert steps == [(x["step"], x["loss"]) for x in read_jsonl(tmp_path / "run/log.jsonl")]
