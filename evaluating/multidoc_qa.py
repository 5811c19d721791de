"""The verb multidoc-qa: gold answers in generated ones, by the gold passage's place (RESCUE Sec. 6.3, Table 2)."""

from collecting.answers import has_answer
from collecting.flags import generation_flags
from common import UserError, in_range
from evaluating.plots import plot_positions
from evaluating.shared import answer, beside, mean, model_flags, write_metrics
from files import read_records


def multidoc_qa_flags(add):
    model_flags(add, "multidoc-qa")
    add("--num_beams", type=in_range(int, 1), default=1, help="1: greedy; more: beam search")
    add("--min_new_tokens", type=in_range(int, 0), default=0, help="1: EOS cannot be the first token")
    generation_flags(add, 64)


def multidoc_qa(args):
    """Generate an answer to every question and look for a gold answer in it, by the gold passage's place (Sec. 6.3).

    An answer counts if any gold answer, normalised, is a substring of it so normalised. Both readings are reported:
    the whole answer (as the RESCUE authors do) and its first non-empty line (as Liu et al. do).
    """
    records = list(read_records(args.input))
    for r in records:
        if not isinstance(r.get("answers"), list) or not isinstance(r.get("gold_position"), int):
            where = f"{args.input}: record {r['id']!r}"
            raise UserError(f"{where} has no answers or gold_position; see prepare multidoc_qa")
    if rows := answer(args, "multidoc-qa", records):
        items = by_question(rows)
        metrics = multidoc_qa_metrics(rows) | {"questions": len(items)}
        write_metrics(args, "multidoc-qa", metrics, {"accuracy": items, "empty": by_question(rows, is_empty)})
        plot_positions({args.name: metrics}, beside(args, ".png"))


def is_right(row):
    return has_answer(row["text"], row["answers"])


def is_empty(row):
    return not row["text"].strip()


def by_question(rows, what=is_right):
    """-> {question: the share of its gold positions at which the whole answer is right}: one item, not one a place."""
    questions = {}
    for r in rows:
        questions.setdefault(r["id"].partition("-gold")[0], []).append(what(r))
    return {question: mean(right) for question, right in questions.items()}


def multidoc_qa_metrics(rows):
    """Accuracy at every gold position, whole answer and first line, and the mean of the positions' accuracies."""
    positions = {p: [r for r in rows if r["gold_position"] == p] for p in sorted({r["gold_position"] for r in rows})}
    metrics = {"prompts": len(rows), "unfinished": mean(not row["finished"] for row in rows)}
    metrics["empty"] = mean(map(is_empty, rows))
    for kind, lines in (("accuracy", None), ("first_line", 1)):
        at = {}
        for p, some in positions.items():
            at[p] = mean(has_answer("\n".join(r["text"].split("\n")[:lines]), r["answers"]) for r in some)
        metrics |= {kind: mean(at.values())} | {f"{kind}_at_{p}": x for p, x in at.items()}
    metrics |= {f"prompts_at_{p}": len(positions[p]) for p in sorted(positions)}
    return metrics | {"positions": {p: len(some) for p, some in positions.items()}}
