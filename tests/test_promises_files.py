"""Files that are not what they should be, as attacks: one sentence, exit code 2, bounded memory, no file lost."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
import torch
from api_server import Server
from conftest import ROOT, make_model, make_records, make_tokenizer, refused, write_jsonl
from safetensors.torch import load_file, save_file
from test_collecting_server import arguments
from test_evaluating_tuna import make_lmentry, make_superni
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers import AutoModelForSequenceClassification as CLASSIFIER

import runtime
from collecting import asking
from collecting.downloads import read_rows
from common import UserError


def record(**fields):
    return make_records(1)[0] | fields


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": 7},
        {"instruction": 7},
        {"answers": [5]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"documents": [{"title": "x"}]},
    ],
)
def test_a_field_of_another_type(cli, tiny, tmp_path, wrong):
    data = write_jsonl(tmp_path / "d.jsonl", [record(**wrong)])
    done = cli("rescue", "--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "o")
    refused(done, "d.jsonl:1", *wrong)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_numbers_that_no_float_holds(cli, tiny, tmp_path, number):
    row = json.dumps(record(reward="here")).replace('"here"', number)
    row = row.replace('"correct": true', f'"correct": true, "reward": {number}')
    (tmp_path / "d.jsonl").write_text(row + "\n")
    flags = ["--model", tiny, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "o"]
    refused(cli("rescue", "--ordering", "reward", *flags), "d.jsonl:1")


def test_damaged_gzip(cli, tiny, tmp_path):
    content = bytearray(gzip.compress(json.dumps(record()).encode() * 50))
    content[60:80] = bytes(20)
    (tmp_path / "d.jsonl.gz").write_bytes(content)
    flags = ["--model", tiny, "--data", tmp_path / "d.jsonl.gz", "--output", tmp_path / "o"]
    refused(cli("rescue", "--ordering", "label", *flags), "d.jsonl.gz")


class TestArrays:
    def rows(self, tmp_path, text):
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return [row for _, row in read_rows(tmp_path / "a.json")]

    def test_whatever_the_layout(self, tmp_path):
        rows = [{"a": "é" * k, "b": [1, {"c": "]},["}]} for k in (1, 70_000, 3, 140_000)]
        for indent in (None, 1):
            assert self.rows(tmp_path, json.dumps(rows, indent=indent)) == rows
        assert self.rows(tmp_path, "\ufeff [ ] ") == []

    @pytest.mark.parametrize(
        "text", ["[{}", "[{},", "[{},]", "[,{}]", "[{} {}]", "[{}] 1", "[1]", '[{"a": NaN}]', "[", b"[{\xff}]", "[{]"]
    )
    def test_what_is_none(self, tmp_path, text):
        with pytest.raises(UserError, match="a.json"):
            self.rows(tmp_path, text)


@pytest.mark.parametrize("name", ["x.json.gz", "x.csv.gz"])
def test_memory_stays_bounded(tmp_path, name):
    """A file that unpacks to 400 MB is read, or refused, in a process that may have 300 MB more than it begins with."""
    start, more = (b"[", b"{}," * 2**20) if "json" in name else (b"a\n", b"x" * 3 * 2**20)
    with gzip.open(tmp_path / name, "wb") as f:
        f.write(start)
        for _ in range(130):
            f.write(more)
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT)!r}]
from collecting.downloads import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for n, _ in enumerate(read_rows({str(tmp_path / name)!r})):
        if n == 100_000:
            break
except Exception as e:
    assert type(e).__name__ == "UserError", e
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


class TestModelFolders:
    @pytest.fixture
    def own(self, tiny, tmp_path):
        return shutil.copytree(tiny, tmp_path / "own")

    def train(self, cli, model, data, tmp_path):
        return cli("rescue", "--ordering", "label", "--model", model, "--data", data, "--output", tmp_path / "o")

    def test_a_missing_tensor_is_not_made_up(self, cli, own, data, tmp_path):
        weights = load_file(own / "model.safetensors")
        weights.pop("model.layers.1.mlp.up_proj.weight")
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        refused(self.train(cli, own, data, tmp_path), "layers.1.mlp.up_proj")

    @pytest.mark.parametrize("script", ["rescue", "reward_model", "sample"])
    def test_fewer_layers_than_weights(self, cli, own, data, tmp_path, script):
        config = json.loads((own / "config.json").read_text()) | {"num_hidden_layers": 1}
        (own / "config.json").write_text(json.dumps(config))
        flags = ["--model", own, "--output", tmp_path / "o"]
        if script == "sample":
            done = cli("collect_candidates", "sample", "--input", data, *flags)
        else:
            done = cli(script, "--ordering", "label", "--data", data, *flags)
        refused(done, own, "no place for 9 of its weights: model.layers.1.")

    def test_what_legitimately_is_left_over(self, own, tmp_path):
        """Another task's head, a tied head of its own, buffers of older checkpoints; a base model's names."""
        weights = load_file(own / "model.safetensors")
        weights |= {"score.weight": torch.zeros(1, 32), "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        for auto_class, options in ((AutoModelForCausalLM, {}), (CLASSIFIER, {"num_labels": 1}), (AutoModel, {})):
            runtime.load_pretrained(auto_class, own, **options)
        runtime.load_pretrained(AutoModelForCausalLM, own).model.save_pretrained(tmp_path / "body")
        runtime.load_pretrained(CLASSIFIER, tmp_path / "body", num_labels=1)
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
        gpt2.save_pretrained(tmp_path / "gpt2")
        weights = load_file(tmp_path / "gpt2/model.safetensors")
        masks = {f"transformer.h.{i}.attn.{k}": torch.zeros(1) for i in (0, 1) for k in ("bias", "masked_bias")}
        save_file(weights | masks, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
        runtime.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")
        weights = {k.removeprefix("transformer."): v for k, v in (weights | masks).items()}  # as the hub's gpt2
        save_file(weights, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
        runtime.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")
        (tmp_path / "gpt2/config.json").write_text(
            (tmp_path / "gpt2/config.json").read_text().replace('"n_layer": 2', '"n_layer": 1')
        )
        with pytest.raises(UserError, match="no place for 11 of its weights: h.1."):
            runtime.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")

    def test_a_classifiers_missing_layer_is_not_made_up(self, cli, own, data, tmp_path):
        weights = load_file(own / "model.safetensors")
        weights.pop("model.layers.1.mlp.up_proj.weight")
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        flags = ["--ordering", "label", "--data", data, "--model", own, "--output", tmp_path / "o"]
        refused(cli("reward_model", *flags), "lack model.layers.1.mlp.up_proj")

    def test_a_tokenizer_larger_than_the_vocabulary(self, cli, own, data, tmp_path):
        make_model(vocab_size=make_tokenizer().vocab_size - 9).save_pretrained(own)
        refused(self.train(cli, own, data, tmp_path), "do not belong together")

    @pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"{}", None])
    def test_broken_weights(self, cli, own, data, tmp_path, content):
        whole = (own / "model.safetensors").read_bytes()
        (own / "model.safetensors").write_bytes(whole[: len(whole) // 2] if content is None else content)
        refused(self.train(cli, own, data, tmp_path), own)

    @pytest.mark.parametrize(
        "change", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"model_type": 7}, {"num_hidden_layers": "x"}]
    )
    def test_odd_configs(self, cli, own, data, tmp_path, change):
        config = json.loads((own / "config.json").read_text()) | change
        (own / "config.json").write_text(json.dumps(config))
        refused(self.train(cli, own, data, tmp_path), own)


class TestFigures:
    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"metrics": 3}', '{"metrics": {}, "name": 3}', "\x00"])
    def test_foreign_metrics(self, cli, tmp_path, text):
        (tmp_path / "nli.metrics.json").write_text(text)
        refused(cli("evaluate", "report", tmp_path), "nli.metrics.json")

    def test_report_overwrites_only_its_own(self, cli, tmp_path):
        (tmp_path / "nli.metrics.json").write_text('{"metrics": {"accuracy": 0.5}, "name": "x"}')
        mine = tmp_path / "mine.md"
        mine.write_text("mine")
        refused(cli("evaluate", "report", tmp_path, "--output", mine), "mine.md")
        assert mine.read_text() == "mine"
        for _ in range(2):
            assert cli("evaluate", "report", tmp_path, "--output", tmp_path / "r.md").code == 0

    def test_the_key_of_a_sheet_stays(self, cli, tmp_path):
        rows = [{"id": "r0", "prompt": "p", "text": "t"}]
        files = [write_jsonl(tmp_path / f"{n}.jsonl", rows) for n in "ab"]
        flags = ["--systems", *files, "--names", "a", "b", "--input", files[0], "--output", tmp_path / "s.html"]
        (tmp_path / "s.html.key.json").write_text("mine")
        refused(cli("evaluate", "sheet", *flags), "key.json")
        assert (tmp_path / "s.html.key.json").read_text() == "mine"
        for key in ("mine", '{"orders": [], "systems": 3}', '{"orders": [[0, 5]], "systems": ["a", "b"]}'):
            (tmp_path / "s.html.key.json").write_text(key)
            refused(cli("evaluate", "sheet", "--score", files[0], "--output", tmp_path / "s.html"), "key.json")

    @pytest.mark.parametrize("row", [{"x": 1}, {"id": "a", "text": 3, "question": "q"}, {"id": ["a"]}])
    def test_judge_on_foreign_files(self, cli, tmp_path, row):
        file = write_jsonl(tmp_path / "a.jsonl", [row])
        flags = ["--answers", file, file, "--model", "m", "--base_url", "http://127.0.0.1:9", "--name", "n"]
        refused(cli("evaluate", "judge", *flags, "--output", tmp_path / "o.jsonl"), "a.jsonl:1")


class TestTheKey:
    def test_is_hidden_before_the_message_is_cut(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", key := "sk-" + "s" * 165)
        leak = (400, {}, json.dumps({"error": {"message": "x" * 80 + " " + key}}).encode())
        with Server(lambda prompt, nth, body: leak) as server:
            [(_, _, error)] = asking.complete(arguments(server.url), ["a"])
        assert "sss" not in error and "***" in error

    def test_is_not_echoed_into_the_output(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
        reply = {"choices": [{"message": {"content": "your key is sk-secret-key"}}]}
        with Server(lambda prompt, nth, body: json.dumps(reply).encode()) as server:
            [(_, [response], _)] = asking.complete(arguments(server.url), ["a"])
        assert response["text"] == "your key is ***"

    def test_a_charset_that_is_none(self, monkeypatch):
        reply = json.dumps({"choices": [{"message": {"content": "hé"}}]}).encode()
        told = (200, {"Content-Type": "application/json; charset=zlib"}, reply)
        with Server(lambda prompt, nth, body: told) as server:
            [(_, responses, error)] = asking.complete(arguments(server.url), ["a"])
        assert error is None and responses[0]["text"].startswith("h")


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1" + "0" * 20],
        ["--seed", "1" + "0" * 400],
        ["--temperature", "1e-40"],
        ["--max_new_tokens", "1" + "0" * 30],
        ["--stop", ""],
    ],
)
def test_absurd_numbers(cli, tiny, tmp_path, flags):
    data = write_jsonl(tmp_path / "d.jsonl", [record()])
    refused(cli("collect_candidates", "sample", "--model", tiny, "--input", data, "--output", tmp_path / "o", *flags))


class TestTheGuard:
    """What nobody foresaw: a sentence; 2 for files and flags, 1 for this program's own mistakes."""

    @pytest.mark.parametrize(
        "error, code, word",
        [
            (ValueError("of a library"), 2, "a file or a flag"),
            (UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), 2, "a file or a flag"),
            (PermissionError(13, "not allowed", "f"), 2, "not allowed"),
            (AttributeError("mistake"), 1, "please report"),
            (AssertionError(), 1, "please report"),
        ],
    )
    def test_one_sentence(self, monkeypatch, capsys, error, code, word):
        def main():
            raise error

        monkeypatch.setattr(sys, "argv", ["x.py"])
        with pytest.raises(SystemExit) as left:
            runtime.run_cli(main)
        said = capsys.readouterr().err
        assert left.value.code == code and word in said and "Traceback" not in said and said.count("\n") == 1
        monkeypatch.setattr(sys, "argv", ["x.py", "--debug"])
        with pytest.raises(SystemExit):
            runtime.run_cli(main)
        assert "Traceback" in capsys.readouterr().err and sys.argv == ["x.py"]


