"""The verb report: figures of several systems side by side."""

import functools
import json
import pathlib

import common
import runtime
from common import UserError
from evaluating.plots import need_verb, plot_positions, plot_setting, plot_sources
from evaluating.shared import EVAL_FOLDER
from runtime import say

PLOTS = {
    "alpha": functools.partial(plot_setting, setting="alpha"),
    "num_candidates": functools.partial(plot_setting, setting="num_candidates"),
    "sources": plot_sources,
    "gold_position": lambda systems, path: plot_positions(
        {name: need_verb(documents, name, "multidoc-qa")["metrics"] for name, documents in systems.items()}, path
    ),
}


def report_flags(add):
    add("names", nargs="+", help=f"systems: folders under {EVAL_FOLDER}, or paths")
    add("--columns", nargs="+", help="one table with just these figures, whichever verbs they come from")
    add(
        "--plot",
        nargs="+",
        choices=sorted(PLOTS),
        default=[],
        help="RESCUE's Fig. 4 (alpha, num_candidates), 5 and 6 "
        "(sources), and accuracy by gold_position; PLOT.png beside --output, sources in each system's folder",
    )
    add("--output", help="also write the Markdown there")


def report(args):
    """Every plain figure of several systems side by side: a Markdown table a verb."""
    tables, systems = {}, {}
    for name in args.names:
        folder = pathlib.Path(name) if pathlib.Path(name).is_dir() else EVAL_FOLDER / name
        files = sorted(folder.glob("*.metrics.json"))
        if not files:
            raise UserError(f"{folder}: no *.metrics.json; evaluate {name} first")
        for file in files:
            document = json.loads(file.read_text())
            plain = {k: v for k, v in document["metrics"].items() if common.is_number(v)}
            verb = file.name.removesuffix(".metrics.json")
            tables.setdefault(verb, {})[document["name"]] = plain
            systems.setdefault(document["name"], {})[verb] = document | {"folder": folder}
    if args.columns:
        merged = {name: {} for rows in tables.values() for name in rows}
        for name, row in ((name, row) for rows in tables.values() for name, row in rows.items()):
            merged[name] |= {k: v for k, v in row.items() if k in args.columns}
        if unknown := set(args.columns) - {k for row in merged.values() for k in row}:
            raise UserError(f"--columns {' '.join(sorted(unknown))}: no such figure of {' '.join(args.names)}")
        tables = {"": {name: {k: row[k] for k in args.columns if k in row} for name, row in merged.items()}}
    text = "\n\n".join((f"### {verb}\n\n" if verb else "") + markdown(rows) for verb, rows in tables.items())
    say(text)
    if args.output:
        runtime.write_atomically(pathlib.Path(args.output), text + "\n")
    for plot in args.plot:
        PLOTS[plot](systems, (pathlib.Path(args.output).parent if args.output else EVAL_FOLDER) / f"{plot}.png")


def markdown(rows):
    """{row name: {column: number}} -> a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
