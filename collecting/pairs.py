"""Preference data of one's own as records: pairs, ranked lists, chats and ratings."""

import functools

import common
from collecting.files import as_dict, is_message, row_id
from collecting.prompts import fill, render_chat
from common import UserError

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
chat_tokenizer = functools.cache(common.load_tokenizer)


def prepare_pair(row, where, index, template, args):
    """A row with prompt and chosen, rejected or responses -> its record; none without two different responses.

    A response is a text, an object, or messages, which may begin with the prompt. Sources are chosen, rejected and
    response (or what a response's `source` or `model` says), and reference for the column of that name.
    """
    names = dict(c.partition("=")[::2] for c in args.columns)
    if wrong := names.keys() - COLUMNS.keys():
        raise UserError(f"--columns {wrong.pop()}: write NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
    given, row = row, {ours: column(row, names, ours) for ours in COLUMNS}
    responses, rewards, ranks, places = row["responses"], row["rewards"], row["ranks"], None
    if row["chosen"] is not None and row["rejected"] is not None:
        chosen, rejected = several(row["chosen"]), several(row["rejected"])
        responses, sources = chosen + rejected, ["chosen"] * len(chosen) + ["rejected"] * len(rejected)
        rewards, ranks = several(row["chosen_reward"]) + several(row["rejected_reward"]), None
        rewards = None if rewards == [None, None] else rewards
        places = [0] * len(chosen) + [1 + i * args.rejected_ordered for i in range(len(rejected))]
    elif isinstance(responses, list):
        sources = [None] * len(responses)
        if "responses" in names or given.get("responses") is not None:  # best first; another name does not say that
            places = range(len(responses))
    elif all(names.get(k, k) in given for k in ("chosen", "rejected")):
        return []  # one of the two is null
    else:
        responses = None
    contexts = [r[:-1] for r in responses or () if isinstance(r, list) and len(r) > 1]  # the prompt is in them
    context = contexts[0] if contexts else row["prompt"] or row["messages"]
    if not context or responses is None:
        need = "a row needs a prompt (or messages), and chosen and rejected, or a list of responses"
        raise ValueError(f"the columns are {', '.join(given)}; {need}: see --columns and README, 'Your own data'")
    if any(c != context for c in contexts):
        raise ValueError("the responses differ before their last message: no prompt in common")
    if context == given.get("instruction") and isinstance(given.get("input"), str) and given["input"].strip():
        context += f"\n{given['input']}"  # LLaMA-Factory's pairs have Alpaca's columns
    prompt, messages = render(context, args.chat_template)
    prompt = fill(template, {"prompt": prompt}, where)
    candidates = as_candidates(responses, sources, rewards, ranks, places)
    if len({c["text"] for c in candidates}) < 2:
        return []
    if row["reference"]:  # an empty cell of a CSV file is none
        candidates = [{"text": response_text(row["reference"]), "source": "reference"}, *candidates]
    if not prompt[-1:].isspace():  # what common.space_before puts there, and export writes
        candidates = [c | {"text": c["text"].removeprefix(" ")} for c in candidates]
    record = {"id": row_id(row, f"pairs-{index}"), "task": "pairs", "prompt": prompt, "label": None, "answers": None}
    return [record | ({"messages": messages} if messages else {}) | {"candidates": candidates}]


def column(row, names, ours):
    """The row's value under the name of --columns, else under our name or a known one; None where none is there."""
    if ours in names and names[ours] not in row:
        raise ValueError(f"no column {names[ours]!r} (--columns); the columns are {', '.join(row)}")
    known = [names[ours]] if ours in names else [ours, *COLUMNS[ours]]
    return next((row[name] for name in known if row.get(name) is not None), None)


def several(value):
    """A value, or a list of them -> a list. Messages with a turn of the user's are one response."""
    if not isinstance(value, list):
        return [value]
    return [value] if any(as_dict(x).get("role") in ("user", "system") for x in value) else value


def as_candidates(responses, sources, rewards, ranks, places):
    """The responses as candidates, best first. `rank` is the number of better ones: by rewards, else by ranks, else by
    places. Rewards and ranks are lists, or fields of response objects. A response without one, where others have one,
    is left out. Raises ValueError where nothing says which is better."""
    objects = [as_dict(r) for r in responses]
    rewards = numbers(rewards or [rating(o) for o in objects], len(responses))
    ranks = numbers(ranks or [o.get("rank") for o in objects], len(responses))
    costs = [[None if r is None else -r for r in rewards], ranks, places or ()]  # smaller better
    costs = next((some for some in costs if any(cost is not None for cost in some)), None)
    if costs is None and not any({*RATINGS, "rank", "annotations"} & o.keys() for o in objects):
        raise ValueError("no rewards, no ranks: are they best first? --columns responses=COLUMN says so")
    candidates = []
    for response, fields, source, cost, reward in zip(responses, objects, sources, costs or (), rewards):
        if cost is not None:
            own = (fields[k] for k in ("source", "model") if isinstance(fields.get(k), str) and fields[k])
            rank = sum(other < cost for other in costs if other is not None)
            candidate = {"text": response_text(response), "source": source or next(own, "response"), "rank": rank}
            candidate |= {"finished": False} if fields.get("finished") is False else {}  # cut: it gets no EOS
            candidates.append(candidate if reward is None else candidate | {"reward": reward})
    return sorted(candidates, key=lambda c: c["rank"])


def rating(fields):
    """A response's own rating: the mean of its `annotations` (UltraFeedback), else a field of RATINGS, else None."""
    aspects = as_dict(fields.get("annotations")).values()
    values = [value for value in (number(as_dict(a).get("Rating")) for a in aspects) if value is not None]
    if values:
        return sum(values) / len(values)
    return next((fields[k] for k in RATINGS if fields.get(k) is not None), None)


def number(value):
    """A rating -> float; None for none ("N/A" and NaN too). ValueError for other texts."""
    return None if value in (None, "", "N/A") or value != value else float(value)


def numbers(values, count):
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"rewards and ranks must be lists of {count} numbers, one a response")
    return [number(value) for value in values]


def response_text(response):
    """The text of a response: itself, of an object the field of TEXTS, of messages the last one, an assistant's."""
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        response = {"role": None} | response[-1]
    if isinstance(response, dict):
        if response.get("role", "assistant") != "assistant":
            raise ValueError("a response's last message must be the assistant's")
        response = next((response[k] for k in TEXTS if response.get(k) is not None), None)
    if not isinstance(response, str):
        raise ValueError(f"a response must be a text, an object with one of {', '.join(TEXTS)}, or messages")
    return response


def render(context, model):
    """The prompt, a text or messages -> (its final text, its messages or None), by the chat template of `model`."""
    if isinstance(context, str) and not model:
        return context, None
    messages = [{"role": "user", "content": context}] if isinstance(context, str) else context
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise ValueError("the prompt must be a text or messages, each with role and content")
    if not model:
        raise ValueError("the prompt is messages: name the model whose template renders them, --chat_template")
    messages = [{k: m[k] for k in ("role", "content")} for m in messages]
    return render_chat(chat_tokenizer(model, "--chat_template"), messages, add_generation_prompt=True), messages
