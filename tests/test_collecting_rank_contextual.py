"""collecting/rank_asked.py: the replies that are read, and the way through a server."""

import re

import pytest
from api_server import Server, chat
from conftest import RANKABLE, rank

import common
from collecting.rank_asked import contextual_prompt, parse_contextual

OURS = """Type: closed
Reference: Paris.
Duplicates: none
Scores:
0: 3 2 0 = 5
1: 5 5 5 = 15
2: 1 0 1 = 2
3: 5 4 5 = 14
Ranking: 1 > 3 > 0 > 2"""


TABLE_9 = """First, the instruction requires a close-ended response.

Second, here is my response:
###Response 3:
Paris.

Third, there are no duplicate responses.

Fourth, the scores:
Response 0: [5]
Response 1: [15]
Response 2: [2]
Response 3: [14]

rank: [1, 3, 0, 2]"""


ORDER = [1, 3, 0, 2]


def changed(old, new, text=OURS):
    assert old in text
    return text.replace(old, new)


RANK = "rank: [1, 3, 0, 2]"
READ = {  # name -> the reply; its ranking is ORDER
    "ours": OURS,
    "Table 9's": TABLE_9,
    "Table 9's in bold": changed(RANK, f"**{RANK.title()}**", TABLE_9),
    "emphasis": changed("Type:", "**Type:**").replace("Ranking:", "**Ranking:**"),
    "commas": changed("3 2 0 = 5", "3, 2, 0").replace("5 5 5 = 15", "5, 5, 5"),
    "a reference with Type:": changed("Paris.", "Paris.\nType: city"),
    "a numbered reference": changed("Paris.", "1. 20\n2: 0"),
    "a wrong sum": changed("= 15", "= 3"),
    "sums alone": changed("3 2 0 = ", "").replace("5 5 5 = ", ""),
    "named aspects": changed("3 2 0 = 5", "accuracy 3, details 2, clarity 0 (5/15)"),
    "a ranking that contradicts its scores": changed("1 > 3 > 0 > 2", "2 > 0 > 3 > 1"),
    "the ranking on the next line": changed("Ranking: ", "Ranking:\n"),
    "Response before each number": changed("1 > 3 > 0 > 2", "Response 1 > Response 3 > Response 0 > Response 2"),
    # in a ranker's own words
    "a quoted ranking": changed(RANK, f"'{RANK}'", TABLE_9),
    "a numbered last line": changed(RANK, f"5. {RANK}", TABLE_9),
    "the final rank is": changed(RANK, "The final rank is: [1, 3, 0, 2]", TABLE_9),
    "words behind the ranking": changed("0, 2]", "0, 2], so response 1 is best (of 4).", TABLE_9),
    "a line on the ranking behind it": TABLE_9 + "\nThis ranking: by accuracy first.",
    "no commas": changed("[1, 3, 0, 2]", "1 3 0 2", TABLE_9),
    "no scores at all": re.sub(r"Response \d: \[\d+\]\n", "", TABLE_9),
    "no duplicates, in a sentence": changed("none", "There are no duplicate responses."),
    "scores of 5": changed("3 2 0 = 5", "3/5 2/5 0/5").replace("5 5 5 = 15", "5/5, 5/5, 5/5 (15/15)"),
    "slashes alone": changed("3 2 0 = 5", "3/2/0").replace("5 5 5 = 15", "5/5/5"),
    "half points": changed("1 0 1 = 2", "1.5 0 1"),
    "a word behind the number": TABLE_9.replace("Response 0: [5]", "Response 0 score: 5/15"),
}
RANKED = {name: (reply, ORDER) for name, reply in READ.items()} | {  # name -> (the reply, its ranking)
    "Table 9's, a duplicate left out": (changed("0, 2]", "0]", TABLE_9), [1, 3, 0]),
    "a tie goes by the ranking": (changed("5 4 5 = 14", "5 5 5 = 15").replace("1 > 3", "3 > 1"), [3, 1, 0, 2]),
    "a duplicate": (changed("none", "2=0.").replace(" > 2", ""), [1, 3, 0]),
    "one duplicate": (changed("none", "Response 2 is a duplicate of Response 0.").replace(" > 2", ""), [1, 3, 0]),
}


@pytest.mark.parametrize("reply, ranking", RANKED.values(), ids=RANKED)
def test_replies_that_parse(reply, ranking):
    found, scores = parse_contextual(reply, 3)
    assert found == ranking and scores.get(0, 5) == 5


def test_half_points_and_fifths_are_summed():
    assert parse_contextual(READ["half points"], 3)[1][2] == 2.5
    assert parse_contextual(READ["scores of 5"], 3)[1] == {0: 5, 1: 15, 2: 2, 3: 14}
    assert parse_contextual(READ["no scores at all"], 3)[1] == {}


def released_ranking(reply):
    """How the released code reads a reply: every number behind the first `rank:`, or else the first `ranking:`."""
    return [int(k) for k in re.findall(r"\d+", re.split("rank:|ranking:", reply.lower())[1])]


