"""run.py: a run's folder, steps and end, as README promises them: nothing stale, nothing lost, no code from data."""

import argparse
import json
import pathlib
import shutil
import sys
import types

import pytest
import torch
from architectures import ENCODED, make
from conftest import ROOT, command, make_model, read_jsonl, refused
from run import Run, learning_rate, peak_flops, speed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import common
from collecting import files
from common import pack


def train(cli, model, data, output, *more):
    flags = ["--ordering", "label", "--lr", "1e-3", "--batch_size", 4, "--epochs", 2, *more]
    return cli("rescue", "--model", model, "--data", data, "--output", output, *flags)


def stop_after(steps):
    """A patch that makes a run stop as on SIGTERM in the row after so many steps."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Run, "interrupted", lambda run: run.step >= steps)
    return patch


@pytest.fixture
def half(cli, tiny, data, tmp_path):
    """The folder of a run that was stopped after three steps."""
    with_stop = stop_after(3)
    assert train(cli, tiny, data, tmp_path / "half").code == 0
    with_stop.undo()
    assert (tmp_path / "half/latest").exists()
    return tmp_path / "half"


@pytest.fixture
def own(tiny, tmp_path):
    """A copy of the model to change."""
    return shutil.copytree(tiny, tmp_path / "own")


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestNothingStale:
    def test_a_retrained_model_is_not_given_the_old_figures(self, cli, own, data, tmp_path):
        flags = ["--model", own, "--input", data, "--by", "label", "--output", tmp_path / "r.jsonl"]
        assert cli("evaluate", "ranking", *flags).code == 0 and cli("evaluate", "ranking", *flags).code == 0
        make_model(seed=5).save_pretrained(own)
        refused(cli("evaluate", "ranking", *flags), "content of", own)

    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
    def test_a_model_that_changed_is_not_resumed(self, cli, own, data, tmp_path, file):
        patch = stop_after(1)
        train(cli, own, data, tmp_path / "run")
        patch.undo()
        if file.endswith(".json"):
            (own / file).write_text((own / file).read_text() + "\n")
        else:
            save_file({k: v + 1 for k, v in load_file(own / file).items()}, own / file)
        refused(train(cli, own, data, tmp_path / "run", "--resume"), "content of", own)

    def test_a_large_file_is_read_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "SAMPLED", 1000)
        (tmp_path / "x").mkdir()
        content = bytearray(200_000)
        (tmp_path / "x/model.safetensors").write_bytes(content)
        before = files.folder_digest(tmp_path / "x")
        content[-1] = 1
        (tmp_path / "x/model.safetensors").write_bytes(content)
        assert files.folder_digest(tmp_path / "x") != before

    def test_overwrite_does_not_resume_through_a_link(self, cli, tiny, data, tmp_path, half):
        shutil.move(half / "checkpoints", tmp_path / "elsewhere")
        (half / "checkpoints").symlink_to(tmp_path / "elsewhere")
        result = train(cli, tiny, data, half, "--overwrite")
        assert result.code == 0 and "resuming" not in result.out and list((tmp_path / "elsewhere").glob("step-*"))
        assert [x["step"] for x in read_jsonl(half / "log.jsonl")] == [1, 2, 3, 4, 5, 6]

    def test_an_empty_args_file_is_no_free_pass(self, cli, tiny, data, half):
        (half / "args.json").write_text("")
        refused(train(cli, tiny, data, half, "--resume", "--lr", "1e-2"), "args.json is empty")

    @pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
    def test_a_foreign_args_file_stays(self, cli, tiny, data, tmp_path, flag):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/args.json").write_text('{"mine": 1}')
        refused(train(cli, tiny, data, tmp_path / "out", flag), "no run's")
        assert (tmp_path / "out/args.json").read_text() == '{"mine": 1}'


class TestNoCodeFromData:
    def test_a_model_folders_code_is_not_run(self, own, data, tmp_path):
        config = json.loads((own / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        (own / "config.json").write_text(json.dumps(config))
        (own / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = None\n")
        flags = ["--model", own, "--data", data, "--output", tmp_path / "o"]
        done = command(sys.executable, "rescue.py", "--ordering", "label", *flags, check=False, input="y\n")
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "ran").exists()

    def test_a_checkpoint_holds_no_pickle(self, half):
        saved = [p for p in (half / "checkpoints").rglob("*") if p.is_file()]
        assert {p.suffix for p in saved} == {".safetensors", ".json"}

    def test_a_damaged_shard_is_not_resumed(self, cli, tiny, data, half):
        [shard] = (half / "checkpoints").rglob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[-4096:] = bytes(4096)
        shard.write_bytes(content)
        refused(train(cli, tiny, data, half, "--resume"), "is damaged", shard.parent)


class TestTheEnd:
    def test_a_disk_full_at_the_final_save_loses_nothing(self, cli, tiny, data, tmp_path, monkeypatch):
        train(cli, tiny, data, tmp_path / "whole", "--checkpoint_every", 0)
        with monkeypatch.context() as context:

            def full(*args, **kwargs):
                raise SafetensorError("Error while serializing: IoError(No space left on device)")

            context.setattr(LlamaForCausalLM, "save_pretrained", full)
            result = train(cli, tiny, data, tmp_path / "run", "--checkpoint_every", 0)
        refused(result, "the disk is full", "step-00000006", "is whole")
        result = train(cli, tiny, data, tmp_path / "run", "--checkpoint_every", 0, "--resume")
        assert result.code == 0 and "resuming after step 6" in result.out
        assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))

    def test_killed_in_finish_cleans_at_the_next_start(self, cli, tiny, data, tmp_path, monkeypatch):
        with monkeypatch.context() as context:
            context.setattr(Run, "_drop_checkpoints", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
            assert train(cli, tiny, data, tmp_path / "run").code == 130
        assert (tmp_path / "run/checkpoints").exists() and (tmp_path / "run/model/config.json").exists()
        assert train(cli, tiny, data, tmp_path / "run", "--resume").code == 0
        assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/latest").exists()

    def test_the_model_is_synced_before_its_checkpoints_go(self, cli, tiny, data, tmp_path, monkeypatch):
        """With the folder that holds its name, and that one's own."""
        done, sync, remove = [], files.sync, files.remove
        monkeypatch.setattr(files, "sync", lambda path: (done.append(pathlib.Path(path)), sync(path)))
        monkeypatch.setattr("run.remove", lambda path: (done.append(("gone", path)), remove(path)))
        train(cli, tiny, data, tmp_path / "run")
        out = tmp_path / "run"
        before = done[: len(done) - done[::-1].index(("gone", out / "checkpoints"))]
        assert {out / "model.part/model.safetensors", out / "model.part/config.json", out / "model.part"} <= {*before}
        after_model = before[before.index(out / "model.part") :]
        assert out in after_model and out.parent in after_model

    def test_weights_that_are_not_finite_are_not_saved(self, cli, tiny, data, tmp_path, monkeypatch):
        def spoil(run, grad_norm):
            if run.step + 1 == run.total:
                next(run.model.parameters()).data[0, 0] = torch.inf

        monkeypatch.setattr(Run, "log", spoil)
        refused(train(cli, tiny, data, tmp_path / "run"), "not finite", "step 6")
        assert not (tmp_path / "run/model").exists()


