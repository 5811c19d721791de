"""Prompt templates: the built-in ones (templates/), the user's own (--prompt_file), and how a template is filled."""

import os
import pathlib
import re

from jinja2 import TemplateError

from common import UserError

TEMPLATES = {p.stem: p.read_text(encoding="utf-8") for p in pathlib.Path(__file__).with_name("templates").glob("*.txt")}
TEMPLATES["hh"] = "\n\n{dialogue}\n\nAssistant:"  # as HH-RLHF itself writes a dialogue
HINDSIGHT = [  # what ends the prompt, and the response
    ("A good answer:", "{better} A bad answer: {worse}"),
    ("A bad answer:", "{worse} A good answer: {better}"),
]
RELEASED_TEMPLATE = "templates/alpaca.txt"


def render_chat(tokenizer, messages, **options):
    """The text that the tokenizer's chat template makes of messages. UserError where the template refuses them."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as e:
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses the messages: {e}") from e


def fill(template, fields, where):
    """Put fields into a template's {names}, once: text that holds braces itself is left alone."""
    names = set(re.findall(r"{(\w+)}", template))
    if names - fields.keys():
        raise UserError(f"{where}: the template asks for {sorted(names - fields.keys())}; there are {sorted(fields)}")
    return re.sub(r"{(\w+)}", lambda m: fields[m[1]], template)


def read_template(args, default):
    """The text of --prompt_file, or of --template, or the built-in template."""
    name, path = getattr(args, "template", None), args.prompt_file
    if not path and name != "alpaca":
        return TEMPLATES["alpaca"] if name == "own" else default
    if not path and not os.path.exists(RELEASED_TEMPLATE):
        raise UserError(
            f"--template alpaca: save the released prompts (tatsu-lab/stanford_alpaca, PROMPT_DICT in train.py) as "
            f"{RELEASED_TEMPLATE}, the one with {{instruction}} and {{input}} first, then a line ---, then the other"
        )
    return pathlib.Path(path or RELEASED_TEMPLATE).read_text(encoding="utf-8")


def task_of(record):
    """What a record asks for without a template: its instruction and input, else its prompt."""
    return "\n\n".join(filter(None, (record.get("instruction"), record.get("input")))) or record["prompt"]


def alpaca_prompt(template, fields, where):
    """Fill the template's part before a line --- where there is an input, else the part after it. The line end before
    the --- and the file's last are no part of the prompt: the released one ends in `### Response:`."""
    with_input, mark, without_input = template.removesuffix("\n").partition("\n---\n")
    part = with_input if fields["input"] or not mark else without_input
    return fill(part, fields, where)


def qa_prompt(template, question, documents, where):
    texts = [f"Document {i} ({d['title']}): {d['text']}" for i, d in enumerate(documents, 1)]
    return fill(template, {"documents": "\n".join(texts), "question": question}, where)


def shown_prompts(args, records):
    """What a model is shown to answer these records: --shots, else --prompt_file filled with a record's own texts
    ({prompt}, {premise}, {hypothesis}, {question}, ...), else the prompts that training reads.

    The examples of --shots answer in two lines, with labels in lower case: a small model ends an answer at its first
    full stop unless a new line begins with the mark, and misspells labels of several tokens. rank --drop_malformed
    gives answers the human responses' form.
    """
    template = TEMPLATES["nli_shots"] + TEMPLATES["nli"] if args.shots else read_template(args, "{prompt}")
    where = "--shots 3" if args.shots else "--prompt_file"
    return [fill(template, {k: v for k, v in r.items() if isinstance(v, str)}, where) for r in records]
