"""collecting/teacher.py: a hostile server, secrets, likelihoods, a local teacher."""

import json

import pytest
from api_server import Server
from conftest import nli, read_jsonl, refused, write_jsonl

from collecting.server import read_reply


@pytest.fixture
def ask(cli, tmp_path):
    """ask(records, server, *flags) -> Result: the verb teacher, from in.jsonl into o.jsonl."""

    def run(records, server, *flags):
        files = ["--input", write_jsonl(tmp_path / "in.jsonl", records), "--output", tmp_path / "o.jsonl"]
        return cli("collect_candidates", "teacher", *files, "--model", "m", "--base_url", server.url, *flags)

    return run


def prompts(count):
    return [nli(i, "because #### Neutral") for i in range(count)]


def test_a_hostile_server_loses_and_doubles_nothing(tmp_path, ask):
    def behave(prompt, nth, body):
        return 500 if prompt == "prompt 7" and nth <= 3 else 429 if nth == 1 else None

    with Server(behave) as server:
        result = ask(prompts(12), server, "--retries", 2)
        assert "r7 failed: HTTP 500" in result.out and "11 of 12 done, 1 missing" in result.out
        assert len(read_jsonl(tmp_path / "o.jsonl")) == 11  # a usable file
        before = server.asked.copy()
        ask(prompts(12), server, "--retries", 2)  # the same command does the rest and only that
        assert server.asked - before == {"prompt 7": 1}
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows] == [f"r{i}" for i in range(12)]
    for r in rows:
        assert [(c["source"], c["text"]) for c in r["candidates"][1:]] == [("m", f"echo {r['prompt']}")]


def test_secrets_stay_out_of_its_files(tmp_path, monkeypatch, ask):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(lambda *a: (400, {}, b'{"error": {"message": "sk-very-secret is no good"}}')) as server:
        told = ask(prompts(1), server)
    for text in (told.out, told.err, *(p.read_text() for p in tmp_path.iterdir())):
        assert "very-secret" not in text
    refused(told, "0 of 1 done", "nothing new was done: see the messages above")  # no answer is no success
    assert "r0 failed: HTTP 400 (*** is no good)" in told.out


def test_refused_prompts_are_left_out_once_and_for_all(tmp_path, ask):
    """30 of 40 prompts are refused, each in one of three ways. The others are answered; a second run asks none of the
    30; a run that does not find their list asks them again."""
    ways = [403, (400, {}, b'{"error": {"message": "content management policy", "code": "content_filter"}}')]
    ways += [b'{"choices": [{"message": {"content": null, "refusal": "I cannot."}, "finish_reason": "stop"}]}']
    file, flags = tmp_path / "o.jsonl.refused.jsonl", ["--concurrency", 1]
    with Server(lambda prompt, nth, body: ways[int(prompt[7:]) % 3] if int(prompt[7:]) >= 10 else None) as server:
        result = ask(prompts(40), server, *flags)
        assert result.code == 0 and "10 records in" in result.out and "missing" not in result.out
        assert "r10 and 9 more refused: HTTP 400 (content management policy)" in result.out
        assert "r11 and 9 more refused: no response: I cannot." in result.out and "HTTP 403 (no)" in result.out
        assert "30 refused prompts are left out" in result.out
        assert [r["id"] for r in read_jsonl(tmp_path / "o.jsonl")] == [f"r{i}" for i in range(10)]
        assert {r["id"]: r["reason"] for r in read_jsonl(file)}["r12"] == "HTTP 403 (no)"
        assert set(server.asked.values()) == {1}  # nobody paid twice
        assert ask(prompts(40), server, *flags).code == 0
        assert sum(server.asked.values()) == 40
        file.unlink()
        assert ask(prompts(40), server, *flags).code == 0  # more than 20 in a row: no end
        assert sum(server.asked.values()) == 70


TASK = {"id": "a", "prompt": "Task: x\n"}


