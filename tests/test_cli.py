"""Every script as a command, every flag read, the floors of the imports, and README's commands."""

import ast
import csv
import functools
import graphlib
import importlib
import json
import pathlib
import re
import shlex
import shutil
import sys

import pytest
from api_server import Server, chat
from architectures import make
from conftest import ROOT, command, ranked_records, read_jsonl, saved, write_jsonl

import common

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


def reach(path):
    """The files that a script imports, and those that they import, itself among them."""
    seen, todo = set(), [path]
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            todo += [ROOT / f"{name.replace('.', '/')}.py" for name in own_imports(one)]
    return seen


def unread_flags(texts):
    """{path: text} -> the flags that no module in their script's reach reads, as args.name or by "name". parse_args
    only fills in defaults."""
    unread = set()
    for script in (ROOT / f"{name}.py" for name in SCRIPTS):
        files = [p for p in reach(script) if p.stem != "common" or "add_training_flags" in texts[script]]
        flags = {flag for p in files for flag in re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', texts[p])}
        reads = "".join(re.sub(r"def parse_args\(.*?(?=\n\n\n|\Z)", "", texts[p], flags=re.S) for p in reach(script))
        unread |= {flag for flag in flags if not re.search(rf'\b(args|options)\.{flag}\b|"{flag}"', reads)}
    return unread


def test_every_flag_is_read():
    texts = {p: p.read_text() for p in MODULES}
    assert not unread_flags(texts)
    for flag in ("alpha", "no_temperature", "activation_checkpointing", "top_p"):  # and it would be found
        gone = {p: re.sub(rf'\bargs\.{flag}\b|"{flag}"', "0", text) for p, text in texts.items()}
        assert unread_flags(gone) == {flag}


@functools.cache
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


@pytest.mark.parametrize(
    "script, flags",
    [
        ("rescue", "--ordering hybrid"),
        ("pro", "--no_temperature"),
        ("pro", "--no_temperature --bootstrap_splits 1"),
        ("tuna", "--stage contextual"),
        ("reward_model", ""),
    ],
)
def test_a_copied_script_trains(tiny, reward_folder, tmp_path, script, flags):
    """Beside common.py alone; PRO's bootstrapping also has collecting/."""
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    if "bootstrap" in flags:
        shutil.copytree(ROOT / "collecting", tmp_path / "collecting")
        flags += f" --reward_model {reward_folder} --max_new_tokens 12"
    data = write_jsonl(tmp_path / "d.jsonl", ranked_records(4))
    flags += f" --data {data} --model {tiny} --output {tmp_path / 'out'}"
    command(sys.executable, tmp_path / f"{script}.py", *flags.split())
    assert (tmp_path / "out/model/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_the_snippet_of_the_readme_runs(kind, tmp_path):
    """Verbatim but for the model, beside common.py alone. The row is right, also of windows and of eager attention."""
    model = saved(tmp_path / "model", make(kind, vocab_size=400, bos_token_id=0, eos_token_id=1))
    text = (ROOT / "README.md").read_text().partition("## Copying a script\n")[2]
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("demo/model", str(model))
    snippet += "import common\nassert model.get_input_embeddings().weight.grad.abs().sum() > 0\n"
    snippet += "padded, _ = candidate_logprobs(model, common.pack_padded([encoded]))\n"
    (tmp_path / "snippet.py").write_text(snippet + "torch.testing.assert_close(logprobs, padded, atol=1e-3, rtol=1e-4)")
    shutil.copy(ROOT / "common.py", tmp_path)
    command(sys.executable, tmp_path / "snippet.py")


def test_an_error_is_one_line_and_exit_code_2(monkeypatch):
    """In a fresh python, not warm.py's, which the environment calls a process among others, of no number."""
    for name, value in {"RANK": "abc", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = command(sys.executable, "rescue.py", "--ordering", "label", check=False, cold=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("rescue.py, process abc: error: ")


def readme_commands(section="", page="README.md"):
    """Every `python X.py ...` and `torchrun ... X.py ...` in a page's shell blocks (from a heading on, up to the next
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


@pytest.mark.parametrize("line", [*readme_commands(), *readme_commands(page="recipes/README.md")])
def test_readme_commands_parse(line, monkeypatch):
    parse(shlex.split(line), monkeypatch)


def run_readme(cli, section, small, replaced, after=lambda words: None):
    """Run a section's commands in order, without torchrun. small: {words of a command: flags to add}; after(words) is
    called behind each -> the last Result, and what was run."""
    ran = []
    for line in readme_commands(section):
        for name, stand_in in replaced.items():
            line = line.replace(name, str(stand_in))
        words = shlex.split(line)
        words = words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]
        words += next((extra for key, extra in small.items() if key in line), [])
        result = cli(words[0][:-3], *words[1:])
        assert result.code == 0, (line, result.err)
        after(words)
        ran.append(words[:2])
    return result, ran


def test_readme_rescue_recipe_runs(cli, tiny, here):
    """The RESCUE recipe, command by command, as printed but for the model and the sizes; without torchrun."""
    rows = [json.loads(line) for line in (ROOT / "demo/nli.jsonl").read_text().splitlines()]
    for name, part in (("train_1", rows[:4]), ("train_2", rows[4:8]), ("test", rows[-3:])):
        with open(f"esnli_{name}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1"])
            writer.writerows(
                [f"{name}-{i}", r["label"], r["premise"], r["hypothesis"], r["explanation"]] for i, r in enumerate(part)
            )
    (here / "recipes").symlink_to(ROOT / "recipes")  # its prompts

    def well_formed(words):
        if words[1] == "sample":  # of a random model's responses none is well-formed, and there would be no pair
            records = read_jsonl("data/esnli/sampled.jsonl")
            for r in records:
                r["candidates"][1]["text"] = "It is so.\n#### contradiction"
            write_jsonl(pathlib.Path("data/esnli/sampled.jsonl"), records)

    few = ["--max_new_tokens", 4]
    small = {" sample ": few, " nli ": few, "rescue.py": ["--model", tiny]}
    result, ran = run_readme(cli, "RESCUE on e-SNLI", small, {"meta-llama/Llama-2-7b-hf": tiny}, well_formed)
    assert ["collect_candidates.py", "rank"] in ran and ["evaluate.py", "report"] in ran and len(ran) >= 10
    assert "| rescue-label |" in result.out and "| rescue-none |" in result.out


def test_readme_pro_and_tuna_recipes_run(cli, tiny, reward_folder, here):
    """As above for the section on PRO and Tuna, with files for the hub's data and a server that ranks by length."""

    def longest_first(prompt, nth, body):
        texts = dict(re.findall(r"^Response (\d+):\n(.*)$", prompt, re.M))
        ranking = [*sorted(texts, key=lambda i: -len(texts[i])), str(len(texts))]  # the last one: its own
        scores = "\n".join(f"{i}: {5 - k} {5 - k} {5 - k} = {15 - 3 * k}" for k, i in enumerate(ranking))
        form = "Type: open\nReference: mine\nDuplicates: none\nScores:\n{}\nRanking: {}"
        return chat(form.format(scores, " > ".join(ranking)))

    start = "\n\nHuman: {}?\n\nAssistant:".format
    hh = [{"chosen": f"{start(i)} No.", "rejected": f"{start(i)} Yes {i}."} for i in range(4)]
    write_jsonl(here / "hh.jsonl", hh)
    alpaca = [{"instruction": f"Name {i} things.", "input": "", "output": "One, two."} for i in range(4)]
    (here / "alpaca_data.json").write_text(json.dumps(alpaca))
    more = {"hh --subset": ["--input", *["hh.jsonl"] * 4], "sample": ["--max_new_tokens", "6"]}
    more |= {"pro.py": ["--model", tiny], "--stage sft": ["--model", tiny]}
    with Server(longest_first) as server:
        replaced = {"https://api.openai.com/v1": server.url}
        replaced["OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5"] = reward_folder
        run_readme(cli, "PRO and Tuna", more, replaced)
    assert sorted(p.parent.name for p in here.glob("runs/*/model")) == ["pro-full", "tuna-contextual", "tuna-sft"]
