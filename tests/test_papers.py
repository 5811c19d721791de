"""PAPERS.md against the project: what it names exists, and what the project says of the papers is in its lists."""

import ast
import pathlib
import re
import tokenize

import pytest
from conftest import ROOT

PAPERS = ("RESCUE", "PRO", "Tuna")
OTHERS = ("LMentry",)  # another paper whose parts are named
KINDS = {"sec": "Sec.", "eq": "Eq.", "table": "Table", "fig": "Fig.", "app": "App.", "algorithm": "Algorithm"}
KINDS |= {"section": "Sec.", "appendix": "App.", "figure": "Fig.", "equation": "Eq.", "footnote": "Footnote"}
NUMBER = r"(?:\d+(?:\.\d+)*|[A-K]\b)"
REFERENCE = re.compile(
    rf"(?<!\w)(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})s?\.?\s+"
    rf"(?P<numbers>{NUMBER}(?:\s*(?:-|–|and|to)\s*{NUMBER}|,\s*{NUMBER}(?=\s*(?:[,);:|]|and\b|$)))*)",
    re.IGNORECASE,
)
NAME = re.compile(rf"\b({'|'.join(PAPERS + OTHERS)})")
SOURCES = [p for pattern in ("*.py", "*/*.py", "recipes/*.sh") for p in sorted(ROOT.glob(pattern))]
PAGES = [p for pattern in ("*.md", "[!.]*/*.md") for p in sorted(ROOT.glob(pattern))]
TEXTS = [p for p in SOURCES + PAGES if p != pathlib.Path(__file__) and not p.is_relative_to(ROOT / ".venv")]


def page():
    return (ROOT / "PAPERS.md").read_text()


def section(title):
    return re.split(r"\n## ", page().partition(f"\n## {title}\n")[2])[0]


def expand(numbers):
    """ "1-4" -> ["1", "2", "3", "4"]; "5.1, 6 and A" -> ["5.1", "6", "A"]."""
    found = []
    for first, last in re.findall(rf"({NUMBER})(?:\s*(?:-|–|to)\s*({NUMBER}))?", numbers):
        whole = first.isdigit() and last.isdigit()
        found += map(str, range(int(first), int(last) + 1)) if whole else filter(None, (first, last))
    return found


def inventory(paper):
    """The lists under "The paper has" -> {"Sec.": {"1", "5.1"}, ...}."""
    lists = re.findall(r"^- (\w+\.?): (.*)$", section(paper), re.MULTILINE)
    return {kind: set() if numbers == "none" else set(expand(numbers)) for kind, numbers in lists}


def references(text, own=None):
    """Every reference in a text -> (paper or None, kind, number, the words around it).

    The paper is the one named just before it (`PRO, Table 1`), or the one of the reference just before (`Sec. 3.1,
    Table 7`), else the text's own, else the one named last.
    """
    before = None
    for m in REFERENCE.finditer(text):
        named = re.search(rf"({'|'.join(PAPERS + OTHERS)})(?:_\w+)?(?:'s)?[,:]?\s*[(#]?\s*$", text[: m.start()])
        chained = before and re.fullmatch(r"[\s,;(]*(?:and|to)?\s*", text[before[0] : m.start()])
        last = NAME.findall(text[: m.start()])
        paper = named[1] if named else before[1] if chained else own or (last[-1] if last else None)
        before = (m.end(), paper)
        for number in expand(m["numbers"]):
            yield paper, KINDS[m["kind"].lower()], number, " ".join(text[max(0, m.start() - 60) : m.end() + 20].split())


def own_paper(path):
    """rescue.py, tests/test_rescue.py, recipes/rescue_esnli.sh are RESCUE's, and so on; others are nobody's."""
    found = [p for p in PAPERS if re.search(rf"(^|_){p.lower()}(_|$)", path.stem)]
    return found[0] if found else None


def parts(path):
    """A file as (text, own paper): pages by their sections, PAPERS.md's with a paper each, code whole, of tests the
    docstrings and comments."""
    if path.parent.name == "tests" and path.suffix == ".py":
        tokens = tokenize.generate_tokens(path.open().readline)
        said = [t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith('"""')]
        return [("\n".join(said), own_paper(path))]
    if path.suffix != ".md":
        return [(path.read_text(), own_paper(path))]
    if path.name != "PAPERS.md":
        return [(text, None) for text in re.split(r"\n(?=#+ )", path.read_text())]
    return [(section(p), p) for p in PAPERS] + [
        (section(title), None) for title in re.findall(r"\n## (.*)", page())[3:]
    ]


