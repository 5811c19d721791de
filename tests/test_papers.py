"""PAPERS.md against the project: what it names exists, what the scripts say of their papers is in its lists, and every
loss that is logged is explained."""

import importlib
import re

import pytest
from conftest import ROOT

PAPERS = ("RESCUE", "PRO", "Tuna")
KINDS = ("Sec.", "Eq.", "Table", "Fig.", "App.", "Algorithm")
SOURCES = [p for pattern in ("*.py", "*/*.py", "recipes/*.sh") for p in ROOT.glob(pattern)]
PAGE = (ROOT / "PAPERS.md").read_text()


def section(title):
    return re.split(r"\n## ", PAGE.partition(f"\n## {title}\n")[2])[0]


def expand(numbers):
    """ "1-4" -> {"1", "2", "3", "4"}; "5.1, 6, A" -> {"5.1", "6", "A"}; "none" -> {}."""
    found = set()
    for part in numbers.replace("none", "").split(", "):
        first, _, last = part.partition("-")
        found |= {*map(str, range(int(first), int(last) + 1))} if last else {first} - {""}
    return found


def inventory(paper):
    """The lists under "The paper has" -> {"Sec.": {"1", "5.1"}, ...}."""
    lists = re.findall(r"^- (\w+\.?): (.*)$", section(paper), re.MULTILINE)
    return {kind: expand(numbers) for kind, numbers in lists}


def absent_references(text, paper):
    """References to parts that the paper does not have; "Table 2 of Tuna" and "PRO, Sec. 4" are another's."""
    kinds = "|".join(map(re.escape, KINDS))
    found = re.findall(rf"(?<!\w)(?:(RESCUE|PRO|Tuna),? )?({kinds}) ([A-K]\b|\d+(?:\.\d+)*)", text)
    return [(kind, number) for named, kind, number in found if number not in inventory(named or paper)[kind]]


@pytest.mark.parametrize("paper", PAPERS)
def test_what_a_script_says_of_its_paper_is_in_it(paper):
    assert not absent_references((ROOT / f"{paper.lower()}.py").read_text(), paper)
    assert absent_references("(Eq. 3) Sec. 99, Table 1", paper) == [("Sec.", "99")]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_equation_table_and_figure_has_a_row(paper):
    rows = re.findall(r"^\| (Eq\.|Table|Fig\.|Algorithm) (\w+)", section(paper), re.MULTILINE)
    for kind in ("Eq.", "Table", "Fig.", "Algorithm"):
        assert {number for k, number in rows if k == kind} == inventory(paper)[kind], kind


def defined(path):
    """The names that a module defines: functions, classes, constants."""
    return re.findall(r"^(?:def |class )?(\w+)", path.read_text(), re.MULTILINE)


def test_every_function_and_flag_named_exists():
    named = set(re.findall(r"`([\w/]+\.py)(?::(\w+))?", PAGE))
    assert len(named) > 40
    assert not [f"{f}:{n}" for f, n in named if not (ROOT / f).is_file() or n and n not in defined(ROOT / f)]
    flags = {flag for code in re.findall(r"`([^`]*)`", PAGE) for flag in re.findall(r"--(\w+)", code)}
    known = {flag for p in SOURCES for flag in re.findall(r"[\"']--(\w+)[\"']", p.read_text())}
    assert len(flags) > 30 and not flags - known


def test_every_recipe_and_result_named_exists():
    for name, note in re.findall(r"`recipes/(\w+\.sh)`(?: \((not built)\))?", PAGE):
        assert (ROOT / "recipes" / name).exists() != bool(note), name
    recipes = {p.name for p in ROOT.glob("recipes/*.sh") if not re.search("lib|_common", p.name)}  # those are sourced
    listed = (ROOT / "recipes/README.md").read_text()
    assert not [name for name in recipes if f"`recipes/{name}`" not in PAGE or f"`{name}`" not in listed]
    for folder in re.findall(r"`(results/[\w./-]+)`", PAGE):
        assert (ROOT / folder).exists(), folder


def test_every_logged_loss_is_in_the_glossary():
    explained = {*re.findall(r"`([^`]+)`", section("Glossary of logged figures"))}
    for script in ("rescue", "pro", "tuna", "reward_model"):
        assert {*importlib.import_module(script).LOSSES} <= explained


def test_results_name_no_place_of_a_machine():
    for path in ROOT.glob("results/*/*/*.json"):
        assert not re.search(r'["= ]/[^" /]', path.read_text()), path
