"""common.py: the row plan, attention's masks, loading, memory; what a user is told."""

import json
import os
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import ENCODED, FEW_SHOT, LONG, TREE, assert_same_gradients, gradients, make, make_encoded
from conftest import ROOT, make_model, make_tokenizer, refused
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers import AutoModelForSequenceClassification as CLASSIFIER

import common
from common import Encoded, UserError, pack, plan_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
import scale  # noqa: E402


class TestPlan:
    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("budget", [1, 100, 5000])
    def test_every_prompt_once_equal_rows_within_budget(self, world, budget):
        lengths = [30, 500, 70, 40, 99, 10, 55, 23, 41]
        encoded = [common.Encoded(str(i), [i] * (n - 2), [[1, 2]], 0, 0) for i, n in enumerate(lengths)]
        plan = plan_rows(encoded, budget, world)
        assert len(plan) == world and len({len(rows) for rows in plan}) == 1
        counted = sorted(i for rows in plan for row, weight in rows if weight for i in row)
        assert counted == list(range(len(lengths)))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for rows in plan for row, _ in rows)

    def test_fewer_prompts_than_ranks(self):
        plan = plan_rows([common.Encoded("a", [1] * 8, [[1, 2]], 0, 0)], 100, 4)
        assert [rows[0][1] for rows in plan] == [1.0, 0.0, 0.0, 0.0]


