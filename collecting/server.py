"""Requests to an OpenAI-compatible server: what may go wrong, and the key that nobody sees. Repeats, pauses and
Retry-After are the openai client's."""

import asyncio
import itertools
import json
import math
import os
import urllib.parse

from collecting.generation import unescape
from common import UserError, is_number

MAX_REPLY = 8 * 2**20  # bytes of one reply
FAILURES_IN_A_ROW = 20  # then the server or the request is at fault, not a prompt
BUDGET_SPENT = "--max_requests is reached"


def ask_server(args, dialogues, count, **options):
    """`asking.complete` through the server: at most --concurrency requests under way, results as they come."""
    loop, waiting, running, failures = asyncio.new_event_loop(), iter(dialogues.items()), set(), 0
    client = open_client(args, count)
    try:
        while True:
            for i, dialogue in itertools.islice(waiting, args.concurrency - len(running)):
                running.add(loop.create_task(request(client, args, i, dialogue, count, **options)))
            if not running:
                return
            done, running = loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in sorted(done, key=lambda task: task.exception() is None):  # errors first: all are fetched
                i, responses, error = task.result()
                failures = 0 if responses or error == BUDGET_SPENT else failures + 1
                if failures == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"--base_url {args.base_url}: {failures} prompts in a row failed; the last: {error}"
                    )
                count["failed"] += responses is None
                yield i, responses, error
    finally:
        for task in running:
            task.cancel()
        loop.run_until_complete(asyncio.wait([*running, loop.create_task(client.close())]))
        _ = [task.cancelled() or task.exception() for task in running]  # fetched, or asyncio prints them
        loop.close()


def open_client(args, count):
    """An openai.AsyncOpenAI that repeats a request --retries times, also where a reply is no completion, and whose
    every attempt counts for --max_requests, lasts --timeout seconds at most, and reads MAX_REPLY bytes at most."""
    import httpx2  # what openai speaks HTTP with: its errors are what openai repeats
    import openai

    class Transport(openai.DefaultAsyncHttpxClient):
        async def send(self, request, **kwargs):
            if count["requests"] == args.max_requests:
                raise openai.OpenAIError(BUDGET_SPENT)  # passed on as it is
            count["requests"] += 1
            try:
                response = await asyncio.wait_for(super().send(request, **kwargs), args.timeout)
                if response.is_success:
                    read_reply(response.text)
                count["errors"] += response.is_error
                return response
            except TimeoutError as e:
                count["errors"] += 1
                raise httpx2.ReadTimeout(f"no whole reply within {args.timeout:g} s", request=request) from e
            except (ValueError, LookupError, OverflowError, httpx2.RequestError) as e:
                count["errors"] += 1
                raise httpx2.RequestError(str(e) or type(e).__name__, request=request) from e

    return openai.AsyncOpenAI(
        base_url=args.base_url,
        api_key=check_server(args.base_url) or "none",  # servers of one's own often want none
        max_retries=args.retries,
        timeout=args.timeout,
        default_headers={"Accept-Encoding": "identity"},  # so that MAX_REPLY bounds what arrives
        http_client=Transport(follow_redirects=False, event_hooks={"response": [bound_reply]}),
    )


async def request(client, args, i, dialogue, count, *, num_samples, logprobs, completions, temperature, top_p):
    """One prompt's samples -> (i, responses, None) or (i, None, error). A server that gives fewer is asked again."""
    import openai

    responses = []
    endpoint = client.completions if completions else client.chat.completions
    body = {"prompt": dialogue[0]["content"]} if completions else {"messages": dialogue}
    body |= {"model": args.model, "temperature": temperature, "top_p": top_p}
    body |= {"stop": list(unescape(args.stop))} if args.stop else {}
    body |= {"logprobs": 1 if completions else True} if logprobs else {}  # the older endpoint takes a number
    while len(responses) < num_samples:
        missing = num_samples - len(responses)
        body["n"] = missing if missing > 1 else openai.omit
        limit = "max_completion_tokens" if count["new names"] else "max_tokens"
        try:
            reply = await endpoint.with_raw_response.create(**body, **{limit: args.max_new_tokens})
        except openai.APIStatusError as e:
            if e.status_code == 400 and "max_completion_tokens" in e.message and limit == "max_tokens":
                count["new names"] = 1  # OpenAI's newer models know only this name, many servers only the old one
                continue
            return i, None, status_error(e, args)
        except openai.OpenAIError as e:
            return i, None, hide_key(str(e.__cause__ or e))
        more, tokens = read_reply(reply.text)
        responses += more[:missing]
        count["tokens"] += tokens
    return i, responses, None


