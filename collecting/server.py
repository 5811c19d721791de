"""Requests to an OpenAI-compatible server. Repeats, pauses and Retry-After are the openai client's."""

import asyncio
import contextlib
import json
import math
import os
import re
from collections import Counter

import httpx2  # openai speaks HTTP with it, and repeats a request after one of its errors
import openai

from collecting.answers import KNOWN, Refusal, without_thinking
from collecting.files import as_dict
from common import UserError, printable, say

BUDGET_SPENT = "--max_requests is reached"
FAILURES_IN_A_ROW = 20  # then the server or the request is at fault, not a prompt
# Every other finish_reason is that of a whole response.
CUT = {
    "cut at --max_new_tokens": ("length", "max_tokens", "model_length"),
    "cut by a content filter": ("content_filter", "safety", "recitation", "prohibited_content", "blocklist"),
    "cut by an error": ("error", "abort", "insufficient_system_resource"),
}
WHOLE = ("", "stop", "eos", "eos_token", "end", "end_turn", "stop_sequence")
# Fields that a server may not take, or not with this value, and the sign of it in its error.
OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": "temperature", "top_p": "top_p"}
OPTIONAL |= {"n": r"\bn\b|completion choice"}
SPECIAL = re.compile(rb"<[^<>\s]*>|\[[A-Z_/]+\]|")  # what a special token looks like: </s>, <|im_end|>, [EOS], nothing
OPENAIS_OWN = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")


class NoResponse(openai.OpenAIError):
    """What a reply holds instead of a response. The client passes this error on and repeats nothing."""


def ask_server(args, count, dialogues, **options):
    """{index: dialogue} -> yields (index, responses, error) as they come, --concurrency requests at once.

    `count` keeps what is known of the server: (model, KNOWN), the prompts that it answered; (model, FIELD), 1 where it
    refuses this field.
    """
    client, results, todo, failures = open_client(args, count), asyncio.Queue(), iter(dialogues), 0

    async def work():
        for i in todo:
            try:
                results.put_nowait((i, await respond(client, args, count, dialogues[i], **options), None))
            except Exception as e:
                results.put_nowait((i, None, e))

    with asyncio.Runner() as runner:
        workers = [runner.get_loop().create_task(work()) for _ in range(args.concurrency)]
        try:
            for _ in dialogues:
                i, responses, error = runner.run(results.get())
                error = error and reason_of(error, args)
                count[args.model, KNOWN] += not error
                harmless = not error or error == BUDGET_SPENT or count[args.model, KNOWN] and isinstance(error, Refusal)
                failures = 0 if harmless else failures + 1
                if failures == FAILURES_IN_A_ROW:
                    raise UserError(f"{address(args)}: {failures} prompts in a row failed; the last: {error}")
                yield i, responses, error
        finally:
            for worker in workers:
                worker.cancel()
            runner.run(client.close())


async def respond(client, args, count, dialogue, *, num_samples, logprobs, completions, temperature, top_p):
    """-> the responses to one prompt: num_samples, or fewer where the server gives no more."""
    responses, path = [], "/completions" if completions else "/chat/completions"
    body = {"prompt": dialogue[0]["content"]} if completions else {"messages": dialogue}
    body |= {"model": args.model, "max_tokens": args.max_new_tokens, "temperature": temperature}
    body |= {"top_p": top_p} if top_p < 1 else {}
    body |= {"stop": args.stop} if args.stop else {}
    body |= {"logprobs": 1 if completions else True} if logprobs else {}  # the older endpoint takes a number
    while missing := num_samples - len(responses):
        fields = body | ({"n": missing} if missing > 1 else {})
        sent = {k: v for k, v in fields.items() if not count[args.model, k]}
        sent |= {} if "max_tokens" in sent else {"max_completion_tokens": args.max_new_tokens}
        try:
            reply = await client.post(path, body=sent, cast_to=httpx2.Response)
            more, kinds = read_reply(reply.content, args.keep_thinking)
            responses += more[:missing]
            count.update(kinds)
        except openai.APIStatusError as e:
            if not leave_out(e, sent, args, count):
                raise
        except NoResponse:
            if not responses:
                raise
            break
    return responses


def leave_out(error, sent, args, count):
    """Whether the server refuses an optional field. No request has it from then on, which is said once."""
    said = f"{error.param}: {words(error.response.text)}"
    for name, sign in OPTIONAL.items():
        if error.status_code in (400, 422) and name in sent and re.search(sign, said):
            if not count[args.model, name] and not count[args.model, KNOWN]:
                count[args.model, name] = 1
                say(f"--model {args.model}: the server is asked without {name}, which it refuses ({said})")
            return count[args.model, name] > 0
    return False