def test_likelihoods_are_kept(tmp_path, ask):
    """/completions with log-probabilities: three tokens a response."""
    logprobs = {"tokens": ["a", "b", "c"], "token_logprobs": [-0.5, -0.25, -1.0]}
    choices = [
        {"index": i, "text": t, "logprobs": logprobs, "finish_reason": "stop"} for i, t in enumerate((" one", " two"))
    ]
    reply = json.dumps({"choices": choices, "usage": {"completion_tokens": 6}}).encode()
    record = TASK | {"candidates": [{"text": "t", "source": "human"}]}
    with Server(lambda prompt, nth, body: reply) as server:
        result = ask([record], server, "--num_samples", 2, "--logprobs", "--completions")
    assert result.code == 0, result.err
    [body] = server.bodies
    assert body["prompt"] == "Task: x\n" and body["logprobs"] == 1 and body["n"] == 2 and "messages" not in body
    [record] = read_jsonl(tmp_path / "o.jsonl")
    likelihood = {"logprob": -1.75, "num_tokens": 3, "finished": True, "source": "m", "teacher": "m"}
    assert record["candidates"][1:] == [{"text": "one"} | likelihood, {"text": "two"} | likelihood]


@pytest.mark.parametrize(
    "text, tokens, kept",
    [
        ("one two", ["one", " two"], 2),  # llama-cpp-python leaves EOS out
        ("one two", ["one", " two", "</s>"], 2),  # others report it
        ("one </s", ["one", " </s"], 2),  # the text's own end stays
        ("", ["</s>"], 1),  # an empty response is its EOS
        ("caf\u00e9", ["caf", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"], 3),
        ("one two", ["one", "\u0120two", "<|im_end|>"], 2),  # the vocabulary's strings
        ("one <b>", ["one", "\u0120", "<b>"], 3),
    ],
)
def test_eos_counts_in_no_log_probability(text, tokens, kept):
    values = [-0.5 - i for i in range(len(tokens))]
    old = {"text": text, "finish_reason": "stop", "logprobs": {"tokens": tokens, "token_logprobs": values}}
    content = [{"token": t, "logprob": v} for t, v in zip(tokens, values)]
    new = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}
    for choice in (old, new):
        [response], _ = read_reply(json.dumps({"choices": [choice]}).encode())
        assert (response["num_tokens"], response["logprob"]) == (kept, sum(values[:kept]))


def test_eos_is_found_by_the_bytes_where_token_strings_are_numbers():
    content = [("token_id:7", -1.0, list("h\u00e9".encode())), ("token_id:2", -4.0, list(b"</s>"))]
    content = [{"token": t, "logprob": v, "bytes": b} for t, v, b in content]
    choice = {"message": {"content": "h\u00e9"}, "logprobs": {"content": content}}
    [response], _ = read_reply(json.dumps({"choices": [choice]}).encode())
    assert (response["num_tokens"], response["logprob"]) == (1, -1.0)


def test_a_server_that_ignores_logprobs_is_named(ask):
    with Server(lambda prompt, nth, body: None) as server:
        result = ask([TASK], server, "--logprobs")
    refused(result, server.url, "rank --by logprob")
    assert server.bodies[0]["logprobs"] is True


def test_a_local_teacher_continues_the_prompt(tmp_path, tiny, cli):
    flags = ["--input", write_jsonl(tmp_path / "d.jsonl", [TASK]), "--model", tiny, "--temperature", 0]
    flags += ["--num_samples", 1, "--max_new_tokens", 6, "--output"]
    assert cli("collect_candidates", "teacher", *flags, tmp_path / "t.jsonl", "--completions", "--logprobs").code == 0
    assert cli("collect_candidates", "sample", *flags, tmp_path / "s.jsonl").code == 0
    [one], [other] = (read_jsonl(tmp_path / f"{k}.jsonl")[0]["candidates"] for k in "ts")
    assert one["text"] == other["text"] and one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