def check_server(url):
    """Raise UserError unless `url` and OPENAI_API_KEY can be used -> the key, empty where there is none."""
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError("--base_url must be http(s)://host/path, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--base_url must hold no user, password, or query: a key belongs in OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its complaint
        raise UserError("OPENAI_API_KEY holds characters that no key has")
    return key


async def bound_reply(response):
    """A hook on every response, errors too: reading stops at MAX_REPLY bytes."""
    read = response.aiter_raw

    async def bounded(*args, **kwargs):
        size = 0
        async for chunk in read(*args, **kwargs):
            size += len(chunk)
            if size > MAX_REPLY:
                raise OverflowError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
            yield chunk

    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the reply is compressed, which was not asked for")
    response.aiter_raw = bounded
    response.encoding = "utf-8"  # whatever the server calls it: zlib is a codec too


def read_reply(text):
    """A completion's JSON, chat or text -> (its responses, the number of their tokens). ValueError on anything else."""
    try:
        reply = json.loads(text)
        used = (reply.get("usage") or {}).get("completion_tokens")
        responses = []
        for choice in reply["choices"]:
            content = choice["message"]["content"] if "message" in choice else choice["text"]
            response = {"text": hide_key(content or "").strip(), "finished": choice.get("finish_reason") == "stop"}
            response["text"].encode()  # a lone surrogate cannot be written to a file
            logprobs = choice.get("logprobs") or {}
            tokens = [(t["token"], t["logprob"]) for t in logprobs.get("content") or ()]
            if logprobs.get("token_logprobs"):
                tokens = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
            values = [value for _, value in without_eos(tokens, content or "")]
            if values:
                response |= {"logprob": math.fsum(values), "num_tokens": len(values)}
            responses.append(response)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f"the reply is no completion ({type(e).__name__})") from e
    if not responses or not all(is_number(r.get("logprob", 0)) for r in responses):
        raise ValueError("the reply holds no choices, or a log-probability that is no number")
    used = used if is_number(used) else 0
    if len(responses) == 1 and used > 0:
        responses[0].setdefault("num_tokens", used)
    return responses, used


def without_eos(tokens, text):
    """[(token, value)] without the special tokens behind the text, which some servers report and others do not: what
    ends a response counts in no log-probability here. Of an empty text all stay."""
    joined = "".join(token for token, _ in tokens)
    while len(tokens) > 1 and text and joined.removesuffix(tokens[-1][0]).startswith(text):
        joined = joined.removesuffix(tokens[-1][0])
        tokens = tokens[:-1]
    return tokens


def status_error(e, args):
    """What an HTTP status other than 200 says, in the server's own words, short and never with the key. Raises
    UserError where no prompt can succeed."""
    code, said = e.status_code, hide_key(" ".join(str(e.message).split()))[:200]
    if code in (401, 403):
        raise UserError(f"--base_url {args.base_url}: the key in OPENAI_API_KEY is missing or refused (HTTP {code})")
    if code == 404 or 300 <= code < 400 or getattr(e, "code", None) == "insufficient_quota":
        hint = "redirects are not followed" if code < 400 else said
        raise UserError(f"--base_url {args.base_url}, --model {args.model}: HTTP {code} ({hint})")
    return f"HTTP {code} ({said})"


def hide_key(text):
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "***") if key else text
