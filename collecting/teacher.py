"""The verb teacher: responses of another model, behind a server or run here."""

import common
from collecting import asking, generation
from collecting.flags import api_flags, collected_flags, prompt_flags, sampling_flags
from collecting.journal import open_collected
from collecting.prompts import shown_prompts
from common import UserError


def teacher_flags(add):
    collected_flags(add, "train", "teacher")
    sampling_flags(add, 1)
    add("--logprobs", action="store_true", help="ask the server for logprob and num_tokens (Tuna's teacher score)")
    add("--completions", action="store_true", help="continue the prompt as it stands (/completions), not as a chat")
    prompt_flags(add)
    api_flags(add, 256, alpaca=512)


def teacher(args):
    """Add responses of a model behind an OpenAI-compatible server, or, without --base_url, of one run here. A record
    with `messages` goes as these turns, unless --completions."""
    name = common.run_name(args.model)
    args.source = args.source or name
    args.max_new_tokens = generation.new_tokens(args, 256)
    records, journal = open_collected(args, "train", "teacher")
    given = bool(journal.done)  # whether the server gives log-probabilities, if it is asked for them
    ids, as_it_stands = [r["id"] for r in records], args.completions or args.shots or args.prompt_file
    prompts = [(not as_it_stands and r.get("messages")) or shown_prompts(args, [r])[0] for r in records]
    options = {k: getattr(args, k) for k in ("num_samples", "temperature", "top_p", "logprobs", "completions")}
    for i, responses in asking.ask_records(args, journal, ids, prompts, **options):
        given = given or any("logprob" in r or not r["text"] for r in responses)
        if args.logprobs and not given:
            hint = "drop --logprobs and run rank --by logprob with a local model, or ask another"
            raise UserError(f"--base_url {args.base_url}: no log-probabilities come with a response: {hint}")
        more = [r | {"source": args.source} | ({"teacher": name} if "logprob" in r else {}) for r in responses]
        journal.write([records[i] | {"candidates": records[i].get("candidates", []) + more}])
    journal.finish()
