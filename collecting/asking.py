"""Answers of a model that takes instructions: behind a server, or on this machine."""

import functools
import zlib
from collections import Counter

import torch
from tqdm import tqdm

from collecting import generation
from collecting.prompts import render_chat
from collecting.server import ask_server

RE_ASKS = 2  # after an answer that could not be used


# fmt: off
def complete(args, prompts, *, temperature=0.0, top_p=1.0, num_samples=1, logprobs=False, completions=False,
             follow_up=None, count=None, done=()):
    # fmt: on
    """Ask the model of `api_flags` each prompt -> yields (index, responses, error) as they finish, each index once.

    prompts: texts, sent as one user message each (locally: through the chat template where there is one), or dialogues,
    lists of {role, content}; or, with completions=True, texts continued as they stand. responses: num_samples of {text,
    finished, num_tokens and logprob where known} (logprobs=True asks a server for them), or None with `error`, a
    sentence: such prompts failed and may be asked again another time. follow_up(index, text) -> None, or the message to
    re-ask with when `text` is no use: RE_ASKS times, the dialogue so far before it. What concerns all prompts (a
    refused key, an unknown model, no server) is a UserError. done: indices not to yield, from a run before. A local
    model's batches are those of all prompts, one that is not all done is asked whole, and re-asked by itself: so its
    answers do not depend on `done`. count: a Counter that several calls share, so that --max_requests bounds them
    together.
    """
    options = {"temperature": temperature, "top_p": top_p, "num_samples": num_samples, "completions": completions}
    ask = functools.partial(ask_server, logprobs=logprobs) if args.base_url else ask_local
    dialogues = {i: [{"role": "user", "content": p}] if isinstance(p, str) else p for i, p in enumerate(prompts)}
    order = sorted(dialogues, key=lambda i: -sum(len(message["content"]) for message in dialogues[i]))
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    batches = [[i for i in dialogues if i not in done]] if args.base_url else batches
    count = Counter() if count is None else count
    with tqdm(total=len(prompts) - len(done), desc=f"asking {args.model}", leave=False) as bar:
        for batch in batches:
            asked = {i: dialogues[i] for i in batch} if not all(i in done for i in batch) else {}
            for turn in range(1 + RE_ASKS):
                again = {}
                for i, responses, error in ask(args, asked, count, **options) if asked else ():
                    bar.set_postfix(count)
                    more = follow_up(i, responses[0]["text"]) if follow_up and responses and turn < RE_ASKS else None
                    if more is not None:
                        answer = {"role": "assistant", "content": responses[0]["text"]}
                        again[i] = [*asked[i], answer, {"role": "user", "content": more}]
                    elif i not in done:
                        bar.update()
                        yield i, responses, error
                asked = again


def ask_local(args, dialogues, count, *, completions, **options):
    """One batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = generation.load_generator(args.model, device, args.bf16)
    texts = {
        i: dialogue[0]["content"]
        if completions
        else render_chat(tokenizer, dialogue, add_generation_prompt=True)
        if tokenizer.chat_template
        else "\n\n".join(message["content"] for message in dialogue) + "\n"
        for i, dialogue in dialogues.items()
    }
    options = generation.options_of(args) | options
    torch.manual_seed(zlib.crc32(f"{args.seed} {next(iter(texts.values()))}".encode()))
    responses = generation.generate(model, tokenizer, [*texts.values()], **options)
    for i, samples in zip(texts, responses):
        count["tokens"] += sum(r["num_tokens"] for r in samples)
        yield i, samples, None
