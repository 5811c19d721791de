"""All figures as PNG: what a verb draws of one system, and RESCUE's figures of several."""

import functools
import pathlib
from statistics import fmean

import pandas

import common
from collecting.answers import NLI_LABELS
from collecting.files import read_rows
from common import UserError, say
from evaluating.intervals import wilson
from evaluating.tables import without_seed


def new_figure(width=6.4, height=4.0, columns=1):
    """-> (the figure, its axes [columns])."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def save_figure(figure, path):
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    say(f"plot: {path}")


def error_bars(shares, counts):
    """How far the 95% intervals of shares of so many reach -> [below them, above them]."""
    spans = [(share, *wilson(share, n)) for share, n in zip(shares, counts)]
    return [[max(0, share - low) for share, low, _ in spans], [max(0, high - share) for share, _, high in spans]]


def plot_shares(axes, x, shares, counts, **style):
    """A line of shares, each with its 95% interval of so many -> the line."""
    return axes.errorbar(x, shares, error_bars(shares, counts), capsize=3, **style)[0]


def plot_nli(metrics, name, path):
    """The confusion matrix, and the share of each label among answers and gold: a model that leans to the middle
    answers 'neutral'."""
    figure, (left, right) = new_figure(10, 4, 2)
    columns, n = (*NLI_LABELS, "unparsed"), metrics["prompts"]
    counts = [[metrics["confusion"][g][c] for c in columns] for g in NLI_LABELS]
    left.imshow(counts, cmap="Blues")
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            colour = "white" if value > max(map(max, counts)) / 2 else "black"
            left.text(x, y, value, ha="center", va="center", color=colour)
    left.set(xlabel="predicted", xticks=range(4), xticklabels=columns)
    left.set(ylabel="gold", yticks=range(3), yticklabels=NLI_LABELS)
    low, high = wilson(metrics["accuracy"], n)
    left.set_title(f"{name}: accuracy {metrics['accuracy']:.3f} [{low:.2f}, {high:.2f}]")
    gold, predicted = ([metrics[key].get(c, 0) for c in columns] for key in ("gold_share", "predicted_share"))
    right.bar([x - 0.2 for x in range(4)], gold, 0.4, color="0.75", label="gold")
    bars = {"yerr": error_bars(predicted, [n] * 4), "capsize": 3}
    right.bar([x + 0.2 for x in range(4)], predicted, 0.4, color="tab:blue", label="predicted", **bars)
    right.set(ylabel="share of prompts", ylim=(0, 1), title="central tendency")
    right.set_xticks(range(4), columns, fontsize=9)
    right.legend(frameon=False)
    save_figure(figure, path)


def of_verb(systems, verb):
    """-> [(system, its document of this verb)]; UserError where one has none."""
    for name, documents in systems.items():
        if verb not in documents:
            raise UserError(f"{name} has no {verb}.metrics.json: run evaluate.py {verb} first")
    return [(name, documents[verb]) for name, documents in systems.items()]


def plot_positions(systems, path):
    """The U-shaped curve: accuracy by the gold passage's place, with 95% intervals over prompts; first lines are
    dashed, where they are not the whole answers. Seeds of a system, which answer the same prompts, are one line, their
    mean, and a thin one each: how far apart they lie no interval over prompts says."""
    figure, [axes] = new_figure()
    lines = {}
    for name, document in of_verb(systems, "multidoc-qa"):
        lines.setdefault(without_seed(name), []).append(document["metrics"])
    for number, (name, runs) in enumerate(lines.items()):
        counts = {int(p): n for p, n in runs[0]["positions"].items()}
        whole, first = (
            [[run[f"{kind}_at_{p}"] for p in counts] for run in runs] for kind in ("accuracy", "first_line")
        )
        places = [p + 0.06 * (number - (len(lines) - 1) / 2) for p in counts]  # side by side, or bars hide each other
        style = {"color": f"C{number}", "counts": counts.values()}
        if len(runs) > 1:
            name = f"{name}, {len(runs)} seeds"
            axes.plot(places, [*zip(*whole)], color=f"C{number}", lw=0.7, alpha=0.5)
        plot_shares(axes, places, [*map(fmean, zip(*whole))], fmt="-o", label=name, **style)
        if first != whole:
            plot_shares(axes, places, [*map(fmean, zip(*first))], fmt="--o", label=f"{name}, first line", **style)
    axes.set(xlabel="place of the gold passage", ylabel="accuracy", xticks=list(counts), ylim=(0, 1))
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_setting(setting, systems, path):
    """Fig. 4: label accuracy against a training argument (alpha, number of candidates, prompts trained on).

    A line joins runs that differ in nothing else; runs that differ in the seed alone are one point, their mean, and a
    dot each. What tells the lines apart is in the legend.
    """
    runs = []
    for name, document in of_verb(systems, "nli"):
        model, evaluated = document["settings"]["--model"], document["settings"]
        # kept beside the figures, or where the run is
        trained = common.run_settings(document["folder"] / "model") or common.run_settings(model)
        if trained.get(setting) is None:
            raise UserError(f"--plot {setting}: {name} is no run with --{setting}, as its RUN/args.json says")
        own = {k: str(v) for k, v in (trained | evaluated).items()}
        for k in ("seed", setting, "--model", "--name", f"content of {model}"):
            own.pop(k, None)
        runs.append((own, trained[setting], document["metrics"]))
    differing = sorted({k for own, *_ in runs for k, v in own.items() if any(o.get(k) != v for o, *_ in runs)})
    told = [k for k in differing if not k.startswith("content of ")] or differing
    rows = []
    for own, x, metrics in runs:
        shown = [(k, own[k].rpartition("/")[2][:24]) for k in told if k in own]  # of a path the name
        label = ", ".join(v if k == "ordering" else f"{k} {v}" for k, v in shown)
        line = tuple(own.get(k, "") for k in differing)
        rows.append({"label": label or "accuracy", "line": line, "x": x} | metrics)
    figure, [axes] = new_figure()
    frame = pandas.DataFrame(rows)
    for (label, _), line in frame.groupby(["label", "line"]):
        points = line.groupby("x")  # seeds answer the same prompts: they add none
        means, prompts = points["accuracy"].mean(), points["prompts"].first()
        drawn = plot_shares(axes, means.index, means, prompts, fmt="-o", label=label)
        seeds = line[points["x"].transform("size") > 1]
        axes.plot(seeds["x"], seeds["accuracy"], ".", color=drawn.get_color(), alpha=0.5)
    axes.set(xlabel="training prompts" if setting == TRAIN_SIZE else setting.replace("_", " "), ylabel="accuracy")
    values = sorted(set(frame["x"]))
    if setting != "num_candidates" and values[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.minorticks_off()
    figure.legend(frameon=False, loc="outside right upper")
    save_figure(figure, path)


TRAIN_SIZE = "max_train_samples"


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


def plot_training(systems, path):
    """A run's log: loss, pair accuracy and, where it has them, held-out figures and reward, a column each."""
    for name, documents in systems.items():
        models = [d["settings"].get("--model") for d in documents.values()]
        logs = [pathlib.Path(model).parent / "log.jsonl" for model in models if model]
        log = next((file for file in logs if file.is_file()), None)
        if log is None:
            raise UserError(f"--plot training: {name} is no run of ours (no log.jsonl beside its model)")
        frame = pandas.DataFrame([row for _, row in read_rows(log)]).set_index("step")
        keys = [k for k in ("loss", "pair_accuracy", "reward") if {k, f"eval_{k}"} & {*frame}]
        figure, axes = new_figure(4.4 * len(keys), 3.4, len(keys))
        for ax, key in zip(axes, keys):
            training, held_out = (frame.get(k, pandas.Series()).dropna() for k in (key, f"eval_{key}"))
            if len(training) >= 40:  # batches leap about: the mean over a tenth of the run
                ax.plot(training, color="C0", alpha=0.25)
                training = training.rolling(2 * (len(training) // 20) + 1, center=True).mean().dropna()
            if len(training):
                ax.plot(training, "-", label="training")
            if len(held_out):
                ax.plot(held_out, "o--", label="held out")
            ax.set(xlabel="step", ylabel=key.replace("_", " "), title=name)
            ax.legend(frameon=False)
        save_figure(figure, path.with_name(f"{path.stem}-{name}.png"))


PLOTS = {
    "alpha": functools.partial(plot_setting, "alpha"),
    "num_candidates": functools.partial(plot_setting, "num_candidates"),
    "train_size": functools.partial(plot_setting, TRAIN_SIZE),
    "gold_position": plot_positions,
    "sources": plot_sources,
    "training": plot_training,
}
