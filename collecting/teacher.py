"""The verb teacher: responses of another model, behind a server or run here."""

from collections import Counter

import common
from collecting import asking, generation
from collecting.flags import api_flags, collected_flags, prompt_flags
from collecting.journal import open_collected
from collecting.prompts import shown_prompts
from collecting.server import BUDGET_SPENT
from common import UserError, in_range, say


def teacher_flags(add):
    collected_flags(add, "train", "teacher")
    add("--source", help="the candidates' source (default: the model's name)")
    add("--num_samples", type=in_range(int, 1), default=1, help="responses a prompt")
    add("--temperature", type=in_range(float, 0), default=0.8, help="0: greedy")
    add("--top_p", type=in_range(float, 0, 1), default=1.0, help="sample from the likeliest tokens of this mass")
    add("--logprobs", action="store_true", help="ask the server for logprob and num_tokens (Tuna's teacher score)")
    add("--completions", action="store_true", help="continue the prompt as it stands (/completions), not as a chat")
    prompt_flags(add)
    api_flags(add, 256, alpaca=512)


def ask_each(args, records, journal, prompt, finish, **options):
    """Ask prompt(record) for every record not done; journal finish(record, responses) as they come; list failures."""
    done, failed = {i for i, r in enumerate(records) if r["id"] in journal.done}, Counter()
    for i, responses, error in asking.complete(args, [prompt(r) for r in records], done=done, **options):
        if error:
            failed[error] += 1
            if error != BUDGET_SPENT:
                say(f"{records[i]['id']} failed: {error}")
        else:
            journal.write([finish(records[i], responses)])
    for error, number in failed.items():
        say(f"{number} prompts failed and are left for another run: {error}")
    journal.finish()


def teacher(args):
    """Add responses of a model behind an OpenAI-compatible server, or, without --base_url, of one run here. A record
    with `messages` goes as these turns, unless --completions."""
    name = common.run_name(args.model)
    args.source = args.source or name
    args.max_new_tokens = generation.new_tokens(args, 256)
    records, journal = open_collected(args, "train", "teacher")

    def finish(record, responses):
        if args.logprobs and not all("logprob" in r for r in responses):
            raise UserError(
                f"--base_url {args.base_url}: the server ignores `logprobs`, as transformers serve does: drop "
                "--logprobs and add them from a local model with rank --by logprob, or ask a server that gives them"
            )
        by = {"source": args.source}
        more = [r | by | ({"teacher": name} if "logprob" in r else {}) for r in responses]
        return record | {"candidates": record.get("candidates", []) + more}

    options = {k: getattr(args, k) for k in ("num_samples", "temperature", "top_p", "logprobs", "completions")}

    def prompt(record):
        own = not (args.completions or args.shots or args.prompt_file) and record.get("messages")
        return own or shown_prompts(args, [record])[0]

    ask_each(args, records, journal, prompt, finish, **options)
