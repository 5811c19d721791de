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
from collecting.server import open_client
from common import UserError


def arguments(url=None, model="m", *more):
    parser = argparse.ArgumentParser()
    api_flags(parser.add_argument, 12)
    fast = ["--timeout", "0.8", "--retries", "3"]
    return parser.parse_args(["--model", str(model), *(["--base_url", url] if url else []), *fast, *more])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")


def test_every_fault_once_then_an_answer():
    faults = [429, 500, b"<html>", b'{"choices": []}', b"[1]", "half", "silence", "flood", (503, {"Retry-After": "0"})]
    faults += [
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
        "drip",
    ]
    with Server(lambda prompt, nth, body: faults[int(prompt)] if nth == 1 else None) as server:
        prompts = [str(i) for i in range(len(faults))]
        results = list(asking.complete(arguments(server.url), prompts))
    assert sorted(i for i, _, _ in results) == list(range(len(faults)))
    for i, responses, error in results:
        assert error is None
        assert responses == [{"text": f"echo {i}", "finished": True, "num_tokens": 7}]
    assert set(server.asked.values()) == {2}
    assert server.headers[0]["authorization"] == "Bearer sk-secret-key"


def test_faults_without_end_are_listed_and_harm_no_other_prompt():
    always = {"a": 500, "b": b"garbage", "c": "half", "d": 400, "e": (429, {"Retry-After": "9999"})}
    with Server(lambda prompt, nth, body: always.get(prompt)) as server:
        results = {i: (r, e) for i, r, e in asking.complete(arguments(server.url), list("abcdef"))}
    assert len(results) == 6 and results[5][0][0]["text"] == "echo f"
    assert [results[i][0] for i in range(5)] == [None] * 5
    assert "HTTP 500" in results[0][1] and "no completion" in results[1][1] and "HTTP 400" in results[3][1]
    assert "HTTP 429" in results[4][1]
    assert server.asked == {"a": 4, "b": 4, "c": 4, "d": 1, "e": 1, "f": 1}


def test_retry_after_is_honoured():
    with Server(lambda prompt, nth, body: (429, {"Retry-After": "0.5"}) if nth == 1 else None) as server:
        assert [e for _, _, e in asking.complete(arguments(server.url), ["a"])] == [None]
    assert server.times[1] - server.times[0] >= 0.5


def test_max_requests_counts_repeats_and_leaves_the_rest():
    with Server(lambda prompt, nth, body: 500 if prompt == "a" and nth < 3 else None) as server:
        args = arguments(server.url, "m", "--max_requests", "4", "--concurrency", "1")
        results = list(asking.complete(args, list("abcde")))
    assert [(i, e) for i, r, e in results if r is None] == [(i, "--max_requests is reached") for i in (2, 3, 4)]
    assert sum(server.asked.values()) == 4


@pytest.mark.parametrize(
    "fault, message",
    [
        (401, "OPENAI_API_KEY is missing or refused"),
        (404, "HTTP 404"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}), "redirects are not followed"),
    ],
)
def test_what_no_prompt_survives_stops_at_once(fault, message, capfd):
    with Server(lambda prompt, nth, body: fault) as server, pytest.raises(UserError, match=message):
        list(asking.complete(arguments(server.url), [str(i) for i in range(50)]))
    assert sum(server.asked.values()) <= 24  # of 50; --concurrency 8, and the server may be faster than the client
    gc.collect()  # asyncio complains of errors nobody fetched when their tasks go
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_that_fails_always_is_given_up():
    with Server(lambda prompt, nth, body: 400) as server, pytest.raises(UserError, match="20 prompts in a row failed"):
        list(asking.complete(arguments(server.url), [str(i) for i in range(500)]))
    assert sum(server.asked.values()) < 40
    with pytest.raises(UserError, match="20 prompts in a row"):  # nobody listens on port 9
        args = arguments("http://127.0.0.1:9/v1", "m", "--retries", "0")
        list(asking.complete(args, [str(i) for i in range(50)]))


