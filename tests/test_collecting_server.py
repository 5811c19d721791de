"""collecting/asking.py and server.py: a hostile server on loopback, a local model, re-asks."""

import argparse
import gc
import json
import os
import time
from collections import Counter

import pytest
import torch
from api_server import Server, chat
from conftest import refused

from collecting import asking, generation
from collecting.answers import Refusal
from collecting.flags import api_flags
from collecting.server import open_client, read_reply
from common import UserError


def arguments(url=None, model="m", *more):
    parser = argparse.ArgumentParser()
    api_flags(parser.add_argument, 12)
    fast = ["--timeout", "0.8", "--retries", "3"]
    return parser.parse_args(["--model", str(model), *(["--base_url", url] if url else []), *fast, *map(str, more)])


def ask(behave, prompts, *flags, **options):
    """-> ({index: (responses, error)}, the server)"""
    behave = behave if callable(behave) else lambda *_, reply=behave: reply
    with Server(behave) as server:
        found = asking.complete(arguments(server.url, "m", *flags), prompts, **options)
        return {i: (responses, error) for i, responses, error in found}, server


def ask_one(behave, *flags, **options):
    """-> (responses, error, the server)"""
    found, server = ask(behave, ["a"], *flags, **options)
    return *found[0], server


def error_reply(status, message):
    return status, {}, json.dumps({"error": {"message": message}}).encode()


def replies(*choices, **more):
    return json.dumps({"choices": choices} | more).encode()


def said_by(content, finish="stop", **more):
    return {"message": {"content": content} | more, "finish_reason": finish}


NUMBERS = [str(i) for i in range(50)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")


def test_every_fault_once_then_an_answer():
    faults = [429, 500, b"<html>", replies(), b"[1]", "half", "silence", "flood", (503, {"Retry-After": "0.5"})]
    faults += [replies(said_by("\ud800")), replies(said_by(3))]
    prompts = NUMBERS[: len(faults)]
    found, server = ask(lambda prompt, nth, body: faults[int(prompt)] if nth == 1 else None, prompts)
    assert found == {i: ([{"text": f"echo {i}", "finished": True}], None) for i in range(len(faults))}
    assert set(server.asked.values()) == {2}
    assert server.headers[0]["authorization"] == "Bearer sk-secret-key"
    assert server.bodies[0].keys() == {"messages", "model", "max_tokens", "temperature"}  # no top_p of 1
    first, second = (t for t, body in zip(server.times, server.bodies) if body["messages"][0]["content"] == "8")
    assert second - first >= 0.5


def test_faults_without_end_are_listed_and_harm_no_other_prompt():
    always = {"a": 500, "b": b"garbage", "c": "half", "d": 400, "e": (429, {"Retry-After": "9999"}), "f": "silence"}
    found, server = ask(lambda prompt, nth, body: always.get(prompt), list("abcdefg"))
    assert [found[i][0] for i in range(6)] == [None] * 6 and found[6][0][0]["text"] == "echo g"
    for i, words in {0: "HTTP 500", 1: "no completion", 3: "HTTP 400", 4: "HTTP 429", 5: "timed out"}.items():
        assert words in found[i][1]
    assert server.asked == {"a": 4, "b": 4, "c": 4, "d": 1, "e": 1, "f": 4, "g": 1}


def test_max_requests_counts_repeats_and_leaves_the_rest():
    flags = ["--max_requests", 4, "--concurrency", 1]
    found, server = ask(lambda prompt, nth, body: 500 if prompt == "a" and nth < 3 else None, list("abcde"), *flags)
    spent = (None, "--max_requests is reached")
    assert [found[i] == spent for i in range(5)] == [False, False, True, True, True]
    assert sum(server.asked.values()) == 4


@pytest.mark.parametrize(
    "fault, message",
    [
        (401, "OPENAI_API_KEY is refused: HTTP 401"),
        (402, "HTTP 402"),
        ((404, {}, b"404 page not found"), r"/x \(most servers want /v1 at its end\).*HTTP 404 \(404 page not found\)"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}), "HTTP 302"),  # the key goes nowhere else
    ],
)
def test_what_no_prompt_survives_stops_at_once(fault, message, capfd):
    with Server(lambda *_: fault) as server, pytest.raises(UserError, match=message):
        list(asking.complete(arguments(server.url.replace("/v1", "/x")), NUMBERS))
    assert sum(server.asked.values()) <= 24  # of 50; --concurrency 8, and the server may be faster than the client
    gc.collect()  # asyncio complains of errors nobody fetched when their tasks go
    assert "Traceback" not in capfd.readouterr().err