def open_client(args, count):
    """An openai.AsyncOpenAI whose every attempt counts for --max_requests, and which repeats unreadable replies. Raises
    UserError where --base_url, OPENAI_API_KEY or a proxy's address cannot be used."""

    async def before(request):
        if count["requests"] == args.max_requests:
            raise openai.OpenAIError(BUDGET_SPENT)
        count["requests"] += 1

    async def after(response):
        response.encoding = "utf-8"  # whatever the server calls it: zlib is a codec too
        if response.is_success:
            read_reply(await response.aread())

    key = os.environ.get("OPENAI_API_KEY", "").strip()
    openais = re.match(r"https://([\w-]+\.)?api\.openai\.com(/|$)", args.base_url)
    hidden = {} if openais else {name: os.environ.pop(name) for name in OPENAIS_OWN if name in os.environ}
    try:
        if not re.fullmatch(r"https?://[^/:@?#][^@?#]*", args.base_url) or not re.fullmatch("[!-~]*", key):
            raise ValueError("the HTTP library's complaint would quote a password or the key")
        hooks = {"event_hooks": {"request": [before], "response": [after]}, "follow_redirects": False}
        options = {"max_retries": args.retries, "timeout": args.timeout, "api_key": key or "none"}
        return openai.AsyncOpenAI(
            base_url=args.base_url, http_client=openai.DefaultAsyncHttpxClient(**hooks), **options
        )
    except (ValueError, httpx2.InvalidURL) as e:
        raise UserError(
            "--base_url must be http(s)://host/path, like http://localhost:8000/v1, without user, password or query; "
            "OPENAI_API_KEY a key of one line; HTTP_PROXY and HTTPS_PROXY a proxy's address"
        ) from e
    finally:
        os.environ |= hidden


def reason_of(error, args):
    """Why a prompt has no responses: a sentence, a `Refusal` where asking again would not help. Raises UserError where
    no prompt can succeed."""
    if isinstance(error, openai.APIStatusError):
        code, said = error.status_code, f"HTTP {error.status_code} ({words(error.response.text)})"
        if code in (401, 402, 404) or code < 400:
            raise UserError(f"{address(args)}, --model {args.model} or the key in OPENAI_API_KEY is refused: {said}")
        return said if may_pass(code) else Refusal(said)
    if isinstance(error, NoResponse) or isinstance(error.__cause__, httpx2.DecodingError):
        return Refusal(error.__cause__ or error)
    if isinstance(error, openai.OpenAIError):
        return words(str(error.__cause__ or "") or str(error) or type(error).__name__)  # a timeout has no words
    raise error


def may_pass(code):
    """Whether another try may help after this HTTP status, which some servers put into a reply as a string."""
    return re.fullmatch("4(08|09|25|29)|5..", str(code)) is not None


def address(args):
    hint = "" if re.search(r"/v\d", args.base_url) else " (most servers want /v1 at its end)"
    return f"--base_url {args.base_url}{hint}"


def read_reply(content, keep_thinking=False):
    """A completion's JSON, chat or text -> (its responses, a Counter of what they are). Raises NoResponse where another
    try would not help, httpx2.DecodingError where the reply is no completion."""
    count, text = Counter(), content.decode(errors="replace")
    try:
        reply = json.loads(content)
        if (error := reply.get("error")) and not reply.get("choices") and not may_pass(as_dict(error).get("code")):
            raise NoResponse(f"the server replies: {words(text)}")
        found = [read_choice(choice, keep_thinking, count) for choice in reply["choices"]]
        if not any(found):
            raise NoResponse([*count][0])
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise httpx2.DecodingError(f"the reply is no completion: {words(text)}") from e
    return [response for response in found if response], count


def read_choice(choice, keep_thinking, count):
    """-> its response, or None; `count` gains what it is."""
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    content.encode()  # a lone surrogate cannot be written to a file
    thinking = message.get("reasoning_content") or message.get("reasoning")
    text = (content if keep_thinking else without_thinking(content)).strip()
    finish = str(choice.get("finish_reason") or "").lower()
    cut = next((kind for kind, reasons in CUT.items() if finish in reasons), None)
    said = message.get("refusal") or choice.get("error")
    if not text and (said or content or thinking or cut):
        why = words(json.dumps(said)) if said else "nothing but thinking" if content or thinking else cut
        count[f"no response: {why}"] += 1
        return None
    count.update({"responses": 1, "empty": not text})
    count.update([cut] if cut else [] if finish in WHOLE else [f"of finish_reason {words(finish)}"])
    alone = text == content.strip() and not thinking  # what is known of thinking's tokens is not said of the text
    known = likelihood(choice.get("logprobs") or {}, content) if alone else {}
    if thinking and keep_thinking:
        text = f"<think>\n{thinking}\n</think>\n\n{text}"
    return {"text": text, "finished": not cut} | known


def likelihood(logprobs, text):
    """{logprob, num_tokens} of a choice's text, {} where the server gave none. The special tokens that end a response
    count in neither, though some servers report them."""
    old = zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), strict=True)
    tokens = logprobs.get("content") or [{"token": token, "logprob": value} for token, value in old]
    values, ended = [], True
    for t in reversed(tokens):
        piece = bytes(t["bytes"]) if t.get("bytes") is not None else t["token"].encode()
        ended = ended and SPECIAL.fullmatch(piece) and not (piece and text.encode().endswith(piece))
        values += [] if ended else [t["logprob"]]
    values = values or [t["logprob"] for t in tokens[:1]]  # an empty response is its EOS
    return {"logprob": math.fsum(values), "num_tokens": len(values)} if values else {}


def words(text):
    """What a reply says of an error, or a text as it is: one line, short, without the key."""
    value, key = None, os.environ.get("OPENAI_API_KEY", "").strip()
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    for name in ("error", "detail", "message"):
        value = as_dict(value).get(name) or value
    text = value if isinstance(value, str) else text
    text = text.replace(key, "***") if len(key) >= 8 else text  # a placeholder such as EMPTY is no secret
    return printable(" ".join(text.split()))[:200]