def test_blocks_never_hold_what_no_token_sees(monkeypatch):
    """Prompts of 8, each with 4 responses of 6, in blocks of 8 queries: their keys are the prompt (but for a block of
    its own) and at most two responses, never the other prompt, and the mask is not T x T in memory."""
    monkeypatch.setattr(common, "CPU_BLOCK", 8)
    seen, sdpa = [], F.scaled_dot_product_attention
    spy = lambda q, k, v, **options: seen.append((q.shape[2], k.shape[2])) or sdpa(q, k, v, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, encoded = make("llama", num_hidden_layers=1), make_encoded(*[(8, [6] * 4)] * 2)
    model.set_attn_implementation("blocks")
    batch = common.pack_for("blocks", encoded, torch.device("cpu"))
    common.candidate_logprobs(model, batch)
    assert seen == [(8, 8), (8, 16), (8, 18), (8, 20)] * 2
    assert batch.attention_mask.untyped_storage().nbytes() == 1


class TestFlex:
    @pytest.mark.parametrize("encoded", [LONG, LONG[1:2], make_encoded((128, [64, 64])), FEW_SHOT, TREE])
    def test_blocks_are_those_of_the_dense_mask(self, encoded):
        """Block by block: partly visible, wholly visible, or absent, as the T x T mask says; nothing is left out."""
        T, flex = pack(encoded).input_ids.shape[1], common.pack_for("flex_attention", encoded, torch.device("cpu"))
        filled, mask = flex.input_ids.shape[1], flex.attention_mask
        index = torch.arange(filled)
        dense = mask.mask_mod(0, 0, index[:, None], index[None])
        assert torch.equal(dense[:T, :T], pack(encoded).attention_mask[0, 0])
        assert not dense[:T, T:].any() and not dense[T:, :T].any() and dense.diagonal().all()
        blocks = dense.view(filled // 128, 128, -1, 128)
        some, every = blocks.any(3).any(1), blocks.all(3).all(1)
        for want, number, indices in (
            (some & ~every, mask.kv_num_blocks, mask.kv_indices),
            (every, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            for row, n, order in zip(want, number[0, 0], indices[0, 0]):
                assert sorted(order[:n].tolist()) == row.nonzero().flatten().tolist()

    def test_attention_is_sdpas_and_is_compiled_twice_at_most(self):
        """A new row length makes the shape dynamic, once: no compilation per step. aot_eager stands in for Triton."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        flex_attention = torch.compile(torch.nn.attention.flex_attention.flex_attention, backend="aot_eager")
        for n in range(1, 6):
            encoded = make_encoded(*[(60 + 40 * n, [20 * n, 30])] * n)
            plain, flex = pack(encoded), common.pack_for("flex_attention", encoded, torch.device("cpu"))
            T, filled = plain.input_ids.shape[1], flex.input_ids.shape[1]
            q, k, v = torch.randn(3, 1, 2, filled, 16)
            with torch.no_grad():
                got = flex_attention(q, k, v, block_mask=flex.attention_mask)[:, :, :T]
            q, k, v = (x[:, :, :T] for x in (q, k, v))
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=plain.attention_mask)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("every, twice", [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1])])
def test_activation_checkpointing_every_nth_layer(every, twice, tmp_path, monkeypatch):
    make("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    monkeypatch.setattr(common, "load_tokenizer", lambda name: types.SimpleNamespace(get_vocab=lambda: {"a": 0}))
    common.init_distributed()
    args = types.SimpleNamespace(model=str(tmp_path), attn="sdpa", padded=False, max_length=64, allow_pickle=False)
    args.compile = args.bf16 = False
    found = []
    for args.activation_checkpointing in ("auto", every):  # auto: none on a CPU
        model, _ = common.load_for_training(args, torch.device("cpu"))
        count = [0] * 4
        for i, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda m, x, y, i=i: count.__setitem__(i, count[i] + 1))
        found.append((gradients(model, pack(ENCODED))[1], count))
    torch.distributed.destroy_process_group()
    (want, once), (got, count) = found
    assert once == [1] * 4 and count == twice
    assert_same_gradients(got, want)


def test_an_unfilled_model_is_the_loaded_one_without_its_weights():
    model = make("llama", tie_word_embeddings=True)
    empty = common.unfilled(transformers.AutoModelForCausalLM, model.config, model.generation_config)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight and empty.device.type == "cpu"
    assert empty.generation_config is model.generation_config
    empty.load_state_dict(model.state_dict())
    for buffer, filled in zip(empty.buffers(), model.buffers(), strict=True):  # they are in no state dict
        buffer.copy_(filled)
    torch.testing.assert_close(gradients(empty, pack(ENCODED))[0], gradients(model, pack(ENCODED))[0])


def test_describe_plan():
    """Two processes: rows of 80 and 60 tokens, then 50 and 70; the wait is for 80 + 70 = 150, the mean is 130."""
    plan = [[([0], 1.0), ([1, 2], 1.0)], [([3], 1.0), ([4], 1.0)]]
    encoded = make_encoded((70, [5, 5]), (15, [5]), (20, [10]), (50, [10]), (60, [10]))
    text = common.describe_plan(plan, encoded, 100)
    assert text == "2 rows each, 65% full, the slowest process 15% over the mean"


def test_prompts_that_share_a_start_are_planned_into_one_row():
    """Three templates of 50 tokens, three prompts each: 3 rows of 50 + 3 (2 + 5) = 71, where unshared it takes 9."""
    templates = [e.prompt_ids for e in make_encoded(*[(50, [1])] * 3)]
    encoded = [Encoded(str(i), templates[i % 3] + [60, i], [[7, 8, 9, 3, 1]], 0, 0) for i in range(9)]
    plan = common.plan_rows(encoded, 80, 1)
    assert sorted(plan[0]) == [([i, i + 3, i + 6], 1.0) for i in range(3)]
    assert common.unique_tokens([encoded[i] for i in plan[0][0][0]]) == 50 + 1 + 3 * 6
    assert common.describe_plan(plan, encoded, 80).startswith("3 rows each, 86% full")


class TestAttention:
    """What --attn gives a model, and what becomes of it."""

    @pytest.mark.parametrize(
        "kind, more, why",
        [
            ("gpt2", {}, "GPT2LMHeadModel has no FlexAttention"),
            ("llama", {"attention_dropout": 0.1}, "has attention_dropout 0.1, which FlexAttention lacks"),
            ("llama", {"num_attention_heads": 4}, "has heads of 8, where FlexAttention on CUDA wants 16 or more"),
        ],
    )
    def test_models_that_flex_is_not_for(self, kind, more, why):
        model = make(kind, **more)
        assert common.set_attention(model, "flex") == "blocks" == model.config._attn_implementation
        with pytest.raises(common.UserError, match=why):
            common.set_attention(model, "flex", asked="flex")

    def test_models_that_flex_is_for(self):
        assert common.set_attention(make("llama", num_attention_heads=2), "flex") == "flex_attention"

    def test_blocks_survive_the_way_to_the_device(self, monkeypatch):
        """Pinning returns another tensor, without the attribute: a stand-in for CUDA does as much."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x.clone())
        batch = common.pack_for("blocks", ENCODED, torch.device("cpu"))
        moved = batch.to(torch.device("cuda"))
        assert moved.attention_mask.blocks and moved.input_ids is not batch.input_ids

    @pytest.mark.parametrize("inside, after", [("flex_attention", "sdpa"), ("blocks", "blocks")])
    def test_generation_in_training_is_not_flexs(self, inside, after):
        common.init_distributed()
        model = make("llama", attn_implementation=inside)
        with common.gathered(model), torch.no_grad():
            assert model.config._attn_implementation == after
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        torch.distributed.destroy_process_group()
        assert model.config._attn_implementation == inside


class TestMemory:
    @pytest.mark.parametrize("name, world", [("7B", 4), ("13B", 8), ("70B", 64)])
    def test_bytes_are_those_of_scale(self, name, world):
        want = scale.predict(scale.SHAPES[name], world)
        fixed = sum(want[k] for k in ("state", "gathered", "reduced", "logits"))
        got = common.training_bytes(scale.build(scale.SHAPES[name], "meta"), scale.T, world)
        assert got == (fixed + want["activations"], fixed + want["checkpointed"])

    @pytest.mark.parametrize("free, every", [(80e9, 0), (1e9, 1)])
    def test_auto_decides_by_free_memory(self, free, every, monkeypatch, capsys):
        common.init_distributed()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
        args = types.SimpleNamespace(max_tokens_per_row=None)
        assert common.decide_checkpointing(make("llama"), args, torch.device("cuda")) == every
        torch.distributed.destroy_process_group()
        line = "a GPU needs 1 GB as it is, 1 GB with activation checkpointing, and has"
        assert line in (out := capsys.readouterr().out) and out.count("\n") == 1

    @pytest.mark.parametrize(
        "world, free, line",
        [
            (4, 84.4, "a GPU needs 80 GB as it is, 35 GB with activation checkpointing, and has 84 GB free: every"),
            (8, 84.4, "a GPU needs 66 GB as it is, 21 GB with activation checkpointing, and has 84 GB free: no"),
            (4, 150.0, "a GPU needs 80 GB as it is, 35 GB with activation checkpointing, and has 150 GB free: no"),
        ],
    )
    def test_7b_by_hand(self, world, free, line, monkeypatch, capsys):
        """Cards of 80 GB (79 GiB, a context of half a GB) and of 141 GB. 7B has 6.738e9 parameters, 202.4e6 a layer and
        262.1e6 in the root. On 4 GPUs: state 16 x 6.738e9 / 4 = 27.0 GB; root gathered 0.5, two layers and one's
        gradients 2.0, logits 1.3 GB; a token keeps 16 x 4096 + 4 x 2 x 4096 + 8 x 11008 + 136 = 186,504 bytes a layer,
        8,192 tokens in 32 layers 48.9 GB, together 79.7. Checkpointed: one layer's 1.5 and 32 inputs of 67 MB, 34.5."""
        model = scale.build(scale.SHAPES["7B"], "meta")
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 1e9), int(85e9)))
        args = types.SimpleNamespace(max_tokens_per_row=None)
        every = common.decide_checkpointing(model, args, torch.device("cuda"))
        assert capsys.readouterr().out == f"{line} layer is checkpointed\n" and every == line.endswith("every")
        assert common.training_bytes(model, 8192, 4) == (
            pytest.approx(79.73e9, rel=1e-3),
            pytest.approx(34.51e9, rel=1e-3),
        )

    def test_out_of_memory_is_a_sentence(self, capsys):
        def main():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")

        with pytest.raises(SystemExit) as left:
            common.run_cli(main)
        message = capsys.readouterr().err
        assert left.value.code == 2 and message.count("\n") == 1
        assert "Tried to allocate 2.50 GiB" in message and "--activation_checkpointing" in message

    def test_expandable_segments_unless_the_user_says_otherwise(self, monkeypatch):
        for own, want in ((None, "expandable_segments:True"), ("max_split_size_mb:64", None)):
            monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
            if own:
                monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
            common.init_distributed()
            torch.distributed.destroy_process_group()
            assert os.environ.get("PYTORCH_ALLOC_CONF") == want


def test_compiled_layers_learn_the_same():
    """Before fully_shard, over rows of two lengths; aot_eager traces as on CUDA and leaves inductor's minutes out."""
    common.init_distributed()
    found = []
    for compiled in (False, True):
        model = make("llama", num_hidden_layers=1)
        if compiled:
            common.compile_layers(model, backend="aot_eager")
        for layer in model.model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        model.set_attn_implementation("sdpa")
        found.append([gradients(model, pack(e)) for e in (ENCODED, ENCODED[:1])])
    torch.distributed.destroy_process_group()
    for (want, want_grads), (got, got_grads) in zip(*found):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert_same_gradients(got_grads, want_grads)


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
            common.load_pretrained(auto_class, own, **options)
        common.load_pretrained(AutoModelForCausalLM, own).model.save_pretrained(tmp_path / "body")
        common.load_pretrained(CLASSIFIER, tmp_path / "body", num_labels=1)
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
        gpt2.save_pretrained(tmp_path / "gpt2")
        weights = load_file(tmp_path / "gpt2/model.safetensors")
        masks = {f"transformer.h.{i}.attn.{k}": torch.zeros(1) for i in (0, 1) for k in ("bias", "masked_bias")}
        save_file(weights | masks, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
        common.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")
        weights = {k.removeprefix("transformer."): v for k, v in (weights | masks).items()}  # as the hub's gpt2
        save_file(weights, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
        common.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")
        (tmp_path / "gpt2/config.json").write_text(
            (tmp_path / "gpt2/config.json").read_text().replace('"n_layer": 2', '"n_layer": 1')
        )
        with pytest.raises(UserError, match="no place for 11 of its weights: h.1."):
            common.load_pretrained(AutoModelForCausalLM, tmp_path / "gpt2")

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
            common.run_cli(main)
        said = capsys.readouterr().err
        assert left.value.code == code and word in said and "Traceback" not in said and said.count("\n") == 1
        monkeypatch.setattr(sys, "argv", ["x.py", "--debug"])
        with pytest.raises(SystemExit):
            common.run_cli(main)
        assert "Traceback" in capsys.readouterr().err and sys.argv == ["x.py"]
