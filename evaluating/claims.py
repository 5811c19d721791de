"""Evidence: what the papers say, held against kept results item by item and seed by seed -> results/README.md."""

import math
import pathlib

from common import UserError
from evaluating.shared import mean, paired_bootstrap
from evaluating.tables import beside_paper, items_of, read_document, t_half_width, table, tables_of, without_seed

WANTED = {"title": str, "says": str, "command": str, "folder": str, "setting": str, "comparisons": list}
OPTIONAL = {"systems": list, "table": str, "columns": list, "figures": list, "plots": list}
COMPARED = {"higher": str, "lower": str, "figure": str}
VERDICT = COMPARED | {"study": str, "claim": str, "paper": str, "folder": str}
FOUND = {1: "**seen**", 0: "**too small to tell**", -1: "**not seen: the other way round**"}


def claims_page(path):
    """A claims file -> Markdown: for each claim its paper's words, the command, our figures beside the paper's, and the
    comparisons that decide it.

    The JSON: intro, claims, conclusions (a list of sentences), and verdicts, the lines of the table at the page's head:
    a comparison with study, claim, paper (what it printed), folder, note, and percent where a share is to be shown in
    points. A claim: title, says (the paper's finding), command, folder (of results, beside the file), systems (patterns
    of names in it, without: all), setting, table (a JSON of the paper's, from the file's folder on, with columns) and
    figures of ours alone, a verb before each ("nll response_nll"), comparisons [{higher, lower, figure}, ...] of
    systems without their -seedN, plots. `higher` is the system that should have the higher figure; `at_equal` names
    another figure at whose equal values the first one is compared. Several systems, "label@500 & label@1500", are one:
    the mean over them. Raises UserError on other fields.
    """
    path = pathlib.Path(path)
    page = read_document(path, intro=str, claims=list, conclusions=list)
    parts = [f"# Evidence\n\n{page['intro']}"]
    if "verdicts" in page:
        parts.append(verdicts(path, page["verdicts"]))
    if page["conclusions"]:
        parts.append("## What a reader may conclude\n\n" + "\n".join(f"- {s}" for s in page["conclusions"]))
    for number, claim in enumerate(page["claims"]):
        check_fields(f"{path}: claims[{number}]", claim, WANTED, OPTIONAL)
        for i, compared in enumerate(claim["comparisons"]):
            check_fields(f"{path}: claims[{number}].comparisons[{i}]", compared, COMPARED, {"at_equal": str})
        parts.append(f"## {claim['title']}\n\nThe paper: {claim['says']}\n\n```sh\n{claim['command']}\n```")
        found = {p for g in claim.get("systems", "*") for p in (path.parent / claim["folder"]).glob(g)}
        folders = sorted(p for p in found if any(p.glob("*.metrics.json")))
        if not folders:
            parts.append("Not run at this size yet.")
            continue
        parts.append(claim["setting"])
        tables, systems = tables_of(folders)
        if "table" in claim:
            parts.append(beside_paper(path.parent / claim["table"], tables, claim.get("columns")))
        if "figures" in claim:
            parts.append(own_figures(tables, claim["figures"]))
        lines = [comparison(systems, **wanted) for wanted in claim["comparisons"]]
        parts.append(table(["difference", "over items", "over seeds", "items, seeds", ""], lines))
        parts += [f"![{claim['title']}]({claim['folder']}/{plot})" for plot in claim.get("plots", ())]
    return "\n\n".join(parts)


