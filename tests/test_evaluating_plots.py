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
    metrics = questions.multidoc_qa_metrics(rows)
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


def test_seeds_are_one_line(curves, here):
    def metrics(right):
        shares = {f"{k}_at_{p}": right for k in ("accuracy", "first_line") for p in (1, 5)}
        return {"positions": {1: 10, 5: 10}} | shares

    shares = {"base": 0.1, "label-seed0": 0.2, "label-seed1": 0.6}
    runs = {name: {"multidoc-qa": {"metrics": metrics(share)}} for name, share in shares.items()}
    plots.plot_positions(runs, here / "p.png")
    place = "place of the gold passage"
    assert curves[place, "label, 2 seeds"][1] == pytest.approx([0.4, 0.4])
    assert "seed0" not in str(curves)


def test_wilson_against_the_book():
    assert intervals.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert intervals.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.fixture
def curves(monkeypatch):
    """What is drawn: every errorbar's label -> (x, y); every histogram's label -> its values."""
    drawn = {}
    real = plots.save_figure

    def save(figure, path):
        for axes in figure.axes:
            for container in axes.containers:
                x, y = container[0].get_data()
                drawn[axes.get_xlabel(), container.get_label()] = (list(x), list(y))
            labels = axes.get_legend_handles_labels()[1]
            drawn.setdefault(axes.get_xlabel(), labels)
        real(figure, path)

    monkeypatch.setattr(plots, "save_figure", save)
    return drawn


def fake_run(here, name, accuracy, **settings):
    (here / f"runs/{name}/model").mkdir(parents=True)
    (here / f"runs/{name}/args.json").write_text(json.dumps({"settings": settings}))
    folder = here / f"runs/eval/{name}"
    folder.mkdir(parents=True)
    document = {"name": name, "metrics": {"accuracy": accuracy, "prompts": 100}}
    document["settings"] = {"--model": f"runs/{name}/model"}
    (folder / "nli.metrics.json").write_text(json.dumps(document))


def test_accuracy_against_alpha_and_candidates(cli, here, curves):
    for i, (alpha, n, accuracy) in enumerate([(0.1, 5, 0.6), (0.01, 5, 0.5), (0.1, 3, 0.4)]):
        fake_run(here, f"r{i}", accuracy, alpha=alpha, num_candidates=n, ordering="label")
    fake_run(here, "h", 0.3, alpha=0.1, num_candidates=5, ordering="human")
    assert cli("evaluate", "report", "r0", "r1", "h", "--plot", "alpha", "num_candidates").code == 0
    assert curves["alpha", "label"] == ([0.01, 0.1], [0.5, 0.6])
    assert curves["alpha", "human"] == ([0.1], [0.3])
    assert cli("evaluate", "report", "r0", "r2", "--plot", "num_candidates").code == 0
    assert curves["num candidates", "accuracy"] == ([3, 5], [0.4, 0.6])
    assert (here / "runs/eval/alpha.png").stat().st_size > 5000
    refused(cli("evaluate", "report", "h", "--plot", "sources"), "no ranking.metrics.json")
    (here / "runs/h/args.json").unlink()
    refused(cli("evaluate", "report", "h", "--plot", "alpha"), "h is no run")


def test_a_line_joins_what_differs_in_nothing_else(cli, here, curves):
    """Seeds are one point; another learning rate or number of candidates is another line."""
    same = {"ordering": "label", "max_train_samples": 500}
    runs = [(0.1, 1e-4, 0, 0.6), (0.1, 1e-4, 1, 0.4), (0.01, 1e-4, 0, 0.3), (0.1, 3e-4, 0, 0.9), (0.01, 3e-4, 0, 0.8)]
    for i, (alpha, lr, seed, accuracy) in enumerate(runs):
        fake_run(here, f"r{i}", accuracy, alpha=alpha, lr=lr, seed=seed, **same)
    assert cli("evaluate", "report", *(f"r{i}" for i in range(5)), "--plot", "alpha").code == 0
    lines = {k[1]: v for k, v in curves.items() if isinstance(k, tuple)}
    assert lines == {"lr 0.0001": ([0.01, 0.1], [0.3, 0.5]), "lr 0.0003": ([0.01, 0.1], [0.8, 0.9])}
    for size, accuracy in ((500, 0.5), (1500, 0.7)):
        fake_run(here, f"s{size}", accuracy, **same | {"max_train_samples": size})
    assert cli("evaluate", "report", "s500", "s1500", "--plot", "train_size").code == 0
    assert curves["training prompts", "accuracy"] == ([500, 1500], [0.5, 0.7])


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
