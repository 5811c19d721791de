"""evaluate.py: the metrics by hand, the verbs from end to end on a tiny model, the report."""

import json
import math

import pytest
from conftest import make_records, metrics_of, read_jsonl, refused, write_jsonl
from transformers import AutoModelForCausalLM

import common
from evaluating import likelihood, questions


class TestMetrics:
    def test_ranking_by_hand(self):
        rows = [
            {"id": "a", "scores": [-1.0, -2.0, -1.05], "levels": [2, 1, 0]},  # gaps 1.0, 0.05, -0.95
            {"id": "b", "scores": [-3.0, -1.0], "levels": [1, 1]},  # a tie: no pair
            {"id": "c", "scores": [-3.0, -1.0], "levels": [1, 0]},  # gap -2.0
        ]
        got = likelihood.ranking_metrics(rows, 0.1, likelihood.kendall_taus(rows))
        assert got["pairs"] == 4 and got["prompts"] == 2
        assert got["pair_accuracy"] == 0.5 and got["margin_violations"] == 0.75
        assert got["mean_margin"] == pytest.approx((1.0 + 0.05 - 0.95 - 2.0) / 4)
        assert got["kendall_tau"] == pytest.approx(((2 - 1) / 3 + -1) / 2)

    @pytest.mark.parametrize(
        "a, b, tau",
        [
            ([1, 2, 3], [1, 2, 3], 1),
            ([1, 2, 3], [3, 2, 1], -1),
            ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(6)),
            ([1, 1], [1, 2], 0),
        ],
    )
    def test_kendall_tau_b(self, a, b, tau):
        assert likelihood.kendall_taus([{"id": "x", "scores": a, "levels": b}]) == {"x": pytest.approx(tau)}

    def test_nli_by_hand(self):
        def row(gold, predicted, text="a b"):
            return {"label": gold, "prediction": predicted, "well_formed": predicted is not None, "text": text}

        e, n, c = "entailment", "neutral", "contradiction"
        got = questions.nli_metrics([row(e, e), row(e, n), row(n, n), row(c, None, "x y z w")])
        wanted = {"accuracy": 0.5, "unparsed": 0.25, "well_formed": 0.75, "mean_words": 2.5}
        assert {k: got[k] for k in wanted} == wanted
        assert got["confusion"] == {
            e: {e: 1, n: 1, c: 0, "unparsed": 0},
            n: {e: 0, n: 1, c: 0, "unparsed": 0},
            c: {e: 0, n: 0, c: 0, "unparsed": 1},
        }
        assert got["predicted_share"] == {e: 0.25, n: 0.5, c: 0.0, "unparsed": 0.25}


@pytest.fixture
def here(here):
    write_jsonl(here / "d.jsonl", make_records(5))
    return here


def test_verbs_and_report(cli, tiny, here):
    for name in ("a", "b"):
        flags = ["--model", tiny, "--name", name, "--input", "d.jsonl"]
        result = cli("evaluate", "nli", *flags, "--max_new_tokens", 4)
        assert result.code == 0, result.err
        assert (here / f"runs/eval/{name}/nli.png").stat().st_size > 10_000
        assert cli("evaluate", "ranking", *flags, "--by", "label").code == 0
    predictions = read_jsonl(here / "runs/eval/a/nli.jsonl")
    assert [p["id"] for p in predictions] == [f"r{i}" for i in range(5)]
    metrics = json.loads((here / "runs/eval/a/nli.metrics.json").read_text())
    assert metrics["metrics"]["prompts"] == 5 and {"torch", "transformers"} <= metrics["versions"].keys()
    report = cli("evaluate", "report", "a", "b", "--columns", "accuracy", "pair_accuracy", "--output", "table.md").out
    assert "| a |" in report and "| b |" in report and (here / "table.md").read_text().endswith(report)
    assert "### nli" in cli("evaluate", "report", "a", "b").out
    refused(cli("evaluate", "report", "a", "--columns", "beauty"), "beauty")
    refused(cli("evaluate", "report", "nobody"), "nobody")


@pytest.fixture
def evaluated(here):
    """evaluated(name, verb, **metrics): a system's figures of a verb."""

    def write(name, verb, **metrics):
        folder = here / "runs/eval" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{verb}.metrics.json").write_text(json.dumps({"metrics": metrics}))

    return write


def test_report_has_intervals(cli, evaluated):
    """Wilson's 95% interval of 4 of 10 is 0.168 to 0.687, of 1 of 4 0.046 to 0.699; a verb's own stands as it is."""
    evaluated("a", "multidoc-qa", accuracy=0.4, prompts=10, accuracy_at_3=0.25, prompts_at_3=4, mean_words=12.5)
    own = {"reward 95% low": 52.0, "reward 95% high": 58.0}
    evaluated("a", "ranking", pair_accuracy=0.4, pairs=1000, prompts=10, reward=55.0, **own)
    columns = ["accuracy", "accuracy_at_3", "pair_accuracy", "reward", "mean_words"]
    row = cli("evaluate", "report", "a", "--columns", *columns).out.splitlines()[-1]
    four_of_ten = "0.400 [0.17, 0.69]"
    assert row == f"| a | {four_of_ten} | 0.250 [0.05, 0.70] | {four_of_ten} | 55.000 [52.00, 58.00] | 12.5 |"
    assert "95% low" not in cli("evaluate", "report", "a").out