TWO = """
import os, sys
sys.path[:0] = [{root!r}]
import torch
import rescue, runtime
sys.argv = ["rescue.py", *{argv!r}]
if os.environ["RANK"] == "1":
    {change}
common.run_cli(rescue.main)
"""


def on_two(tmp_path, argv, change):
    """rescue.py on two gloo processes, the second after `change`."""
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT), argv=[*map(str, argv)], change=change))
    return command("torchrun", "--standalone", "--nproc_per_node", 2, tmp_path / "two.py", check=False)


@pytest.mark.parametrize(
    "change, words",
    [
        ("sys.argv += ['--alpha', '0.5']", "process 1 differs from process 0 (alpha 0.1 -> 0.5)"),
        ("torch.Tensor.backward = lambda *a, **k: 1 / 0", "process 1: error: ZeroDivisionError"),
        ("sys.argv[sys.argv.index('--data') + 1] += 'x'", "process 1: error: --data"),
    ],
)
def test_a_process_that_differs_says_so(tiny, data, tmp_path, change, words):
    argv = ["--ordering", "label", "--model", tiny, "--data", data, "--output", tmp_path / "out", "--batch_size", 4]
    done = on_two(tmp_path, argv, change)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "out/model").exists()


def test_rows_are_the_plan_in_order():
    """Each row with its own prompts' tokens and values; the repeated one has weight 0."""
    common.init_distributed()
    run = object.__new__(Run)
    run.args = argparse.Namespace(padded=False, attn="sdpa", seed=0)
    run.device, run.process, run.world, run.step, run.seen, run.signal = torch.device("cpu"), 0, 1, 0, [], None
    run.encoded, run.tokenizer, run.row_budget = ENCODED, None, 1
    levels = [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([5.0, 4.0])]
    rows = list(run.rows([1, 0], levels))
    torch.distributed.destroy_process_group()
    assert [(row, weight) for row, weight, *_ in rows] == [([0], 1.0), ([1], 1.0)] and run.seen == ["0", "1"]
    for row, _, batch, values in rows:
        assert torch.equal(batch.input_ids, pack([ENCODED[i] for i in row]).input_ids)
        assert torch.equal(values, levels[row[0]]) and batch.sizes == [len(values)]