def wrong_references(path):
    have = {paper: inventory(paper) for paper in PAPERS}
    wrong = []
    for text, own in parts(path):
        for paper, kind, number, words in references(text, own):
            if paper is None:
                wrong.append(f"{path.name}: which paper's? ...{words}")
            elif paper in PAPERS and number not in have[paper][kind]:
                wrong.append(f"{path.name}: {paper} has no {kind} {number}: ...{words}")
    return wrong


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_said_of_a_paper_is_in_it(path):
    assert not wrong_references(path)


def test_a_wrong_reference_is_found(tmp_path):
    text = (
        '"""Eq. 3 and Tables 1-2 are there; Sec. 5.1, Fig. 7 and Table 9 are not.\n\nTuna, Table 9; PRO Eq. 12-13."""'
    )
    (tmp_path / "rescue.py").write_text(text)
    wrong = wrong_references(tmp_path / "rescue.py")
    assert [w.split(":")[1] for w in wrong] == [" RESCUE has no Fig. 7", " RESCUE has no Table 9", " PRO has no Eq. 13"]
    (tmp_path / "common.py").write_text("# Eq. 1 of some paper")
    assert wrong_references(tmp_path / "common.py") == ["common.py: which paper's? ...# Eq. 1 of some paper"]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_equation_table_and_figure_has_a_row(paper):
    rows = re.findall(r"^\| (Eq\.|Table|Fig\.|Algorithm) (\w+)", section(paper), re.MULTILINE)
    for kind in ("Eq.", "Table", "Fig.", "Algorithm"):
        assert {number for k, number in rows if k == kind} == inventory(paper)[kind], kind


def defined(path):
    """The names that a module defines: functions, classes, constants."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


def test_every_function_named_exists():
    named = set(re.findall(r"`([\w/]+\.py)(?::(\w+))?", page()))
    assert len(named) > 40
    absent = [f"{file}:{name}" for file, name in sorted(named) if not (ROOT / file).is_file()]
    absent += [f"{f}:{n}" for f, n in sorted(named) if n and (ROOT / f).is_file() and n not in defined(ROOT / f)]
    assert not absent


def test_every_flag_named_exists():
    flags = {flag for code in re.findall(r"`([^`]*)`", page()) for flag in re.findall(r"--(\w+)", code)}
    known = {flag for p in SOURCES for flag in re.findall(r"[\"']--(\w+)[\"']", p.read_text())}
    assert len(flags) > 30 and not flags - known


def test_every_recipe_and_result_named_exists():
    for name, note in re.findall(r"`recipes/(\w+\.sh)`(?: \((not built)\))?", page()):
        assert (ROOT / "recipes" / name).exists() != bool(note), name
    for recipe in [
        p.name for p in ROOT.glob("recipes/*.sh") if not re.search("lib|_common", p.name)
    ]:  # those are sourced
        assert f"`recipes/{recipe}`" in page() and f"`{recipe}`" in (ROOT / "recipes/README.md").read_text(), recipe
    for folder in re.findall(r"`(results/[\w./-]+)`", page()):
        assert (ROOT / folder).exists(), folder


def test_results_name_no_place_of_a_machine():
    for path in ROOT.glob("results/*/*/*.json"):
        assert not re.search(r'["= ]/[^" /]', path.read_text()), path


def keys(tree):
    """The constant keys of the dicts in a tree, and of what is stored under a constant key."""
    for node in ast.walk(tree):
        found = node.keys if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found = [node.slice]
        yield from (k.value for k in found if isinstance(k, ast.Constant) and isinstance(k.value, str))


def logged_names():
    """What training logs and evaluation writes: the names in LOSSES, keys in what is given to write_metrics, in dicts
    called line, figures, metrics or timing, and in functions called means or *_metrics."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("evaluating/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            written = isinstance(node, ast.Call) and ast.unparse(node.func) == "write_metrics"
            if written or isinstance(node, ast.FunctionDef) and re.fullmatch(r"means|(?!write).*_metrics", node.name):
                yield from keys(node)
            elif isinstance(node, (ast.Assign, ast.AugAssign)):
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                if target == "LOSSES":
                    yield from ast.literal_eval(node.value)
                elif re.match(r"(line|figures|metrics|timing)\b", target):
                    yield from keys(node)


def test_every_logged_figure_is_in_the_glossary():
    explained = set(re.findall(r"`([^`]+)`", section("Glossary of logged figures")))
    names = {name for name in logged_names() if re.fullmatch(r"[a-z][a-z_/0-9 ]+", name)}
    assert len(names) > 40 and {"rank_loss", "kendall_tau", "lmentry_score"} <= names
    assert not sorted(names - explained)
