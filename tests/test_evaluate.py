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
        assert got["precision"] == {e: 1.0, n: 0.5, c: 0.0} and got["recall"] == {e: 0.5, n: 1.0, c: 0.0}
        assert got["confusion"][c] == {e: 0, n: 0, c: 0, "unparsed": 1}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", make_records(5))
    return tmp_path


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


def test_report_has_intervals(cli, here):
    """Wilson's 95% interval of 4 of 10 is 0.168 to 0.687, of 1 of 4 0.046 to 0.699; a verb's own stands as it is."""
    metrics = {"accuracy": 0.4, "prompts": 10, "accuracy_at_3": 0.25, "prompts_at_3": 4, "mean_words": 12.5}
    other = {"pair_accuracy": 0.4, "pairs": 1000, "prompts": 10, "reward": 55.0}
    other |= {"reward 95% low": 52.0, "reward 95% high": 58.0}
    for verb, figures in (("multidoc-qa", metrics), ("ranking", other)):
        (here / "runs/eval/a").mkdir(parents=True, exist_ok=True)
        document = {"name": "a", "metrics": figures, "settings": {}}
        (here / f"runs/eval/a/{verb}.metrics.json").write_text(json.dumps(document))
    columns = ["accuracy", "accuracy_at_3", "pair_accuracy", "reward", "mean_words"]
    row = cli("evaluate", "report", "a", "--columns", *columns).out.splitlines()[-1]
    four_of_ten = "0.400 [0.17, 0.69]"
    assert row == f"| a | {four_of_ten} | 0.250 [0.05, 0.70] | {four_of_ten} | 55.000 [52.00, 58.00] | 12.5 |"
    assert "95% low" not in cli("evaluate", "report", "a").out


def test_report_beside_a_paper(cli, here):
    def system(name, verb, **metrics):
        folder = here / "runs/eval" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{verb}.metrics.json").write_text(json.dumps({"name": name, "metrics": metrics}))

    for seed, accuracy in enumerate((0.60, 0.62, 0.67)):
        system(f"label@500-seed{seed}", "nli", accuracy=accuracy, prompts=1000)
    system("none@500-seed0", "nli", accuracy=0.5, prompts=1000)
    paper = {"source": "X, Table 1", "cells": "accuracy", "percent": ["accuracy"], "names": {"label": "(PO) Label"}}
    paper["rows"] = {"label": {"2000": 81.97}, "gpt": {"2000": 82.2}}
    (here / "paper.json").write_text(json.dumps(paper))
    names = [f"label@500-seed{seed}" for seed in range(3)]
    out = cli("evaluate", "report", *names, "none@500-seed0", "--paper", "paper.json").out.splitlines()
    assert out[2] == "|  | 500 | 2000 |" and out[5] == "| gpt |  | (82.2) |"
    # mean 63, standard deviation 3.6056, t(0.975, 2) = 4.3027: 4.3027 * 3.6056 / sqrt(3) = 8.957
    assert out[4] == "| (PO) Label | 63.00 ±8.96 | (81.97) |"
    assert out[6] == "| none | 50.00 [46.9, 53.1] |  |"  # Wilson's, 500 of 1000

    for seed, accuracy in enumerate((0.70, 0.72, 0.71)):
        system(f"label@2000-seed{seed}", "nli", accuracy=accuracy, prompts=1000)
    paper["rows"] = {"base": {"0": 33.31}, "label": {"500": 60.5, "2000": 81.97, "mean": 71.2}, "none": {"mean": 70.0}}
    (here / "paper.json").write_text(json.dumps(paper))
    names += [f"label@2000-seed{seed}" for seed in range(3)]
    out = cli("evaluate", "report", *names, "none@500-seed0", "--paper", "paper.json").out.splitlines()
    assert out[2] == "|  | 0 | 500 | 2000 | mean |" and out[6].endswith("|  | (70.0) |")
    # seed by seed 65, 67, 69: standard deviation 2, 4.3027 * 2 / sqrt(3) = 4.968
    assert out[5].endswith("| 67.00 ±4.97 (71.2) |")

    paper = {"source": "X, Table 2", "note": "x 100", "percent": ["reward"]}
    paper["rows"] = {"a": {"hard reward": 51.5, "bleu": 10.0}}
    (here / "paper.json").write_text(json.dumps(paper))
    system("a", "hh", reward=0.4, bleu=9.5, **{"hard reward": 0.5})
    out = cli("evaluate", "report", "a", "--paper", "paper.json").out.splitlines()
    assert out[0].endswith("Table 2: x 100") and out[2] == "|  | hard reward | bleu |"
    assert out[4] == "| a | 50.00 (51.5) | 9.50 (10.0) |"

    # an interval that the verb gives; a subset's share by the subset's own count; some of the columns
    paper = {"source": "X, Table 3", "percent": ["win"], "rows": {"a": {"reward": 51.5, "hard win": 60.0, "win": 55.0}}}
    (here / "paper.json").write_text(json.dumps(paper))
    more = {"reward 95% low": 38.5, "reward 95% high": 41.5, "hard win": 0.5, "win": 0.6}
    system("a", "hh", reward=40.0, questions=4000, **more, **{"hard questions": 1000})
    out = cli("evaluate", "report", "a", "--paper", "paper.json", "--columns", "reward", "hard win").out.splitlines()
    assert out[2] == "|  | reward | hard win |"
    assert out[4] == "| a | 40.00 [38.5, 41.5] (51.5) | 50.00 [46.9, 53.1] (60.0) |"


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


def test_ranking_measures_with_what_the_run_was_trained_with(cli, tiny, here):
    """lambda, margin, and lengths of RUN/args.json, unless they are given; RESCUE's hinge has no margin."""
    import shutil

    for name, settings in {
        "rescue": {"length_scaling": 0.85, "human_length_scaling": 1.0, "max_length": 64, "max_prompt_length": None},
        "tuna": {"margin": 0.1, "length_penalty": 1.4, "max_length": 512},
    }.items():
        shutil.copytree(tiny, here / f"runs/{name}/model")
        (here / f"runs/{name}/args.json").write_text(json.dumps({"settings": settings}))
    ranking = ("evaluate", "ranking", "--by", "hybrid", "--input", "d.jsonl", "--model")

    def settings(name):
        document = json.loads((here / f"runs/eval/{name}/ranking.metrics.json").read_text())
        return [document["settings"][f"--{k}"] for k in ("length_scaling", "margin", "max_length", "length_penalty")]

    assert "length_scaling 0.85" in cli(*ranking, "runs/rescue/model").out and settings("rescue") == [0.85, 0, 64, 1.3]
    assert cli(*ranking, "runs/tuna/model").code == 0 and settings("tuna") == [1.0, 0.1, 512, 1.4]
    assert cli(*ranking, tiny, "--name", "base").code == 0 and settings("base") == [1.0, 0.0, 512, 1.3]
    assert cli(*ranking, "runs/rescue/model", "--name", "x", "--margin", 0.2, "--length_scaling", 1).code == 0
    assert settings("x") == [1.0, 0.2, 64, 1.3]
    levels = read_jsonl(here / "runs/eval/base/ranking.jsonl")[0]["levels"]
    assert levels == [2.0] + [float(c["correct"]) for c in make_records(1)[0]["candidates"][1:]]
