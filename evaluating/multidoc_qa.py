"""The verb multidoc-qa: gold answers in generated ones, by the gold passage's place (RESCUE Sec. 5.2)."""

import runtime
from collecting.answers import has_answer
from collecting.flags import generation_flags
from collecting.journal import read_records
from common import UserError, in_range
from evaluating.plots import plot_positions
from evaluating.shared import answer, mean, metrics_file, model_flags, write_metrics


def multidoc_qa_flags(add):
    model_flags(add, "multidoc-qa")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    generation_flags(add, 64)


def multidoc_qa(args):
    """Generate an answer to every question and look for a gold answer in it, by the gold passage's place (RESCUE 5.2).

    An answer counts if any gold answer, normalised, is a substring of it so normalised. Both readings are reported:
    the whole answer (as the RESCUE authors do) and its first non-empty line (as Liu et al. do).
    """
    rank, world, device = runtime.init_distributed()
    records = list(read_records(args.input))
    for r in records:
        if not isinstance(r.get("answers"), list) or not isinstance(r.get("gold_position"), int):
            raise UserError(
                f"{args.input}: record {r['id']!r} has no answers or gold_position; see prepare multidoc_qa"
            )
    rows = answer(args, "multidoc-qa", records, rank, world, device)
    if rank == 0:
        metrics = multidoc_qa_metrics(rows)
        write_metrics(args, "multidoc-qa", metrics)
        plot_positions({args.name: metrics}, metrics_file(args.output).with_suffix("").with_suffix(".png"))


def multidoc_qa_metrics(rows):
    """Accuracy at every gold position, whole answer and first line, and the mean of the positions' accuracies."""
    positions = {}
    for row in rows:
        positions.setdefault(row["gold_position"], []).append(row)
    metrics = {"prompts": len(rows), "unfinished": mean(not row["finished"] for row in rows)}
    for kind, cut in (("accuracy", None), ("first_line", "\n")):
        texts = {
            p: [(r["text"].split(cut)[0] if cut else r["text"], r["answers"]) for r in positions[p]] for p in positions
        }
        at = {p: mean(has_answer(*pair) for pair in texts[p]) for p in sorted(positions)}
        metrics |= {kind: mean(at.values())} | {f"{kind}_at_{p}": x for p, x in at.items()}
    return metrics | {"positions": {p: len(positions[p]) for p in sorted(positions)}}
