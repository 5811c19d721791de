"""The demo's questions and its commands. Running it takes minutes: `make demo`."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl

import common
from collecting.answers import has_answer

sys.path.insert(0, str(ROOT / "demo"))
from make_questions import TEST, TRAIN, main  # noqa: E402


def test_training_and_test_share_nothing(tmp_path):
    main(tmp_path)
    train, test = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    towns = [
        {re.search(r"(?:of|in|at|from|near) ([A-Z]\w+)", r["question"])[1] for r in rows} for rows in (train, test)
    ]
    assert [len(t) for t in towns] == [len(train), len(test)] == [104, 160] and not towns[0] & towns[1]
    kinds = [{c["title"] for r in rows for c in r["ctxs"]} for rows in (train, test)]
    assert kinds == [{k[0] for k in TRAIN}, {k[0] for k in TEST}] and not kinds[0] & kinds[1]
    answers = [{a for k in kinds for a in k[3]} for kinds in (TRAIN, TEST)]
    assert not answers[0] & answers[1]


def test_one_passage_holds_the_answer(tmp_path):
    main(tmp_path)
    for row in read_jsonl(tmp_path / "train.jsonl") + read_jsonl(tmp_path / "test.jsonl"):
        assert len(row["ctxs"]) == 4
        assert [c["isgold"] for c in row["ctxs"]] == [has_answer(c["text"], row["answers"]) for c in row["ctxs"]]


def commands(folder):
    """What demo.sh would run, a list of words each."""
    for name in ("python", "torchrun"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", ROOT / "demo/demo.sh"], env=env, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in re.findall(r"\$ (.*?)\x1b", out)]


def test_its_commands_parse(tmp_path, monkeypatch):
    ran = commands(tmp_path)
    verbs = [words[words.index(next(w for w in words if w.endswith(".py"))) :] for words in ran]
    assert [v[0] for v in verbs if v[0] == "rescue.py"] == ["rescue.py"] and len(verbs) == 14
    original = common.Parser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise KeyboardInterrupt  # parsed, and not run

    monkeypatch.setattr(common.Parser, "parse_args", parse_args)
    for script, *words in verbs:
        assert (ROOT / script).exists()
        if "/" not in script:
            monkeypatch.setattr(sys, "argv", [script, *words])
            with pytest.raises(KeyboardInterrupt):
                importlib.import_module(script.removesuffix(".py")).main()
