"""Every script as a command, every flag read, the floors of the imports, and README's commands."""

import ast
import csv
import graphlib
import json
import pathlib
import re
import shlex
import shutil
import sys

import pytest
from api_server import Server, chat
from architectures import tiny as tiny_model
from conftest import ROOT, command, make_records, write_jsonl
from test_models import saved

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
def test_help_shows_the_contract(script):
    out = command(sys.executable, f"{script}.py", "--help").stdout
    assert "arXiv" in out or "JSONL" in out
    assert "--help" in out


def test_the_tests_named_beside_the_attacks_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests/README.md").read_text()))
    there = {name for p in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", p.read_text())}
    assert len(named) > 40 and not named - there


def flags_of(node):
    """The names that a module's add("--name", ...) and add_argument("--name", ...) declare."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")).startswith("add"):
            flags = [a.value for a in call.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]
            yield from (flag[2:] for flag in flags)


def reads_of(tree):
    """The names read as args.name, outside parse_args, which only fills in defaults, and by getattr:
    getattr(args, "name"), getattr(args, k) for k in ("name", ...), a tuple that may be a constant of the module."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "parse_args":
            function.body = []
    tuples = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and hasattr(n.targets[0], "id")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if getattr(node.value, "id", getattr(node.value, "attr", "")) in ("args", "options"):
                yield node.attr
        for names in by_name(node):
            names = tuples.get(getattr(names, "id", None), names)
            yield from (x.value for x in getattr(names, "elts", [names]) if isinstance(x, ast.Constant))


def by_name(node):
    """What getattr(args, name) in this node takes its names from."""
    calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "getattr"]
    for call in calls:
        if getattr(call.args[0], "id", "") == "args":
            key = getattr(call.args[1], "id", None)
            yield from (g.iter for g in getattr(node, "generators", []) if getattr(g.target, "id", "") == key)
            yield call.args[1]


def reach(path):
    """The files that a script imports, and those that they import, itself among them."""
    seen, todo = set(), [path]
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            todo += [ROOT / f"{name.replace('.', '/')}.py" for name in own_imports(one)]
    return seen


