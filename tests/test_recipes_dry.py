"""recipes/*.sh at the papers' size: DRY=1 prints every command and runs none. Each is parsed by its script's parser.
What it reads must have been written by a command before it, or be named in the recipe's preflight."""

import importlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import collect_candidates
import common
import evaluate
from collecting.flags import run_verb
from recipes import helper

METHODS = ("rescue", "pro", "tuna", "reward_model")
VERBS = {"collect_candidates": collect_candidates.VERBS, "evaluate": evaluate.VERBS}
SHELL = {"head", "tail", "cat", "grep", "sed", "cp"}
RECIPES = [  # in the order in which a paper's recipes are run, with what a user sets
    ("rescue_esnli", {}),
    ("rescue_sweeps", {}),
    ("rescue_multidoc", {}),
    ("pro_hh", {"JUDGE": "gpt-4"}),
    ("pro_ablations", {}),
    ("pro_rankings", {"CURIE": "babbage-002"}),
    ("tuna_prm", {}),
    ("tuna", {"DAVINCI": "davinci.json"}),
    ("tuna_sweeps", {"DAVINCI": "davinci.json"}),
    ("tuna_multidoc", {}),
    ("ultrafeedback", {}),
]
NO_PAPERS = {"tuna_multidoc", "ultrafeedback"}
DESIGNS = [name for name, _ in RECIPES if name.startswith(("rescue", "pro"))] + ["tuna_multidoc"]  # results/DESIGNS.md
SERVED = {"gpt-3.5-turbo", "gpt-4", "babbage-002", "openbmb/UltraFeedback"}  # names at a server or the hub


def dry(name, out, **env):
    """-> the commands that a recipe would run, as lists of words, and (rc, all that it printed)."""
    env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | {"OUT": out, "DRY": "1"} | env
    done = subprocess.run(["bash", ROOT / f"recipes/{name}.sh"], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert all(line.startswith("+ ") for line in lines), [x for x in lines if not x.startswith("+ ")]
    return [shlex.split(line[2:]) for line in lines]


def parse(words, monkeypatch):
    """A command's words -> (what runs: rescue, sample, hh, need, head, ..., its arguments parsed by its own parser)."""
    if words[0] == "torchrun":
        assert words[1] == "--nproc_per_node" and int(words[2]) > 1
        words = words[3:]
    elif words[0] == "python":
        words = words[1:]
    else:
        assert words[0] in SHELL | {"rm"}, words
        return words[0], words[1:]
    script = pathlib.Path(words[0]).stem
    monkeypatch.setattr(sys, "argv", words)
    if script in METHODS:
        return script, importlib.import_module(script).parse_args()
    if script == "records":
        return script, words[2:]
    if script == "helper":
        args = helper.parse_args()
        return args.verb, args
    got = []
    run_verb({verb: (flags, got.append) for verb, (flags, _) in VERBS[script].items()}, "")
    return got[0].verb, got[0]


def strings(value):
    """The strings of a value: None, a string, a path, or a list."""
    values = value if isinstance(value, list) else [value]
    return [str(x) for x in values if x is not None]


READ = "data eval_data model reward_model label_model encoder input references answers systems names paper prompt_file"
READ = (READ + " superni_dir lmentry_dir figures kept run").split()


class Files:
    """What a recipe's commands have written, and what its preflight names."""

    def __init__(self):
        self.made, self.needed, self.gone = set(), set(), set()

    def check(self, path, words):
        if path in self.made or path in self.needed or path in SERVED:
            return
        assert path not in self.gone, f"{path} was deleted before: {shlex.join(words)[:300]}"
        folder = any(path == os.path.dirname(made) for made in self.made)  # a folder that something was written to
        assert folder or (ROOT / path).exists(), f"nothing makes {path}: {shlex.join(words)[:300]}"

    def follow(self, words, monkeypatch):
        words, written = (words[:-2], words[-1:]) if words[-2] == ">" else (words, [])
        kind, args = parse(words, monkeypatch)
        if kind == "need":
            assert not args.absent, args.absent
            self.needed |= {*args.models, *args.files, *(f.removesuffix("/config.json") for f in args.files)}
        elif kind == "rm":
            gone = {x for x in args if x != "-rf"}
            self.made, self.gone = self.made - gone, self.gone | gone
        elif kind == "cp":
            self.check(args[1], words)
            self.made.add(args[2])
        elif kind in SHELL or kind == "records":
            for path in args:
                if path in self.needed or os.path.isabs(path):
                    self.check(path, words)
        else:
            self.read(args, words)
            self.write(kind, args)
        self.made.update(written)

    def read(self, args, words):
        for name in READ:
            if name == "kept" and hasattr(args, "figures"):  # that is where `keep` writes
                continue
            if getattr(args, "by", None) and {"reward": "reward_model", "similarity": "encoder"}.get(args.by) != name:
                if name in ("reward_model", "encoder"):  # a default that this ranker does not read
                    continue
            value = getattr(args, name, None)
            for path in strings(value) if not callable(value) else ():
                self.check(path, words)

    def write(self, kind, args):
        if kind in METHODS:
            self.gone -= {f"{args.output}/model", f"{args.output}/best"}
            self.made |= {args.output, f"{args.output}/model", f"{args.output}/args.json"}
            self.made |= {f"{args.output}/best"} if getattr(args, "eval_data", None) else set()
        elif kind == "keep":
            self.made.add(str(args.kept))
        else:
            self.made |= {args.output, f"{args.output}.lengths.json"}
            if kind == "prepare" and args.validation:
                self.made.add(os.path.join(os.path.dirname(args.output), "validation.jsonl"))


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("dry") / "out")
    found = {name: dry(name, out, SCALE="paper", **env) for name, env in RECIPES}
    assert not os.path.exists(out)  # nothing ran, and nothing was written
    return found