def check_fields(where, found, wanted, optional):
    """UserError, in a sentence, where a JSON value is no object of these fields {name: type}."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: is no object")
    if absent := [k for k in wanted if k not in found]:
        raise UserError(f"{where}: has no {absent[0]!r}")
    for field, value in found.items():
        kind = (wanted | optional).get(field)
        if kind is None:
            raise UserError(f"{where}: {field!r} is none of {', '.join(wanted | optional)}")
        if not isinstance(value, kind) or kind is list and not all(isinstance(v, str | dict) for v in value):
            raise UserError(f"{where}: {field!r} is no {'list of names' if kind is list else 'text'}")


def own_figures(tables, columns):
    """Our systems, a row each, seeds together; columns "VERB FIGURE" -> Markdown."""
    runs = {}
    for column in columns:
        verb, _, figure = column.partition(" ")
        found = {name: row[figure] for name, row in tables.get(verb, {}).items() if figure in row}
        if not found:
            raise UserError(f"figures: {column!r} is no verb and a figure of it that a system here has")
        for name, value in found.items():
            runs.setdefault(without_seed(name), {}).setdefault(column, []).append(value)

    def cell(values):
        text = f"{mean(values):.3g}" if values else ""
        return text + (f" ±{t_half_width(values):.3g}" if len(values) > 1 else "")

    return table(columns, [[name, *(cell(row.get(c, ())) for c in columns)] for name, row in runs.items()])


def verdicts(path, lines):
    """The table at the page's head: what was claimed, ours, the paper's, the verdict. Holm's correction runs over the
    lines of one study; one that is not run yet counts with p = 1."""
    found = []
    for i, line in enumerate(lines):
        check_fields(f"{path}: verdicts[{i}]", line, VERDICT, {"at_equal": str, "note": str, "percent": bool})
        folders = [p for p in (path.parent / line["folder"]).glob("*") if any(p.glob("*.metrics.json"))]
        wanted = {k: line[k] for k in (*COMPARED, "at_equal") if k in line}
        found.append(Difference(tables_of(folders)[1], **wanted))
    rows = []
    for line, ours in zip(lines, found):
        same = [o.p if o.seeds else 1.0 for other, o in zip(lines, found) if other["study"] == line["study"]]
        cells = [line["claim"], "not run", "", line["paper"], "**not run**"]
        if ours.seeds:
            p = holm(same)[same.index(ours.p)]
            scale = 100 if line.get("percent") else 1
            intervals = [f"[{scale * low:+.3g}, {scale * high:+.3g}]" for low, high in ours.intervals()]
            verdict = FOUND[ours.side if p < 0.05 else 0] + (", in one seed" if ours.seeds == 1 else "")
            note = f"; {line['note']}" if "note" in line else ""
            cells[1:3] = f"{scale * ours.middle:+.3g} " + ", ".join(intervals), f"{p:.2g}"
            cells[4] = verdict + note
        rows.append([line["study"], *cells])
    return table(["claim", "ours, over items, over seeds", "p, corrected", "the paper's", "verdict"], rows)


def holm(values):
    """p values -> the same by Holm's correction, in their order."""
    order, corrected, highest = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values), 0.0
    for k, i in enumerate(order):
        highest = corrected[i] = max(highest, min(1.0, (len(values) - k) * values[i]))
    return corrected


