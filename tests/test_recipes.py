"""recipes/*.sh at SCALE=tiny, from end to end, as a user types them."""

import subprocess

import pytest
import warm
from conftest import ROOT


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    with warm.python(tmp_path_factory.mktemp("warm")) as env:
        yield env


def recipe(name, env, out, **more):
    done = subprocess.run(
        ["bash", ROOT / "recipes" / f"{name}.sh"],
        env=env | {"SCALE": "tiny", "OUT": str(out)} | more,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_the_warm_python_is_python(env, tmp_path):
    (tmp_path / "x.py").write_text("import sys, torch; print(sys.argv[1:], torch.ones(2).sum().item()); sys.exit(3)")
    done = subprocess.run(["python", "x.py", "a b"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("['a b'] 2.0\n", 3)
    (tmp_path / "x.py").write_text("raise KeyError('where')")
    done = subprocess.run(["python", "x.py"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError" in done.stderr


def test_rescue_multidoc(env, tmp_path):
    out = recipe("rescue_multidoc", env, tmp_path).stdout
    assert "| (PO) Label Prioritization, 5 documents |" in out and "(44.88)" in out
    metrics = tmp_path / "results/rescue_multidoc-tiny/label-5-seed0/multidoc-qa.metrics.json"
    assert metrics.is_file()
    log = tmp_path / "runs/rescue_multidoc-tiny/label-seed0/log.jsonl"
    before = log.read_text()
    assert recipe("rescue_multidoc", env, tmp_path).returncode == 0  # again: nothing is collected or trained twice
    assert log.read_text() == before