def test_what_the_released_code_reads_ours_reads():
    """Where what it takes is a ranking, each response at most once, ours has the same responses."""
    both = 0
    for name, (reply, _) in RANKED.items():
        if re.search("rank:|ranking:", reply.lower()):
            theirs = released_ranking(reply)
            if len(set(theirs)) == len(theirs) and set(theirs) <= {0, 1, 2, 3}:
                assert set(parse_contextual(reply, 3)[0]) == set(theirs), name
                both += 1
    assert both >= 20


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "no line with the ranking"),
        (OURS[: OURS.index("Ranking")], "no line with the ranking"),  # truncated
        (OURS[:-4], "leaves out"),  # truncated: ends with "> 0"
        (changed("0: 3 2 0 = 5\n", ""), "response 0 has no score"),
        (changed("3 2 0 = 5", "3 2 6"), "response 0 has no score"),
        (changed("0 > 2", "0 > 4"), "not there"),
        (changed("0 > 2", "0 > 1"), "twice"),
        (changed("none", "0=2"), "repeats another"),  # a repetition is ranked all the same
        (changed("none", "1 is like 3"), "repeats another"),
        (changed("[1, 3, 0, 2]", "[1 or 3]", TABLE_9), "not numbers"),
    ],
)
def test_replies_that_do_not_parse(reply, reason):
    with pytest.raises(ValueError, match=reason):
        parse_contextual(reply, 3)


def by_length(prompt):
    """A ranking of what a prompt shows, the longest first, its own last."""
    texts = dict(re.findall(r"^Response (\d+):\n(.*)$", prompt, re.M))
    ranking = [*sorted(texts, key=lambda i: -len(texts[i])), str(len(texts))]
    scores = "\n".join(f"{i}: {min(5, len(texts.get(i, '')))} 1 2" for i in ranking)
    return f"Type: open\nReference: mine\nDuplicates: none\nScores:\n{scores}\nRanking: {' > '.join(ranking)}"


@pytest.fixture
def ranking(tmp_path, monkeypatch):
    """ranking(behave, records, *flags) -> (the records of o.jsonl, the server); behave: {words of a prompt: reply}, or
    a function, as api_server.Server's."""

    def run(behave, records, *flags):
        with Server(behave) as server:
            flags = ("--by", "contextual", "--model", "judge", "--base_url", server.url, *flags)
            return rank(monkeypatch, tmp_path, records, *flags), server

    return run


def test_rank_by_contextual(ranking, tmp_path, capfd):
    good = lambda prompt, nth, body: chat(by_length(prompt))  # noqa: E731
    same = RANKABLE | {"id": "same", "candidates": RANKABLE["candidates"][:3]}
    (one, two), server = ranking(good, [RANKABLE, same])
    ranks = [c["rank"] for c in one["candidates"]]  # the second "bb" is ranked or the first, as the ranker states it
    assert ranks in ([None, 1, None, 2, 0], [None, None, 1, 2, 0]) and one["ranked_by"] == "judge"
    assert one["candidates"][4]["score"] == 7
    assert [c["rank"] for c in two["candidates"]] == [None] * 3  # one different response: nothing to rank
    [prompt] = server.asked.elements()
    assert "name the capital {city}" in prompt and "The original" not in prompt and "and 4 responses to it" in prompt
    out = capfd.readouterr().out
    assert "replies: 1 parsed" in out and "mean words: 0: 1.0, 1: 1.0, 2: 1.0, unranked: 1.4" in out
    for file in tmp_path.glob("o.jsonl*"):
        file.unlink()
    [[record], _] = ranking(good, [RANKABLE], "--rank_original")
    assert [c["rank"] for c in record["candidates"]] in ([0, 2, None, 3, 1], [0, None, 2, 3, 1])


def test_a_template_of_ones_own_can_hold_table_9():
    """Each response by its name, the reference's number, and the prompt as the model met it; or the task's parts."""
    template = "{prompt}\n###Response 0:\n{response_0}\n###Response 3:\n{response_3}\n0-{last}, yours: {reference}"
    record = RANKABLE | {"candidates": RANKABLE["candidates"][1:]}
    prompt = contextual_prompt(template, record, [3, 1, 2, 0], "t")
    assert prompt == f"{RANKABLE['prompt']}\n###Response 0:\ncccc\n###Response 3:\nbb\n0-3, yours: 4"
    with pytest.raises(common.UserError, match="response_3"):  # three responses cannot fill it
        contextual_prompt(template, record, [3, 1, 2], "t")
    template = "I {instruction} N {input} R {response_0}\n---\nI {instruction} R {response_0}"
    assert contextual_prompt(template, record, [3], "t") == "I name the capital {city} R cccc"
    record["input"] = "of {x}"
    assert contextual_prompt(template, record, [3], "t") == "I name the capital {city} N of {x} R cccc"
    assert contextual_prompt("{task}", record, [3], "t") == "name the capital {city}\n\nof {x}"


def test_unparsed_replies_are_kept_and_failures_asked_again(ranking, capfd):
    records = [RANKABLE | {"id": f"q{i}", "instruction": f"task {i}"} for i in range(3)]

    def behave(prompt, nth, body):
        return 500 if "task 1" in prompt else chat("2 is best" if "task 0" in prompt else by_length(prompt))

    (unparsed, done), server = ranking(behave, records, "--retries", 0)  # what is done is a usable file
    out = capfd.readouterr().out
    assert "q1 failed: HTTP 500" in out and "1 parsed, 1 unparsed" in out and "2 of 3 done, 1 missing" in out
    assert done["id"] == "q2" and unparsed["unparsed"] == "2 is best"
    assert {c["rank"] for c in unparsed["candidates"]} == {None}
    assert sorted(server.asked.values()) == [1, 1, 3]
    again = [body["messages"][-1]["content"] for body in server.bodies if len(body["messages"]) > 1]
    assert all("could not be read: there is no line with the ranking" in text for text in again)
    result, server = ranking(lambda prompt, *_: chat(by_length(prompt)), records, "--retries", 0)
    assert sum(server.asked.values()) == 1  # not those that are done
    assert [r["id"] for r in result] == ["q0", "q1", "q2"] and result[1]["candidates"][4]["rank"] == 0
