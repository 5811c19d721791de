"""Figures as PNG: the ones that a verb draws of one system, and RESCUE's figures of several."""

import functools
from statistics import fmean

import pandas

from collecting.answers import NLI_LABELS
from collecting.files import read_rows
from common import UserError, say
from evaluating.intervals import wilson
from evaluating.tables import without_seed


def new_figure(width=6.4, height=4.0, columns=1):
    """-> (the figure, its axes [columns])."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_figure(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    say(f"plot: {path}")


def plot_nli(metrics, name, path):
    """Fig. 6, left: the confusion matrix."""
    figure, [axes] = new_figure(5, 4)
    columns = (*NLI_LABELS, "unparsed")
    counts = [[metrics["confusion"][g][c] for c in columns] for g in NLI_LABELS]
    axes.imshow(counts, cmap="Blues")
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            colour = "white" if value > max(map(max, counts)) / 2 else "black"
            axes.text(x, y, value, ha="center", va="center", color=colour)
    axes.set(xlabel="predicted", xticks=range(4), xticklabels=columns)
    axes.set(ylabel="gold", yticks=range(3), yticklabels=NLI_LABELS)
    low, high = wilson(metrics["accuracy"], metrics["prompts"])
    axes.set_title(f"{name}: accuracy {metrics['accuracy']:.3f} [{low:.2f}, {high:.2f}]")
    save_figure(figure, path)


def of_verb(systems, verb):
    """-> [(system, its document of this verb)]; UserError where one has none."""
    for name, documents in systems.items():
        if verb not in documents:
            raise UserError(f"{name} has no {verb}.metrics.json: run evaluate.py {verb} first")
    return [(name, documents[verb]) for name, documents in systems.items()]


def plot_line(axes, name, points, number, shift=0.0):
    """A line of a system. points: {x: (share of each seed, number of prompts)}. At x + shift the mean over seeds, with
    the 95% interval over prompts: seeds answer the same prompts, so they add none. How far seeds lie apart no interval
    over prompts says: each has a dot."""
    colour, places, means, reach = f"C{number}", [x + shift for x in points], [], []
    for place, (shares, prompts) in zip(places, points.values()):
        mean = fmean(shares)
        low, high = wilson(mean, prompts)
        means.append(mean)
        reach.append((max(0, mean - low), max(0, high - mean)))
        if len(shares) > 1:
            axes.plot([place] * len(shares), shares, ".", color=colour, alpha=0.5)
    axes.errorbar(places, means, [*zip(*reach)], capsize=3, fmt="-o", color=colour, label=name)
    axes.set_ylabel("accuracy")


def plot_positions(systems, path):
    """The U-shaped curve: accuracy by the gold passage's place."""
    figure, [axes] = new_figure()
    lines = {}
    for name, document in of_verb(systems, "multidoc-qa"):
        metrics, points = document["metrics"], lines.setdefault(without_seed(name), {})
        for place, prompts in metrics["positions"].items():
            shares, _ = points.setdefault(int(place), ([], prompts))
            shares.append(metrics[f"accuracy_at_{place}"])
    for number, (name, points) in enumerate(lines.items()):
        shift = 0.06 * (number - (len(lines) - 1) / 2)  # side by side, or bars hide each other
        plot_line(axes, name, points, number, shift)
    places = sorted({place for points in lines.values() for place in points})
    axes.set(xlabel="place of the gold passage", xticks=places, ylim=(0, 1))
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_sweep(label, systems, path):
    """Fig. 4: label accuracy against a number: of systems called NAME@NUMBER, or NAME@NUMBER-seedN; a line a NAME."""
    figure, [axes] = new_figure()
    lines = {}
    for name, document in of_verb(systems, "nli"):
        line, _, value = without_seed(name).partition("@")
        try:
            shares, _ = lines.setdefault(line, {}).setdefault(float(value), ([], document["metrics"]["prompts"]))
        except ValueError:
            raise UserError(f"--plot {path.stem}: {name} is not called NAME@NUMBER") from None
        shares.append(document["metrics"]["accuracy"])
    for number, (name, points) in enumerate(lines.items()):
        plot_line(axes, name, dict(sorted(points.items())), number)
    values = sorted({value for points in lines.values() for value in points})
    if values[0] > 0 and label != "candidates":
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_sources(systems, path):
    """Fig. 5 and 6: by source, log p / |y| and log p / |y| ** lambda of each response, and its length in tokens."""
    for name, document in of_verb(systems, "ranking"):
        predictions = document["folder"] / "ranking.jsonl"
        lists = ["sources", "logprobs", "lengths", "scores"]
        frame = pandas.DataFrame([row for _, row in read_rows(predictions)])[lists].explode(lists)
        sources, (logprobs, lengths, scores) = frame["sources"], (frame[k].astype(float) for k in lists[1:])
        values = {"log p / |y|": logprobs / lengths, r"log p / |y|$^\lambda$": scores, "|y|, tokens": lengths}
        figure, axes = new_figure(10, 3.2, 3)
        figure.suptitle(name)
        for ax, (label, drawn) in zip(axes, values.items()):
            style = {"bins": 16, "range": (drawn.min(), drawn.max()), "density": True, "histtype": "step", "lw": 1.5}
            for source, some in drawn.groupby(sources.values):
                ax.hist(some, label=f"{source} ({len(some)})", **style)
            ax.set(xlabel=label, yticks=[])
            ax.locator_params(axis="x", nbins=5)
        axes[0].set_ylabel("density")
        axes[-1].legend(frameon=False, fontsize=8)
        save_figure(figure, predictions.with_name(path.name))


PLOTS = {
    "alpha": functools.partial(plot_sweep, "alpha"),
    "num_candidates": functools.partial(plot_sweep, "candidates"),
    "train_size": functools.partial(plot_sweep, "training prompts"),
    "gold_position": plot_positions,
    "sources": plot_sources,
}
