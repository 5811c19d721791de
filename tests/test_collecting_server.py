"""collecting/asking.py and server.py: a hostile server on loopback, a local model, re-asks."""

import argparse
import gc
import json
import time

import pytest
import torch
from api_server import Server, chat

from collecting import asking, generation
from collecting.flags import api_flags
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
    assert sum(server.asked.values()) <= 8
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

    def test_is_not_echoed_into_the_output(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
        reply = {"choices": [{"message": {"content": "your key is sk-secret-key"}}]}
        with Server(lambda prompt, nth, body: json.dumps(reply).encode()) as server:
            [(_, [response], _)] = asking.complete(arguments(server.url), ["a"])
        assert response["text"] == "your key is ***"

    def test_a_charset_that_is_none(self, monkeypatch):
        reply = json.dumps({"choices": [{"message": {"content": "hé"}}]}).encode()
        told = (200, {"Content-Type": "application/json; charset=zlib"}, reply)
        with Server(lambda prompt, nth, body: told) as server:
            [(_, responses, error)] = asking.complete(arguments(server.url), ["a"])
        assert error is None and responses[0]["text"].startswith("h")
