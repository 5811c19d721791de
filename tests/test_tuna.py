"""tuna.py: the teacher's ranks, and each stage from end to end."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import read_jsonl, refused, write_jsonl

import tuna


def test_length_penalty_changes_the_order():
    candidates = [
        {"text": "short", "source": "t", "logprob": -4.0, "num_tokens": 2},
        {"text": "long", "source": "t", "logprob": -15.0, "num_tokens": 9},
    ]
    assert tuna.teacher_levels(candidates, "probabilistic", 0.5) == [1, 0]  # -2.83 > -5
    assert tuna.teacher_levels(candidates, "probabilistic", 1.3) == [0, 1]  # -1.62 < -0.86


def test_teacher_levels():
    candidates = [
        {"text": "original", "source": "reference"},  # unannotated: for L_MLE alone
        {"text": "b", "source": "m", "rank": 1},
        {"text": "a", "source": "m", "rank": 0},
        {"text": "b ", "source": "m", "rank": 3},  # a repetition
        {"text": "tie", "source": "m", "rank": 1},
        {"text": "excluded", "source": "m", "rank": None},
        {"text": "c", "source": "m", "rank": 4},
    ]
    levels = torch.tensor([tuna.teacher_levels(candidates, stage, 1.3) for stage in ("contextual", "sft")])
    assert levels.nan_to_num(nan=-1).tolist() == [[-1, 1, 2, -1, 1, -1, 0], [-1] * 7]


# ----------------------------------------------------------------------------------------------------------------------
# From end to end


def write_data(path, num_records=6, annotate=True, reference=True, candidates=4):
    words, records = ["red", "green", "blue", "a long grey one", "an even longer yellow one"], []
    for i in range(num_records):
        responses = [{"text": f"{words[(i + k) % 5]} {i}", "source": "teacher"} for k in range(candidates)]
        if annotate:
            values = [{"logprob": -3.0 - k, "num_tokens": 2 + k, "rank": k} for k in range(candidates)]
            responses = [c | v for c, v in zip(responses, values)]
        original = [{"text": f"original answer {i}", "source": "reference"}] * reference
        records.append({"id": f"r{i}", "prompt": f"Name colour {i}. ", "candidates": original + responses})
    return write_jsonl(path, records)


@pytest.fixture
def run(cli, tiny, tmp_path):
    """run(stage, *flags) -> Result: tuna.py on write_data's records, into tmp_path / "run"."""

    def run(stage, *flags, **options):
        data = write_data(tmp_path / "d.jsonl", **options)
        own = ["--model", tiny, "--data", data, "--batch_size", 3, "--lr", 1e-3, "--output", tmp_path / "run"]
        return cli("tuna", "--stage", stage, *own, *flags)

    return run


def test_alpaca_mul_takes_every_response_as_an_example(run, tmp_path):
    assert "30 examples" in run("sft", "--all_candidates").out  # a step has three of them
    assert len(read_jsonl(tmp_path / "run/log.jsonl")) == 10
    (tmp_path / "run").rename(tmp_path / "before")
    done = run("sft", "--all_candidates", candidates=0)
    refused(done, "d.jsonl: record 'r0' has one response: Alpaca-Mul needs more")


def test_a_student_does_not_teach_itself(tmp_path, tiny, cli):
    """Log-probabilities of the student, or of a run it came from, are refused; so are ranks made of them."""
    student = tmp_path / "tuna-sft"
    for run, model in ((student, tiny), (tmp_path / "tuna-contextual", student / "model")):
        shutil.copytree(tiny, run / "model")
        (run / "args.json").write_text(json.dumps({"settings": {"model": str(model), "stage": "sft"}}))
    records = read_jsonl(write_data(tmp_path / "d.jsonl"))
    for record in records:
        record["ranked_by"] = "tuna-sft"
        record["candidates"] = record["candidates"][:1] + [
            c | {"teacher": "tuna-sft"} for c in record["candidates"][1:]
        ]
    same = ["--data", write_jsonl(tmp_path / "d.jsonl", records), "--output", tmp_path / "o", "--batch_size", 6]
    for run in ("tuna-sft", "tuna-contextual"):
        for stage in ("probabilistic", "contextual"):
            flags = ["--stage", stage, "--model", tmp_path / run / "model", *same]
            refused(cli("tuna", *flags), "record 'r0': the log-probabilities are the student's own (tuna-sft)")
    assert cli("tuna", *flags, "--own_logprobs", "--output", tmp_path / "own").code == 0
    assert cli("tuna", "--stage", "probabilistic", "--model", tiny, *same).code == 0  # another student


def test_what_a_model_came_from_sets_lr_data_and_output(tmp_path, monkeypatch):
    """Table 7, and files of different students are different files."""
    monkeypatch.chdir(tmp_path)

    def parsed(stage, run=None, before=None, *flags):
        if run:
            (tmp_path / f"runs/{run}").mkdir(parents=True, exist_ok=True)
            settings = {"stage": before, "model": "m"}
            (tmp_path / f"runs/{run}/args.json").write_text(json.dumps({"settings": settings}))
        model = ["--model", f"runs/{run}/model"] if run else []
        monkeypatch.setattr(sys, "argv", ["tuna.py", "--stage", stage, *model, *flags])
        args = tuna.parse_args()
        return args.lr, args.data, args.output

    alpaca = "data/alpaca"
    assert parsed("sft") == (2e-5, f"{alpaca}/train.jsonl", "runs/tuna-sft")
    assert parsed("sft", None, None, "--all_candidates") == (2e-5, f"{alpaca}/teacher.jsonl", "runs/tuna-sft-mul")
    p, c = (1e-5, f"{alpaca}/teacher.jsonl", "runs/tuna-probabilistic"), f"{alpaca}/ranked-tuna-sft.jsonl"
    assert parsed("probabilistic", "tuna-sft", "sft") == p
    assert parsed("contextual", "tuna-sft", "sft") == (1e-5, c, "runs/tuna-contextual")
    tuna_data = f"{alpaca}/ranked-tuna-probabilistic.jsonl"
    assert parsed("contextual", "tuna-probabilistic", "probabilistic") == (1e-6, tuna_data, "runs/tuna")
    cp = parsed("probabilistic", "tuna-contextual", "contextual")
    assert cp == (1e-6, f"{alpaca}/teacher.jsonl", "runs/tuna-cp")
    assert parsed("contextual", "x", "sft", "--lr", "5e-6")[0] == 5e-6


@pytest.mark.parametrize(
    "flags, data, message",
    [
        (["probabilistic"], {"annotate": False}, r"candidates\[1\] has no 'logprob'.*rank --by logprob"),
        (["contextual"], {"annotate": False}, r"candidates\[1\] has no 'rank'.*rank --by contextual"),
        (["contextual"], {"reference": False}, "record 'r0' has no reference response"),
        (["contextual", "--all_candidates"], {}, "--all_candidates belongs to --stage sft"),
        (["contextual", "--margin", "-1"], {}, "-1 is out of range"),
        (["probabilistic", "--data", "none"], {}, r"is not there. Make it with:(.|\n)*teacher --task alpaca"),
    ],
)
def test_mistakes_are_one_sentence(run, flags, data, message):
    assert re.search(message, refused(run(*flags, **data)))
