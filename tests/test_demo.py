"""The demo's questions and its commands. Running it takes minutes: `make demo`."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl
from test_cli import parse

sys.path.insert(0, str(ROOT / "demo"))
from make_questions import TEST, TRAIN, main  # noqa: E402


@pytest.fixture
def questions(tmp_path):
    main(tmp_path)
    return [read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "test")]


def test_training_and_test_share_nothing(questions):
    towns = [{re.search(r"(?:of|in|at|from|near) ([A-Z]\w+)", r["question"])[1] for r in rows} for rows in questions]
    assert [len(t) for t in towns] == [len(rows) for rows in questions] == [104, 160] and not towns[0] & towns[1]
    kinds = [{c["title"] for r in rows for c in r["ctxs"]} for rows in questions]
    assert kinds == [{k[0] for k in TRAIN}, {k[0] for k in TEST}] and not kinds[0] & kinds[1]
    answers = [{a for k in kinds for a in k[3]} for kinds in (TRAIN, TEST)]
    assert not answers[0] & answers[1]


def test_its_commands_parse(tmp_path, monkeypatch):
    """demo.sh runs to its end with a python and a torchrun that do nothing; it prints each command first."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", ROOT / "demo/demo.sh"], env=env, capture_output=True, text=True, check=True).stdout
    commands = [line.split() for line in re.findall(r"\$ (.*?)\x1b", out)]
    assert len(commands) == 14 and sum("rescue.py" in words for words in commands) == 1
    for words in commands:
        parse(words, monkeypatch)