@pytest.fixture
def beside(cli, here):
    """beside(paper's table, names, *flags) -> the lines of report."""

    def report(paper, names, *flags):
        (here / "paper.json").write_text(json.dumps({"source": "X, Table 1"} | paper))
        return cli("evaluate", "report", *names, "--paper", "paper.json", *flags).out.splitlines()

    return report


def test_report_beside_a_papers_sizes(beside, evaluated):
    for size, accuracies in {500: (0.60, 0.62, 0.67), 2000: (0.70, 0.72, 0.71)}.items():
        for seed, accuracy in enumerate(accuracies):
            evaluated(f"label@{size}-seed{seed}", "nli", accuracy=accuracy, prompts=1000)
    evaluated("none@500-seed0", "nli", accuracy=0.5, prompts=1000)
    paper = {"cells": "accuracy", "percent": ["accuracy"], "names": {"label": "(PO) Label"}}
    paper["rows"] = {"gpt": {"0": 33.31}, "label": {"500": 60.5, "2000": 81.97, "mean": 71.2}, "none": {"mean": 70.0}}
    names = [f"label@{size}-seed{seed}" for size in (500, 2000) for seed in range(3)]
    out = beside(paper, [*names, "none@500-seed0"])
    assert out[2] == "|  | 0 | 500 | 2000 | mean |" and out[4] == "| gpt | (33.31) |  |  |  |"
    # mean 63, standard deviation 3.6056, t(0.975, 2) = 4.3027: 4.3027 * 3.6056 / sqrt(3) = 8.957
    assert out[5].startswith("| (PO) Label |  | 63.00 ±8.96 (60.5) | 71.00 ±2.48 (81.97) |")
    assert out[5].endswith("| 67.00 ±4.97 (71.2) |")  # seed by seed 65, 67, 69: 4.3027 * 2 / sqrt(3) = 4.968
    assert out[6] == "| none |  | 50.00 [46.9, 53.1] |  | (70.0) |"  # Wilson's, 500 of 1000


def test_report_beside_a_papers_figures(beside, evaluated):
    """An interval that the verb gives; a subset's share by the subset's own count; some of the columns."""
    rows = {"a": {"reward": 51.5, "hard win": 60.0, "win": 55.0}}
    more = {"reward 95% low": 38.5, "reward 95% high": 41.5, "hard win": 0.5, "hard questions": 1000}
    evaluated("a", "hh", reward=40.0, win=0.6, questions=4000, **more)
    paper = {"rows": rows, "percent": ["win"], "note": "x 100"}
    out = beside(paper, ["a"], "--columns", "reward", "hard win")
    assert out[0].endswith("Table 1: x 100") and out[2] == "|  | reward | hard win |"
    assert out[4] == "| a | 40.00 [38.5, 41.5] (51.5) | 50.00 [46.9, 53.1] (60.0) |"
    assert beside(paper, ["a"])[2] == "|  | reward | hard win | win |"


def test_nothing_is_generated_twice(cli, tiny, here, monkeypatch):
    args = ("evaluate", "nli", "--model", tiny, "--name", "a", "--input", "d.jsonl", "--max_new_tokens", 4)
    first = cli(*args).out
    monkeypatch.setattr("collecting.generation.load_generator", lambda *a: pytest.fail("loaded a model for nothing"))
    assert cli(*args).out.splitlines()[-2] == first.splitlines()[-2]
    refused(cli(*args[:-1], 5), "max_new_tokens")


def test_ranking_scores_equal_a_plain_forward(cli, tiny, here):
    import torch

    flags = ["--model", tiny, "--name", "a", "--input", "d.jsonl", "--by", "label", "--length_scaling", 0.85]
    assert cli("evaluate", "ranking", *flags).code == 0
    tokenizer = common.load_tokenizer(str(tiny))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for record, row in zip(make_records(5), read_jsonl(here / "runs/eval/a/ranking.jsonl")):
        with torch.no_grad():
            logp, n = common.candidate_logprobs(model, common.pack_padded([common.encode(tokenizer, record)]))
        want = [(x / k ** (1.0 if i == 0 else 0.85)).item() for i, (x, k) in enumerate(zip(logp, n))]
        assert row["scores"] == pytest.approx(want, rel=1e-4)
    items = json.loads((here / "runs/eval/a/ranking.items.json").read_text())["kendall_tau by label"]
    assert sum(items.values()) / len(items) == metrics_of(here, "ranking", "a")["kendall_tau"]


def test_refusals(cli, tiny, here):
    write_jsonl(here / "nolabel.jsonl", [{"id": "a", "prompt": "p"}])
    refused(cli("evaluate", "nli", "--model", tiny, "--input", "nolabel.jsonl"), "nolabel.jsonl", "label")
    bad = make_records(1)
    del bad[0]["candidates"][1]["correct"]
    write_jsonl(here / "bad.jsonl", bad)
    ranking = ["evaluate", "ranking", "--model", tiny, "--by", "label", "--input"]
    refused(cli(*ranking, "bad.jsonl"), "candidates[1]", "correct")
    refused(cli(*ranking, "none.jsonl"), "none.jsonl")