class TestForeignClones:
    """Super-NaturalInstructions and LMentry as somebody changed them."""

    @pytest.mark.parametrize(
        "change",
        [
            {"Definition": []},
            {"Definition": [7]},
            {"Definition": None},
            {"Positive Examples": {}},
            {"Positive Examples": [7, 7]},
            {"Instances": {"a": 1}},
            {"Instances": ["text"]},
            {"Instances": [{"input": 7, "output": ["a"]}]},
            {"Instances": [{"input": "a", "output": [5]}]},
            {"Instances": [{"input": "a", "output": []}]},
        ],
    )
    def test_superni(self, cli, tiny, tmp_path, change):
        file = make_superni(tmp_path / "ni") / "tasks/task2_say.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        flags = ["--model", tiny, "--superni_dir", tmp_path / "ni", "--shots", 2, "--output", tmp_path / "o.jsonl"]
        refused(cli("evaluate", "superni", *flags), "task2_say.json: not a task")

    @pytest.mark.parametrize("content", [[], {"examples": []}, {"examples": {"1": {"input": "a"}}}, {"examples": 7}])
    def test_lmentry(self, cli, tiny, tmp_path, content):
        file = make_lmentry(tmp_path / "lm") / "data/word_after.json"
        flags = ["--model", tiny, "--lmentry_dir", tmp_path / "lm", "--output", tmp_path / "o.jsonl"]
        file.write_text(json.dumps(content))
        refused(cli("evaluate", "lmentry", *flags), "word_after.json: no examples")

    def test_a_scorer_that_fails(self, cli, tiny, tmp_path):
        file = make_lmentry(tmp_path / "lm") / "data/word_after.json"
        file.write_text(file.read_text().replace('"answer": "e"', '"answer": 7'))
        flags = ["--lmentry_dir", tmp_path / "lm", "--output", tmp_path / "o.jsonl", "--tasks", "word_after"]
        refused(cli("evaluate", "lmentry", "--model", tiny, *flags, "--max_new_tokens", 2), "its scorer fails on word_")

    @pytest.mark.parametrize("content", ["[]", '{"settings": 3}', '{"settings": {"data": 3}}', "\x00"])
    def test_args_beside_a_model_that_are_no_runs(self, cli, own_run, tmp_path, content):
        (own_run / "args.json").write_text(content)
        data = write_jsonl(tmp_path / "d.jsonl", make_records(2))
        flags = ["--model", own_run / "model", "--input", data, "--reward_model", "none", "--max_new_tokens", 2]
        assert cli("evaluate", "hh", *flags, "--output", tmp_path / "o.jsonl").code == 0

    @pytest.fixture
    def own_run(self, tiny, tmp_path):
        shutil.copytree(tiny, tmp_path / "run/model")
        return tmp_path / "run"
