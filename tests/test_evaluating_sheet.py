"""evaluate.py sheet: the page, tried in a real browser where there is one, and the score of what people said."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest
from conftest import refused, write_jsonl

from common import UserError
from evaluating import intervals, sheet

NASTY = '</script><script>document.title="broken"</script><img src=x onerror=\'document.title="broken"\'>&amp;'


@pytest.fixture
def two_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [{"id": f"q{i}", "prompt": f"question {i} {NASTY}", "task": "x"} for i in range(6)]
    write_jsonl(tmp_path / "in.jsonl", records)
    for name in "abcde":
        (tmp_path / name).mkdir()
        write_jsonl(
            tmp_path / name / "p.jsonl", [{"id": f"q{i}", "text": f"{name} says {i} {NASTY}"} for i in range(6)]
        )
    return tmp_path


def make_sheet(cli, systems, *more):
    out = cli("evaluate", "sheet", "--systems", *(f"{s}/p.jsonl" for s in systems), "--input", "in.jsonl", "--output",
              "s.html", *more)  # fmt: skip
    assert out.code == 0, out.err
    return json.loads(open("s.html.key.json").read()), open("s.html").read()


def test_the_page_hides_who_is_who_and_shuffles(cli, two_systems):
    key, page = make_sheet(cli, "ab")
    assert key["systems"] == ["a", "b"] and len(set(map(tuple, key["orders"]))) == 2
    assert "systems" not in page and "orders" not in page and "http" not in page.replace("http-equiv", "")
    assert "</script><script>" not in page[page.index('id="data"') : page.index('"use strict"')].replace(
        "</script>\n<script>", ""
    )
    again = ("--systems", "a/p.jsonl", "b/p.jsonl", "--input", "in.jsonl", "--output", "s.html")
    refused(cli("evaluate", "sheet", *again, "--seed", 1), "there already")
    pathlib.Path("s.html").unlink()  # as after a kill between the two files: the page that belongs to the key
    assert cli("evaluate", "sheet", *again).code == 0 and pathlib.Path("s.html").read_text() == page


def save_results(key, answers, name="r.json"):
    with open(name, "w") as f:
        json.dump({"sheet": key["sheet"], "answers": answers}, f)
    return name


def test_score_of_two_systems_by_hand(cli, two_systems):
    key, _ = make_sheet(cli, "ab")

    def vote(system):  # what a judge presses who prefers a system, wherever it stands
        return [
            ["tie"] if system == "tie" else [] if system is None else [o.index("ab".index(system))]
            for o in key["orders"]
        ]

    one = [v[i] for i, v in enumerate([vote(x) for x in ("a", "a", "a", "tie", "b", None)])]
    save_results(key, one)
    assert cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json").code == 0
    table = json.loads((two_systems / "s.html.score.json").read_text())
    assert table["a"]["win rate"] == pytest.approx(3.5 / 5) and table["b"]["win rate"] == pytest.approx(1.5 / 5)
    assert (table["a"]["win"], table["a"]["tie"], table["a"]["lose"]) == pytest.approx((0.6, 0.2, 0.2))
    assert (table["a"]["95% low"], table["a"]["95% high"]) == pytest.approx(intervals.wilson(0.7, 5))
    save_results(key, vote("b"), "r2.json")  # a second judge: prompts count once, with the mean of the two
    cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json", "r2.json")
    table = json.loads((two_systems / "s.html.score.json").read_text())
    assert table["a"]["prompts"] == 6
    assert table["a"]["win rate"] == pytest.approx((0.5 + 0.5 + 0.5 + 0.25 + 0 + 0) / 6)


def test_score_of_five_systems_is_six_minus_place(cli, two_systems):
    key, _ = make_sheet(cli, "abcde")
    best_first = [[o.index(s) for s in (2, 0, 1, 4, 3)] for o in key["orders"]]
    save_results(key, best_first[:4] + [best_first[4][:3], []])
    assert cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json").code == 0
    table = json.loads((two_systems / "s.html.score.json").read_text())
    assert {k: v["score"] for k, v in table.items()} == {"a": 4, "b": 3, "c": 5, "d": 1, "e": 2}
    assert table["a"]["prompts"] == 4


WRONG = [
    ([[2]] * 6, "no judgement of 2"),
    (["x"] * 6, "no judgement of 2"),
    ([[0]], "another sheet"),
    ([[]] * 6, "nothing"),
]


def test_people_against_a_stored_ranking(cli, two_systems):
    """Tuna App. G: one prompt's candidates in people's order; Spearman against their ranks by hand."""
    candidates = [{"text": f"t{k}", "source": "m", "rank": k} for k in (2, 0, 3, 1)]
    records = [{"id": f"q{i}", "prompt": f"p{i}", "candidates": candidates} for i in range(3)]
    records.append({"id": "short", "prompt": "p", "candidates": candidates[:2]})  # another number of them stays out
    records[0]["candidates"] = [{"text": "original", "source": "reference"}, *candidates]  # not ranked, not shown
    write_jsonl(two_systems / "r.jsonl", records)
    flags = ["--within", "--input", "r.jsonl", "--output", "s.html"]
    assert "3 prompts, 4 candidates" in cli("evaluate", "sheet", *flags).out
    key, page = json.loads((two_systems / "s.html.key.json").read_text()), (two_systems / "s.html").read_text()
    assert "original" not in page and "rank" not in page.partition('id="data">')[2].partition("</script>")[0]

    def judge(best_first):  # what is pressed for an order given as ranks
        return [[ranks.index(rank) for rank in best_first] for ranks in key["ranks"]]

    for order, expected in (([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], -1.0), ([1, 0, 3, 2], 0.6)):  # 1 - 6 * 4 / 60
        save_results(key, judge(order))
        assert cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json").code == 0
        [row] = json.loads((two_systems / "s.html.score.json").read_text()).values()
        assert row["spearman"] == pytest.approx(expected) and row["prompts"] == 3
    refused(cli("evaluate", "sheet", *flags, "--systems", "a/p.jsonl", "b/p.jsonl"), "sheet --within needs --input")


def test_p_of_five_systems(cli, two_systems):
    """Table 2's kind of test: a system that people always prefer differs from the last, not from itself."""
    key, _ = make_sheet(cli, "abc")
    save_results(key, [[order.index(s) for s in (0, 1, 2)] for order in key["orders"]])
    cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json")
    assert json.loads((two_systems / "s.html.score.json").read_text())["a"]["p, c"] == 1.0  # one value: no resampling
    save_results(
        key, [[order.index(s) for s in ((0, 1, 2) if i else (1, 0, 2))] for i, order in enumerate(key["orders"])]
    )
    cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json")
    row = json.loads((two_systems / "s.html.score.json").read_text())["a"]
    assert row["p, c"] < 0.01 < row["p, b"] and "p, a" not in row


