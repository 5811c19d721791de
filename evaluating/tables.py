"""Figures of several systems as Markdown tables, beside a paper's own."""

import math
import pathlib
import re
import statistics

from collecting.files import parse_object
from common import UserError, is_number
from evaluating.intervals import student, wilson

SHARES = ("accuracy", "first_line", "well_formed", "unparsed", "unfinished", "pair_accuracy", "margin_violations")
SHARES += ("win", "tie", "lose", "flip_rate")


def read_document(path, **fields):
    """The JSON object of a file that has these fields {name: type}; UserError on any other."""
    document = parse_object(pathlib.Path(path).read_bytes(), path)
    for field, kind in fields.items():
        if not isinstance(document.get(field), kind):
            raise UserError(f"{path}: has no {field!r}: it is not what this script reads here")
    return document


def load_systems(folders):
    """Folders with VERB.metrics.json and VERB.items.json -> {the folder's name: {verb: document}}: the first file's
    content, with its `folder`, and the second's as `items` {figure: {id: value}}. UserError where a folder has none of
    them, and where two have one name."""
    systems = {}
    for folder in folders:
        name = folder.resolve().name
        if name in systems:
            raise UserError(f"{folder}: two folders are called {name!r}, which is a system's name: rename one")
        documents = systems[name] = {}
        for file in sorted(folder.glob("*.metrics.json")):
            verb = file.name.removesuffix(".metrics.json")
            items = folder / f"{verb}.items.json"
            items = read_document(items) if items.exists() else {}
            documents[verb] = read_document(file, metrics=dict) | {"folder": folder, "items": items}
        if not documents:
            raise UserError(f"{folder}: no *.metrics.json; evaluate {name} first")
    return systems


def items_of(documents):
    """A system's {figure: {id: value}}, whatever the verb."""
    return {figure: values for document in documents.values() for figure, values in document["items"].items()}


def without_seed(name):
    """NAME of NAME-seed0, NAME-seed1, ...: runs that are one system."""
    return re.sub(r"-seed\d+$", "", name)


def figures_of(document):
    """A verb's document -> {figure: (value, its 95% interval, or None)}, of its plain numbers. The interval is the
    verb's own, else Wilson's, of a share of so many prompts: pairs of one prompt are not independent, and a question
    that is asked at several places of the gold document is one."""
    numbers, figures = {k: v for k, v in document["metrics"].items() if is_number(v)}, {}
    for figure, value in numbers.items():
        subset, name, place = re.fullmatch(r"(.* )?(.+?)(_at_\d+)?", figure).groups("")
        counts = [n for what in ("prompts", "questions") if (n := numbers.get(f"{subset}{what}{place}"))]
        interval = None
        if f"{figure} 95% low" in numbers:
            interval = numbers[f"{figure} 95% low"], numbers[f"{figure} 95% high"]
        elif name in SHARES and counts and 0 <= value <= 1:
            interval = wilson(value, min(counts))
        if not figure.endswith((" 95% low", " 95% high")):
            figures[figure] = value, interval
    return figures


def beside_paper(path, systems, wanted=None):
    """A paper's table and our figures -> Markdown.

    The JSON: source, rows {system: {column: the paper's value}}; optional: note; names {system: as the paper calls it};
    percent, the figures (the last word of their names) of ours to be multiplied by 100; cells, one figure's name: then
    a column is what follows the @ in a system's name (label@2000), otherwise a column is a figure's name. Columns of
    ours that the paper lacks stay where `cells` is given, and rows of ours always. A column `mean` is the mean,
    seed by seed, of the others that its rows have. wanted: of the columns, only these.
    """
    paper = read_document(path, rows=dict, source=str)
    cell, printed, names = paper.get("cells"), paper["rows"], paper.get("names", {})
    columns = list(dict.fromkeys(c for row in printed.values() for c in row))
    if not cell and (unknown := set(wanted or ()) - set(columns)):
        raise UserError(f"{path}: has no column {min(unknown)!r}")
    columns = [c for c in columns if c in (wanted or columns)]
    ours = {}  # row -> column -> [(value, interval)], a pair for each seed
    for name, documents in systems.items():
        row, _, size = without_seed(name).partition("@") if cell else (without_seed(name), "", "")
        figures = {k: v for document in documents.values() for k, v in figures_of(document).items()}
        for figure in (f for f in ([cell] if cell else columns) if f in figures):
            value, interval = figures[figure]
            scale = 100 if figure.split()[-1] in paper.get("percent", ()) else 1
            scaled = scale * value, interval and [scale * x for x in interval]
            ours.setdefault(row, {}).setdefault(size or figure, []).append(scaled)
    averaged = {c for row in printed.values() if "mean" in row for c in row} - {"mean"}
    for row in ours.values():
        if averaged and row.keys() >= averaged:
            row["mean"] = [(statistics.fmean(v for v, _ in seeds), None) for seeds in zip(*map(row.get, averaged))]
    columns = list(dict.fromkeys([*columns, *(c for row in ours.values() for c in row)]))
    if cell:  # sizes in order, then words
        columns.sort(key=lambda c: (float(c) if c.replace(".", "").isdigit() else math.inf, c))
    lines = []
    for row in dict.fromkeys([*printed, *ours]):
        cells = [paper_cell(ours.get(row, {}).get(c), printed.get(row, {}).get(c)) for c in columns]
        lines.append([names.get(row, row), *cells])
    note = f": {paper['note']}" if "note" in paper else ""
    return f"Ours, and in brackets {paper['source']}{note}\n\n{table(columns, lines)}"


def paper_cell(ours, printed):
    """ours [(value, interval or None)] or None, the paper's value or None -> `61.2 ±1.9 (81.97)`."""
    text = with_spread([value for value, _ in ours], ".2f") if ours else ""
    if ours and len(ours) == 1 and ours[0][1]:
        text += " [{:.1f}, {:.1f}]".format(*ours[0][1])
    return f"{text} ({printed})".strip() if printed is not None else text


def with_spread(values, form):
    """The mean of the seeds' values, and behind ± half its 95% interval."""
    spread = f" ±{student(values)[0]:{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def own_figures(systems, columns):
    """Our systems, a row each, seeds together; columns "VERB FIGURE" -> Markdown."""
    rows = {}
    for name, documents in systems.items():
        row = rows.setdefault(without_seed(name), {})
        for verb, document in documents.items():
            for figure, (value, _) in figures_of(document).items():
                row.setdefault(f"{verb} {figure}", []).append(value)
    if unknown := [c for c in columns if not any(c in row for row in rows.values())]:
        raise UserError(f"no system has the figure {unknown[0]!r}")
    cells = {name: {c: with_spread(row[c], ".3g") for c in columns if c in row} for name, row in rows.items()}
    return markdown(cells, columns)


def markdown(rows, columns=None):
    """{row name: {column: number or text}} -> a Markdown table, of all columns or of these."""
    columns = columns or list(dict.fromkeys(c for row in rows.values() for c in row))
    text = lambda x: x if isinstance(x, str) else f"{x:.4g}"  # noqa: E731
    return table(columns, [[name, *(text(row.get(c, "")) for c in columns)] for name, row in rows.items()])


def table(columns, lines):
    lines = [["", *columns], ["---"] * (len(columns) + 1), *lines]
    plain = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)  # a name is any text
    return "\n".join("| " + " | ".join(line) + " |" for line in plain)
