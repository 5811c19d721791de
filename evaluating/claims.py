"""Evidence: what the papers say, held against kept results item by item and seed by seed -> results/README.md."""

import math
import pathlib

from common import UserError
from evaluating.shared import mean, paired_bootstrap
from evaluating.tables import beside_paper, items_of, read_document, t_half_width, table, tables_of, without_seed

WANTED = {"title": str, "says": str, "command": str, "folder": str, "setting": str, "comparisons": list}
OPTIONAL = {"systems": list, "table": str, "columns": list, "figures": list, "plots": list}
COMPARED = {"higher": str, "lower": str, "figure": str}
FOUND = {1: "**seen**", 0: "**too small to tell**", -1: "**not seen: the other way round**"}


def claims_page(path):
    """A claims file -> Markdown: for each claim its paper's words, the command, our figures beside the paper's, and the
    comparisons that decide it.

    The JSON: intro, claims, conclusions (a list of sentences). A claim: title, says (the paper's finding), command,
    folder (of results, beside the file), systems (patterns of names in it, without: all), setting, table (a JSON of the
    paper's, from the file's folder on, with columns) and figures of ours alone, a verb before each ("nll
    response_nll"), comparisons [{higher, lower, figure}, ...] of systems without their -seedN, plots. `higher` is the
    system that should have the higher figure; `at_equal` names another figure at whose equal values the first one is
    compared. Raises UserError on other fields.
    """
    path = pathlib.Path(path)
    page = read_document(path, intro=str, claims=list, conclusions=list)
    parts = [f"# Evidence\n\n{page['intro']}"]
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


def comparison(systems, higher, lower, figure, at_equal=None):
    """The line of a table: whether `higher` has the higher figure, on the items that both have.

    The difference is the mean over items of the mean over seeds. It counts as seen where two intervals lie above 0: a
    paired bootstrap over items, and Student's t over the differences of the seeds that both have (a system without
    seeds stands against each); of one seed the second is missing, and the line says so; where the first alone lies
    beside 0, it says how many seeds do. at_equal: the items' differences are regressed on those of log(1 + at_equal);
    the intercept is the difference where both are equal, over seeds the mean of each seed's own.
    """
    name = f"{higher} > {lower}, {figure}" + (f" at equal {at_equal}" if at_equal else "")
    runs = [runs_of(systems, system, figure, at_equal) for system in (higher, lower)]
    seeds = [s for s in runs[0] | runs[1] if all(s in run or "" in run for run in runs)]
    if not seeds:
        return [name, "not run", "", "", "", ""]
    pairs = [[run.get(s, run.get("")) for run in runs] for s in seeds]
    ids = sorted(set.intersection(*(set(items) for pair in pairs for items, _ in pair)))
    if not ids:
        raise UserError(f"{higher} and {lower} have no items in common: they were measured on different records")

    def difference(some):  # of these pairs of runs -> the mean and its interval over items
        differences = [mean(a[i] - b[i] for (a, _), (b, _) in some) for i in ids]
        if not at_equal:
            return paired_bootstrap(differences)[:2]
        sizes = [mean(math.log1p(a[i]) - math.log1p(b[i]) for (_, a), (_, b) in some) for i in ids]
        return intercept(sizes, differences)

    middle, (low, high) = difference(pairs)
    middle = round(middle, 9)  # or a difference of nothing has a float's last bits
    over_items, over_seeds, side = f"[{low:+.3g}, {high:+.3g}]", "", (low > 0) - (high < 0)
    found = FOUND[side] + ", in one seed"
    if len(pairs) > 1:
        values = [difference([pair])[0] for pair in pairs]
        half = t_half_width(values)
        low, high = mean(values) - half, mean(values) + half
        over_seeds, agreed = f"[{low:+.3g}, {high:+.3g}]", (low > 0) - (high < 0) == side
        alike = f", {sum(v * side > 0 for v in values)} of {len(values)} seeds on that side"
        found = FOUND[side if agreed else 0] + (alike if side and not agreed else "")
    return [name, f"{middle:+.3g}", over_items, over_seeds, f"{len(ids)}, {len(pairs)}", found]


def runs_of(systems, name, figure, at_equal):
    """The runs of a system -> {"-seedN", or "" without a seed: ({id: figure}, {id: at_equal})}."""
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
    """Least squares of y on x -> (the intercept, its 95% interval)."""
    from scipy.stats import linregress, t

    fit = linregress(x, y)
    half = float(t.ppf(0.975, len(x) - 2) * fit.intercept_stderr)
    middle = float(fit.intercept)
    return middle, (middle - half, middle + half)
