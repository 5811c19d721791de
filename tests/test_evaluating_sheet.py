"""evaluate.py sheet: the page and its keys, and the score of what people said."""

import json
import pathlib
import shutil
import subprocess

import pytest
from conftest import refused, write_jsonl

from evaluating import intervals

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
    # system c is always three places above e, so that nothing can be resampled: 2 * 0.5 ** 4
    assert table["c"]["p, e"] == 0.125 and "p, c" not in table["c"]


def test_people_against_the_ranks_of_each_prompts_own_candidates(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [
        {"id": f"q{i}", "prompt": "p", "candidates": [{"text": f"{r}", "source": "m", "rank": r} for r in ranks]}
        for i, ranks in enumerate(([2, 0, 1], [1, 2, 0], [0, 1, 2], [0, 1]))  # the last one has too few
    ]
    records[0]["candidates"].append({"text": "again", "source": "m", "rank": None})
    write_jsonl(tmp_path / "ranked.jsonl", records)
    sheet = ("evaluate", "sheet", "--output", "s.html")
    assert cli(*sheet, "--within", "--input", "ranked.jsonl").code == 0
    key = json.loads(pathlib.Path("s.html.key.json").read_text())
    assert sorted(key["ids"]) == ["q0", "q1", "q2"] and key["systems"] == ["rank 0", "rank 1", "rank 2"]
    opinions = ([0, 1, 2], [0, 1, 2], [1, 0, 2])  # Spearman 1, 1 and 0.5 with the ranks
    save_results(key, [[o.index(r) for r in opinion] for o, opinion in zip(key["orders"], opinions)])
    assert cli(*sheet, "--score", "r.json").code == 0
    table = json.loads(pathlib.Path("s.html.score.json").read_text())
    assert table["people against rank"] == {"spearman": pytest.approx(2.5 / 3), "prompts": 3}
    refused(cli(*sheet[:2], "--within", "--output", "t.html"), "--input")


@pytest.mark.parametrize(
    "answers, words",
    [
        ([[2]] * 6, "no judgement of 2"),
        (["x"] * 6, "no judgement of 2"),
        ([[0]], "another sheet"),
        ([[]] * 6, "nothing"),
    ],
)
def test_wrong_results_are_refused(cli, two_systems, answers, words):
    key, _ = make_sheet(cli, "ab")
    save_results(key, answers)
    refused(cli("evaluate", "sheet", "--output", "s.html", "--score", "r.json"), words)


def test_paired_bootstrap(cli, two_systems):
    """Against the exact distribution: resampled from -1, 1, 1, 1, 1, a mean is <= 0 with binomial odds."""
    from scipy.stats import binom

    middle, (low, high), p = intervals.paired_bootstrap([-1.0, 1.0, 1.0, 1.0, 1.0], resamples=50000)
    exact = 2 * binom.sf(2, 5, 0.2)  # three or more draws of the -1 (a mean of 0 needs an even number)
    assert intervals.paired_bootstrap([2.0]) == (2.0, (2.0, 2.0), 1.0)
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


DOCUMENT = """
const boxes = {}, pressed = [];
const element = () => ({append() {}, replaceChildren(...children) { this.shown = children; }, click() {}});
const document = {
  getElementById: id => (boxes[id] ??= Object.assign(element(), {textContent: id === "data" ? DATA : ""})),
  createElement: element,
  addEventListener: (kind, listener) => { document.press = listener; },
};
const kept = {}, localStorage = {getItem: k => kept[k] ?? null, setItem: (k, v) => { kept[k] = v; }};
"""
PRESS = """
for (const key of KEYS) document.press({key, preventDefault() {}});
console.log(JSON.stringify({answers, kept: JSON.parse(Object.values(kept)[0]), said: boxes.progress.textContent}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.parametrize(
    "systems, keys, answers, said",
    [  # two: a tie, the right one, other keys, back and the left one after all; three: wrong, back, the best first
        ("ab", ["1", "1", "1", "0", "2", "x", "3", "Backspace", "1"], [[0], [0], [0], ["tie"], [0], []], 5),
        ("abc", ["2", "2", "4", "Backspace", "3", "1", "2", "1", "3", "2"], [[2, 0, 1], [0, 2, 1], [], [], [], []], 2),
    ],
)
def test_the_keys_of_the_page(cli, two_systems, systems, keys, answers, said):
    """The page's own script, with the least of a document around it."""
    _, page = make_sheet(cli, systems)
    data = page.partition('id="data">')[2].partition("</script>")[0]
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    given = f"const DATA = {json.dumps(data)}, KEYS = {json.dumps(keys)};"
    done = subprocess.run(["node", "-e", given + DOCUMENT + script + PRESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["answers"] == got["kept"] == answers and got["said"].endswith(f"judged: {said}")