def unread_flags(sources):
    """{path: text} -> the flags that no module in their script's reach reads: another script may have one so named."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    declared = {path: set(flags_of(tree)) for path, tree in trees.items()}
    read, unread = {path: set(reads_of(tree)) for path, tree in trees.items()}, set()
    for script in (ROOT / f"{name}.py" for name in SCRIPTS):
        files = reach(script)
        mine = [declared[p] for p in files if p.stem != "common" or declared[script]]  # the commands do not train
        unread |= set().union(*mine) - set().union(*(read[p] for p in files))
    return unread


def test_every_flag_is_read():
    assert not unread_flags({p: p.read_text() for p in MODULES})


@pytest.mark.parametrize("flag", ["alpha", "beta", "no_temperature", "activation_checkpointing", "top_p", "template"])
def test_a_flag_whose_reads_are_gone_is_found(flag):
    gone = {p: re.sub(rf'\bargs\.{flag}\b|"{flag}"', "0", p.read_text()) for p in MODULES}
    assert flag in unread_flags(gone)


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_never_turn_back(path):
    floor = path.relative_to(ROOT).with_suffix("").parts[0]
    assert {name.split(".")[0] for name in own_imports(path)} - {floor} <= FLOORS[floor]


@pytest.mark.parametrize("package", [name for name in FLOORS if (ROOT / name).is_dir()])
def test_no_import_goes_round_in_a_package(package):
    graph = {f"{package}.{p.stem}": own_imports(p) for p in (ROOT / package).glob("*.py")}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the round


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
    records = make_records(4)
    for r in records:
        r["candidates"] = [c | {"rank": k, "reward": -float(k)} for k, c in enumerate(r["candidates"])]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    flags += f" --data {data} --model {tiny} --output {tmp_path / 'out'}"
    command(sys.executable, tmp_path / f"{script}.py", *flags.split())
    assert (tmp_path / "out/model/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_the_snippet_of_the_readme_runs(kind, tmp_path):
    """Verbatim but for the model, beside common.py alone. The row is right, also of windows and of eager attention."""
    model = saved(tmp_path / "model", tiny_model(kind, vocab_size=400, bos_token_id=0, eos_token_id=1))
    text = (ROOT / "README.md").read_text().partition("## Copying a script\n")[2]
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("demo/model", str(model))
    snippet += "import common\nassert model.get_input_embeddings().weight.grad.abs().sum() > 0\n"
    snippet += "padded, _ = candidate_logprobs(model, common.pack_padded([encoded]))\n"
    (tmp_path / "snippet.py").write_text(snippet + "torch.testing.assert_close(logprobs, padded, atol=1e-3, rtol=1e-4)")
    shutil.copy(ROOT / "common.py", tmp_path)
    command(sys.executable, tmp_path / "snippet.py")


def test_an_error_is_one_line_and_exit_code_2():
    done = command(
        sys.executable, "rescue.py", "--ordering", "label", "--data", "nowhere.jsonl", check=False, cold=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("rescue.py: error: nowhere.jsonl is not there")


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


@pytest.mark.parametrize("line", [*readme_commands(), *readme_commands(page="recipes/README.md")])
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


def test_readme_rescue_recipe_runs(cli, tiny, tmp_path, monkeypatch):
    """The RESCUE recipe, command by command, as printed but for the model and the sizes; without torchrun."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (ROOT / "demo/nli.jsonl").read_text().splitlines()]
    for name, part in (("train_1", rows[:4]), ("train_2", rows[4:8]), ("test", rows[-3:])):
        with open(f"esnli_{name}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1"])
            writer.writerows(
                [f"{name}-{i}", r["label"], r["premise"], r["hypothesis"], r["explanation"]] for i, r in enumerate(part)
            )
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # its prompts
    small = {"sample": ["--max_new_tokens", "4"], "nli": ["--max_new_tokens", "4"], "rescue.py": ["--model", str(tiny)]}
    ran = []
    for line in readme_commands("RESCUE on e-SNLI"):
        words = [str(tiny) if w == "meta-llama/Llama-2-7b-hf" else w for w in shlex.split(line)]
        words = words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]
        words += next((extra for key, extra in small.items() if key in words[:2]), [])
        result = cli(words[0][:-3], *words[1:])
        assert result.code == 0, (line, result.err)
        if words[1] == "sample":  # of a random model's responses none is well-formed, and there would be no pair
            sampled = pathlib.Path("data/esnli/sampled.jsonl")
            records = [json.loads(x) for x in sampled.read_text().splitlines()]
            for r in records:
                r["candidates"][1]["text"] = "It is so.\n#### contradiction"
            write_jsonl(sampled, records)
        ran.append(words[:2])
    assert ["collect_candidates.py", "rank"] in ran and ["evaluate.py", "report"] in ran and len(ran) >= 10
    assert "| rescue-label |" in result.out and "| rescue-none |" in result.out


def test_readme_pro_and_tuna_recipes_run(cli, tiny, reward_folder, tmp_path, monkeypatch):
    """As above for the section on PRO and Tuna, with files for the hub's data and a server that ranks by length."""

    def longest_first(prompt, nth, body):
        texts = dict(re.findall(r"^Response (\d+):\n(.*)$", prompt, re.M))
        ranking = [*sorted(texts, key=lambda i: -len(texts[i])), str(len(texts))]  # the last one: its own
        scores = "\n".join(f"{i}: {5 - k} {5 - k} {5 - k} = {15 - 3 * k}" for k, i in enumerate(ranking))
        form = "Type: open\nReference: mine\nDuplicates: none\nScores:\n{}\nRanking: {}"
        return chat(form.format(scores, " > ".join(ranking)))

    monkeypatch.chdir(tmp_path)
    hh = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: No.", "rejected": f"\n\nHuman: {i}?\n\nAssistant: Yes {i}."}
        for i in range(4)
    ]
    write_jsonl(tmp_path / "hh.jsonl", hh)
    alpaca = [{"instruction": f"Name {i} things.", "input": "", "output": "One, two."} for i in range(4)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(alpaca))
    more = {"hh --subset": ["--input", *["hh.jsonl"] * 4], "sample": ["--max_new_tokens", "6"]}
    more |= {"pro.py": ["--model", tiny], "--stage sft": ["--model", tiny]}
    with Server(longest_first) as server:
        for line in readme_commands("PRO and Tuna"):
            line = line.replace("OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5", str(reward_folder))
            words = shlex.split(line.replace("https://api.openai.com/v1", server.url))
            words = words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]
            words += next((extra for key, extra in more.items() if key in line), [])
            result = cli(words[0][:-3], *map(str, words[1:]))
            assert result.code == 0, (line, result.err)
    assert sorted(p.parent.name for p in tmp_path.glob("runs/*/model")) == ["pro-full", "tuna-contextual", "tuna-sft"]
