"""Every script as a command, every flag read, the floors of the imports, and README's commands."""

import ast
import pathlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, command, make_records, write_jsonl

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "__main__" in p.read_text())
FLOORS = {
    "common": set(),
    "collect_candidates": {"common"},
    "rescue": {"common"},
    "tuna": {"common"},
    "reward_model": {"common"},
    "pro": {"common", "collect_candidates"},
    "evaluate": {"common", "collect_candidates"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_contract(script):
    out = command(sys.executable, f"{script}.py", "--help").stdout
    assert "arXiv" in out or "JSONL" in out
    assert "--help" in out


def test_every_flag_is_read():
    sources = {p: p.read_text() for p in ROOT.glob("*.py")}
    everything = "\n".join(sources.values())
    unread = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            flag = (
                isinstance(node, ast.Call)
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and node.args[0].value
            )
            if (
                isinstance(flag, str)
                and flag.startswith("--")
                and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("add", "add_argument")
            ):
                name = flag[2:]
                if not re.search(rf"args\.{name}\b|[\"']{name}[\"']", everything):
                    unread.append(f"{path.name}: {flag}")
    assert not unread


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports_never_turn_back(path):
    own = {p.stem for p in ROOT.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
        imported |= {n.split(".")[0] for n in names if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert imported & own <= FLOORS[path.stem]


def test_a_method_script_with_common_is_a_working_copy(tiny, tmp_path):
    for name in ("rescue.py", "common.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    data = write_jsonl(tmp_path / "d.jsonl", make_records(4))
    flags = f"--ordering hybrid --data {data} --model {tiny} --output {tmp_path / 'out'}"
    command(sys.executable, tmp_path / "rescue.py", *flags.split())
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_an_error_is_one_line_and_exit_code_2():
    done = command(sys.executable, "rescue.py", "--ordering", "label", "--data", "nowhere.jsonl", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("rescue.py: error: --data nowhere.jsonl is not there")


def readme_commands():
    """Every `python X.py ...` and `torchrun ... X.py ...` in README's shell blocks, continued lines joined."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if re.match(r"(python|torchrun) .*\.py", line):
                yield line


@pytest.mark.parametrize("line", list(readme_commands()))
def test_readme_commands_parse(line, monkeypatch):
    """Each command's script exists and takes these flags (their values too); demo/demo.sh and the other tests run
    them."""
    import importlib

    import common

    words = shlex.split(line)
    script = next(w for w in words if w.endswith(".py"))
    if pathlib.Path(script).parent != pathlib.Path("."):
        assert (ROOT / script).exists()
        return
    monkeypatch.setattr(sys, "argv", words[words.index(script) :])
    module = importlib.import_module(script[:-3])
    parsed = []
    original = common.Parser.parse_args

    def parse_args(self, *args, **kwargs):
        parsed.append(original(self, *args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Parser, "parse_args", parse_args)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert parsed
