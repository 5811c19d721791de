"""evaluate.py report --claims: kept results held against a paper's words."""

import json
import math
import shutil

import pytest
from conftest import refused

from evaluating import intervals


def keep(folder, name, values, words=None):
    (folder / name).mkdir(parents=True)
    document = {"metrics": {"accuracy": sum(values) / len(values), "prompts": len(values)}}
    (folder / name / "nli.metrics.json").write_text(json.dumps(document))
    items = {"accuracy": {f"q{i}": v for i, v in enumerate(values)}}
    if words:
        items["words"] = {f"q{i}": v for i, v in enumerate(words)}
    (folder / name / "nli.items.json").write_text(json.dumps(items))


@pytest.fixture
def page(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim = {
        "title": "Table 1",
        "says": "label beats SFT.",
        "command": "bash x.sh",
        "folder": "x-cpu",
        "setting": ["60 prompts.", "One epoch."],
        "comparisons": [{"higher": "label", "lower": "none", "figure": "accuracy"}],
    }

    def run(verdicts=(), **more):
        document = {"intro": "Here.", "claims": [claim | more], "conclusions": ["It does."], "reading": ["± is half."]}
        document |= {"verdicts": verdicts} if verdicts else {}
        (tmp_path / "claims.json").write_text(json.dumps(document))
        return cli("evaluate", "report", "--claims", "claims.json", "--output", "README.md")

    return run


def test_a_claim_is_decided_over_items_and_seeds(page, tmp_path):
    assert "Not run at this size yet." in page().out
    results = tmp_path / "x-cpu"
    for seed in range(3):
        keep(results, f"none-seed{seed}", [0.0, 1.0] * 300)
        keep(results, f"label-seed{seed}", [0.0, 1.0, 1.0] * 200)
    out = page().out
    assert "\n\n- 60 prompts.\n- One epoch.\n\n" in out
    assert "| label > none, accuracy | +0.167 | [" in out and "| [+0.167, +0.167] | 600, 3 | **seen** |" in out
    assert (tmp_path / "README.md").read_text().endswith(out)
    swapped = [{"higher": "none", "lower": "label", "figure": "accuracy"}]
    assert "| **not seen: the other way round** |" in page(comparisons=swapped).out
    for seed, values in enumerate(([0.0, 1.0] * 300, [0.0] * 600, [1.0] * 600)):
        keep(results, f"wild-seed{seed}", values)  # over items clear at most by chance, over seeds never
    out = page(comparisons=[{"higher": "label", "lower": "wild", "figure": "accuracy"}]).out
    assert "600, 3 | **too small to tell**, 2 of 3 seeds on that side |" in out and "[-1" in out
    assert "| x > none, accuracy | not run |" in page(comparisons=[swapped[0] | {"higher": "x", "lower": "none"}]).out


def test_figures_of_ours_alone(page, tmp_path):
    for seed, right in enumerate((20, 22, 24)):
        keep(tmp_path / "x-cpu", f"label-seed{seed}", [1.0] * right + [0.0] * (40 - right))
    keep(tmp_path / "x-cpu", "base", [1.0] * 10 + [0.0] * 30)
    out = page(figures=["nli accuracy", "nli prompts"]).out
    assert "|  | nli accuracy | nli prompts |" in out
    assert "| base | 0.25 | 40 |" in out and "| label | 0.55 ±0.124 | 40 ±0 |" in out  # t(2) = 4.303
    out = page(figures=["nli accuracy"], systems=["b*", "ba*"]).out
    assert "| base | 0.25 |" in out and "| label |" not in out and "| label > none, accuracy | not run |" in out


def test_which_seeds_are_compared(page, tmp_path):
    """Those that both have; a system without seeds stands against each."""
    for seed in range(3):
        keep(tmp_path / "x-cpu", f"label-seed{seed}", [1.0] * (30 + seed) + [0.0] * (10 - seed))
    keep(tmp_path / "x-cpu", "none-seed1", [0.0] * 40)
    assert page().out.splitlines()[-1].endswith("|  | 40, 1 | **seen**, in one seed |")
    keep(tmp_path / "x-cpu", "none-seed2", [0.0] * 40)
    assert "| +0.787 | " in page().out and "| 40, 2 | **seen** |" in page().out
    (tmp_path / "x-cpu/none-seed1").rename(tmp_path / "x-cpu/none")
    shutil.rmtree(tmp_path / "x-cpu/none-seed2")
    assert "| +0.775 | " in page().out and "| 40, 3 | **seen** |" in page().out


def test_at_equal_lengths(page, tmp_path):
    """A reward that falls with length alone is no difference where lengths are equal."""
    short, long = [3 + i % 5 for i in range(40)], [12 + i % 7 for i in range(40)]
    for name, words in (("label", short), ("none", long)):
        keep(tmp_path / "x-cpu", name, [-math.log(1 + w) for w in words], words)
    wanted = {"higher": "label", "lower": "none", "figure": "accuracy"}
    out = page(comparisons=[wanted, wanted | {"at_equal": "words"}]).out.splitlines()
    assert out[-2].endswith("| 40, 1 | **seen**, in one seed |") and "accuracy at equal words | " in out[-1]
    middle, (low, high), p = intervals.intercept([1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 7.0, 9.1])
    assert middle == pytest.approx(0.95) and low < 0.95 < high and p < 0.01  # slope 2.03, mean (2.5, 6.025)


def test_verdicts_at_the_head(page, tmp_path):
    """Holm over the lines of one study; p is the larger one of the bootstrap's and of Student's t."""
    assert list(intervals.holm([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    results = tmp_path / "x-cpu"
    for seed in range(3):
        keep(results, f"none-seed{seed}", [0.0, 1.0] * 300)
        keep(results, f"label-seed{seed}", [0.0, 1.0, 1.0] * 200)
        keep(results, f"like-seed{seed}", [1.0, 0.0] * 300)
    line = {"higher": "label", "lower": "none", "figure": "accuracy", "study": "S", "folder": "x-cpu", "paper": "+5"}
    line |= {"claim": "Label is better", "percent": True, "note": "here"}
    pooled = line | {"higher": "label & like", "percent": False}
    wild = line | {"higher": "like"}
    out = page(verdicts=[line, pooled, wild, line | {"higher": "absent"}]).out.splitlines()
    rows = [x for x in out if x.startswith("| S | Label is better")]
    assert rows[0].startswith("| S | Label is better | +16.7 [")
    assert rows[0].endswith("| 0.0008 | +5 | **seen**; here |")  # times four: the line that is not run counts too
    assert "| +0.1 [" in rows[1] and "| **too small to tell** (±8.0); here |" in rows[2]
    assert rows[3].endswith("| not run |  | +5 | **not run** |")
    assert out.index(rows[0]) < out.index("## What a reader may conclude")
    none = line | {"lower": "label"}  # no difference at all, and with so small a bound a smaller one than is asked for
    out = page(verdicts=[none | {"small": 2}, none | {"small": -1}]).out.splitlines()
    rows = [x for x in out if x.startswith("| S | Label is better")]
    assert "| **not there at this size**: below 2 points; here |" in rows[0] and "too small to tell" in rows[1]


COMPARED = {"higher": "label", "lower": "none", "figure": "accuracy"}


@pytest.mark.parametrize(
    "more, words",
    [
        ({"comparisons": [{"higher": "label"}]}, "'lower' and 'figure'"),
        ({"comparisons": [COMPARED | {"hgiher": "x"}]}, "'hgiher'"),
        ({"comparisons": ["label"]}, "claims.json: not a page of claims"),
        ({"comparisons": [COMPARED | {"at_equal": "wrods"}]}, "label: no items of wrods"),
        ({"comparisons": [COMPARED | {"lower": "other"}]}, "label and other have no items in common"),
        ({"folder": 3}, "claims.json: not a page of claims"),
        ({"tabel": "x.json"}, "'tabel'"),
        ({"table": "x.json"}, "x.json"),
        ({"verdicts": [{"study": "S"}]}, "'folder'"),
    ],
)
def test_a_page_with_mistakes(page, tmp_path, more, words):
    """Every one a sentence that names the file or the field."""
    for name in ("none", "label", "other"):
        keep(tmp_path / "x-cpu", name, [0.0, 1.0] * 20)
    (tmp_path / "x-cpu/other/nli.items.json").write_text(json.dumps({"accuracy": {"another": 1.0}}))
    refused(page(**more), words)


def test_refusals(page, cli):
    refused(cli("evaluate", "report"), "report needs NAMES, or --claims FILE")
    page()
    refused(cli("evaluate", "report", "--claims", "claims.json", "--paired"), "--claims is a page of its own")
