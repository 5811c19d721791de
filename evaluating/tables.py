"""Figures of several systems as Markdown tables, beside a paper's own."""

import math
import pathlib
import re
import statistics

from collecting.files import as_object, parse_json
from common import UserError, is_number
from evaluating.shared import wilson


def read_document(path, **fields):
    """The JSON object of a file that has these fields {name: type}; UserError on any other."""
    try:
        document = as_object(parse_json(pathlib.Path(path).read_bytes(), path), path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    for field, kind in fields.items():
        if not isinstance(document.get(field), kind):
            raise UserError(f"{path}: has no {field!r}: it is not what this script reads here")
    return document


def tables_of(folders):
    """Folders of *.metrics.json -> ({verb: {system: {figure: number}}}, {system: {verb: its document and folder}})."""
    tables, systems = {}, {}
    for folder in folders:
        files = sorted(folder.glob("*.metrics.json"))
        if not files:
            raise UserError(f"{folder}: no *.metrics.json; evaluate {folder.name} first")
        for file in files:
            document = read_document(file, metrics=dict, name=str)
            plain = {k: v for k, v in document["metrics"].items() if is_number(v)}
            verb, others = file.name.removesuffix(".metrics.json"), systems.get(document["name"], {})
            if verb in others:
                where = f"{others[verb]['folder']} and {folder}"
                raise UserError(f"{where} are both called {document['name']!r}: evaluate one again with another --name")
            tables.setdefault(verb, {})[document["name"]] = plain
            systems.setdefault(document["name"], {})[verb] = document | {"folder": folder}
    return tables, systems


def items_of(folders):
    """Folders of *.items.json -> {figure: {id: value}}."""
    files = sorted(file for folder in folders for file in folder.glob("*.items.json"))
    return {figure: values for file in files for figure, values in read_document(file).items()}


def without_seed(name):
    """NAME of NAME-seed0, NAME-seed1, ...: runs that are one system."""
    return re.sub(r"-seed\d+$", "", name)


def beside_paper(path, tables, wanted=None):
    """A paper's table and our figures -> Markdown. tables: {verb: {system: {figure: number}}}.

    The JSON: source, rows {system: {column: the paper's value}}; optional: note; names {system: as the paper calls it};
    percent, the figures (the last word of their names) of ours to be multiplied by 100; cells, one figure's name: then
    a column is what follows the @ in a system's name (label@2000), otherwise a column is a figure's name. Columns of
    ours that the paper lacks stay where `cells` is given, and rows of ours always. A column `mean` is the mean,
    seed by seed, of the others that its rows have. wanted: of the columns, only these.
    """
    paper = read_document(path, rows=dict, source=str)
    cell, columns = paper.get("cells"), list(dict.fromkeys(c for row in paper["rows"].values() for c in row))
    if not cell and (unknown := set(wanted or ()) - set(columns)):
        raise UserError(f"{path}: has no column {min(unknown)!r}")
    columns = [c for c in columns if c in wanted] if wanted else columns
    runs = {}  # row -> column -> [(value, interval)], a pair for each seed
    for rows in tables.values():
        for name, figures in rows.items():
            name = without_seed(name)
            row, _, column = name.partition("@") if cell else (name, "", "")
            for figure in [cell] if cell else columns:
                if figure in figures:
                    value = with_interval(figures, figure, figure.split()[-1] in paper.get("percent", ()))
                    runs.setdefault(row, {}).setdefault(column or figure, []).append(value)
    averaged = {c for row in paper["rows"].values() if "mean" in row for c in row} - {"mean"}
    for row in runs.values():
        if averaged and row.keys() >= averaged:
            seeds = zip(*([value for value, _ in row[c]] for c in sorted(averaged)))
            row["mean"] = [(statistics.fmean(values), None) for values in seeds]
    columns += [c for row in runs.values() for c in row if c not in columns]
    if cell:  # sizes in order, then words
        columns = sorted(set(columns), key=lambda c: (float(c) if c.replace(".", "").isdigit() else math.inf, c))
    lines = []
    for row in dict.fromkeys([*paper["rows"], *runs]):
        cells = [paper_cell(runs.get(row, {}).get(c), paper["rows"].get(row, {}).get(c)) for c in columns]
        lines.append([paper.get("names", {}).get(row, row), *cells])
    head = f"Ours, and in brackets {paper['source']}{': ' + paper['note'] if 'note' in paper else ''}"
    return f"{head}\n\n{table(columns, lines)}"


SHARES = ("accuracy", "first_line", "well_formed", "unparsed", "unfinished", "pair_accuracy", "margin_violations")
SHARES += ("win", "tie", "lose", "flip_rate", "first_place_preferred")


def interval_of(figures, figure, share):
    """-> a figure's 95% interval (low, high), or None: the verb's own, else Wilson's, of a share of so many prompts.
    Pairs count by their prompts: those of one prompt are not independent."""
    if f"{figure} 95% low" in figures:
        return figures[f"{figure} 95% low"], figures[f"{figure} 95% high"]
    subset, at = figure.rpartition(" ")[0], re.search(r"(_at_\d+)?$", figure)[0]  # of one place of the gold document
    counts = [figures.get(f"{subset} {what}{at}".strip()) for what in ("prompts", "questions")]
    n = min((n for n in counts if n), default=None)  # a question that is asked at several places is one
    return wilson(figures[figure], n) if share and n and 0 <= figures[figure] <= 1 else None


def with_interval(figures, figure, percent):
    """-> (the figure, its interval or None), both x 100 if percent and the verb gave no interval of its own."""
    interval = interval_of(figures, figure, percent)
    scale = 100 if percent and f"{figure} 95% low" not in figures else 1
    return scale * figures[figure], interval and [scale * x for x in interval]


def with_intervals(figures):
    """{figure: number} -> {figure: its cell}: `0.44 [0.31, 0.58]` where it has a 95% interval."""
    cells = {}
    for name, value in figures.items():
        if not name.endswith((" 95% low", " 95% high")):
            share = re.sub(r"_at_\d+$", "", name.split()[-1]) in SHARES
            interval = interval_of(figures, name, share)
            cells[name] = f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else f"{value:.4g}"
    return cells


def paper_cell(ours, printed):
    """ours [(value, interval or None)] or None, the paper's value or None -> `61.2 ±1.9 (81.97)`."""
    text = ""
    if ours:
        values, interval = [value for value, _ in ours], ours[0][1]
        text = f"{statistics.fmean(values):.2f}"
        if len(values) > 1:
            text += f" ±{t_half_width(values):.2f}"
        elif interval:
            text += f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{text} ({printed})".strip() if printed is not None else text


def t_half_width(values):
    """Half the 95% interval of the mean of n > 1 values, Student's t with n - 1 degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def markdown(rows):
    """{row name: {column: number or text}} -> a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    text = lambda x: x if isinstance(x, str) else f"{x:.4g}"  # noqa: E731
    cells = ([text(row.get(c, "")) for c in columns] for row in rows.values())
    return table(columns, [[name, *line] for name, line in zip(rows, cells)])


def table(columns, lines):
    lines = [["", *columns], ["---"] * (len(columns) + 1), *lines]
    plain = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)  # a name is any text
    return "\n".join("| " + " | ".join(line) + " |" for line in plain)
