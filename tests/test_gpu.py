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
    """Prompts that see each other."""
    row = gpu.some_rows(device)[0]
    errors = lambda: gpu.attention_errors(row, 4, 2, 16, torch.float32, "mistral", device)  # noqa: E731
    assert errors() < 1e-5
    monkeypatch.setattr(common, "sees", lambda query, key, *rest: key <= query)
    assert errors() > 0.1


def test_what_a_part_found_stays_whatever_becomes_of_it():
    """One fails, one hangs, one dies: each after it said something."""

    def part(end):
        return lambda save: [save(nats=1), end()]

    ends = (lambda: 1 / 0, lambda: time.sleep(60), lambda: os._exit(3))
    found = [gpu.run_part(part(end), 1, lambda found: None) for end in ends]
    assert all(x["nats"] == 1 and not x["passed"] for x in found)
    errors = [x["error"].splitlines()[-1] for x in found]
    assert errors[1:] == ["stopped after 1 s", "its process died"] and "ZeroDivisionError" in errors[0]
