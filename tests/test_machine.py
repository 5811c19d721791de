"""common.py's machine: attention's masks, loading, sharding, memory; what a user is told."""

import sys
import types

import pytest
import torch
from architectures import ENCODED, assert_same_gradients, gradients, make
from conftest import change, change_weights, make_model, make_tokenizer, refused
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import AutoModelForSequenceClassification as CLASSIFIER

import common
from collecting import on_policy
from common import UserError, pack


@pytest.fixture
def machine():
    yield common.init_distributed()
    torch.distributed.destroy_process_group()


def load(folder, **changed):
    """common.load_model of a folder that has no tokenizer."""
    args = types.SimpleNamespace(model=str(folder), attn="sdpa", padded=False, allow_pickle=False, compile=False)
    args.bf16, args.activation_checkpointing, device = False, None, changed.pop("device", "cpu")
    args.max_length = 64
    vars(args).update(changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda name, model: make_tokenizer())
        return common.load_model(args, torch.device(device))[0]


@pytest.mark.parametrize("every, times", [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (0, [1, 1, 1, 1])])
def test_activation_checkpointing_every_nth_layer(every, times, tmp_path, machine):
    make("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    found = []
    for n in (None, every):  # None: none on a CPU
        model, count = load(tmp_path, activation_checkpointing=n), [0] * 4
        for i, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda m, x, y, i=i: count.__setitem__(i, count[i] + 1))
        found.append((gradients(model, pack(ENCODED))[1], count))
    (want, once), (got, count) = found
    assert once == [1] * 4 and count == times
    assert_same_gradients(got, want)


