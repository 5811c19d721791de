"""The verb report: figures of several systems side by side, or beside a paper's own."""

import functools
import pathlib

from collecting.files import write_atomically
from common import UserError, say
from evaluating.claims import claims_page
from evaluating.plots import TRAIN_SIZE, need_verb, plot_positions, plot_setting, plot_sources, plot_training
from evaluating.shared import EVAL_FOLDER, paired_bootstrap
from evaluating.tables import beside_paper, items_of, markdown, tables_of, with_intervals

PLOT_HELP = """RESCUE's Fig. 4 (alpha, num_candidates), accuracy by train_size and by gold_position, Fig. 5 and 6
(sources), the runs' logs (training); PLOT.png beside --output, sources in each system's folder"""
PLOTS = {
    "alpha": functools.partial(plot_setting, setting="alpha"),
    "num_candidates": functools.partial(plot_setting, setting="num_candidates"),
    "train_size": functools.partial(plot_setting, setting=TRAIN_SIZE),
    "sources": plot_sources,
    "training": plot_training,
    "gold_position": lambda systems, path: plot_positions(
        {name: need_verb(documents, name, "multidoc-qa")["metrics"] for name, documents in systems.items()}, path
    ),
}


# fmt: off
def report_flags(add):
    add("names", nargs="*", help=f"systems: folders under {EVAL_FOLDER}, or paths")
    add("--columns", nargs="+", help="one table with just these figures, whichever verbs they come from")
    add("--plot", nargs="+", choices=sorted(PLOTS), default=[], help=PLOT_HELP)
    add("--paper", help="a JSON of a paper's table (recipes/paper/): ours with 95%% intervals, the paper's in brackets")
    add("--paired", action="store_true", help="the first system against each other one, item by item: paired bootstrap")
    add("--claims", help="no NAMES: a page of what kept results say of the papers' claims (results/claims.json)")
    add("--output", help="also write the Markdown there")
# fmt: on


def report(args):
    """Every plain figure of several systems side by side, shares and means with their 95% intervals: a Markdown table a
    verb.

    With --paper one table, the paper's rows and columns and what we have beyond them. Systems called NAME-seed0,
    NAME-seed1, ... are one row: their mean and the 95% interval of Student's t over the seeds; a lone share of n
    prompts has Wilson's interval, a mean the one that its verb gave it. --columns keeps these of the paper's.
    """
    if bool(args.names) == bool(args.claims):
        raise UserError("report needs NAMES, or --claims FILE")
    if args.claims and (args.columns or args.plot or args.paper or args.paired):
        raise UserError("--claims is a page of its own: leave out --columns, --plot, --paper and --paired")
    tables, systems = tables_of(map(folder_of, args.names))
    if not args.paper:  # before verbs are merged: each has a number of prompts of its own
        tables = {verb: {name: with_intervals(row) for name, row in rows.items()} for verb, rows in tables.items()}
    if args.columns and not args.paper:
        merged = {}
        for rows in tables.values():
            for name, row in rows.items():
                merged[name] = merged.get(name, {}) | row
        if unknown := set(args.columns) - {k for row in merged.values() for k in row}:
            raise UserError(f"--columns {' '.join(sorted(unknown))}: no such figure of {' '.join(args.names)}")
        tables = {"": {name: {k: row[k] for k in args.columns if k in row} for name, row in merged.items()}}
    if args.claims:
        text = claims_page(args.claims)
    elif args.paper:
        text = beside_paper(args.paper, tables, args.columns)
    else:
        text = "\n\n".join((f"### {verb}\n\n" if verb else "") + markdown(rows) for verb, rows in tables.items())
    if args.paired:
        text += f"\n\n{paired({name: folder_of(name) for name in args.names})}"
    say(text)
    if args.output:
        output = pathlib.Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not output.read_bytes().startswith(HEAD.encode()):
            raise UserError(f"--output {output} was not written by report: name another file")
        write_atomically(output, HEAD + text + "\n")
    for plot in args.plot:
        PLOTS[plot](systems, (pathlib.Path(args.output).parent if args.output else EVAL_FOLDER) / f"{plot}.png")


HEAD = "<!-- evaluate.py report: written anew each time -->\n\n"


def folder_of(name):
    return pathlib.Path(name) if pathlib.Path(name).is_dir() else EVAL_FOLDER / name


def paired(folders):
    """{system: its folder} -> Markdown: the first system minus each other one, on the items of every figure that both
    have in a VERB.items.json, with the 95% interval and p of a paired bootstrap."""
    items = {name: items_of([folder]) for name, folder in folders.items()}
    first, *others = items
    rows = {}
    for other in others:
        for figure in items[first].keys() & items[other].keys():
            ours, theirs = items[first][figure], items[other][figure]
            differences = [ours[i] - theirs[i] for i in ours if i in theirs]
            if differences:
                difference, (low, high), p = paired_bootstrap(differences)
                row = {"difference": difference, "95% low": low, "95% high": high, "p": p, "items": len(differences)}
                rows[f"{first} - {other}, {figure}"] = row
    if not rows:
        raise UserError(f"--paired: {' and '.join(folders)} have no *.items.json with the same figure and items")
    return markdown(rows)