def test_paired_bootstrap(cli, two_systems):
    """Against the exact distribution: resampled from -1, 1, 1, 1, 1, a mean is <= 0 with binomial odds."""
    from scipy.stats import binom

    middle, (low, high), p = intervals.paired_bootstrap([-1.0, 1.0, 1.0, 1.0, 1.0], resamples=50000)
    exact = 2 * binom.sf(2, 5, 0.2)  # three or more draws of the -1 (a mean of 0 needs an even number)
    assert middle == pytest.approx(0.6) and p == pytest.approx(exact, abs=0.01) and low < middle < high
    for name, values in (("a", [1.0, 2.0, 3.0]), ("b", [0.0, 1.5, 2.0])):
        document = {"name": name, "metrics": {"x": 2.0}}
        (two_systems / name / "v.metrics.json").write_text(json.dumps(document))
        items = {f"q{i}": v for i, v in enumerate(values)}
        (two_systems / name / "v.items.json").write_text(json.dumps({"x": items}))
    out = cli("evaluate", "report", "a", "b", "--paired").out
    assert "| a - b, x | 0.8333 | " in out and out.rstrip().endswith("| 0.0002 | 3 |")
    (two_systems / "b/v.items.json").unlink()
    refused(cli("evaluate", "report", "a", "b", "--paired"), "--paired: a and b have no *.items.json")


