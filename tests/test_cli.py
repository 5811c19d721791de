"""Every script as a command, every flag read, the floors of the imports, and README's commands."""

import ast
import graphlib
import importlib
import re
import shlex
import shutil
import sys

import pandas
import pytest
import torch
from architectures import make
from conftest import LABELS, ROOT, command, ranked_records, saved, write_jsonl

import common
from collecting import generation
from recipes.tiny import esnli_rows

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "__main__" in p.read_text())
FLOORS = {  # a script, or a package as a whole: what it may import; inside a package no import goes round
    "common": set(),
    "rescue": {"common"},
    "pro": {"common", "collecting"},  # inside the functions of bootstrapping and of --reward_model
    "tuna": {"common"},
    "reward_model": {"common"},
    "collecting": {"common"},
    "collect_candidates": {"common", "collecting"},
    "evaluating": {"common", "collecting"},
    "evaluate": {"common", "collecting", "evaluating"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_contract(cli, script):
    done = cli(script, "--help")
    assert done.code == 0 and "--help" in done.out and ("arXiv" in done.out or "JSONL" in done.out)


def test_the_tests_named_beside_the_attacks_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests/README.md").read_text()))
    there = {name for p in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", p.read_text())}
    assert len(named) > 40 and not named - there


def test_every_flag_is_read():
    """As args.name or as "name". parse_args only fills in defaults."""
    text = "".join(p.read_text() for p in MODULES)
    flags = set(re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', text))
    reads = re.sub(r"def parse_args\(.*?(?=\n\n\n|\Z)", "", text, flags=re.S)
    assert not [flag for flag in flags if not re.search(rf'\b(args|options)\.{flag}\b|"{flag}"', reads)]


def own_imports(path):
    """-> the project's modules that a file imports, at its top or inside a function; a package's as package.module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {n for n in names if (ROOT / f"{n.replace('.', '/')}.py").exists()}


MODULES = sorted(ROOT.glob("*.py")) + sorted(p for floor in FLOORS for p in (ROOT / floor).glob("*.py"))


def test_imports_never_turn_back():
    """Nor do they go round in a package: CycleError names the round."""
    graph = {}
    for path in MODULES:
        floor, *module = path.relative_to(ROOT).with_suffix("").parts
        imported = own_imports(path)
        assert {name.split(".")[0] for name in imported} - {floor} <= FLOORS[floor], path
        graph[".".join((floor, *module))] = imported
    graphlib.TopologicalSorter(graph).prepare()


def test_copied_scripts_train(tiny, tmp_path):
    """Each beside common.py alone, in a fresh python, one after another."""
    data = write_jsonl(tmp_path / "d.jsonl", ranked_records(4))
    shutil.copy(ROOT / "common.py", tmp_path)
    commands = ["rescue --ordering hybrid", "pro --no_temperature", "tuna --stage contextual", "reward_model"]
    with open(tmp_path / "all.py", "w") as f:
        print("import runpy, sys", file=f)
        for script, *flags in map(str.split, commands):
            copy = shutil.copy(ROOT / f"{script}.py", tmp_path)
            argv = [copy, *flags, "--data", data, "--model", tiny, "--output", tmp_path / script]
            print(f"sys.argv = {[*map(str, argv)]}\nrunpy.run_path(sys.argv[0], run_name='__main__')", file=f)
    command(sys.executable, tmp_path / "all.py", cold=True)
    assert len([*tmp_path.glob("*/model/model.safetensors")]) == 4


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_the_snippet_of_the_readme_runs(kind, tmp_path):
    """Verbatim but for the model. The row is right, also of windows and of eager attention."""
    model = saved(tmp_path / "model", make(kind, vocab_size=400, bos_token_id=0, eos_token_id=1))
    text = (ROOT / "README.md").read_text().partition("## Copying a script\n")[2]
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("demo/model", str(model))
    exec(snippet, names := {})
    assert names["model"].get_input_embeddings().weight.grad.abs().sum() > 0
    padded, _ = common.candidate_logprobs(names["model"], common.pack_padded([names["encoded"]]))
    torch.testing.assert_close(names["logprobs"], padded, atol=1e-3, rtol=1e-4)


def test_an_error_is_one_line_and_exit_code_2(cli, tiny, monkeypatch):
    """Also of a process whose environment gives it no number."""
    for name, value in {"RANK": "abc", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = cli("rescue", "--ordering", "label", "--model", tiny)
    assert done.code == 2 and done.err.startswith("rescue.py, process abc: error: ") and done.err.count("\n") == 1


def readme_commands(page="README.md", section=""):
    """Every `python X.py ...` and `torchrun ... X.py ...` in a page's shell blocks (those of a section, up to the next
    heading), continued lines joined."""
    text = (ROOT / page).read_text()
    if section:
        text = re.split(r"\n#+ ", text.partition(f"# {section}\n")[2])[0]
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\w+", "1.3", line.split("  #")[0].strip())  # the one loop is over beta
            if re.match(r"(python|torchrun) .*\.py", line):
                yield line


def parse(words, monkeypatch):
    """Assert that a command's script exists and takes these flags and their values."""
    script = next(w for w in words if w.endswith(".py"))
    assert (ROOT / script).exists()
    if "/" in script:
        return
    parse_args = common.Parser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "argv", words[words.index(script) :])
        patch.setattr(common.Parser, "parse_args", parse_and_stop)
        importlib.import_module(script[:-3]).main()


@pytest.mark.parametrize("line", [*readme_commands(), *readme_commands("recipes/README.md")])
def test_readme_commands_parse(line, monkeypatch):
    parse(shlex.split(line), monkeypatch)


def test_rescues_commands_in_the_readme_hand_on_their_files(cli, tiny, here, monkeypatch):
    """In order, as printed but for torchrun, the models and the sizes; a random model gets its labels from here."""
    for i, name in enumerate(("train_1", "train_2", "test")):
        pandas.DataFrame(esnli_rows()[4 * i : 4 * i + 4]).to_csv(f"esnli_{name}.csv", index=False)
    (here / "recipes").symlink_to(ROOT / "recipes")  # its prompts
    draw = generation.generate
    give = lambda drawn: [r | {"text": f"So.\n#### {label}"} for r, label in zip(drawn, LABELS)]  # noqa: E731
    monkeypatch.setattr(generation, "generate", lambda *args, **more: [*map(give, draw(*args, **more))])
    small = {" sample ": ["--max_new_tokens", 4], " nli ": ["--max_new_tokens", 4], "rescue.py": ["--model", tiny]}
    for line in readme_commands(section="RESCUE on e-SNLI"):
        words = shlex.split(line[re.search(r"\w+\.py", line).start() :].replace("meta-llama/Llama-2-7b-hf", str(tiny)))
        done = cli(words[0][:-3], *words[1:], *next((flags for key, flags in small.items() if key in line), []))
        assert done.code == 0, (line, done.err)
    assert "| rescue-label |" in done.out and "| rescue-none |" in done.out
