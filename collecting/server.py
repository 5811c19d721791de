"""Requests to an OpenAI-compatible server. Repeats, pauses and Retry-After are the openai client's."""

import asyncio
import contextlib
import json
import math
import os
import re
import urllib.parse
from collections import Counter

import httpx2  # openai speaks HTTP with it, and repeats a request after one of its errors
import openai

from collecting.answers import Refusal, without_thinking
from collecting.files import as_dict
from collecting.generation import unescape
from common import UserError, is_number, say

BUDGET_SPENT = "--max_requests is reached"
FAILURES_IN_A_ROW = 20  # then the server or the request is at fault, not a prompt
# Every other finish_reason is that of a whole response.
CUT = dict.fromkeys(("length", "max_tokens", "model_length"), "cut at --max_new_tokens")
FILTERS = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist")
CUT |= dict.fromkeys(FILTERS, "cut by a content filter")
CUT |= dict.fromkeys(("error", "abort", "insufficient_system_resource"), "cut by an error")
WHOLE = ("", "stop", "eos", "eos_token", "end", "end_turn", "stop_sequence")
# Fields that a server may not take, or not with this value, and the sign of it in its error.
OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": "temperature", "top_p": "top_p"}
OPTIONAL |= {"n": r"\bn\b|completion choice"}
SPECIAL = re.compile(rb"<[^<>\s]*>|\[[A-Z_/]+\]|")  # what a special token looks like: </s>, <|im_end|>, [EOS], nothing
OPENAIS_OWN = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")


def ask_server(args, dialogues, count, **options):
    """`asking.complete` through a server: at most --concurrency requests at once, results as they come."""
    failures, results, slots = 0, asyncio.Queue(), asyncio.Semaphore(args.concurrency)
    with asyncio.Runner() as runner:
        client, create_task = open_client(args, count), runner.get_loop().create_task
        tasks = {create_task(ask(client, slots, args, x, count, **options)): i for i, x in dialogues.items()}
        for task in tasks:  # the exception is read at once: asyncio prints those that nobody reads
            task.add_done_callback(lambda task: results.put_nowait((task, not task.cancelled() and task.exception())))
        try:
            for _ in tasks:
                task, error = runner.run(results.get())
                error = error and reason_of(error, args)
                count[args.model, "answered"] += not error
                known = count[args.model, "answered"] or count[args.model, "before"]  # the server answers other prompts
                harmless = not error or error == BUDGET_SPENT or known and isinstance(error, Refusal)
                failures = 0 if harmless else failures + 1
                if failures == FAILURES_IN_A_ROW:
                    raise UserError(f"{address(args)}: {failures} prompts in a row failed; the last: {error}")
                yield tasks[task], None if error else task.result(), error
        finally:
            runner.run(client.close())


async def ask(client, slots, args, dialogue, count, *, num_samples, logprobs, completions, temperature, top_p):
    """-> the responses to one prompt: num_samples, or fewer where the server gives no more."""
    endpoint, responses = client.completions if completions else client.chat.completions, []
    body = {"prompt": dialogue[0]["content"]} if completions else {"messages": dialogue}
    body |= {"model": args.model, "max_tokens": args.max_new_tokens, "temperature": temperature}
    body |= {"top_p": top_p} if top_p < 1 else {}
    body |= {"stop": list(unescape(args.stop))} if args.stop else {}
    body |= {"logprobs": 1 if completions else True} if logprobs else {}  # the older endpoint takes a number
    async with slots:
        while missing := num_samples - len(responses):
            fields = body | ({"n": missing} if missing > 1 else {})
            sent = {k: v for k, v in fields.items() if (args.model, k) not in count}
            sent |= {} if "max_tokens" in sent else {"max_completion_tokens": args.max_new_tokens}
            try:
                reply = await endpoint.with_raw_response.create(**sent)
                more, tokens = read_reply(reply.http_response.content, count, args.keep_thinking)
            except openai.APIStatusError as e:
                if not leave_out(e, sent, args, count):
                    raise
            except NoResponse:
                if not responses:
                    raise
                break
            else:
                responses += more[:missing]
                count["tokens"] += tokens
    return responses


