"""evaluate.py multidoc-qa, its curve, and the figures of report."""

import json

import pytest
from conftest import make_records, read_jsonl, refused, write_jsonl

from evaluating import intervals, plots, questions


def qa(i, position, answers=("Oslo",)):
    return {"id": f"q{i}-gold{position}", "prompt": f"where? {i}", "answers": list(answers), "gold_position": position}


def answered(position, text, answers=("Oslo",)):
    return {"gold_position": position, "text": text, "answers": list(answers), "finished": True}


def test_multidoc_metrics_by_hand():
    rows = [answered(1, "In Oslo."), answered(1, "Bergen"), answered(5, "Bergen\nor oslo"), answered(5, "x\ny")]
    rows += [answered(3, "the OS-LO!"), answered(3, "Oslo"), answered(3, "no"), answered(3, "no\nno")]
    metrics = questions.multidoc_qa_metrics(questions.judged(rows))
    assert [metrics[f"accuracy_at_{p}"] for p in (1, 3, 5)] == [0.5, 0.5, 0.5]
    assert [metrics[f"first_line_at_{p}"] for p in (1, 3, 5)] == [0.5, 0.5, 0.0]
    assert metrics["accuracy"] == 0.5 and metrics["first_line"] == pytest.approx(1 / 3)  # positions weigh alike
    assert metrics["positions"] == {1: 2, 3: 4, 5: 2} and metrics["prompts"] == 8


def test_multidoc_qa_and_its_curve(cli, tiny, here):
    data = write_jsonl(here / "qa.jsonl", [qa(i, p) for i in range(2) for p in (1, 3, 5)])
    more = ("--input", data, "--max_new_tokens", "3", "--num_beams", "2")
    for name in ("a", "b"):
        assert cli("evaluate", "multidoc-qa", "--model", tiny, "--name", name, *more).code == 0
    rows = read_jsonl("runs/eval/a/multidoc-qa.jsonl")
    assert [r["gold_position"] for r in rows] == [1, 3, 5] * 2 and all("text" in r for r in rows)
    assert (here / "runs/eval/a/multidoc-qa.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((here / "runs/eval/a/multidoc-qa.metrics.json").read_text())["metrics"]
    assert metrics["prompts"] == 6 and metrics["questions"] == 2  # the interval of `accuracy` is of two
    out = cli("evaluate", "report", "a", "b", "--plot", "gold_position", "--output", here / "r.md")
    assert out.code == 0 and "accuracy_at_3" in (here / "r.md").read_text()
    assert (here / "gold_position.png").read_bytes().startswith(b"\x89PNG")
    other = write_jsonl(here / "n.jsonl", make_records(1))
    refused(cli("evaluate", "multidoc-qa", "--model", tiny, "--input", other), "no answers")


def test_wilson_against_the_book():
    assert intervals.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert intervals.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.fixture
def curves(monkeypatch):
    """What is drawn: the label of every line with intervals -> (x, y); of histograms the labels, by what is drawn."""
    drawn, save = {}, plots.save_figure

    def read(figure, path):
        for axes in figure.axes:
            drawn[axes.get_xlabel()] = axes.get_legend_handles_labels()[1]
            for container in axes.containers:
                drawn[container.get_label()] = tuple(map(list, container[0].get_data()))
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", read)
    return drawn


def test_seeds_are_one_line(curves, here):
    shares = {"base": 0.1, "label-seed0": 0.2, "label-seed1": 0.6}
    metrics = {k: {"positions": {"1": 10, "5": 10}, "accuracy_at_1": v, "accuracy_at_5": v} for k, v in shares.items()}
    plots.plot_positions({k: {"multidoc-qa": {"metrics": v}} for k, v in metrics.items()}, here / "p.png")
    assert curves["label"] == ([1.03, 5.03], pytest.approx([0.4, 0.4])) and curves["base"][1] == [0.1, 0.1]
    assert curves["place of the gold passage"] == ["base", "label"]


def test_accuracy_against_what_is_behind_the_at(cli, here, curves):
    for name, accuracy in {"label@1500": 0.7, "label@500-seed0": 0.5, "label@500-seed1": 0.6, "none@500": 0.3}.items():
        (here / f"runs/eval/{name}").mkdir(parents=True)
        document = {"metrics": {"accuracy": accuracy, "prompts": 100}}
        (here / f"runs/eval/{name}/nli.metrics.json").write_text(json.dumps(document))
    names = ("label@1500", "label@500-seed0", "label@500-seed1", "none@500")
    assert cli("evaluate", "report", *names, "--plot", "train_size", "alpha").code == 0
    assert curves["label"] == ([500, 1500], [0.55, 0.7]) and curves["none"] == ([500], [0.3])
    assert (here / "runs/eval/alpha.png").stat().st_size > 5000 and "training prompts" in curves
    refused(cli("evaluate", "report", "none@500", "--plot", "sources"), "no ranking.metrics.json")
    (here / "runs/eval/none@500").rename(here / "runs/eval/none")
    refused(cli("evaluate", "report", "none", "--plot", "alpha"), "none is not called NAME@NUMBER")


def test_sources_before_and_after_lambda(cli, tiny, data, here, curves):
    flags = ["--model", tiny, "--name", "t", "--input", data, "--by", "label", "--length_scaling", 0.85]
    assert cli("evaluate", "ranking", *flags).code == 0
    row = read_jsonl("runs/eval/t/ranking.jsonl")[0]
    assert row["sources"] == ["human", "tiny", "tiny", "tiny"]
    for source, logp, n, score in zip(row["sources"], row["logprobs"], row["lengths"], row["scores"]):
        assert score == pytest.approx(logp / n ** (1.0 if source == "human" else 0.85), rel=1e-5)
    assert cli("evaluate", "report", "t", "--plot", "sources").code == 0
    assert sorted(curves["log p / |y|"]) == ["human (12)", "tiny (36)"]
    assert (here / "runs/eval/t/sources.png").read_bytes().startswith(b"\x89PNG")
