"""make gpu: its small form on a CPU (on CUDA: all of it), and what becomes of a part that fails."""

import json
import os
import sys
import time

import pytest
import torch
from conftest import ROOT, command

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

import common  # noqa: E402


def test_every_part_passes(tmp_path, monkeypatch):
    """As a command: every part is in gpu.json, the steps' tables are what bench.py shows."""
    monkeypatch.setenv("OUT", str(tmp_path))
    shown = command(sys.executable, "benchmarks/gpu.py", "--minutes", "9").stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {k: v.get("error", v["passed"]) for k, v in report["parts"].items()} == dict.fromkeys(gpu.PARTS, True)
    for name in ("steps_1b", "steps_7b"):
        table = command(sys.executable, "benchmarks/bench.py", "--show", "--output", tmp_path / f"{name}.json").stdout
        assert table.splitlines()[-1] in shown and (tmp_path / f"{name}.seconds.png").exists()
        assert "| padded" in table and "| ours+checkpoint |" in table


@pytest.fixture
def device():
    yield common.init_distributed()[2]
    torch.distributed.destroy_process_group()


def test_attention_finds_a_wrong_mask(device, monkeypatch):
    """A window that is one token off, and prompts that see each other."""
    row = gpu.some_rows(device)[0]
    errors = lambda: gpu.attention_errors(row, 4, 2, 16, torch.float32, "mistral", device)  # noqa: E731
    assert errors() < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "KINDS", {"mistral": {"sliding_window": gpu.KINDS["mistral"]["sliding_window"] + 1}})
        build = gpu.build
        patch.setattr(gpu, "build", lambda *args: [m := build(*args), setattr(m.config, "sliding_window", 100)][0])
        assert errors() > 0.01
    monkeypatch.setattr(common, "sees", lambda query, key, *rest: key <= query)
    assert errors() > 0.1


def test_what_a_part_found_stays_whatever_becomes_of_it():
    """One fails, one hangs, one dies, one passes: each after it said something."""

    def fails(save):
        save(nats=1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def hangs(save):
        save(nats=1)
        time.sleep(60)

    def dies(save):
        save(nats=1)
        os._exit(3)

    written = []
    found = [gpu.run_part(part, 1, lambda found: written.append(dict(found))) for part in (fails, hangs, dies)]
    assert all(x["nats"] == 1 and not x["passed"] for x in found) and written.count({"nats": 1}) == 3
    errors = [x["error"].splitlines()[-1] for x in found]
    assert errors[1:] == ["stopped after 1 s", "its process died"] and errors[0].endswith("CUDA out of memory")
    assert gpu.run_part(lambda save: {"passed": True}, 20)["passed"]


def test_what_a_part_started_does_not_go_on(tmp_path):
    """Past its time a part's own process, which would hold the GPU's memory, ends too."""

    def part(save):
        gpu.FORK.Process(target=lambda: [time.sleep(2), (tmp_path / "late").touch()]).start()
        time.sleep(60)

    gpu.run_part(part, 0.5)
    time.sleep(2)
    assert not (tmp_path / "late").exists()
