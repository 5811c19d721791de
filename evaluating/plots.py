"""All figures as PNG: what a verb draws of one system, and RESCUE's figures of several."""

import pathlib
from statistics import fmean

import common
from collecting.answers import NLI_LABELS
from collecting.files import read_rows
from common import UserError, say
from evaluating.shared import wilson
from evaluating.tables import without_seed


def new_figure(width=6.4, height=4.0, columns=1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    say(f"plot: {path}")


def plot_nli(metrics, name, path):
    """The confusion matrix, and the share of each label among answers and gold: a model that leans to the middle
    answers 'neutral'."""
    figure, (left, right) = new_figure(10, 4, 2)
    columns = (*NLI_LABELS, "unparsed")
    counts = [[metrics["confusion"][g][c] for c in columns] for g in NLI_LABELS]
    left.imshow(counts, cmap="Blues")
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            colour = "white" if value > max(map(max, counts)) / 2 else "black"
            left.text(x, y, value, ha="center", va="center", color=colour)
    left.set(xlabel="predicted", xticks=range(4), xticklabels=columns)
    left.set(ylabel="gold", yticks=range(3), yticklabels=NLI_LABELS)
    low, high = wilson(metrics["accuracy"], metrics["prompts"])
    left.set_title(f"{name}: accuracy {metrics['accuracy']:.3f} [{low:.2f}, {high:.2f}]")
    for offset, key, colour in ((-0.2, "gold_share", "0.75"), (0.2, "predicted_share", "tab:blue")):
        shares = [metrics[key].get(c, 0) for c in columns]
        bars = {"yerr": error_bars(shares, [metrics["prompts"]] * 4), "capsize": 3} if key == "predicted_share" else {}
        right.bar([x + offset for x in range(4)], shares, 0.4, color=colour, label=key.split("_")[0], **bars)
    right.set(ylabel="share of prompts", ylim=(0, 1), title="central tendency")
    right.set_xticks(range(4), columns, fontsize=9)
    right.legend(frameon=False)
    save_figure(figure, path)


def error_bars(shares, counts):
    """How far the 95% intervals of shares of so many reach -> [below them, above them]."""
    spans = [wilson(share, n) for share, n in zip(shares, counts)]
    return [*zip(*((max(0, share - low), max(0, high - share)) for share, (low, high) in zip(shares, spans)))]


def plot_shares(axes, x, shares, counts, **style):
    """A line of shares, each with its 95% interval of so many -> the line."""
    return axes.errorbar(x, shares, error_bars(shares, counts), capsize=3, **style)[0]


def plot_positions(systems, path):
    """The U-shaped curve: accuracy by the gold passage's place, with 95% intervals over prompts; first lines are
    dashed, where they are not the whole answers. Seeds of a system, which answer the same prompts, are one line, their
    mean, and a thin one each: how far apart they lie no interval over prompts says."""
    figure, axes = new_figure()
    seeds = {}
    for name, metrics in systems.items():
        seeds.setdefault(without_seed(name), []).append(metrics)
    for colour, (name, runs) in enumerate(seeds.items()):
        counts = {int(p): n for p, n in runs[0]["positions"].items()}
        places = [p + 0.06 * (colour - (len(seeds) - 1) / 2) for p in counts]  # side by side, or bars hide each other
        whole, first = (
            [fmean(r[f"{kind}_at_{p}"] for r in runs) for p in counts] for kind in ("accuracy", "first_line")
        )
        style = {"color": f"C{colour}", "counts": counts.values()}
        if len(runs) > 1:
            name = f"{name}, {len(runs)} seeds"
            for run in runs:
                axes.plot(places, [run[f"accuracy_at_{p}"] for p in counts], color=f"C{colour}", lw=0.7, alpha=0.5)
        plot_shares(axes, places, whole, fmt="-o", label=name, **style)
        if first != whole:
            plot_shares(axes, places, first, fmt="--o", label=f"{name}, first line", **style)
    axes.set(xlabel="place of the gold passage", ylabel="accuracy", xticks=list(counts), ylim=(0, 1))
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_setting(systems, path, setting):
    """Fig. 4: label accuracy against a training argument (alpha, number of candidates, prompts trained on).

    A line joins runs that differ in nothing else; runs that differ in the seed alone are one point, their mean, and a
    dot each. What tells the lines apart is in the legend.
    """
    runs = []
    for name, documents in systems.items():
        document = need_verb(documents, name, "nli")
        model = document["settings"]["--model"]
        # kept beside the figures, or where the run is
        trained = common.run_settings(document["folder"] / "model") or common.run_settings(model)
        if setting not in trained:
            raise UserError(f"--plot {setting}: {name} is no run with --{setting}, as its RUN/args.json says")
        evaluated = {
            k: v for k, v in document["settings"].items() if k not in ("--model", "--name", f"content of {model}")
        }
        runs.append(({k: v for k, v in trained.items() if k != "seed"} | evaluated, document["metrics"]))
    same = {k for k in runs[0][0] if all(r.get(k, "") == runs[0][0][k] for r, _ in runs)}
    lines = {}  # what is particular to it -> x -> [metrics]
    for settings, metrics in runs:
        own = tuple(sorted((k, str(v)) for k, v in settings.items() if k not in same and k != setting))
        lines.setdefault(own, {}).setdefault(settings[setting], []).append(metrics)
    figure, axes = new_figure()
    for own, points in sorted(lines.items()):
        x = sorted(points, key=float)
        shares = [fmean(m["accuracy"] for m in points[v]) for v in x]
        prompts = [points[v][0]["prompts"] for v in x]  # seeds answer the same ones: they add none
        told = [(k, pathlib.Path(v).name) for k, v in own if not k.startswith("content of ")]
        told = told or [(k, v[:6]) for k, v in own]  # the content of a file alone: other data, another model before
        label = ", ".join(v if k == "ordering" else f"{k} {v}" for k, v in told)
        line = plot_shares(axes, x, shares, prompts, fmt="-o", label=label or "accuracy")
        for value in (v for v in x if len(points[v]) > 1):
            seeds = [m["accuracy"] for m in points[value]]
            axes.plot([value] * len(seeds), seeds, ".", color=line.get_color(), alpha=0.5)
    axes.set(xlabel="training prompts" if setting == TRAIN_SIZE else setting.replace("_", " "), ylabel="accuracy")
    values = sorted({x for points in lines.values() for x in points})
    if setting != "num_candidates" and values[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.minorticks_off()
    figure.legend(frameon=False, loc="outside right upper")
    save_figure(figure, path)


TRAIN_SIZE = "max_train_samples"


def plot_sources(systems, path):
    """Fig. 5 and 6: by source, log p / |y| and log p / |y| ** lambda of each response, and its length in tokens."""
    for name, documents in systems.items():
        predictions = need_verb(documents, name, "ranking")["folder"] / "ranking.jsonl"
        values = {}
        for where, row in read_rows(predictions):
            if "sources" not in row:
                raise UserError(f"{where}: has no sources; delete {predictions} and run evaluate.py ranking again")
            for source, logp, n, score in zip(*(row[k] for k in ("sources", "logprobs", "lengths", "scores"))):
                values.setdefault(source, []).append((logp / n, score, n))
        figure, axes = new_figure(10, 3.2, 3)
        figure.suptitle(name)
        labels = ("log p / |y|", r"log p / |y|$^\lambda$", "|y|, tokens")
        for column, (ax, label) in enumerate(zip(axes, labels)):
            drawn = [v[column] for rows in values.values() for v in rows]
            style = {"bins": 16, "range": (min(drawn), max(drawn)), "density": True, "histtype": "step", "lw": 1.5}
            for source, rows in sorted(values.items()):
                ax.hist([v[column] for v in rows], label=f"{source} ({len(rows)})", **style)
            ax.set(xlabel=label, yticks=[])
            ax.locator_params(axis="x", nbins=5)
        axes[0].set_ylabel("density")
        axes[-1].legend(frameon=False, fontsize=8)
        save_figure(figure, predictions.with_name(path.name))


def plot_training(systems, path):
    """A run's log: loss, pair accuracy and, where it has them, held-out figures and reward, a column each."""
    for name, documents in systems.items():
        models = [d["settings"].get("--model") for d in documents.values() if d["settings"].get("--model")]
        logs = [pathlib.Path(model).parent / "log.jsonl" for model in models]
        log = next((file for file in logs if file.is_file()), None)
        if log is None:
            raise UserError(f"--plot training: {name} is no run of ours (no log.jsonl beside its model)")
        rows = [row for _, row in read_rows(log)]
        figures = [k for k in ("loss", "pair_accuracy", "reward") if any(k in r or f"eval_{k}" in r for r in rows)]
        figure, axes = new_figure(4.4 * len(figures), 3.4, len(figures))
        for ax, key in zip(axes if len(figures) > 1 else [axes], figures):
            for column, style in ((key, "-"), (f"eval_{key}", "o--")):
                points = [(row["step"], row[column]) for row in rows if column in row]
                if len(points) >= 40 and column == key:  # batches leap about: the mean over a tenth of the run
                    ax.plot(*zip(*points), color="C0", alpha=0.25)
                    n = len(points) // 20
                    some = range(n, len(points) - n)
                    points = [(points[i][0], fmean(v for _, v in points[i - n : i + n + 1])) for i in some]
                if points:
                    ax.plot(*zip(*points), style, label="held out" if column != key else "training")
            ax.set(xlabel="step", ylabel=key.replace("_", " "), title=name)
            ax.legend(frameon=False)
        save_figure(figure, path.with_name(f"{path.stem}-{name}.png"))


def need_verb(documents, name, verb):
    if verb not in documents:
        raise UserError(f"{name} has no {verb}.metrics.json: run evaluate.py {verb} first")
    return documents[verb]
