"""make gpu's checks: all on CUDA, on a CPU in small sizes those that are quick there."""

import json
import sys
import time

import pytest
import torch
from conftest import ROOT, command

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

import common  # noqa: E402

CUDA = torch.cuda.is_available()
CHECKS = gpu.CHECKS if CUDA else [gpu.kernel, gpu.packed, gpu.tolerance, gpu.head, gpu.memory]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check(check):
    torch._dynamo.reset()  # row lengths of earlier tests make sizes dynamic, and torch 2.13's C++ for flex then fails
    _, _, device = common.init_distributed()
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


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page("--parts", ...) is the command where there is a GPU, its parts run on the CPU -> (gpu.json, gpu.md)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")

    def run(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "ROOT", tmp_path)
            patch.setattr(sys, "argv", ["gpu.py", *argv])
            gpu.main()
        folder = tmp_path / "benchmarks/results/some-gpu"
        return json.loads((folder / "gpu.json").read_text())["parts"], (folder / "gpu.md").read_text()

    return run


def test_parts_are_on_the_page_whatever_becomes_of_them(page, monkeypatch):
    """One fails, one hangs, one passes; a later call keeps the others; the time may be over."""
    found = {"kernel": "raise torch.OutOfMemoryError('CUDA out of memory')", "packed": "import time; time.sleep(60)"}
    found["head"] = "print('RESULT {\"passed\": true, \"nats\": 1}'); print('a warning')"
    run_command = gpu.run_command

    def fake(command, limit, **env):
        code = found[command[command.index("--check") + 1]]
        return run_command([sys.executable, "-c", "import torch; " + code], min(limit, 20), **env)

    monkeypatch.setattr(gpu, "run_command", fake)
    parts, _ = page("--parts", "kernel", "head")
    assert not parts["kernel"]["passed"] and "CUDA out of memory" in parts["kernel"]["error"]
    assert parts["head"]["passed"] and parts["head"]["nats"] == 1
    parts, text = page("--parts", "packed")
    assert "stopped after 20 s" in parts["packed"]["error"] and parts["head"]["passed"]
    parts, text = page("--parts", "packed", "--minutes", "0.1")
    assert parts["packed"]["error"] == "not begun: 0.1 minutes are over"
    assert "| kernel | FAILED |" in text and "| head | passed |" in text


def test_what_a_part_started_does_not_go_on(tmp_path):
    """Past its time a shell's child, which would hold the GPU's memory, ends too."""
    with pytest.raises(RuntimeError, match="stopped after 1 s"):
        gpu.run_command(["bash", "-c", f"(sleep 5; touch {tmp_path}/late) & wait"], 1)
    time.sleep(6)
    assert not (tmp_path / "late").exists()


def test_recipes_run_or_say_why_not(tmp_path, monkeypatch):
    """Those whose data is named run at SCALE=135m; a failure is recorded."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/pro_hh.sh").write_text("test $SCALE = 135m && mkdir -p $OUT")
    (tmp_path / "recipes/pro_ablations.sh").write_text("echo no such thing; exit 3")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("HH", "somewhere")
    monkeypatch.delenv("ALPACA", raising=False)
    figures = gpu.recipes(60)
    assert not figures["passed"] and figures["tuna"] == "not run: set ALPACA" and (tmp_path / "runs/gpu").is_dir()
    assert figures["pro_hh"].endswith(" s") and "exit code 3: no such thing" in figures["pro_ablations"]
    for name, *_ in gpu.RECIPES_135M:
        sourced = (ROOT / "recipes" / f"{name.partition('_')[0]}_common.sh").read_text()
        assert (ROOT / "recipes" / f"{name}.sh").exists() and "135m)" in sourced


def test_bench_shows_what_it_measured_before_it_failed(tmp_path, monkeypatch):
    said = []

    def fake(command, limit):
        said.append(command)
        if "--show" not in command:
            (tmp_path / "b.json").write_text("{}")
            raise RuntimeError("stopped after 9 s")
        return "a line\n| a | table |"

    monkeypatch.setattr(gpu, "run_command", fake)
    result = gpu.bench(tmp_path, "b", 9, "--model", "llama-6m")
    assert result == {"passed": False, "error": "stopped after 9 s", "table": "| a | table |"}
    assert said[0][-2:] == ["--repeats", "3"] and said[1][-1] == "--show"