def test_every_recipe_is_here():
    scripts = {p.stem for p in ROOT.glob("recipes/*.sh")} - {"lib", "rescue_common", "pro_common", "tuna_common"}
    assert scripts == {name for name, _ in RECIPES}


def follow(commands, monkeypatch):
    papers = {}
    for name, found in commands.items():
        files = papers.setdefault(name.partition("_")[0], Files())
        for words in found:
            files.follow(words, monkeypatch)
    return sum(map(len, commands.values()))


def test_every_command_is_parsed_and_its_inputs_are_made(commands, monkeypatch):
    assert follow(commands, monkeypatch) > 700


def test_the_designs_commands(monkeypatch, tmp_path):
    """SCALE=cpu, as results/DESIGNS.md runs it; the figures that it names."""
    out = str(tmp_path / "out")
    found = {name: dry(name, out, SCALE="cpu", TRAIN_FILES="hh.jsonl", TEST_FILES="hh.jsonl") for name in DESIGNS}
    found |= {"rescue_multidoc unseen": dry("rescue_multidoc", out, SCALE="cpu", UNSEEN="1")}
    assert follow(found, monkeypatch) > 400
    for name, data, system, flags in (
        ("pro_hh", "own5", "rrhf-own5-seed4", {"schedule": "cosine", "warmup": "0.1", "max_train_samples": "320"}),
        ("pro_rankings", "own5", "subset@2-seed0", {"ranking_length": "2", "lr": "5e-5"}),
        ("rescue_esnli", "mixed-label", "label@2000-seed2", {"alpha": "0.1", "lr": "3e-4", "model": "demo/model"}),
        ("rescue_multidoc", "ranked", "label-seed2", {"lr": "1e-4"}),
        ("tuna_multidoc", "shuffled", "shuffled-seed2", {"stage": "contextual", "lr": "5e-5"}),
        ("tuna_multidoc", "ranked-tuna_p-seed0", "tuna-seed0", {"lr": "2e-5"}),
    ):
        [run] = [c for c in of(found, name, "--resume") if flag(c, "output").endswith(f"/{system}")]
        assert flag(run, "data").endswith(f"/{data}.jsonl") and "--bf16" in run, system
        assert {key: flag(run, key) for key in flags} == flags, system
    assert {flag(c, "reward_model") for c in of(found, "pro_hh", "evaluate.py", "hh")} == {"afinn"}
    assert {flag(c, "min_new_tokens") for c in of(found, "rescue_multidoc", "multidoc-qa")} == {"1"}
    assert of(found, "rescue_multidoc unseen", "passages", "56", "65")


