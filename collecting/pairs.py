"""Preference data of one's own as records: pairs, ranked lists, chats and ratings."""

import functools
import itertools

import common
from collecting.files import is_message, row_id
from collecting.prompts import fill, render_chat
from common import UserError, is_number

COLUMNS = {  # ours -> what else data sets call it
    "id": (),
    "prompt": ("instruction", "question", "query"),  # a text, or messages
    "messages": ("conversation",),
    "chosen": (),  # a response, or a list of equally good ones
    "rejected": (),
    "chosen_reward": ("score_chosen", "chosen_score", "chosen_rating"),
    "rejected_reward": ("score_rejected", "rejected_score", "rejected_rating"),
    "responses": ("completions", "answers", "all_responses", "all_generated_responses"),
    "rewards": ("ratings", "scores", "overall_scores", "all_rm_scores"),  # a number a response, larger better
    "ranks": (),  # a number a response, smaller better
    "reference": (),  # a response that a person wrote
}
TEXTS = ("text", "response", "content", "completion", "answer")
RATINGS = ("reward", "rating", "score", "overall_score")
SECTION = "README, section 'Your own data'"


def pair_converter(args):
    """-> prepare_pair with the names of --columns, the tokenizer of --chat_template, and --rejected_ordered."""
    names = dict(c.partition("=")[::2] for c in args.columns)
    if wrong := [c for c in args.columns if c.partition("=")[0] not in COLUMNS or not c.partition("=")[2]]:
        raise UserError(f"--columns {wrong[0]}: write NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
    tokenizer = args.chat_template and common.load_tokenizer(args.chat_template, "--chat_template")
    if tokenizer and not tokenizer.chat_template:
        raise UserError(f"--chat_template {args.chat_template}: this model's tokenizer has no chat template")
    return functools.partial(prepare_pair, names=names, tokenizer=tokenizer, rejected_ordered=args.rejected_ordered)


def prepare_pair(row, where, index, template, names, tokenizer, rejected_ordered=False):
    """A row with prompt and chosen, rejected or responses -> record; None without two different responses.

    A response is a text, an object, or messages, which may begin with the prompt. Sources are chosen, rejected and
    response (or what a response's `source` or `model` says), and reference for the column of that name.
    """
    given, row = row, {ours: column(row, names, ours, where) for ours in COLUMNS}
    responses, order = None, None  # order: a number a response, larger better, for those without rewards and ranks
    if row["chosen"] is not None and row["rejected"] is not None:
        good, bad = several(row["chosen"]), several(row["rejected"])
        responses, order = good + bad, [0] * len(good) + [-1 - i * rejected_ordered for i in range(len(bad))]
        sources = ["chosen"] * len(good) + ["rejected"] * len(bad)
        rewards = [row["chosen_reward"], row["rejected_reward"]]
        rewards, ranks = sum(map(several, rewards), []) if rewards != [None, None] else None, None
    elif isinstance(row["responses"], list):
        responses, rewards, ranks, sources = row["responses"], row["rewards"], row["ranks"], itertools.repeat(None)
        if "responses" in names or given.get("responses") is not None:  # best first; another name does not say that
            order = [-i for i in range(len(responses))]
    elif all(names.get(k, k) in given for k in ("chosen", "rejected")):
        return None  # one of the two is null
    contexts = [r[:-1] for r in responses or () if isinstance(r, list) and len(r) > 1]  # the prompt is in them
    context = contexts[0] if contexts else row["prompt"] or row["messages"]
    if not context or responses is None:
        need = "a prompt (or messages), and chosen and rejected, or responses"
        hint = "name them by --columns prompt=COLUMN chosen=COLUMN rejected=COLUMN"
        raise UserError(f"{where}: the columns are {', '.join(given)}; a row needs {need}: {hint} ({SECTION})")
    if any(c != context for c in contexts):
        raise UserError(f"{where}: the responses differ before their last message: no prompt in common")
    if context == given.get("instruction") and isinstance(given.get("input"), str) and given["input"].strip():
        context += f"\n{given['input']}"  # LLaMA-Factory's pairs have Alpaca's columns
    prompt, messages = render(context, where, tokenizer)
    prompt = fill(template, {"prompt": prompt}, where)
    candidates = as_candidates(responses, sources, rewards, ranks, order, where)
    if len({c["text"] for c in candidates}) < 2:
        return None
    if row["reference"]:  # an empty cell of a CSV file is none
        candidates = [{"text": response_text(row["reference"], where), "source": "reference"}, *candidates]
    if not prompt[-1:].isspace():  # what common.space_before puts there, and export writes
        candidates = [c | {"text": c["text"].removeprefix(" ")} for c in candidates]
    record = {"id": row_id(row, f"pairs-{index}"), "task": "pairs", "prompt": prompt}
    record |= {"messages": messages} if messages else {}
    return record | {"label": None, "answers": None, "candidates": candidates}


def column(row, names, ours, where):
    """The row's value under the name of --columns, else under our name or a known one; None where none is there."""
    if ours in names:
        if names[ours] not in row:
            raise UserError(f"{where}: no column {names[ours]!r} (--columns); the columns are {', '.join(row)}")
        return row[names[ours]]
    return next((row[name] for name in (ours, *COLUMNS[ours]) if row.get(name) is not None), None)


def several(value):
    """A value, or a list of them -> a list. Messages with a turn of the user's are one response."""
    if not isinstance(value, list):
        return [value]
    return [value] if any(isinstance(x, dict) and x.get("role") in ("user", "system") for x in value) else value


def as_candidates(responses, sources, rewards, ranks, order, where):
    """The responses as candidates, best first. `rank` is the number of better ones: by rewards, else by ranks, else by
    `order`. Rewards and ranks are lists, or fields of response objects. A response without one, where others have one,
    is left out. Raises UserError where nothing says which is better.
    """
    objects = [r if isinstance(r, dict) else {} for r in responses]
    for name, values in (("rewards", rewards), ("ranks", ranks)):
        if values is not None and (not isinstance(values, list) or len(values) != len(responses)):
            raise UserError(f"{where}: {name!r} must be a list of {len(responses)} numbers, one a response")
    rewards = [rating(o, where) for o in objects] if rewards is None else [number(r, where) for r in rewards]
    ranks = [number(r, where) for r in ([o.get("rank") for o in objects] if ranks is None else ranks)]
    orders = (rewards, [None if r is None else -r for r in ranks], order or ())
    worth = next((o for o in orders if any(w is not None for w in o)), None)
    if worth is None:
        if not any({*RATINGS, "rank", "annotations"} & o.keys() for o in objects):
            raise UserError(f"{where}: no rewards, no ranks: are they best first? --columns responses=COLUMN says so")
        return []
    candidates = []
    for response, fields, source, w, reward in zip(responses, objects, sources, worth, rewards):
        if w is not None:
            own = (fields[k] for k in ("source", "model") if isinstance(fields.get(k), str) and fields[k])
            rank = sum(other > w for other in worth if other is not None)
            c = {"text": response_text(response, where), "source": source or next(own, "response"), "rank": rank}
            c |= {"finished": False} if fields.get("finished") is False else {}  # cut, as export writes it
            candidates.append(c if reward is None else c | {"reward": reward})
    return sorted(candidates, key=lambda c: c["rank"])


def rating(fields, where):
    """A response's own rating: the mean of its `annotations` (UltraFeedback), else a field of RATINGS, else None."""
    aspects = fields.get("annotations")
    aspects = aspects.values() if isinstance(aspects, dict) else ()
    values = [number(a.get("Rating"), where) for a in aspects if isinstance(a, dict)]
    if values := [v for v in values if v is not None]:
        return sum(values) / len(values)
    return next((number(fields[k], where) for k in RATINGS if fields.get(k) is not None), None)


def number(value, where):
    """A rating -> float; None for none ("N/A" and NaN too). UserError for what is neither."""
    try:
        value = None if value in (None, "", "N/A") or value != value else float(value)
    except (TypeError, ValueError):
        value = where
    if value is not None and not is_number(value):
        raise UserError(f"{where}: a reward, rating or rank must be a number ({SECTION})")
    return value


def response_text(response, where):
    """The text of a response: itself, of an object the field of TEXTS, of messages the last one, an assistant's."""
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        response = {"role": None} | response[-1]
    if isinstance(response, dict):
        if response.get("role", "assistant") != "assistant":
            raise UserError(f"{where}: a response's last message must be the assistant's ({SECTION})")
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
        raise UserError(f"{where}: the prompt must be a text or messages, each with role and content ({SECTION})")
    if not tokenizer:
        raise UserError(f"{where}: the prompt is messages: name the model whose template renders them, --chat_template")
    messages = [{k: m[k] for k in ("role", "content")} for m in messages]
    return render_chat(tokenizer, messages, add_generation_prompt=True), messages