def leave_out(error, sent, args, count):
    """Whether the server refuses an optional field. No request has it from then on, which is said once."""
    said = f"{error.param}: {words(error.response.text)}"
    for name, sign in OPTIONAL.items():
        if name in sent and error.status_code in (400, 422) and re.search(sign, said):
            if (args.model, name) not in count and not count[args.model, "answered"]:
                count[args.model, name] = 1
                say(f"--model {args.model}: the server is asked without {name} {sent[name]}, which it refuses ({said})")
            return (args.model, name) in count
    return False


class NoResponse(Exception):
    """What a reply holds instead of a response. Another try would not help."""


class Unreadable(httpx2.RequestError):
    """A reply that is no completion. Being a RequestError, it has the request repeated."""


class Client(openai.DefaultAsyncHttpxClient):
    """Every attempt counts for --max_requests and lasts --timeout seconds at most."""

    def __init__(self, args, count):
        super().__init__(follow_redirects=False)
        self._args, self._count = args, count

    async def send(self, request, **kwargs):
        if self._count["requests"] == self._args.max_requests:
            raise openai.OpenAIError(BUDGET_SPENT)  # passed on as it is
        self._count["requests"] += 1
        try:
            async with asyncio.timeout(self._args.timeout):
                response = await super().send(request, **kwargs)
        except TimeoutError as e:
            raise httpx2.ReadTimeout(f"no whole reply within {self._args.timeout:g} s", request=request) from e
        response.encoding = "utf-8"  # whatever the server calls it: zlib is a codec too
        try:
            if response.is_success:
                read_reply(response.content, Counter())
        except ValueError as e:
            raise Unreadable(str(e), request=request) from e
        except NoResponse:
            pass
        return response


