"""The verb report: figures of several systems side by side, or beside a paper's own."""

import pathlib

from collecting.files import write_atomically
from common import UserError, say
from evaluating.claims import claims_page, compare, shown
from evaluating.plots import PLOTS
from evaluating.shared import EVAL_FOLDER
from evaluating.tables import beside_paper, figures_of, items_of, load_systems, markdown, without_seed

HEAD = "<!-- evaluate.py report: written anew each time -->\n\n"
PLOT_HELP = """accuracy of systems called NAME@NUMBER against the number (alpha, num_candidates, train_size), or by
gold_position; RESCUE's Fig. 5 and 6 (sources). PLOT.png beside --output, sources in each system's folder"""


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
    folders = [pathlib.Path(n) if pathlib.Path(n).is_dir() else EVAL_FOLDER / n for n in args.names]
    systems = load_systems(folders)
    if args.claims:
        text = claims_page(args.claims)
    elif args.paper:
        text = beside_paper(args.paper, systems, args.columns)
    else:
        text = side_by_side(systems, args.columns)
    if args.paired:
        text += f"\n\n{paired(systems)}"
    say(text)
    if args.output:
        output = pathlib.Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not output.read_bytes().startswith(HEAD.encode()):
            raise UserError(f"--output {output} was not written by report: name another file")
        write_atomically(output, HEAD + text + "\n")
    for plot in args.plot:
        PLOTS[plot](systems, (pathlib.Path(args.output).parent if args.output else EVAL_FOLDER) / f"{plot}.png")


def side_by_side(systems, columns):
    """A table a verb, or one of just these columns, with cells such as `0.44 [0.31, 0.58]`."""
    tables = {}
    for name, documents in systems.items():
        for verb, document in documents.items():
            row = tables.setdefault("" if columns else verb, {}).setdefault(name, {})
            for figure, (value, interval) in figures_of(document).items():
                row[figure] = f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else f"{value:.4g}"
    if not columns:
        return "\n\n".join(f"### {verb}\n\n{markdown(rows)}" for verb, rows in tables.items())
    if unknown := set(columns) - {figure for row in tables[""].values() for figure in row}:
        raise UserError(f"--columns {' '.join(sorted(unknown))}: no such figure of {' '.join(systems)}")
    return markdown(tables[""], columns)


def paired(systems):
    """The first system minus each other one, in every figure that both have item by item, as claims.compare has it ->
    Markdown."""
    first, *others = dict.fromkeys(map(without_seed, systems))
    figures = {name: {} for name in (first, *others)}
    for name, documents in systems.items():
        figures[without_seed(name)] |= items_of(documents)
    rows = {}
    for other in others:
        for figure in (f for f in figures[first] if f in figures[other]):
            if found := compare(systems, first, other, figure):
                row = {"difference": found.middle} | dict(zip(["over items", "over seeds"], shown(found.intervals)))
                rows[f"{first} - {other}, {figure}"] = row | {"p": found.p, "items": found.items}
    if not rows:
        raise UserError(f"--paired: {' and '.join(systems)} have no *.items.json with the same figure")
    return markdown(rows)
