"""Evidence: what the papers say, held against kept results item by item and seed by seed -> results/README.md."""

import pathlib
from types import SimpleNamespace

import numpy as np
import pandas

from common import UserError
from evaluating.intervals import holm, intercept, paired_bootstrap, student
from evaluating.tables import beside_paper, items_of, load_systems, own_figures, read_document, without_seed
from evaluating.tables import table as markdown_table

FOUND = {1: "**seen**", 0: "**too small to tell**", -1: "**not seen: the other way round**"}


def claims_page(path):
    """A claims file -> Markdown: a table of verdicts, the conclusions, how to read the tables, and for each claim its
    paper's words, the command, our figures beside the paper's, and the comparisons that decide it.

    The JSON: intro, verdicts, conclusions and reading (lists of sentences), claims. What a verdict and a claim hold are
    the arguments of `verdict` and `section`; a comparison those of `compare`. Folders are beside the file. Raises
    UserError.
    """
    page = read_document(path, intro=str, claims=list, conclusions=list, reading=list)
    root = pathlib.Path(path).parent
    parts = [f"# Evidence\n\n{page['intro']}"]
    try:
        if "verdicts" in page:
            parts.append(verdicts(root, page["verdicts"]))
        parts.append("## What a reader may conclude\n\n" + bullets(page["conclusions"]))
        parts.append("## How to read the tables\n\n" + bullets(page["reading"]))
        parts += [section(root, **claim) for claim in page["claims"]]
    except (KeyError, TypeError) as e:  # a field that is missing, unknown or of another type
        raise UserError(f"{path}: not a page of claims ({type(e).__name__}: {e})") from e
    return "\n\n".join(parts)


def bullets(sentences):
    return "\n".join(f"- {sentence}" for sentence in sentences)


# fmt: off
def section(root, title, says, command, folder, setting, comparisons, systems=("*",), table=None, columns=None,
            figures=None, plots=()):
    # fmt: on
    """A claim. title: a heading; says: the paper's finding; folder: of results; systems: patterns of their names;
    setting: sentences; table: a JSON of the paper's, with `columns` of it; figures: ours alone, a verb before each
    ("nll response_nll"); comparisons: arguments of `compare`; plots: files in the folder."""
    parts = [f"## {title}\n\nThe paper: {says}\n\n```sh\n{command}\n```"]
    found = systems_in(root / folder, systems)
    if not found:
        return "\n\n".join([*parts, "Not run at this size yet."])
    parts.append(bullets(setting))
    if table:
        parts.append(beside_paper(root / table, found, columns))
    if figures:
        parts.append(own_figures(found, figures))
    lines = [comparison(found, **wanted) for wanted in comparisons]
    parts.append(markdown_table(["difference", "over items", "over seeds", "items, seeds", ""], lines))
    return "\n\n".join([*parts, *(f"![{title}]({folder}/{plot})" for plot in plots)])


def systems_in(folder, patterns=("*",)):
    found = {path for pattern in patterns for path in folder.glob(pattern) if any(path.glob("*.metrics.json"))}
    return load_systems(sorted(found))


def comparison(systems, higher, lower, figure, at_equal=None):
    """One of a claim's lines. A difference is seen where both intervals lie on its side of 0. Of one seed the second
    interval is missing, and the line says so; where the first alone lies on that side, it says how many seeds do."""
    name = f"{higher} > {lower}, {figure}" + (f" at equal {at_equal}" if at_equal else "")
    found = compare(systems, higher, lower, figure, at_equal)
    if not found:
        return [name, "not run", "", "", "", ""]
    seen, seeds = side(found.intervals[0]), len(found.values)
    text = FOUND[seen] + ", in one seed" * (seeds == 1)
    if seen and side(found.intervals[-1]) != seen:
        text = f"{FOUND[0]}, {sum(v * seen > 0 for v in found.values)} of {seeds} seeds on that side"
    over_items, over_seeds = [*shown(found.intervals), ""][:2]
    return [name, f"{found.middle:+.3g}", over_items, over_seeds, f"{found.items}, {seeds}", text]


def verdicts(root, lines):
    """The table at the page's head. Holm's correction runs over the lines of one study; one that is not run yet counts
    with p = 1."""
    systems = {folder: systems_in(root / folder) for folder in {line["folder"] for line in lines}}
    found = [compare(systems[x["folder"]], x["higher"], x["lower"], x["figure"]) for x in lines]
    p = pandas.Series([ours.p if ours else 1.0 for ours in found])
    p = p.groupby([line["study"] for line in lines]).transform(holm)
    rows = [verdict(ours, corrected, **line) for ours, corrected, line in zip(found, p, lines)]
    return markdown_table(["claim", "ours, over items, over seeds", "p, corrected", "the paper's", "verdict"], rows)