def test_at_most_concurrency_at_once():
    active, most = set(), []

    def behave(prompt, nth, body):
        active.add(prompt)
        most.append(len(active))
        time.sleep(0.02)
        active.discard(prompt)

    assert len(ask(behave, NUMBERS, "--concurrency", 3)[0]) == 50 and max(most) == 3


def test_fewer_samples_than_asked_for_are_completed():
    responses, _, server = ask_one(lambda prompt, nth, body: chat("x", "y") if nth == 1 else None, num_samples=4)
    assert [r["text"] for r in responses] == ["x", "y", "echo a", "echo a"]
    assert [b.get("n") for b in server.bodies] == [4, 2, None]


def test_re_asks_carry_the_dialogue_and_end():
    found, server = ask(None, ["a", "b"], follow_up=lambda i, text: None if i == 0 else "again, please")
    assert sorted(found) == [0, 1] and server.asked == {"a": 1, "b": 3}
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert server.bodies[-1]["messages"][-1]["content"] == "again, please"


def test_local_model_answers_in_the_callers_numbering(tiny):
    args = arguments(None, tiny, "--batch_size", "2")
    prompts = ["a", "a much longer prompt", "bb"]
    results = {i: r for i, r, e in asking.complete(args, prompts, num_samples=2, temperature=1.0)}
    assert sorted(results) == [0, 1, 2] and all(len(r) == 2 for r in results.values())
    alone = {i: r for i, r, e in asking.complete(args, prompts)}
    model, tokenizer = generation.load_generator(tiny, torch.device("cpu"))
    for i, prompt in enumerate(prompts):
        [[want]] = generation.generate(model, tokenizer, [prompt + "\n"], max_new_tokens=12)
        assert alone[i][0]["text"] == want["text"]