@pytest.mark.parametrize("flag, on", [(None, True), (0, False), (2, True)])
def test_on_cuda_activations_are_recomputed_unless_the_flag_says_no(flag, on, tmp_path, machine, monkeypatch):
    make("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(common, "shard", lambda model, *more: model)
    model = load(tmp_path, device="cuda", attn="auto", activation_checkpointing=flag)
    assert model.model.layers[0].gradient_checkpointing is on


class TestAttention:
    """What --attn gives a model, and what becomes of it."""

    def test_flex_does_not_train_on_a_cpu(self, train):
        refused(train("run", "--attn", "flex", code=2), "--attn flex", "no backward on CPU")

    @pytest.mark.parametrize(
        "kind, more, asked, on_cpu, on_cuda",
        [
            ("gpt2", {}, "auto", "blocks", "blocks"),  # transformers has no FlexAttention for it
            ("llama", {"attention_dropout": 0.1}, "auto", "blocks", "blocks"),
            ("llama", {}, "auto", "blocks", "blocks"),  # heads of 8
            ("llama", {"head_dim": 16}, "auto", "blocks", "flex_attention"),
            ("gemma2", {"head_dim": 16}, "auto", "eager", "flex_attention"),  # it caps its scores, which SDPA cannot
            ("llama", {"attn_implementation": "eager"}, "auto", "eager", "eager"),  # its config's own
            ("llama", {"attn_implementation": "eager"}, "sdpa", "sdpa", "sdpa"),  # the flag stands above it
            ("llama", {"head_dim": 16}, "flex", "flex_attention", "flex_attention"),
            ("gpt2", {}, "flex", None, None),
            ("gemma2", {}, "sdpa", None, None),
        ],
    )
    def test_each_model_has_one_that_reads_packed_rows(self, kind, more, asked, on_cpu, on_cuda):
        """None: refused."""
        for device, want in (("cpu", on_cpu), ("cuda", on_cuda)):
            model = make(kind, **more)
            if want is None:
                with pytest.raises(UserError, match=f"--attn {asked}"):
                    common.set_attention(model, torch.device(device), asked)
            else:
                common.set_attention(model, torch.device(device), asked)
                assert model.config._attn_implementation == want, device

    def test_blocks_survive_the_way_to_the_device(self, monkeypatch):
        """Pinning returns another tensor, without the attribute: a stand-in for CUDA does as much."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x.clone())
        model = make("llama")
        model.set_attn_implementation("blocks")
        batch = common.pack_for(model, ENCODED)
        moved = batch.to(torch.device("cuda"))
        assert moved.attention_mask.blocks and moved.input_ids is not batch.input_ids

    @pytest.mark.parametrize("inside, after", [("flex_attention", "sdpa"), ("blocks", "blocks")])
    def test_generation_in_training_is_not_flexs(self, inside, after):
        model = make("llama", head_dim=16)
        model.set_attn_implementation(inside)
        with on_policy.gathered(model), torch.no_grad():
            assert model.config._attn_implementation == after
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        assert model.config._attn_implementation == inside


def test_compiled_layers_learn_the_same(tmp_path, machine, monkeypatch):
    """Before fully_shard; Dynamo traces as on CUDA, inductor's minutes are left out."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **more: compile_module(m, backend="eager", **more))
    make("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    found = []
    for compiled in (False, True):
        model = load(tmp_path, compile=compiled)
        assert [layer._compiled_call_impl is not None for layer in model.model.layers] == [compiled]
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        found.append(gradients(model, pack(ENCODED)))
    (want, want_grads), (got, got_grads) = found
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert_same_gradients(got_grads, want_grads)


class TestModelFolders:
    @pytest.mark.parametrize("wrong", ["a tensor is missing", "fewer layers than weights"])
    def test_weights_that_do_not_fit(self, cli, own, data, tmp_path, wrong):
        """Nothing is made up, nothing left out."""
        if wrong == "a tensor is missing":
            change_weights(own, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        else:
            change(own / "config.json", num_hidden_layers=1)
        training, verb = ["reward_model", "--ordering", "label", "--data"], ["collect_candidates", "sample", "--input"]
        for command, output in ((training, "run"), (verb, "o.jsonl")):
            done = cli(*command, data, "--model", own, "--output", tmp_path / output)
            refused(done, own, "do not fit its config.json: model.layers.1.")

    def test_what_legitimately_is_left_over(self, own, tmp_path):
        """A tied head of its own, buffers of older checkpoints, a base model's names; of another task also its head."""
        head = lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})  # noqa: E731
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        change_weights(own, head)
        change_weights(own, lambda weights: weights.update(buffer))
        for auto_class, options in ((AutoModelForCausalLM, {}), (CLASSIFIER, {"num_labels": 1}), (AutoModel, {})):
            common.load_pretrained(auto_class, own, **options)
        common.load_pretrained(AutoModelForCausalLM, own).model.save_pretrained(tmp_path / "body")
        common.load_pretrained(CLASSIFIER, tmp_path / "body", num_labels=1)
        change_weights(own, lambda weights: weights.update({"score.weight": torch.zeros(1, 32)}))
        common.load_pretrained(CLASSIFIER, own, num_labels=1)
        with pytest.raises(UserError, match="do not fit its config.json: score.weight"):
            common.load_pretrained(AutoModelForCausalLM, own)

    def test_the_hubs_gpt2(self, tmp_path):
        """It has masks that are no weights, and names without a prefix."""
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
        weights = {f"h.{i}.attn.{k}": torch.zeros(1) for i in (0, 1) for k in ("bias", "masked_bias")}
        weights |= {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        common.load_pretrained(AutoModelForCausalLM, tmp_path)
        change(tmp_path / "config.json", n_layer=1)
        with pytest.raises(UserError, match="do not fit its config.json: (transformer.)?h.1."):
            common.load_pretrained(AutoModelForCausalLM, tmp_path)

    def test_a_tokenizer_larger_than_the_vocabulary(self, train, own):
        make_model(vocab_size=make_tokenizer().vocab_size - 9).save_pretrained(own)
        done = train("o", "--model", own, code=2)
        refused(done, f"its tokenizer has {make_tokenizer().vocab_size} tokens")

    @pytest.mark.parametrize(
        "file, content",
        [
            *[("model.safetensors", content) for content in (b"", b"\x00" * 40, b"{}", b"torn")],
            *[("config.json", c) for c in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"model_type": 7})],
        ],
    )
    def test_a_broken_folder(self, train, own, file, content):
        if file == "config.json":
            change(own / file, **content)
        else:
            whole = (own / file).read_bytes()
            (own / file).write_bytes(whole[: len(whole) // 2] if content == b"torn" else content)
        refused(train("o", "--model", own, code=2), own)


class TestTheGuard:
    """What nobody foresaw: a sentence; 2 for files and flags, 1 for this program's own mistakes."""

    @pytest.mark.parametrize(
        "error, code, word",
        [
            (ValueError("of a library"), 2, "check files, flags"),
            (PermissionError(13, "not allowed", "f"), 2, "not allowed"),
            (torch.OutOfMemoryError("Tried to allocate 2.50 GiB. GPU 0 has"), 2, "memory"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "memory"),
            (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 2, "another process ended"),
            (RuntimeError("Timed out waiting 1800000ms for recv operation"), 2, "another process ended or does not"),
            (common.UserError("a server said \x1b[31mred\x07"), 2, "a server said \ufffd[31mred\ufffd"),
            (RuntimeError("shape mismatch"), 1, "please report"),
            (AssertionError(), 1, "please report"),
        ],
    )
    def test_one_sentence(self, monkeypatch, capsys, error, code, word):
        def main():
            raise error

        monkeypatch.setattr(sys, "argv", ["x.py"])
        with pytest.raises(SystemExit) as left:
            common.run_cli(main)
        said = capsys.readouterr().err
        assert left.value.code == code and word in said and "Traceback" not in said and said.count("\n") == 1
        monkeypatch.setattr(sys, "argv", ["x.py", "--debug"])
        with pytest.raises(SystemExit):
            common.run_cli(main)
        assert "Traceback" in capsys.readouterr().err and sys.argv == ["x.py"]


@pytest.mark.parametrize("name", ["/no/model", "runs/x/model", "../model"])
def test_a_folder_that_is_not_there_is_named_so(name):
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(UserError, match=f"^--model {name}: .*no such folder"):
            common.load_pretrained(auto_class, name)
