"""Prompt templates: the built-in ones as text, the user's own (--prompt_file), and how a template is filled."""

import os
import pathlib
import re

from jinja2 import TemplateError

from common import UserError

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
        return ALPACA_TEMPLATE if name == "own" else default
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
    ({prompt}, {premise}, {hypothesis}, {question}, ...), else the prompts that training reads."""
    template = NLI_SHOTS_TEMPLATE if args.shots else read_template(args, "{prompt}")
    where = "--shots 3" if args.shots else "--prompt_file"
    return [fill(template, {k: v for k, v in r.items() if isinstance(v, str)}, where) for r in records]


NLI_TEMPLATE = """Premise: {premise}
Hypothesis: {hypothesis}
A reason, then #### and contradiction, neutral or entailment:
"""
# The same behind examples, as in the released code. Two lines and labels in lower case: a small model ends an answer
# at its first full stop unless a new line begins with the mark, and misspells labels of several tokens. rank
# --drop_malformed gives answers the human responses' form.
NLI_SHOTS_TEMPLATE = """Premise: A cook stirs soup in a large pot.
Hypothesis: The kitchen is empty.
A reason, then #### and contradiction, neutral or entailment:
A kitchen with a cook in it has somebody in it.
#### contradiction

Premise: Two men carry a sofa up the stairs.
Hypothesis: The men are brothers.
A reason, then #### and contradiction, neutral or entailment:
Friends or movers carry sofas too.
#### neutral

Premise: A girl in boots jumps over a puddle.
Hypothesis: A girl is jumping.
A reason, then #### and contradiction, neutral or entailment:
Jumping over a puddle is jumping.
#### entailment

"""
NLI_SHOTS_TEMPLATE += NLI_TEMPLATE
ALPACA_TEMPLATE = """Carry out the task below, with the input that follows it. Write the response and nothing else.

Task:
{instruction}

Input:
{input}

Response:

---
Carry out the task below. Write the response and nothing else.

Task:
{instruction}

Response:

"""
QA_TEMPLATE = """Answer the question from the documents below. Some of them are irrelevant.

{documents}

Question: {question}
Answer:"""
HH_TEMPLATE = "\n\n{dialogue}\n\nAssistant:"  # as HH-RLHF itself writes a dialogue
FLIP_TEMPLATE = """Rewrite the sentence so that it says the opposite. Answer with the rewritten sentence alone.

Sentence: {explanation}"""
LABEL_TEMPLATE = """{prompt}
{explanation} ####

Finish this answer with the label that its explanation leads to, one word: Entailment, Neutral or Contradiction."""
HINDSIGHT_TEMPLATES = [  # what ends the prompt, and the response
    ("A good answer:", "{better} A bad answer: {worse}"),
    ("A bad answer:", "{worse} A good answer: {better}"),
]
GPT_TEMPLATE = """Below are a task, a reference response, and {n} more responses. Rank these by how close
they come to the reference. You decide whether a response gives the label that the reference gives: all that do come
before those that do not. Answer with one line naming every response once, best first, like: {example}

Task:
{prompt}

Reference: {reference}

{responses}
"""
CONTEXTUAL_TEMPLATE = """Below are a task and {count} responses to it, numbered from 0 to {last}.

The task:
{task}

{responses}

Work in this order:
1. Decide whether the task is closed (one answer is right) or open (many answers can be good).
2. Write your own response to the task, a good one in the same form as the others. It is response {reference}.
3. Find the responses that repeat another in the same or nearly the same words. One of each such group stays.
4. Compare response {reference} and all that stay, and give each three whole numbers from 0 to 5. If the task is open:
   relevance, detail and justification, accuracy. If it is closed: accuracy, detail and justification, clarity.
   Its score is their sum.
5. Rank these responses by their scores, the best first.

Reply in exactly this form and with nothing else:
Type: open or closed
Reference: your own response
Duplicates: none, or groups such as 1=3
Scores:
0: 4 3 5 = 12
1: and so on, a line for every response that stays, response {reference} among them
Ranking: the numbers of these responses, such as 2 > 0 > 1
"""
