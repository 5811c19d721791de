"""Preference data of one's own as records: pairs, ranked lists, chats and ratings, from files or the hub."""

import functools
import pathlib

import common
from collecting.files import is_message
from collecting.prompts import fill, render_chat
from common import UserError, is_number

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {  # ours -> what else data sets call it
    "id": (),
    "prompt": ("instruction", "question", "query"),  # a text, or messages
    "messages": ("conversation",),
    "chosen": (),  # a text, a message, or messages that may begin with the prompt
    "rejected": (),
    "chosen_reward": ("score_chosen", "chosen_score", "chosen_rating"),
    "rejected_reward": ("score_rejected", "rejected_score", "rejected_rating"),
    "responses": ("completions",),  # best first where neither rewards nor ranks are there
    "rewards": ("ratings", "scores"),  # a number a response, larger better
    "ranks": (),  # a number a response, smaller better
    "reference": (),  # a response that a person wrote
}
TEXTS, RATINGS = ("text", "response", "content", "completion"), ("reward", "rating", "score", "overall_score")
SECTION = "README, section 'Your own data'"


def pair_rows(args):
    """Yield (where, row) of every --input: a file, a folder of files as the hub has them, or a data set of the hub."""
    import datasets

    for name in args.input:
        path = pathlib.Path(name)
        kind = KINDS.get(pathlib.Path(name.removesuffix(".gz")).suffix.lower())
        if kind and not path.is_file():
            raise UserError(f"{name}: no such file")
        if path.is_file() and not kind:
            raise UserError(f"{name}: expected {', '.join(KINDS)}, a folder, or a data set of the hub")
        try:
            of_hub = {"path": name, "name": args.config, "split": args.split}
            source = {"path": kind, "data_files": name, "split": "train"} if kind else of_hub
            rows = datasets.load_dataset(**source, streaming=True)
            yield from ((f"{name}:{i}", row) for i, row in enumerate(rows, 1))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
            reason = str(e.__cause__ or e).strip().partition("\n")[0]
            raise UserError(f"--input {name} cannot be read ({reason}); another split: --split, part: --config") from e


