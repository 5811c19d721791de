"""The verb vicuna: answers to Vicuna's 80 questions, for a judge."""

import itertools

from collecting.files import read_rows
from collecting.flags import alpaca_flags, generation_flags
from collecting.prompts import ALPACA_TEMPLATE, alpaca_prompt, read_template
from common import UserError, in_range
from evaluating.shared import answer, length_figures, model_flags, write_metrics


# fmt: off
def vicuna_flags(add):
    model_flags(add, "vicuna", "FastChat's question.jsonl: question_id, category, turns (or text)")
    alpaca_flags(add)
    add("--limit", type=in_range(int, 1), help="only the first questions")
    generation_flags(add, 512)
# fmt: on


def vicuna(args):
    """Answer the questions' first turns, greedily."""
    template, records = read_template(args, ALPACA_TEMPLATE), []
    for where, row in itertools.islice(read_rows(args.input), args.limit):
        turns = row.get("turns", [row.get("text")])  # text: of FastChat's first files
        if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
            raise UserError(f"{where}: field 'turns' must be a list of strings (or 'text' a string)")
        prompt = alpaca_prompt(template, {"instruction": turns[0], "input": ""}, where)
        record = {"id": str(row.get("question_id")), "category": row.get("category"), "question": turns[0]}
        records.append(record | {"instruction": turns[0], "prompt": prompt})
    if rows := answer(args, "vicuna", records):
        write_metrics(args, "vicuna", length_figures(rows))