# fmt: off
def verdict(ours, p, study, claim, paper, folder, higher, lower, figure, note=None, percent=False, small=-np.inf):
    # fmt: on
    """One of its lines. ours: compare's; p: corrected; paper: what it printed; percent: a share, shown in points.
    small: where nothing is seen and both intervals end below so many points, the verdict is "not there at this size";
    else the larger half-width stands behind it: a smaller effect could not have been seen.
    """
    if not ours:
        return [study, claim, "not run", "", paper, "**not run**"]
    scale = 100 if percent else 1
    figures = f"{scale * ours.middle:+.1f} {', '.join(shown(ours.intervals, scale, '+.1f'))}"
    one_seed = ", in one seed" * (len(ours.values) == 1)
    if p < 0.05:
        text = FOUND[side(ours.intervals[0])] + one_seed
    elif not one_seed and all(scale * high < small for _, high in ours.intervals):
        text = f"**not there at this size**: below {small} points"
    else:
        half = max(high - low for low, high in ours.intervals) / 2
        text = f"{FOUND[0]}{one_seed} (±{scale * half:.1f})"
    return [study, claim, figures, f"{p:.2g}", paper, f"{text}; {note}" if note else text]


def side(interval):
    """1 or -1 for an interval above or below 0, else 0."""
    return (interval[0] > 0) - (interval[1] < 0)


def shown(intervals, scale=1, form="+.3g"):
    return [f"[{scale * low:{form}}, {scale * high:{form}}]" for low, high in intervals]


def compare(systems, higher, lower, figure, at_equal=None):
    """How much higher a figure is under one system than under another, on the items that both have; None where one of
    them, named without its -seedN, has not run.

    higher: the one that should have the higher figure. Several, "label@500 & label@1500", are one: the mean over them.
    at_equal: the items' differences are regressed on those of log(1 + at_equal); the difference is the intercept, where
    both are equal, and over seeds the mean of each seed's own.
    -> middle, the mean over items of the mean over seeds; intervals, over items by a paired bootstrap and, where there
    are several, over seeds by Student's t; values, of each seed; p, the larger one of both; items, their number.
    """
    difference = subtract(runs_of(systems, higher, figure), runs_of(systems, lower, figure))
    if difference.columns.empty:
        return None
    if difference.empty:
        raise UserError(f"{higher} and {lower} have no items in common: they were measured on different records")

    def over_items(seeds):
        differences = difference[seeds].mean(axis=1).tolist()
        return intercept(sizes[seeds].mean(axis=1), differences) if at_equal else paired_bootstrap(differences)

    if at_equal:
        sizes = subtract(*(np.log1p(runs_of(systems, name, at_equal)) for name in (higher, lower)))
        sizes = sizes.loc[difference.index]
    middle, interval, p = over_items([*difference])
    values = [over_items([seed])[0] if at_equal else float(difference[seed].mean()) for seed in difference]
    intervals = [interval]
    if len(values) > 1:
        half, p_of_seeds = student(values)
        over_seeds = sum(values) / len(values)
        intervals.append((over_seeds - half, over_seeds + half))
        p = max(p, p_of_seeds)
    middle = round(middle, 9)  # or a difference of nothing has a float's last bits
    return SimpleNamespace(middle=middle, intervals=intervals, values=values, p=p, items=len(difference))


def runs_of(systems, name, figure):
    """The items of a system's runs, or the mean of several systems' -> DataFrame [ids, seeds]; of a system without
    seeds the column is ""."""
    frames = []
    for part in name.split(" & "):
        runs = {}
        for system in sorted(s for s in systems if without_seed(s) == part):
            items = items_of(systems[system])
            if figure not in items:
                raise UserError(f"{system}: no items of {figure}; evaluate it again")
            runs[system.removeprefix(part)] = items[figure]
        frames.append(pandas.DataFrame(runs))
    return (sum(frames) / len(frames)).dropna(axis="columns", how="all")


def subtract(higher, lower):
    """[ids, seeds] both -> higher - lower on the ids and seeds that both have. A system without seeds stands against
    each seed of the other."""
    if "" in higher:
        higher = pandas.DataFrame(dict.fromkeys(lower, higher[""]))
    if "" in lower:
        lower = pandas.DataFrame(dict.fromkeys(higher, lower[""]))
    higher, lower = higher.align(lower, join="inner")
    return (higher - lower).dropna().sort_index()
