"""Answers of a model that takes instructions: behind a server, or on this machine."""

import json
import pathlib
import zlib
from collections import Counter

import torch
from tqdm import tqdm

from collecting import generation
from collecting.answers import KNOWN, Refusal, without_thinking
from collecting.files import read_rows, write_atomically
from collecting.prompts import render_chat
from common import say

RE_ASKS = 2  # after an answer that could not be used


def ask_records(args, journal, ids, prompts, **options):
    """`complete` for the records of a journal -> yields (index, responses) of those that are answered, then says what
    failed.

    Refused prompts are kept in OUTPUT.refused.jsonl. No later run asks them, and `journal.finish` does not miss them,
    until that file is deleted.
    """
    file, failed, answered = pathlib.Path(f"{journal.path}.refused.jsonl"), {}, bool(journal.done)
    if not journal.done:
        file.unlink(missing_ok=True)  # it is an earlier output's
    refused = {row["id"]: row for _, row in read_rows(file)} if file.exists() else {}
    done = {n for n, i in enumerate(ids) if i in journal.done or i in refused}
    for n, responses, error in complete(args, prompts, done=done, **options):
        if error:
            failed.setdefault(error, []).append(ids[n])
        else:
            answered = True
            yield n, responses
    for error, those in failed.items():
        final = isinstance(error, Refusal) and answered  # else the request may be at fault, and not the prompts
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        say(f"{those[0]}{more} {'refused' if final else 'failed'}: {error}")
        refused |= {i: {"id": i, "reason": error} for i in those if final}
    if refused:
        journal.ids = [i for i in journal.ids if i not in refused]
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in refused.values()))
        say(f"{len(refused)} refused prompts are left out; a run that finds no {file} asks them again")


# fmt: off
def complete(args, prompts, *, temperature=0.0, top_p=1.0, num_samples=1, logprobs=False, completions=False,
             follow_up=None, count=None, done=()):
    # fmt: on
    """Ask the model of `api_flags` each prompt -> yields (index, responses, error) as they finish, each index once.

    prompts: texts, sent as one user message each (locally: through the chat template where there is one), or dialogues,
    lists of {role, content}; or, with completions=True, texts continued as they stand.
    responses: num_samples of {text, finished, logprob and num_tokens where known} (logprobs=True asks a server for
    both), fewer where a server gives no more; or None, with the reason in `error`.
    follow_up(index, text) -> None, or the message to re-ask with when `text` is no use: RE_ASKS times, the dialogue so
    far before it. done: indices not to yield. A local model's batches are formed over all prompts, so its answers do
    not depend on `done`. count: a Counter that several calls share. --max_requests then bounds them together, and a
    later call knows which fields the server refuses. Without it, what was counted is said at the end. Raises UserError
    for what concerns all prompts: a refused key, an unknown model, no server.
    """
    options = {"temperature": temperature, "top_p": top_p, "num_samples": num_samples}
    options |= {"logprobs": logprobs, "completions": completions}
    shared, count = count is not None, Counter() if count is None else count
    count[args.model, KNOWN] += len(done)
    ask = ask_local
    if args.base_url:
        from collecting.server import ask_server as ask  # openai takes a second to import
    dialogues = {i: [{"role": "user", "content": p}] if isinstance(p, str) else p for i, p in enumerate(prompts)}
    batches = [[i for i in dialogues if i not in done]]
    if not args.base_url:
        order = sorted(dialogues, key=lambda i: -sum(len(message["content"]) for message in dialogues[i]))
        batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    with tqdm(total=len(prompts) - len(done), desc=f"asking {args.model}", leave=False) as bar:
        for batch in (b for b in batches if not all(i in done for i in b)):
            asked = {i: dialogues[i] for i in batch}
            for turn in range(1 + RE_ASKS):
                again = {}
                for i, responses, error in ask(args, count, asked, **options) if asked else ():
                    more = follow_up(i, responses[0]["text"]) if follow_up and responses and turn < RE_ASKS else None
                    if more is not None:
                        answer = {"role": "assistant", "content": responses[0]["text"]}
                        again[i] = [*asked[i], answer, {"role": "user", "content": more}]
                    elif i not in done:
                        bar.update()
                        yield i, responses, error
                asked = again
    if not shared and counted(count):
        say(f"{args.model}: {counted(count)}")


def counted(count):
    return ", ".join(f"{n} {what}" for what, n in count.items() if n and isinstance(what, str))


def ask_local(args, count, dialogues, *, completions, logprobs, **options):
    """One batch."""
    model, tokenizer = generation.load_generator(args.model, generation.local_device(), args.bf16)
    if completions:
        texts = [dialogue[0]["content"] for dialogue in dialogues.values()]
    elif tokenizer.chat_template:
        texts = [render_chat(tokenizer, dialogue, add_generation_prompt=True) for dialogue in dialogues.values()]
    else:
        texts = ["\n\n".join(m["content"] for m in dialogue) + "\n" for dialogue in dialogues.values()]
    options = generation.options_of(args) | options
    torch.manual_seed(zlib.crc32(f"{args.seed} {texts[0]}".encode()))
    responses = generation.generate(model, tokenizer, texts, **options)
    for i, samples in zip(dialogues, responses):
        for k, r in enumerate(samples):
            text = r["text"] if args.keep_thinking else without_thinking(r["text"])
            if text != r["text"]:  # the likelihood was the thinking's too
                samples[k] = r = {"text": text.strip(), "finished": r["finished"]}
            count.update({"responses": 1, "cut at --max_new_tokens": not r["finished"], "empty": not r["text"]})
        yield i, samples, None
