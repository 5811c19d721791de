"""tuna.py: the loss in both reductions and the teacher's score by hand, ranks, and each stage from end to end."""

import json
import math
import re
import shutil
import sys

import pytest
import torch
from conftest import read_jsonl, refused, write_jsonl

import tuna


def naive_loss(scores, ranks, margin, mean_by_distance):
    by_distance = {}
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if a < b:  # i is the better one
                by_distance.setdefault(b - a, []).append(max(0.0, scores[j] - scores[i] + margin * (b - a)))
    return sum(sum(v) / (len(v) if mean_by_distance else 1) for v in by_distance.values())


def test_ranking_loss_by_hand():
    scores = torch.tensor([-1.0, -0.8, -1.5])  # best first, m = 0.1
    # pairs: (0,1) 0.2 + 0.1 = 0.3; (1,2) -0.7 + 0.1 -> 0; (0,2) -0.5 + 0.2 -> 0
    assert tuna.ranking_loss(scores, 0.1).item() == pytest.approx(0.3, abs=1e-6)
    # distance 1: (0.3 + 0) / 2; distance 2: 0
    assert tuna.ranking_loss(scores, 0.1, pair_reduction="mean_by_distance").item() == pytest.approx(0.15, abs=1e-6)
    # a margin of 1: 1.2 + 0.3 + 1.5 against (1.2 + 0.3) / 2 + 1.5
    assert tuna.ranking_loss(scores, 1.0).item() == pytest.approx(3.0, abs=1e-6)
    assert tuna.ranking_loss(scores, 1.0, pair_reduction="mean_by_distance").item() == pytest.approx(2.25, abs=1e-6)


def test_ranking_loss_gradient_by_hand():
    scores = torch.tensor([-1.0, -0.8, -1.5], requires_grad=True)
    tuna.ranking_loss(scores, 1.0).backward()
    assert scores.grad.tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("reduction", ["sum", "mean_by_distance"])
def test_ranking_loss_against_loops(reduction):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 4, 5):
        scores = torch.randn(n, generator=generator)
        for ranks in (list(range(n)), torch.randperm(n, generator=generator).tolist(), [min(i, 2) for i in range(n)]):
            loss = tuna.ranking_loss(scores, 0.3, -torch.tensor(ranks), reduction)
            assert loss.item() == pytest.approx(naive_loss(scores.tolist(), ranks, 0.3, reduction != "sum"), abs=1e-5)


def test_ranking_loss_without_pairs():
    for scores in (torch.empty(0), torch.tensor([1.0])):
        for reduction in ("sum", "mean_by_distance"):
            assert tuna.ranking_loss(scores, 0.1, torch.zeros(len(scores), dtype=torch.long), reduction).item() == 0


def test_teacher_score_by_hand():
    assert tuna.teacher_score(-20.0, 10, 1.3) == pytest.approx(-20 / 19.9526, rel=1e-5)  # 10 ** 1.3
    assert tuna.teacher_score(-20.0, 10, 0.0) == -20.0


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


def test_mle_loss_by_hand():
    logprobs, lengths = torch.tensor([-6.0, -9.0, -2.0]), torch.tensor([3.0, 2.0, 1.0])
    for taken, want in (([True, False, True], 2.0), ([False, True, False], 4.5), ([False] * 3, 0.0)):
        assert tuna.mle_loss(logprobs, lengths, torch.tensor(taken)).item() == want


@pytest.mark.parametrize("reduction", ["sum", "mean_by_distance"])
def test_the_unranked_are_compared_with_nothing(reduction):
    """Values and gradients are those of the ranked ones alone, without a NaN."""
    scores = torch.randn(5, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([1, math.nan, 2, 0, math.nan])
    whole, alone = scores.clone().requires_grad_(), scores[[0, 2, 3]].requires_grad_()
    got = tuna.ranking_loss(whole, 2.0, levels, reduction)
    want = tuna.ranking_loss(alone, 2.0, torch.tensor([1, 2, 0]), reduction)
    got.backward()
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6) and want > 0
    torch.testing.assert_close(whole.grad[[0, 2, 3]], alone.grad)
    assert whole.grad[[1, 4]].tolist() == [0.0, 0.0]


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


@pytest.mark.parametrize(
    "flags, rank_weight, mle_weight",
    [
        (["sft"], 0, 1),
        (["contextual", "--mle_on", "all", "--pair_reduction", "mean_by_distance"], 1, 1),
        (["contextual", "--mle_weight", "0"], 1, 0),
    ],
)
def test_the_loss_is_its_terms(run, tmp_path, flags, rank_weight, mle_weight):
    assert run(*flags, "--epochs", 2).code == 0
    log = read_jsonl(tmp_path / "run/log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    for line in log:
        terms = rank_weight * line["rank_loss"] + mle_weight * line["mle_loss"]
        assert line["loss"] == pytest.approx(terms, abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]


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
