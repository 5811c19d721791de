"""A command of several verbs, and the flags that its verbs share."""

import common
from common import in_range


def run_verb(verbs, description):
    """Parse `SCRIPT VERB --flags` against {verb: (its flags, its function)} and call the function."""
    parser = common.Parser(description=description)
    subparsers = parser.add_subparsers(dest="verb", required=True)
    for name, (flags, run) in verbs.items():
        verb = subparsers.add_parser(name, description=run.__doc__)
        flags(verb.add_argument)
        verb.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


def group(add, title):
    """A parser's add_argument -> the add_argument of a group of flags under a heading of their own."""
    return add.__self__.add_argument_group(title).add_argument


def stop_string(text):
    """The type of --stop: a newline is written \\n."""
    if not text:
        raise ValueError  # every response would end at once
    return text.replace("\\n", "\n")


TEMPLATE_HELP = """own: the one that prepare --task alpaca writes, for models trained on that; alpaca: the released one,
for others' Alpaca weights, which you save as templates/alpaca.txt"""


# fmt: off
def collected_flags(add, before, after, task="esnli"):
    add("--task", default=task, help=f"for the default paths: data/TASK/{before}.jsonl, data/TASK/{after}.jsonl")
    add("--input", help="records, JSONL")
    add("--output", help="the same records with more in them, JSONL")


def sampling_flags(add, num_samples):
    add("--source", help="the candidates' source (default: the model's name; of RUN/model: RUN)")
    add("--num_samples", type=in_range(int, 1, 10_000), default=num_samples, help="a prompt (RESCUE: 3, Tuna: 4)")
    add("--temperature", type=in_range(float, 0), default=0.8, help="0: greedy")
    add("--top_p", type=in_range(float, 0, 1), default=1.0, help="sample from the likeliest tokens of this mass")


def generation_flags(add, max_new_tokens, alpaca=None):
    add = group(add, "generation")
    by_task = f" (default: {max_new_tokens}; --task alpaca: {alpaca})" if alpaca else ""
    default = None if alpaca else max_new_tokens
    add("--max_new_tokens", type=in_range(int, 1, 10**6), default=default, help="tokens of a response" + by_task)
    add("--max_prompt_length", type=in_range(int, 1), help="cut longer prompts from the left")
    add("--stop", nargs="*", type=stop_string, default=[], help="a response ends before any of these; newline: \\n")
    add("--batch_size", type=in_range(int, 1), default=16, help="prompts at once")
    add("--bf16", action="store_true", help="compute in bf16 on CPU too: faster if lscpu shows avx512_bf16 or amx_bf16")


def alpaca_flags(add, fields="{instruction} and {input}"):
    add("--prompt_file", help=f"a template of your own with {fields}, a line ---, and one for no input")
    add("--template", choices=["own", "alpaca"], help=TEMPLATE_HELP)


def prompt_flags(add):
    add = add.__self__.add_mutually_exclusive_group().add_argument
    add("--shots", type=int, choices=[0, 3], default=0, help="3: ask with the built-in prompt of three NLI examples")
    add("--prompt_file", help="ask with this template, which names a record's texts: {prompt}, {premise}, ...")


def api_flags(add, max_new_tokens, required=True, alpaca=None):
    ask = group(add, "the model that is asked")
    ask("--model", required=required, help="a model's name at --base_url; without that: hub id or folder, run here")
    ask("--base_url", help="OpenAI-compatible server, e.g. https://api.openai.com/v1; its key: OPENAI_API_KEY")
    ask("--concurrency", type=in_range(int, 1), default=8, help="requests under way at once")
    ask("--max_requests", type=in_range(int, 1), help="stop after this many requests, repeated ones counted")
    ask("--retries", type=in_range(int, 0), default=5, help="repeat a failed request this often, with growing pauses")
    ask("--timeout", type=in_range(float, above=0), default=120.0, help="seconds that the server may be silent")
    ask("--seed", type=in_range(int, 0, 2**32), default=0, help="of a local model's samples")
    ask("--keep_thinking", action="store_true", help="a response keeps the thinking before it, in <think> tags")
    generation_flags(add, max_new_tokens, alpaca)
# fmt: on