def open_client(args, count):
    """An openai.AsyncOpenAI. Raises UserError where --base_url, OPENAI_API_KEY or a proxy's address cannot be used."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its complaint
        raise UserError("OPENAI_API_KEY holds characters that no key has")
    hidden = {}
    try:
        url = urllib.parse.urlsplit(args.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or "@" in url.netloc or url.query:
            raise ValueError("not an address")
        if not f".{url.hostname}".endswith(".api.openai.com"):  # the client would send them to any server
            hidden = {name: os.environ.pop(name) for name in OPENAIS_OWN if name in os.environ}
        options = {"max_retries": args.retries, "timeout": args.timeout, "http_client": Client(args, count)}
        return openai.AsyncOpenAI(base_url=args.base_url, api_key=key or "none", **options)
    except (ValueError, httpx2.InvalidURL) as e:
        raise UserError(
            "--base_url must be http(s)://host/path, such as http://localhost:8000/v1, without user, password or query "
            "(a key belongs in OPENAI_API_KEY); HTTP_PROXY and HTTPS_PROXY, where set, must hold a proxy's address"
        ) from e
    finally:
        os.environ |= hidden


def reason_of(error, args):
    """Why a prompt has no responses: a sentence, a `Refusal` where asking again would not help. Raises UserError where
    no prompt can succeed."""
    if isinstance(error, openai.APIStatusError):
        code = error.status_code
        said = f"HTTP {code} ({words(error.response.text)})"
        if code == 401:
            raise UserError(f"{address(args)}: the key in OPENAI_API_KEY is missing or refused: {said}")
        if code in (402, 404, 405) or code < 400 or error.code == "insufficient_quota":
            said += "; redirects are not followed" * (code < 400)
            raise UserError(f"{address(args)}, --model {args.model}: {said}")
        return said if may_pass(code) else Refusal(said)
    if isinstance(error, NoResponse) or isinstance(error.__cause__, Unreadable):
        return Refusal(error.__cause__ or error)
    if isinstance(error, openai.OpenAIError):
        return words(str(error.__cause__ or error))
    raise error


def may_pass(code):
    """Whether another try may help after this HTTP status, which some servers put into a reply as a string."""
    return re.fullmatch("4(08|09|25|29)|5..", str(code)) is not None


def address(args):
    hint = "" if re.search(r"/v\d", args.base_url) else " (most servers want /v1 at its end)"
    return f"--base_url {args.base_url}{hint}"


def read_reply(content, count, keep_thinking=False):
    """A completion's JSON, chat or text -> (its responses, the number of their tokens); `count` gains what they are.

    Raises NoResponse where another try would not help, ValueError where the reply is no completion.
    """
    responses, why = [], None
    try:
        reply = json.loads(content)
        if (error := reply.get("error")) and not reply.get("choices") and not may_pass(as_dict(error).get("code")):
            raise NoResponse(f"the server replies: {words(content)}")
        usage = reply.get("usage") or {}
        used = usage.get("completion_tokens") if is_number(usage.get("completion_tokens")) else 0
        hidden = as_dict(usage.get("completion_tokens_details")).get("reasoning_tokens")
        for choice in reply["choices"]:
            message = choice["message"] if "message" in choice else {"content": choice["text"]}
            full = message.get("content") or ""
            full = "".join(part.get("text") or "" for part in full) if isinstance(full, list) else full
            full.encode()  # a lone surrogate cannot be written to a file
            thinking = message.get("reasoning_content") or message.get("reasoning")
            text = (full if keep_thinking else without_thinking(full)).strip()
            finish = str(choice.get("finish_reason") or "").lower()
            cut, said = CUT.get(finish), message.get("refusal") or choice.get("error")
            if not text and may_pass(as_dict(said).get("code")):
                raise ValueError("an error after which another try may help")
            if not text and (said or full or thinking or cut):
                why = words(json.dumps(said)) if said else "nothing but thinking" if full or thinking else cut
                count[f"of no text ({why})"] += 1
                continue
            if thinking and keep_thinking:
                text = f"<think>\n{thinking}\n</think>\n\n{text}"
            response = {"text": text, "finished": not cut}
            if text == full.strip() and not thinking and not hidden:
                response |= {"num_tokens": used} if used > 0 and len(reply["choices"]) == 1 else {}
                response |= likelihood(choice.get("logprobs") or {}, full)
            responses.append(response)
            count.update({"responses": 1, "empty": not text})
            count.update([cut] if cut else [] if finish in WHOLE else [f"of finish_reason {words(finish)}"])
        if not reply["choices"] or not all(is_number(r.get("logprob", 0)) for r in responses):
            raise ValueError("no choices, or a log-probability that is no number")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f"the reply is no completion: {words(content)}") from e
    if not responses:
        raise NoResponse(f"no response: {why}")
    return responses, used


def likelihood(logprobs, text):
    """{logprob, num_tokens} of a choice's text, {} where the server gave none. What ends a response counts in neither,
    though some servers report it; of an empty text all counts."""
    old = zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), strict=True)
    tokens = logprobs.get("content") or [{"token": token, "logprob": value} for token, value in old]
    pieces = [bytes(t["bytes"]) if isinstance(t.get("bytes"), list) else t["token"].encode() for t in tokens]
    values, end = [t["logprob"] for t in tokens], text.encode()
    spelled = b"".join(pieces).startswith(end)  # else token strings are no text: "Ġ" for a space, a number, ...
    while len(pieces) > 1 and end:
        last = pieces.pop()
        sign = SPECIAL.fullmatch(last) and not (last and end.endswith(last))
        ends = b"".join(pieces).startswith(end) if spelled else sign
        if not ends:
            break
        values.pop()
    return {"logprob": math.fsum(values), "num_tokens": len(values)} if values else {}


def words(text):
    """What a reply says of an error, or a text as it is: one line, short, without the key."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    value, key = None, os.environ.get("OPENAI_API_KEY", "").strip()
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    for name in ("error", "detail", "message"):
        value = as_dict(value).get(name) or value
    text = value if isinstance(value, str) else text
    text = text.replace(key, "***") if len(key) >= 8 else text  # a placeholder such as EMPTY is no secret
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
