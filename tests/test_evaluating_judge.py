"""evaluating/vicuna.py and judge.py: verdicts, both orders, shares and their items."""

import json
import re

import pytest
from api_server import Server, chat
from conftest import metrics_of, read_jsonl, refused, write_jsonl

from evaluating import judge


def test_verdict():
    texts = ("A is right. [[A]]", "[[C]] both. So: [[C]]", "A is better.", "[[A]] or [[B]]", "[[D]] [A]")
    assert [judge.verdict(text) for text in texts] == ["A", "C", None, None, None]


def test_judge_metrics_by_hand():
    pairs = [
        ("A", "B"),  # system 1 wins in both orders
        ("B", "A"),  # loses in both
        ("A", "A"),  # the first place wins: a tie, flipped
        ("C", "B"),  # a tie, then system 1: a tie, flipped
        ("C", "C"),
        ("A", None),
        ("A", "B"),
        ("B", "B"),  # the second place: a tie, flipped
    ]
    got = judge.judge_metrics(pairs, "agree")
    assert (got["win"], got["lose"], got["tie"], got["unparsed"]) == (2 / 8, 1 / 8, 4 / 8, 1 / 8)
    assert got["flip_rate"] == pytest.approx(3 / 7)
    mean = judge.judge_metrics(pairs, "average")  # system 1 wins 2, 0, 1, 1, 0, 1, 2, 1 of 16 verdicts
    assert (mean["win"], mean["lose"], mean["tie"], mean["unparsed"]) == (8 / 16, 4 / 16, 3 / 16, 1 / 16)
    assert mean["flip_rate"] == got["flip_rate"]


def test_a_win_by_the_mean_of_both_orders():
    """A win and a tie are a win, a tie and a loss a loss, a win and a loss a tie; one order unparsed is no verdict."""
    pairs = [("A", "C"), ("C", "B"), ("C", "A"), ("A", "A"), ("C", "C"), ("B", "A"), ("A", None), ("A", "B")]
    got = judge.judge_metrics(pairs, "mean")
    assert (got["win"], got["tie"], got["lose"], got["unparsed"]) == (3 / 8, 2 / 8, 2 / 8, 1 / 8)


QUESTIONS = [{"question_id": k, "category": "generic", "turns": [f"What {{is}} {k}?"]} for k in range(3)]
QUESTIONS[2]["text"] = QUESTIONS[2].pop("turns")[0]  # as in FastChat's first files


def test_vicuna_and_judge(cli, tiny, here, monkeypatch):
    write_jsonl(here / "q.jsonl", QUESTIONS)
    for name, tokens in (("long", 12), ("short", 3)):
        flags = ["--model", tiny, "--name", name, "--input", "q.jsonl", "--max_new_tokens", tokens]
        assert cli("evaluate", "vicuna", *flags).code == 0
    rows = read_jsonl(here / "runs/eval/long/vicuna.jsonl")
    assert [r["id"] for r in rows] == ["0", "1", "2"] and "What {is} 0?" in rows[0]["prompt"]
    assert rows[0]["question"] == "What {is} 0?" and metrics_of(here, "vicuna", "long")["prompts"] == 3

    answers = ["--answers", "runs/eval/long/vicuna.jsonl", "runs/eval/short/vicuna.jsonl", "--max_new_tokens", 8]
    assert cli("evaluate", "judge", *answers, "--model", tiny, "--name", "noise", "--limit", 2).code == 0
    got = metrics_of(here, "judge", "noise")  # a random model gives no verdicts: counted, and kept for a look
    assert got["unparsed"] == 1 and got["questions"] == 2 and got["win"] + got["lose"] + got["tie"] == 0
    assert all(r["verdict"] is None and "text" in r for r in read_jsonl(here / "runs/eval/noise/judge.jsonl"))

    asked = []

    def longest(args, prompts, done=(), **options):  # prefers the longer answer, and A among equals; fails once
        for i, prompt in enumerate(prompts):
            if i in done:
                continue
            asked.append(prompt)
            if len(asked) == 2:
                yield i, None, "HTTP 500"
                continue
            a = prompt.partition("[A's answer]\n")[2].partition("\n[End of A")[0]
            b = prompt.partition("[B's answer]\n")[2].partition("\n[End of B")[0]
            yield i, [{"text": f"So [[{'A' if len(a) >= len(b) else 'B'}]]"}], None

    monkeypatch.setattr("collecting.asking.complete", longest)
    result = cli("evaluate", "judge", *answers, "--model", "x")
    assert "0/21 failed: HTTP 500" in result.out and "1 missing" in result.out
    assert not (here / "runs/eval/long-vs-short/judge.metrics.json").exists()
    assert cli("evaluate", "judge", *answers, "--model", "x").code == 0
    assert len(asked) == 7  # only the one that failed was asked again
    got = metrics_of(here, "judge", "long-vs-short")
    files = (here / f"runs/eval/{name}/vicuna.jsonl" for name in ("long", "short"))
    lengths = [[len(r["text"]) for r in read_jsonl(file)] for file in files]
    wins = sum(a > b for a, b in zip(*lengths))
    items = json.loads((here / "runs/eval/long-vs-short/judge.items.json").read_text())
    assert sum(items["win"].values()) == wins and {*items} == {"win", "lose"} and len(items["lose"]) == 3
    out = cli("evaluate", "report", "long-vs-short", "noise", "--paired").out
    assert re.search(rf"\| long-vs-short - noise, win \| {min(a > b for a, b in zip(*lengths)):d}.* \| 2 \|", out)
    assert got["win"] == pytest.approx(wins / 3) and got["unparsed"] == 0 and got["mean_words_1"] >= 1
    refused(cli("evaluate", "judge", *answers[:2], "d.jsonl", "--model", "x"), "d.jsonl: cannot be read")


def test_a_judge_that_refuses_some_questions(here, cli):
    """One order of one question is refused: the figures are those of the others, and the second run asks nothing."""
    for name in ("left", "right"):
        rows = [{"id": k, "question": f"question {k}", "text": f"{name} {k}"} for k in "abc"]
        (here / name).mkdir()
        write_jsonl(here / name / "v.jsonl", rows)

    def behave(prompt, nth, body):
        a, b = (prompt.index(f"{name} ") for name in ("left", "right"))
        refusal = (400, {}, b'{"error": {"message": "filtered", "code": "content_filter"}}')
        return refusal if "question b" in prompt and a < b else chat("[[A]]" if a < b else "[[B]]")

    with Server(behave) as server:
        flags = ["--answers", "left/v.jsonl", "right/v.jsonl", "--model", "m", "--base_url", server.url]
        first = cli("evaluate", "judge", *flags)
        assert first.code == 0 and "b/12 refused: HTTP 400 (filtered)" in first.out, first.err
        got = metrics_of(here, "judge", "left-vs-right")
        assert (got["win"], got["questions"], got["refused"]) == (1, 2, 1)
        assert cli("evaluate", "judge", *flags).code == 0 and sum(server.asked.values()) == 6
        assert metrics_of(here, "judge", "left-vs-right") == got