def test_key_and_address(monkeypatch):
    leak = (400, {}, b'{"error": {"message": "bad key sk-secret-key"}}')
    with Server(lambda prompt, nth, body: leak) as server:
        [(_, _, error)] = asking.complete(arguments(server.url), ["a"])
    assert "bad key ***" in error and "secret" not in error
    for url in ("http://user:sk@host/v1", "https://host/v1?key=sk", "localhost:8000", "file:///etc"):
        with pytest.raises(UserError) as e:
            list(asking.complete(arguments(url), ["a"]))
        assert "sk" not in str(e.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
    with pytest.raises(UserError, match="no key has"):
        list(asking.complete(arguments("http://127.0.0.1:9/v1"), ["a"]))


def test_at_most_concurrency_at_once():
    active, most = set(), []

    def behave(prompt, nth, body):
        active.add(prompt)
        most.append(len(active))
        time.sleep(0.02)
        active.discard(prompt)

    with Server(behave) as server:
        args = arguments(server.url, "m", "--concurrency", "3")
        assert len(list(asking.complete(args, [str(i) for i in range(30)]))) == 30
    assert max(most) == 3


def test_fewer_samples_than_asked_for_are_completed():
    with Server(lambda prompt, nth, body: chat("x", "y") if nth == 1 else None) as server:
        [(_, responses, _)] = asking.complete(arguments(server.url), ["a"], num_samples=4)
    assert [r["text"] for r in responses] == ["x", "y", "echo a", "echo a"]
    assert [b.get("n") for b in server.bodies] == [4, 2, None]


def test_log_probabilities_and_the_newer_name_of_the_limit():
    tokens = {"content": [{"token": "h", "logprob": -0.5}, {"token": "i", "logprob": -1.25}]}
    choice = {"message": {"content": "hi"}, "finish_reason": "length", "logprobs": tokens}
    refused = (400, {}, b'{"error": {"message": "use \'max_completion_tokens\' instead"}}')
    reply = json.dumps({"choices": [choice]}).encode()
    with Server(lambda prompt, nth, body: reply if "max_completion_tokens" in body else refused) as server:
        [(_, [response], _)] = asking.complete(arguments(server.url), ["a"], logprobs=True)
    assert response == {"text": "hi", "finished": False, "logprob": -1.75, "num_tokens": 2}
    assert server.bodies[1]["max_completion_tokens"] == 12 and "max_tokens" not in server.bodies[1]


def test_re_asks_carry_the_dialogue_and_end():
    follow_ups = []

    def follow_up(i, text):
        follow_ups.append(text)
        return None if i == 0 else "again, please"

    with Server(lambda prompt, nth, body: None) as server:
        results = list(asking.complete(arguments(server.url), ["a", "b"], follow_up=follow_up))
    assert sorted(i for i, _, _ in results) == [0, 1]
    assert server.asked == {"a": 1, "b": 3}
    roles = [m["role"] for m in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
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
        leak = (400, {}, json.dumps({"error": {"message": "x" * 80 + " " + key}}).encode())
        with Server(lambda prompt, nth, body: leak) as server:
            [(_, _, error)] = asking.complete(arguments(server.url), ["a"])
        assert "sss" not in error and "***" in error

    @pytest.mark.parametrize("key", ["sk-secret-key", "x", "EMPTY"])
    def test_is_hidden_in_messages_alone(self, monkeypatch, key):
        """A reply is never edited; a message is not either where the key is a placeholder."""
        monkeypatch.setenv("OPENAI_API_KEY", key)
        refusal = (400, {}, b'{"error": {"message": "EMPTY text, next: sk-secret-key"}}')
        with Server(lambda prompt, nth, body: refusal if prompt == "no" else chat(f"an {key}ample")) as server:
            found = {i: (r, e) for i, r, e in asking.complete(arguments(server.url), ["yes", "no"])}
        assert found[0][0][0]["text"] == f"an {key}ample"
        said = "EMPTY text, next: " + ("***" if key == "sk-secret-key" else "sk-secret-key")
        assert found[1][1] == f"HTTP 400 ({said})"

    def test_goes_where_it_belongs(self, monkeypatch):
        """Organisation, project and custom headers are OpenAI's own business: no other server gets them."""
        own = {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1", "OPENAI_CUSTOM_HEADERS": "X-Own: yes"}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with Server(lambda prompt, nth, body: None) as server:
            list(asking.complete(arguments(server.url), ["a"]))
        [headers] = server.headers
        assert not {"openai-organization", "openai-project", "x-own"} & headers.keys()
        assert all(os.environ[name] == value for name, value in own.items())
        client = open_client(arguments("https://eu.api.openai.com/v1"), Counter())
        assert client.default_headers["OpenAI-Project"] == "proj-1" and client.default_headers["X-Own"] == "yes"

    def test_is_not_echoed_where_it_is_no_flag(self, cli):
        for typed in (["--api_key", "sk-typed-key"], ["--api-key=sk-typed-key"]):
            message = refused(cli("collect_candidates", "teacher", "--model", "m", *typed), "***")
            assert "typed" not in message

    def test_a_charset_that_is_none(self, monkeypatch):
        reply = json.dumps({"choices": [{"message": {"content": "hé"}}]}).encode()
        told = (200, {"Content-Type": "application/json; charset=zlib"}, reply)
        with Server(lambda prompt, nth, body: told) as server:
            [(_, responses, error)] = asking.complete(arguments(server.url), ["a"])
        assert error is None and responses[0]["text"].startswith("h")


def replies(*choices, **more):
    return json.dumps({"choices": choices} | more).encode()


def said_by(content, finish="stop", **more):
    return {"message": {"content": content} | more, "finish_reason": finish}


@pytest.mark.parametrize("finish", ["stop", "eos_token", "eos", "end", "STOP", None, "tool_calls"])
def test_a_response_is_whole_unless_it_is_known_to_be_cut(finish, capsys):
    with Server(lambda prompt, nth, body: replies(said_by("hi", finish))) as server:
        [(_, responses, _)] = asking.complete(arguments(server.url), ["a"])
    assert responses == [{"text": "hi", "finished": True}]
    assert ("1 of finish_reason tool_calls" in capsys.readouterr().out) == (finish == "tool_calls")


@pytest.mark.parametrize("finish", ["model_length", "PROHIBITED_CONTENT", "blocklist", "insufficient_system_resource"])
def test_other_servers_words_for_a_cut(finish):
    """Mistral's, Gemini's, DeepSeek's."""
    with Server(lambda prompt, nth, body: replies(said_by("hi", finish))) as server:
        [(_, [response], _)] = asking.complete(arguments(server.url), ["a"])
    assert response == {"text": "hi", "finished": False}


def test_cuts_and_empty_responses_are_counted(capsys):
    found = [said_by("a", "length"), said_by("b", "content_filter"), said_by("c", "error"), said_by(""), said_by(None)]
    with Server(lambda prompt, nth, body: replies(*found)) as server:
        [(_, responses, _)] = asking.complete(arguments(server.url), ["a"], num_samples=5)
    assert [r["finished"] for r in responses] == [False] * 3 + [True] * 2
    out = capsys.readouterr().out
    for counted in ("5 responses", "1 cut at --max_new_tokens", "1 cut by a content filter", "1 cut by an error"):
        assert counted in out
    assert "2 empty" in out  # kept, as `sample` keeps and counts them


@pytest.mark.parametrize(
    "choice, reason",
    [
        (said_by(None, refusal="I cannot."), "no response: I cannot."),
        (said_by("", "content_filter"), "no response: cut by a content filter"),
        (said_by("", "length"), "no response: cut at --max_new_tokens"),
        (said_by(None, "error") | {"error": {"message": "the GPU fell off"}}, "the GPU fell off"),
        (said_by(None, reasoning_content="Let me see"), "nothing but thinking"),
        (said_by("<think>Let me see", "length"), "nothing but thinking"),
    ],
)
def test_an_empty_candidate_is_a_refusal_with_its_reason(choice, reason):
    with Server(lambda prompt, nth, body: replies(choice)) as server:
        [(_, responses, error)] = asking.complete(arguments(server.url), ["a"])
    assert responses is None and isinstance(error, Refusal) and reason in error
    assert server.asked == {"a": 1}  # another try would be paid for, and give the same


def test_a_refused_sample_costs_one_more_request_and_not_the_others():
    both = replies(said_by("x"), said_by(None, refusal="no"))
    with Server(lambda prompt, nth, body: both if nth == 1 else replies(said_by(None, refusal="no"))) as server:
        [(_, responses, error)] = asking.complete(arguments(server.url), ["a"], num_samples=2)
    assert [r["text"] for r in responses] == ["x"] and error is None and server.asked == {"a": 2}


@pytest.mark.parametrize(
    "choice, text, kept",
    [
        (said_by("<think>\nLet me see.\n</think>\n\n4"), "4", "<think>\nLet me see.\n</think>\n\n4"),
        (said_by("Let me see.</think>4"), "4", "Let me see.</think>4"),  # the opening tag was in the prompt
        (said_by("4", reasoning_content="Let me see."), "4", "<think>\nLet me see.\n</think>\n\n4"),
        (said_by("4", reasoning="Let me see."), "4", "<think>\nLet me see.\n</think>\n\n4"),
    ],
)
def test_thinking_is_no_part_of_a_response(choice, text, kept):
    choice |= {"logprobs": {"content": [{"token": "thought and text", "logprob": -9.0}]}}
    reply = replies(choice, usage={"completion_tokens": 9})
    with Server(lambda prompt, nth, body: reply) as server:
        [(_, [response], _)] = asking.complete(arguments(server.url), ["a"])
        [(_, [with_thinking], _)] = asking.complete(arguments(server.url, "m", "--keep_thinking"), ["a"])
    assert response == {"text": text, "finished": True}  # what is known of the thinking's tokens is not said of it
    assert with_thinking["text"] == kept


def test_a_local_models_thinking(tiny, monkeypatch):
    found = {"text": "<think>hm</think> 4", "finished": True, "num_tokens": 5, "logprob": -2.0}
    monkeypatch.setattr(generation, "generate", lambda model, tokenizer, prompts, **more: [[found]] * len(prompts))
    [(_, [response], _)] = asking.complete(arguments(None, tiny), ["a"])
    assert response == {"text": "4", "finished": True}
    [(_, [response], _)] = asking.complete(arguments(None, tiny, "--keep_thinking"), ["a"])
    assert response == found


def test_after_a_first_success_a_refusal_concerns_one_prompt():
    """25 refusals in a row end nothing, while 20 errors of the server do, and 20 refusals before any success."""
    with Server(lambda prompt, nth, body: 403 if prompt != "0" else None) as server:
        args = arguments(server.url, "m", "--concurrency", "1")
        results = list(asking.complete(args, [str(i) for i in range(26)]))
        assert sum(isinstance(error, Refusal) for _, _, error in results) == 25
        with pytest.raises(UserError, match="20 prompts in a row failed; the last: HTTP 403"):
            list(asking.complete(args, [str(i) for i in range(1, 26)]))
        assert len(list(asking.complete(args, [str(i) for i in range(26)], done={0}))) == 25  # answered by a run before
    with Server(lambda prompt, nth, body: 500 if prompt != "0" else None) as server:
        args = arguments(server.url, "m", "--concurrency", "1", "--retries", "0")
        with pytest.raises(UserError, match="20 prompts in a row failed; the last: HTTP 500"):
            list(asking.complete(args, [str(i) for i in range(26)]))


OPENAIS = (
    "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is supported."
)


@pytest.mark.parametrize(
    "field, said",
    [
        ("temperature", OPENAIS),
        ("temperature", "`temperature` must be strictly positive"),
        ("n", "Only one completion choice is allowed"),
        ("n", "'n' : number must be at most 1"),
        ("top_p", "top_p must be 1"),
    ],
)
def test_a_field_that_the_server_refuses_is_left_out(field, said, capsys):
    error = (422 if "strictly" in said else 400, {}, json.dumps({"error": {"message": said}}).encode())
    with Server(lambda prompt, nth, body: error if field in body else None) as server:
        results = list(asking.complete(arguments(server.url), list("abc"), num_samples=2, top_p=0.9))
    assert all(len(responses) == 2 for _, responses, _ in results)
    assert capsys.readouterr().out.count("is asked without") == 1
    assert [set(body) - {"n"} for body in server.bodies[-1:]] == [
        {"messages", "model", "max_tokens", "temperature", "top_p"} - {field}
    ]


def test_top_p_is_not_sent_at_1():
    with Server(lambda prompt, nth, body: None) as server:
        list(asking.complete(arguments(server.url), ["a"]))
    assert server.bodies[0].keys() == {"messages", "model", "max_tokens", "temperature"}


@pytest.mark.parametrize(
    "reply, said, requests",
    [
        ({"error": {"message": "context is full", "code": 400}}, "the server replies: context is full", 1),
        ({"error": "Unexpected endpoint or method. (POST /chat/completions)"}, "Unexpected endpoint or method", 1),
        ({"detail": "Method Not Allowed"}, "no completion: Method Not Allowed", 4),
        ({"error": {"message": "upstream is busy", "code": 502}}, "no completion: upstream is busy", 4),
        ({"choices": [{"message": {}, "error": {"message": "busy", "code": 502}}]}, "no completion: ", 4),
    ],
)
def test_an_error_in_a_good_reply_is_shown(reply, said, requests):
    """It is repeated where another try may help, and never called a KeyError."""
    with Server(lambda prompt, nth, body: json.dumps(reply).encode()) as server:
        [(_, _, error)] = asking.complete(arguments(server.url), ["a"])
    assert said in error and "Error" not in error and server.asked == {"a": requests}


def test_a_forgotten_v1_is_guessed():
    said = r"most servers want /v1.*HTTP 404 \(404 page not found\)"
    missing = (404, {}, b"404 page not found")
    with Server(lambda prompt, nth, body: missing) as server, pytest.raises(UserError, match=said):
        list(asking.complete(arguments(server.url.removesuffix("/v1")), ["a"]))


def test_content_in_parts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "4 "}]
    with Server(lambda prompt, nth, body: replies(said_by([*parts, {"type": "text", "text": "apples"}]))) as server:
        [(_, [response], _)] = asking.complete(arguments(server.url), ["a"])
    assert response["text"] == "4 apples"


def test_a_servers_words_cannot_move_the_cursor():
    with Server(lambda prompt, nth, body: (400, {}, b"no\x1b[2J\nway")) as server:
        [(_, _, error)] = asking.complete(arguments(server.url), ["a"])
    assert error == "HTTP 400 (no [2J way)"


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:99999/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="--base_url must be"):
        list(asking.complete(arguments(url), ["a"]))


def test_a_proxy_that_is_none(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "gopher://proxy")
    with pytest.raises(UserError, match="HTTP_PROXY"):
        list(asking.complete(arguments("http://127.0.0.1:9/v1"), ["a"]))
