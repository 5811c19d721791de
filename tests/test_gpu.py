"""make gpu's checks: all on CUDA, on a CPU in small sizes those that are quick there."""

import json
import sys

import pytest
import torch
from conftest import ROOT, command

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

import runtime  # noqa: E402

CUDA = torch.cuda.is_available()
CHECKS = gpu.CHECKS if CUDA else [gpu.kernel, gpu.packed, gpu.tolerance, gpu.head]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check(check):
    torch._dynamo.reset()  # row lengths of earlier tests make sizes dynamic, and torch 2.13's C++ for flex then fails
    _, _, device = runtime.init_distributed()
    try:
        result = check(device)
    finally:
        torch.distributed.destroy_process_group()
    assert result["passed"], result


@pytest.mark.skipif(CUDA, reason="says so without CUDA alone")
def test_without_cuda_it_says_so():
    assert "no CUDA device here" in command(sys.executable, "benchmarks/gpu.py").stdout


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_command():
    command(sys.executable, "benchmarks/gpu.py", "--parts", "packed")


def test_a_part_that_fails_is_on_the_page_and_the_next_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "CHECKS", [kernel, packed])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "kernel", "packed"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runtime, "init_distributed", lambda: (0, 1, torch.device("cpu")))
    gpu.main()
    folder = tmp_path / "benchmarks/results/some-gpu"
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    assert not parts["kernel"]["passed"] and "out of memory" in parts["kernel"]["error"] and parts["packed"]["passed"]
    assert "| kernel | FAILED |" in (folder / "gpu.md").read_text()


def kernel(device):
    raise torch.OutOfMemoryError("out of memory")


def packed(device):
    return {"passed": True}