class Difference:
    """Whether `higher` has the higher figure, on the items that both have.

    middle: the mean over items of the mean over seeds; over_items: its interval by a paired bootstrap; over_seeds:
    Student's t over the differences of the seeds that both have (a system without seeds stands against each), or None
    of one seed; p: two-sided, the larger one of the two; side: 1 or -1 where over_items lies beside 0, else 0.
    at_equal: the items' differences are regressed on those of log(1 + at_equal); the intercept is the difference where
    both are equal, over seeds the mean of each seed's own.
    """

    def __init__(self, systems, higher, lower, figure, at_equal=None):
        self.name = f"{higher} > {lower}, {figure}" + (f" at equal {at_equal}" if at_equal else "")
        runs = [runs_of(systems, system, figure, at_equal) for system in (higher, lower)]
        seeds = [s for s in runs[0] | runs[1] if all(s in run or "" in run for run in runs)]
        self.seeds = len(seeds)
        if not seeds:
            return
        pairs = [[run.get(s, run.get("")) for run in runs] for s in seeds]
        ids = sorted(set.intersection(*(set(items) for pair in pairs for items, _ in pair)))
        if not ids:
            raise UserError(f"{higher} and {lower} have no items in common: they were measured on different records")
        self.items = len(ids)

        def difference(some):  # of these pairs of runs -> the mean, its interval over items, p
            differences = [mean(a[i] - b[i] for (a, _), (b, _) in some) for i in ids]
            if not at_equal:
                return paired_bootstrap(differences)
            sizes = [mean(math.log1p(a[i]) - math.log1p(b[i]) for (_, a), (_, b) in some) for i in ids]
            return intercept(sizes, differences)

        middle, self.over_items, self.p = difference(pairs)
        self.middle = round(middle, 9)  # or a difference of nothing has a float's last bits
        self.side = (self.over_items[0] > 0) - (self.over_items[1] < 0)
        self.values = [difference([pair])[0] for pair in pairs] if len(pairs) > 1 else [middle]
        self.over_seeds = None
        if len(pairs) > 1:
            half = t_half_width(self.values)
            self.over_seeds = mean(self.values) - half, mean(self.values) + half
            self.p = max(self.p, p_of_seeds(self.values))

    def intervals(self):
        return [self.over_items, *([self.over_seeds] if self.over_seeds else [])]


def comparison(systems, **wanted):
    """The line of a table. The difference counts as seen where both intervals lie above 0; of one seed the second is
    missing, and the line says so; where the first alone lies beside 0, it says how many seeds do."""
    found = Difference(systems, **wanted)
    if not found.seeds:
        return [found.name, "not run", "", "", "", ""]
    side, values = found.side, found.values
    intervals = [f"[{low:+.3g}, {high:+.3g}]" for low, high in found.intervals()]
    text = FOUND[side] + ", in one seed"
    if found.over_seeds:
        low, high = found.over_seeds
        agreed = (low > 0) - (high < 0) == side
        alike = f", {sum(v * side > 0 for v in values)} of {len(values)} seeds on that side"
        text = FOUND[side if agreed else 0] + (alike if side and not agreed else "")
    both = [*intervals, ""][:2]
    return [found.name, f"{found.middle:+.3g}", *both, f"{found.items}, {found.seeds}", text]


def p_of_seeds(values):
    """Student's t of n > 1 differences, two-sided."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, 0).pvalue) if len(set(values)) > 1 else float(not values[0])


def runs_of(systems, name, figure, at_equal):
    """The runs of a system, or the means of several (A & B) -> {"-seedN", or "" without a seed: ({id: figure}, {id:
    at_equal})}."""
    parts = [runs_of_one(systems, part, figure, at_equal) for part in name.split(" & ")]

    def averaged(several):  # [{id: value}, ...], or [None, ...]
        if several[0] is not None:
            return {i: mean(values[i] for values in several) for i in set.intersection(*map(set, several))}

    seeds = [s for s in parts[0] if all(s in part for part in parts)]
    return {s: tuple(averaged(some) for some in zip(*(part[s] for part in parts))) for s in seeds}


def runs_of_one(systems, name, figure, at_equal):
    runs = {}
    for system in sorted(systems):
        if without_seed(system) == name:
            folders = {document["folder"] for document in systems[system].values()}
            items = items_of(folders)
            if absent := {figure, at_equal or figure} - items.keys():
                raise UserError(
                    f"{system}: no items of {min(absent)} in {', '.join(map(str, folders))}; evaluate it again"
                )
            runs[system.removeprefix(name)] = items[figure], items.get(at_equal)
    return runs


def intercept(x, y):
    """Least squares of y on x -> (the intercept, its 95% interval, p)."""
    from scipy.stats import linregress, t

    fit = linregress(x, y)
    half = float(t.ppf(0.975, len(x) - 2) * fit.intercept_stderr)
    middle = float(fit.intercept)
    p = 2 * float(t.sf(abs(middle) / fit.intercept_stderr, len(x) - 2)) if fit.intercept_stderr else float(not middle)
    return middle, (middle - half, middle + half), p