def test_mfu_counts_layers_alone(monkeypatch):
    common.init_distributed()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)  # q, o; k, v; MLP; norms
    figures = speed(make("llama"), 1000, 0.5, torch.device("cuda"))
    torch.distributed.destroy_process_group()
    assert figures == {"tok/s": 2000.0, "MFU": pytest.approx(6 * layers * 2000 / 989e12)}
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 NVL") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("some other") is None


def test_learning_rate():
    args = types.SimpleNamespace(lr=1.0, warmup=2, schedule="cosine")
    rates = [learning_rate(s, 10, args) for s in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[6] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    args = types.SimpleNamespace(lr=1.0, warmup=0.25, schedule="constant")
    assert [learning_rate(s, 8, args) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_bf16_on_a_cpu(cli, tiny, data, tmp_path):
    """--bf16 computes otherwise than fp32, to a bf16's precision alike, keeps fp32 masters and resumes bit by bit."""
    for name, flags in {"fp32": [], "bf16": ["--bf16"], "half": ["--bf16"]}.items():
        with_stop = stop_after(3 if name == "half" else 10**6)
        assert train(cli, tiny, data, tmp_path / name, *flags).code == 0
        with_stop.undo()
    assert train(cli, tiny, data, tmp_path / "half", "--bf16", "--resume").code == 0
    full, coarse = ([x["loss"] for x in read_jsonl(tmp_path / name / "log.jsonl")] for name in ("fp32", "bf16"))
    assert full != coarse and coarse == pytest.approx(full, rel=0.02)
    assert equal(weights(tmp_path / "bf16"), weights(tmp_path / "half"))


def test_a_next_stage_moves_at_a_small_learning_rate(cli, tiny, data, tmp_path):
    """--bf16 --lr 1e-6, as Tuna's second stage: written in bf16, nearly every weight would come out as it went in."""
    assert train(cli, tiny, data, tmp_path / "first", "--bf16").code == 0
    assert train(cli, tmp_path / "first/model", data, tmp_path / "second", "--bf16", "--lr", "1e-6").code == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    layers = [name for name in first if "proj" in name]  # of the embeddings few rows are read
    moved = lambda cast: torch.cat([(cast(first[k]) != cast(second[k])).flatten() for k in layers]).float().mean()  # noqa: E731
    assert {w.dtype for w in second.values()} == {torch.float32}
    assert moved(torch.Tensor.float) > 0.9 > 0.1 > moved(torch.Tensor.bfloat16)