class TestTheKey:
    def test_is_hidden_before_the_message_is_cut(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", key := "sk-" + "s" * 165)
        _, error, _ = ask_one(error_reply(400, "x" * 80 + " " + key))
        assert "sss" not in error and "***" in error

    @pytest.mark.parametrize("key", ["sk-secret-key", "x", "EMPTY"])
    def test_is_hidden_in_messages_alone(self, monkeypatch, key):
        """A reply is never edited; a message is not either where the key is a placeholder."""
        monkeypatch.setenv("OPENAI_API_KEY", key)
        refusal = error_reply(400, "EMPTY text, next: sk-secret-key")
        found, _ = ask(lambda prompt, *_: refusal if prompt == "no" else chat(f"an {key}ample"), ["yes", "no"])
        assert found[0][0][0]["text"] == f"an {key}ample"
        said = "EMPTY text, next: " + ("***" if key == "sk-secret-key" else "sk-secret-key")
        assert found[1][1] == f"HTTP 400 ({said})"

    def test_goes_where_it_belongs(self, monkeypatch):
        """Organisation, project and custom headers are OpenAI's own business: no other server gets them."""
        own = {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1", "OPENAI_CUSTOM_HEADERS": "X-Own: yes"}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        [headers] = ask_one(None)[2].headers
        assert not {"openai-organization", "openai-project", "x-own"} & headers.keys()
        assert all(os.environ[name] == value for name, value in own.items())
        client = open_client(arguments("https://eu.api.openai.com/v1"), Counter())
        assert client.default_headers["OpenAI-Project"] == "proj-1" and client.default_headers["X-Own"] == "yes"

    def test_is_not_echoed_where_it_is_no_flag(self, cli):
        typed = cli("collect_candidates", "teacher", "--model", "m", "--api_key", "sk-typed-key")
        assert "typed" not in refused(typed, "***")

    def test_that_is_none(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
        with pytest.raises(UserError, match="OPENAI_API_KEY") as e:
            list(asking.complete(arguments("http://127.0.0.1:9/v1"), ["a"]))
        assert "secret" not in str(e.value)


@pytest.mark.parametrize("url", ["http://u:sk@h/v1", "https://h/v1?key=sk", "h:80", "http://[::1/v1", "http://h:x/v1"])
def test_a_server_that_is_none(url):
    with pytest.raises(UserError, match="--base_url must be") as e:
        list(asking.complete(arguments(url), ["a"]))
    assert "sk" not in str(e.value)


def test_a_proxy_that_is_none(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "gopher://proxy")
    with pytest.raises(UserError, match="HTTP_PROXY"):
        list(asking.complete(arguments("http://127.0.0.1:9/v1"), ["a"]))


def test_a_charset_that_is_none():
    told = {"Content-Type": "application/json; charset=zlib"}
    assert ask_one((200, told, replies(said_by("hé"))))[0][0]["text"] == "hé"


CUTS = {
    "cut at --max_new_tokens": ["length", "model_length"],  # Mistral's
    "cut by a content filter": ["content_filter", "PROHIBITED_CONTENT"],  # Gemini's
    "cut by an error": ["error", "insufficient_system_resource"],  # DeepSeek's
}
WHOLE = {"": ["stop", "eos_token", "eos", "end", "STOP", None], "of finish_reason tool_calls": ["tool_calls"]}


@pytest.mark.parametrize("finish, kind", [(finish, kind) for kind, some in (CUTS | WHOLE).items() for finish in some])
def test_a_response_is_whole_unless_it_is_known_to_be_cut(finish, kind):
    [response], count = read_reply(replies(said_by("hi", finish)))
    assert response == {"text": "hi", "finished": kind not in CUTS}
    assert +count == Counter(["responses", kind] if kind else ["responses"])


def test_empty_and_cut_responses_are_counted(capsys):
    """They are kept, as `sample` keeps and counts them."""
    found = ask_one(replies(said_by("a", "length"), said_by(""), said_by(None)), num_samples=3)[0]
    assert [r["text"] for r in found] == ["a", "", ""]
    assert "m: 1 requests, 3 responses, 2 empty, 1 cut at --max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "choice, reason",
    [
        (said_by(None, refusal="I cannot."), "no response: I cannot."),
        (said_by("", "content_filter"), "no response: cut by a content filter"),
        (said_by(None, "error") | {"error": {"message": "the GPU fell off"}}, "the GPU fell off"),
        (said_by(None, reasoning_content="Let me see"), "nothing but thinking"),
    ],
)
def test_an_empty_candidate_is_a_refusal_with_its_reason(choice, reason):
    responses, error, server = ask_one(replies(choice))
    assert responses is None and isinstance(error, Refusal) and reason in error
    assert server.asked == {"a": 1}  # another try would be paid for, and give the same


def test_a_refused_sample_costs_one_more_request_and_not_the_others():
    no = said_by(None, refusal="no")
    first, then = replies(said_by("x"), no), replies(no)
    responses, error, server = ask_one(lambda prompt, nth, body: first if nth == 1 else then, num_samples=2)
    assert [r["text"] for r in responses] == ["x"] and error is None and server.asked == {"a": 2}


@pytest.mark.parametrize(
    "choice, kept",
    [
        (said_by("<think>\nLet me see.\n</think>\n\n4"), "<think>\nLet me see.\n</think>\n\n4"),
        (said_by("Let me see.</think>4"), "Let me see.</think>4"),  # the opening tag was in the prompt
        (said_by("4", reasoning_content="Let me see."), "<think>\nLet me see.\n</think>\n\n4"),
        (said_by("4", reasoning="Let me see."), "<think>\nLet me see.\n</think>\n\n4"),
        (said_by([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"text": "4 "}]) | {"logprobs": None}, "4"),
    ],
)
def test_thinking_is_no_part_of_a_response(choice, kept):
    tokens = {"content": [{"token": "thought and text", "logprob": -9.0}]}
    [response], _ = read_reply(replies({"logprobs": tokens} | choice))
    assert response == {"text": "4", "finished": True}  # what is known of the thinking's tokens is not said of it
    assert ask_one(replies(choice), "--keep_thinking")[0][0]["text"] == kept


def test_a_local_models_thinking(tiny, monkeypatch):
    found = {"text": "<think>hm</think> 4", "finished": True, "num_tokens": 5, "logprob": -2.0}
    monkeypatch.setattr(generation, "generate", lambda model, tokenizer, prompts, **more: [[found]] * len(prompts))
    [(_, [response], _)] = asking.complete(arguments(None, tiny), ["a"])
    assert response == {"text": "4", "finished": True}
    [(_, [response], _)] = asking.complete(arguments(None, tiny, "--keep_thinking"), ["a"])
    assert response == found


def test_after_a_first_success_a_refusal_concerns_one_prompt():
    """25 refusals in a row end nothing, while 20 errors of the server do, and 20 refusals before any success."""
    prompts, flags = NUMBERS[:26], ["--concurrency", 1, "--retries", 0]
    refuse = lambda prompt, nth, body: 403 if prompt != "0" else None  # noqa: E731
    assert sum(isinstance(error, Refusal) for _, error in ask(refuse, prompts, *flags)[0].values()) == 25
    assert len(ask(refuse, prompts, *flags, done={0})[0]) == 25  # answered by a run before
    with pytest.raises(UserError, match="20 prompts in a row failed; the last: HTTP 403"):
        ask(refuse, prompts[1:], *flags)
    with pytest.raises(UserError, match="20 prompts in a row failed; the last: HTTP 500"):
        ask(lambda prompt, nth, body: 500 if prompt != "0" else None, prompts, *flags)
    with pytest.raises(UserError, match="20 prompts in a row"):  # nobody listens on port 9
        list(asking.complete(arguments("http://127.0.0.1:9/v1", "m", "--retries", 0), NUMBERS))


@pytest.mark.parametrize(
    "field, status, said",
    [
        ("temperature", 400, "'temperature' does not support 0.0 with this model. Only the default (1) is supported."),
        ("temperature", 422, "`temperature` must be strictly positive"),
        ("n", 400, "'n' : number must be at most 1"),
        ("top_p", 400, "top_p must be 1"),
        ("max_tokens", 400, "use 'max_completion_tokens' instead"),
    ],
)
def test_a_field_that_the_server_refuses_is_left_out(field, status, said, capsys):
    error, options = error_reply(status, said), {"num_samples": 2, "top_p": 0.9}
    found, server = ask(lambda prompt, nth, body: error if field in body else None, list("abc"), **options)
    assert all(len(responses) == 2 for responses, _ in found.values())
    assert capsys.readouterr().out.count("is asked without") == 1
    sent = {"messages", "model", "max_tokens", "temperature", "top_p"} - {field}
    sent |= {"max_completion_tokens"} if field == "max_tokens" else set()
    assert server.bodies[-1].keys() - {"n"} == sent


@pytest.mark.parametrize(
    "reply, said, requests",
    [
        ({"error": {"message": "context is full", "code": 400}}, "the server replies: context is full", 1),
        ({"detail": "Method Not Allowed"}, "no completion: Method Not Allowed", 2),
        ({"error": {"message": "upstream is busy", "code": 502}}, "no completion: upstream is busy", 2),
    ],
)
def test_an_error_in_a_good_reply_is_shown(reply, said, requests):
    """It is repeated where another try may help, and never called a KeyError."""
    _, error, server = ask_one(json.dumps(reply).encode(), "--retries", 1)
    assert said in error and "Error" not in error and server.asked == {"a": requests}


def test_a_servers_words_cannot_move_the_cursor():
    assert ask_one((400, {}, b"no\x1b[2J\nway"))[1] == "HTTP 400 (no\ufffd[2J way)"