@pytest.mark.parametrize("answers, words", WRONG)
def test_wrong_results_are_refused(cli, two_systems, answers, words):
    key, _ = make_sheet(cli, "ab")
    save_results(key, answers)
    refused(cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json"), words)


class Browser:
    """Headless Chromium, driven over its debugging pipe (null-terminated JSON on file descriptors 3 and 4)."""

    def __init__(self, folder):
        command_read, self.command = os.pipe()
        self.reply, reply_write = os.pipe()
        pipes = (command_read, reply_write)
        shell = (
            f'exec chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe \
            --user-data-dir="{folder}/profile" about:blank 3<&{command_read} 4>&{reply_write}'
        )
        with open(folder / "chromium.log", "wb") as log:
            self.process = subprocess.Popen(["bash", "-c", shell], pass_fds=pipes, stdout=log, stderr=log)
        os.close(command_read)
        os.close(reply_write)
        self.number, self.session, self.rest = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.command, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                chunk = os.read(self.reply, 65536)
                assert chunk, "chromium is gone"
                self.rest += chunk
            text, _, self.rest = self.rest.partition(b"\0")
            reply = json.loads(text)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        until(lambda: self.js("document.readyState === 'complete' && !!document.getElementById('keys')"))

    def js(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, *keys):
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.command)
        os.close(self.reply)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.fixture
def browser(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed (apt-get install chromium)")
    browser = Browser(tmp_path)
    yield browser
    browser.close()


def saved(browser, folder):
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.press("s")
    return until(lambda: next(iter(folder.glob("results-*.json")), None))


def test_judging_two_systems_in_a_browser(cli, two_systems, browser):
    key, _ = make_sheet(cli, "ab")
    browser.open(two_systems / "s.html")
    pages = []
    for _ in range(3):
        pages.append(browser.js("[...document.querySelectorAll('#responses pre')].map(x => x.textContent)"))
        browser.press("1")
    assert browser.js("document.title") == "Which response is better?"  # the nasty text ran nowhere
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.getElementById('prompt').textContent").endswith(NASTY)
    for i, (shown, order) in enumerate(zip(pages, key["orders"])):
        assert shown == [f"{'ab'[s]} says {key['ids'][i][1:]} {NASTY}" for s in order]
    browser.press("0", "2", "x", "3")  # a tie, the right one; other keys do nothing
    assert browser.js("document.getElementById('progress').textContent") == "6 of 6; judged: 5"
    browser.press("Backspace", "1")  # back to the fifth: the left one after all
    browser.open(two_systems / "s.html")  # closed and opened again: nothing is lost
    assert browser.js("document.getElementById('progress').textContent") == "6 of 6; judged: 5"
    results = saved(browser, two_systems)
    assert json.loads(results.read_text())["answers"] == [[0], [0], [0], ["tie"], [0], []]
    assert cli("evaluate", "sheet", "--output", "s.html", "--score", results).code == 0
    wins = sum(order[0] == 0 for i, order in enumerate(key["orders"]) if i in (0, 1, 2, 4))
    assert json.loads((two_systems / "s.html.score.json").read_text())["a"]["win rate"] == pytest.approx(
        (wins + 0.5) / 5
    )


def test_ranking_three_systems_in_a_browser(cli, two_systems, browser):
    key, _ = make_sheet(cli, "abc", "--limit", "2")
    browser.open(two_systems / "s.html")
    browser.press("2", "2", "4", "Backspace", "3", "1", "2", "1", "3")
    results = saved(browser, two_systems)
    assert json.loads(results.read_text())["answers"] == [[2, 0, 1], [0, 2]]
    browser.press("2")
    assert browser.js("document.getElementById('progress').textContent") == "2 of 2; judged: 2"


def test_normal_interval():
    low, high = intervals.normal_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 1.959964 / 3**0.5, 2 + 1.959964 / 3**0.5))
    assert intervals.normal_interval([4.0]) == (4.0, 4.0)
    with pytest.raises(UserError):
        sheet.points_of([0, 0, 1], 3, "here")