@pytest.mark.parametrize(
    "command, error",
    [
        ("python collect_candidates.py prepare --task esnli --input absent.csv", "nothing makes absent.csv"),
        ("python evaluate.py nli --model some/model --input gone.jsonl", "gone.jsonl was deleted before"),
        ("python evaluate.py nli --model some/model --input there.csv --no_such_flag", "--no_such_flag"),
    ],
)
def test_what_is_wrong_is_found(command, error, monkeypatch):
    files = Files()
    files.needed, files.gone = {"some/model", "there.csv"}, {"gone.jsonl"}
    with pytest.raises((AssertionError, common.UserError), match=error):
        files.follow(command.split(), monkeypatch)


def of(commands, name, *words):
    return [c for c in commands[name] if all(word in c for word in words)]


def flag(command, name):
    return command[command.index(f"--{name}") + 1]


def test_the_papers_values(commands):
    """RESCUE on 4 GPUs, the others on 8; sizes, batches, prompts, lengths as printed."""
    for name, found in commands.items():
        gpus = {c[2] for c in found if c[0] == "torchrun"}
        assert gpus == ({"4" if name.startswith("rescue") else "8"} if name not in NO_PAPERS else set()), name
    [drawn] = of(commands, "rescue_esnli", "sample", "--num_samples", "6")
    assert drawn and flag(of(commands, "rescue_esnli", "prepare", "--shuffle")[0], "limit") == "30000"
    [whole] = of(commands, "rescue_esnli", "rank", "--per_source")  # flipped ones have one source, all four
    assert (flag(whole, "per_source"), flag(whole, "min_candidates")) == ("3", "4")
    assert [flag(c, "min_candidates") for c in of(commands, "rescue_esnli", "--min_candidates")] == ["4", "5", "5"]
    assert "22000" in of(commands, "rescue_esnli", "head")[0]  # the teacher is not asked about all 30,000
    for c in of(commands, "rescue_esnli", "nli"):
        assert flag(c, "prompt_file") == "recipes/prompts/nli_three_shots.txt"
    assert {flag(c, "temperature") for c in of(commands, "rescue_esnli", "teacher")} == {"0"}
    batches = {(flag(c, "input")[-7:-6], flag(c, "batch_size")) for c in of(commands, "rescue_multidoc", "multidoc-qa")}
    assert batches == {("5", "8"), ("0", "4")}
    for c in of(commands, "tuna", "--by", "contextual") + of(commands, "tuna_prm", "--by", "contextual"):
        assert flag(c, "prompt_file") == "recipes/prompts/tuna_rank.txt" and flag(c, "max_new_tokens") == "2048"
    assert any("mix-104K.jsonl" in flag(c, "data") for c in of(commands, "tuna", "tuna.py"))
    assert not any("teacher" in word for c in commands["tuna_prm"] for word in c)
    assert of(commands, "tuna_prm", "--by", "prm")[0][0] == "torchrun"