def pair_converter(args):
    """-> prepare_pair with the names of --columns and the tokenizer of --chat_template."""
    names = dict(c.partition("=")[::2] for c in args.columns)
    if wrong := [c for c in args.columns if c.partition("=")[0] not in COLUMNS or not c.partition("=")[2]]:
        raise UserError(f"--columns {wrong[0]}: write NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
    tokenizer = args.chat_template and common.load_tokenizer(args.chat_template, "--chat_template")
    if tokenizer and not tokenizer.chat_template:
        raise UserError(f"--chat_template {args.chat_template}: this model's tokenizer has no chat template")
    return functools.partial(prepare_pair, names=names, tokenizer=tokenizer)


def prepare_pair(row, where, index, template, names, tokenizer):
    """A row with prompt and chosen, rejected or responses -> record; None without two different responses.

    Sources are chosen, rejected and response (or what a response's `source` or `model` says), and reference for the
    column of that name. `rank` is from rewards, else from ranks, else from the order; responses without a rating, where
    others have one, are left out.
    """
    found = ", ".join(row)
    row = {ours: column(row, names, ours, where) for ours in COLUMNS}
    if row["chosen"] is not None and row["rejected"] is not None:
        context, responses = pair_responses(row, where)
    elif isinstance(row["responses"], list):
        context, responses = row["prompt"] or row["messages"], listed_responses(row, where)
    else:
        context, responses = None, []
    if not context or not responses:
        need = "a prompt (or messages), and chosen and rejected, or responses"
        hint = "name them by --columns prompt=COLUMN chosen=COLUMN rejected=COLUMN"
        raise UserError(f"{where}: the columns are {found}; a row needs {need}: {hint} ({SECTION})")
    prompt, messages = render(context, where, tokenizer)
    prompt = fill(template, {"prompt": prompt}, where)
    if len({c["text"] for c in responses}) < 2:
        return None
    rated = [c for c in responses if c.get("reward") is not None]
    if rated:
        responses = [c | {"rank": sum(r["reward"] > c["reward"] for r in rated)} for c in rated]
    if row["reference"] is not None:
        responses = [{"text": response_text(row["reference"], where), "source": "reference"}, *responses]
    if not prompt[-1:].isspace():  # what common.space_before puts there, and export writes
        responses = [c | {"text": c["text"].removeprefix(" ")} for c in responses]
    record = {"id": f"pairs-{index}" if row["id"] is None else str(row["id"]), "task": "pairs", "prompt": prompt}
    record |= {"messages": messages} if messages else {}
    return record | {"label": None, "answers": None, "candidates": responses}


def column(row, names, ours, where):
    """The row's value under the name of --columns, else under our name or a known one; None where none is there."""
    if ours in names:
        if names[ours] not in row:
            raise UserError(
                f"{where}: no column {names[ours]!r} (--columns); the columns are {', '.join(row)} ({SECTION})"
            )
        return row[names[ours]]
    return next((row[name] for name in (ours, *COLUMNS[ours]) if row.get(name) is not None), None)


def pair_responses(row, where):
    """-> (the prompt: a text or messages, [chosen, rejected] as candidates)."""
    context = row["prompt"] or row["messages"]
    whole = [row[k] if isinstance(row[k], list) else [] for k in ("chosen", "rejected")]
    if all(len(turns) > 1 for turns in whole):  # conversations with the prompt in them
        if whole[0][:-1] != whole[1][:-1]:
            raise UserError(f"{where}: chosen and rejected differ before their last message: no prompt in common")
        context = whole[0][:-1]
    candidates = []
    for rank, name in enumerate(("chosen", "rejected")):
        candidate = {"text": response_text(row[name], where), "source": name, "rank": rank}
        reward = number(row[f"{name}_reward"], where)
        candidates.append(candidate if reward is None else candidate | {"reward": reward})
    return context, candidates if len({"reward" in c for c in candidates}) == 1 else []


def listed_responses(row, where):
    """The responses as candidates, with `reward` where they are rated, else `rank`."""
    columns = {}
    for name in ("rewards", "ranks"):
        values = row[name] if row[name] is not None else [None] * len(row["responses"])
        if not isinstance(values, list) or len(values) != len(row["responses"]):
            raise UserError(f"{where}: {name!r} must be a list of {len(row['responses'])} numbers, one a response")
        columns[name] = [number(v, where) for v in values]
    if None in columns["ranks"] and row["ranks"] is not None:
        raise UserError(f"{where}: 'ranks' must be numbers")
    candidates = []
    for i, response in enumerate(row["responses"]):
        fields = response if isinstance(response, dict) else {}
        source = next((fields[k] for k in ("source", "model") if isinstance(fields.get(k), str) and fields[k]), None)
        reward = rating(fields, where) if columns["rewards"][i] is None else columns["rewards"][i]
        rank = i if row["ranks"] is None else sum(r < columns["ranks"][i] for r in columns["ranks"])
        candidate = {"text": response_text(response, where), "source": source or "response", "rank": rank}
        candidate |= {"finished": False} if fields.get("finished") is False else {}  # cut, as export writes it
        candidates.append(candidate if reward is None else candidate | {"reward": reward})
    return candidates


def rating(fields, where):
    """A response's own rating: the mean of its `annotations` (UltraFeedback), else a field of RATINGS, else None."""
    aspects = fields.get("annotations")
    if isinstance(aspects, dict):
        values = [number(a.get("Rating"), where) for a in aspects.values() if isinstance(a, dict)]
        values = [v for v in values if v is not None]
        if values:
            return sum(values) / len(values)
    return next((number(fields[k], where) for k in RATINGS if fields.get(k) is not None), None)


def number(value, where):
    """A rating -> float; None for none ("N/A" too). UserError for what is neither."""
    try:
        value = None if value in (None, "", "N/A") else float(value)
    except (TypeError, ValueError):
        value = where
    if value is not None and not is_number(value):
        raise UserError(f"{where}: a reward, rating or rank must be a number ({SECTION})")
    return value


def response_text(response, where):
    """The text of a response: itself, of an object the field of TEXTS, of messages the last one, an assistant's."""
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        if response[-1].get("role") != "assistant":
            raise UserError(f"{where}: a response's last message must be the assistant's ({SECTION})")
        response = response[-1]
    if isinstance(response, dict):
        response = next((response[k] for k in TEXTS if response.get(k) is not None), None)
    if not isinstance(response, str):
        form = f"a text, an object with one of {', '.join(TEXTS)}, or messages"
        raise UserError(f"{where}: a response must be {form} ({SECTION})")
    return response


def render(context, where, tokenizer):
    """The prompt, a text or messages -> (its final text, its messages or None)."""
    if isinstance(context, str) and not tokenizer:
        return context, None
    messages = [{"role": "user", "content": context}] if isinstance(context, str) else context
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise UserError(
            f"{where}: the prompt must be a text or a list of messages, each with role and content ({SECTION})"
        )
    if not tokenizer:
        raise UserError(f"{where}: the prompt is messages: name the model whose template renders them, --chat_template")
    messages = [{k: m[k] for k in ("role", "content")} for m in messages]
    return render_chat(tokenizer, messages, add_generation_prompt=True), messages