def test_models_go_and_what_is_the_same_is_trained_once(commands):
    trained = {
        n: {flag(c, "output") for c in found if set(c) & {f"{m}.py" for m in METHODS}} for n, found in commands.items()
    }
    for name, runs in trained.items():
        gone = {word.removesuffix("/model") for c in of(commands, name, "rm") for word in c if word.endswith("/model")}
        kept = {pathlib.Path(run).name for run in runs - gone}
        assert kept <= {"alpaca", "tuna_p", "tuna_c", "prm-3B", "prm-7B"} or name in NO_PAPERS, name
    assert len(of(commands, "pro_rankings", "cp")) == 3  # pro-raw, and two of three ways at length 5
    assert len(trained["pro_rankings"]) == 1 + 5 * 3 - 2
    assert [flag(c, "model") for c in of(commands, "pro_hh", "convert")] == [
        "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5",
        "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1",
    ]


TUNA_NEEDS = ["a teacher: DAVINCI=", "alpaca_data.json (tatsu-lab", "natural-instructions (a clone", "8 GPUs"]
TUNA_NEEDS += ["question.jsonl (lm-sys", "prm-3B-39K.jsonl (recipes/tuna_prm.sh", "llama-7b: ", "OPENAI_API_KEY"]


@pytest.mark.parametrize(
    "name, env, said, unsaid",
    [
        ("tuna", {}, TUNA_NEEDS, []),
        ("pro_rankings", {"OPENAI_API_KEY": "k"}, ["text-curie-001 is retired"], ["OPENAI_API_KEY"]),
        ("pro_rankings", {"EXPANSIONS": "alpacas chatgpt"}, ["OPENAI_API_KEY"], ["is retired"]),
        ("tuna", {"SCALE": "cpu"}, ["recipes/tuna_multidoc.sh"], []),
        ("pro_hh", {"SCALE": "135m"}, ["it is paper, cpu or tiny"], []),
    ],
)
def test_the_preflight_says_all_at_once(tmp_path, name, env, said, unsaid):
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "OUT": str(tmp_path), "HF_HUB_OFFLINE": "1"} | env
    done = subprocess.run(["bash", ROOT / f"recipes/{name}.sh"], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not list(tmp_path.rglob("*.jsonl"))
    assert [words for words in said if words not in done.stderr] == []
    assert [words for words in unsaid if words in done.stderr] == []


def test_a_failing_figure_stops_the_recipe(tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    recipe = (
        'NAME=x PAPER_GPUS=1 SCALE=cpu\n. "$(dirname "$0")/lib.sh"\nfigures() { false; echo went on; }\nmeasure a ""\n'
    )
    (tmp_path / "recipes/x.sh").write_text(recipe)
    done = subprocess.run(["bash", tmp_path / "recipes/x.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and "went on" not in done.stdout


def test_the_prompts_that_ship():
    """Three shots: in the form that training teaches, before the training prompt. Tuna's: both parts take a record."""
    from collecting.answers import parse_nli
    from collecting.prompts import TEMPLATES
    from collecting.rank_asked import contextual_prompt

    shots = (ROOT / "recipes/prompts/nli_three_shots.txt").read_text()
    assert shots.endswith("\n\n" + TEMPLATES["nli"])
    examples = [block.splitlines()[-1] for block in shots.removesuffix(TEMPLATES["nli"]).strip().split("\n\n")]
    assert [parse_nli(x) for x in examples] == [(x, True) for x in ("contradiction", "neutral", "entailment")]
    assert all(x.count("####") == 1 and x.rpartition(" ")[2].istitle() for x in examples)
    template = (ROOT / "recipes/prompts/tuna_rank.txt").read_text()
    record = {"prompt": "p", "instruction": "Say {it}.", "candidates": [{"text": f"t{k}"} for k in range(4)]}
    bare = contextual_prompt(template, record, [3, 2, 1, 0], "")
    whole = contextual_prompt(template, record | {"input": "here"}, [3, 2, 1, 0], "")
    assert "### Input:\nhere" in whole and "Input" not in bare and bare.count("Say {it}.") == 1
    assert "###Response 0:\nt3" in bare and bare.endswith("or even 'rank: [i]'.")
