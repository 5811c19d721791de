"""common.py's step: gradients on many architectures, FlexAttention's mask, logits in chunks, tokens that are kept."""

import argparse
import dataclasses
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, make_tokenizer
from torch.distributed.fsdp import fully_shard

import common
import reward_model
import runtime
from common import Encoded, candidate_logprobs, pack, pack_padded
from run import Run, peak_flops, speed

sys.path.insert(0, str(ROOT / "benchmarks"))
import scale  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 512},
}


HYBRIDS = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def make(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(ARCHITECTURES.get(kind, LLAMA) | more))
    return transformers.AutoModelForCausalLM.from_config(config).train()


def make_encoded(*shapes):
    """shapes: (prompt length, response lengths) of each record."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 64, (n,), generator=g).tolist()  # noqa: E731
    return [Encoded(str(i), draw(P), [draw(r) for r in R], 0, 0) for i, (P, R) in enumerate(shapes)]


ENCODED = make_encoded((11, [5, 3, 7]), (6, [4, 9]))


def make_tree():
    """Records whose sequences share starts in every way there is."""
    a, b = make_encoded((9, [6, 4]), (5, [7]))
    follow = lambda i, prompt, *responses: Encoded(str(i), prompt, [*responses], 0, 0)  # noqa: E731
    first, second = a.responses
    return [
        follow(0, a.prompt_ids, first, second, first[:3] + second, first),  # a shared start, the same candidate twice
        follow(1, a.prompt_ids + b.prompt_ids, *b.responses, [1]),  # a prompt before it is the start of this one
        follow(2, a.prompt_ids[:4] + b.prompt_ids, second, b.responses[0]),  # a template
        follow(3, a.prompt_ids + first[:2], first[2:], second),  # the end of a prompt stands in another's candidate
        follow(4, a.prompt_ids[:1], [1], [5, 1]),  # one token
        follow(5, [2], [1], first),
        follow(6, b.prompt_ids, second),
    ]


TREE = make_tree()
LONG = make_encoded((150, [40, 90, 1]), (1, [1, 1]), (300, [128] * 3), (20, [60, 7, 130, 33]))
FEW_SHOT = [dataclasses.replace(e, prompt_ids=LONG[2].prompt_ids + e.prompt_ids) for e in LONG]


def gradients(model, batch, **options):
    model.zero_grad()
    logprobs, lengths = candidate_logprobs(model, batch, **options)
    (common.length_normalized(logprobs, lengths, 0.85) * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return logprobs.detach(), {n: full(p.grad).clone() for n, p in model.named_parameters()}


def assert_same_gradients(got, want, bound=1e-5):
    """Relative difference of every parameter tensor; one whose gradient is rounding (a key's bias) beside the whole."""
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, g in want.items():
        assert (got[name] - g).norm() <= bound * max(g.norm(), 1e-4 * whole), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("attn", ["blocks", "sdpa"])
@pytest.mark.parametrize("encoded", [ENCODED, TREE], ids=["two prompts", "tree"])
def test_gradients_packed_and_padded(kind, attn, encoded, monkeypatch):
    monkeypatch.setattr(runtime, "CPU_BLOCK", 16)  # a span begins and ends within one, and reaches over several
    model = make(kind)
    model.set_attn_implementation(attn)
    packed, grads = gradients(model, runtime.pack_for(attn, encoded, torch.device("cpu")))
    padded, padded_grads = gradients(model, pack_padded(encoded))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
    assert_same_gradients(grads, padded_grads)


def test_blocks_never_hold_what_no_token_sees(monkeypatch):
    """Prompts of 8, each with 4 responses of 6, in blocks of 8 queries: their keys are the prompt (but for a block of
    its own) and at most two responses, never the other prompt, and the mask is not T x T in memory."""
    monkeypatch.setattr(runtime, "CPU_BLOCK", 8)
    seen, sdpa = [], F.scaled_dot_product_attention
    spy = lambda q, k, v, **options: seen.append((q.shape[2], k.shape[2])) or sdpa(q, k, v, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, encoded = make("llama", num_hidden_layers=1), make_encoded(*[(8, [6] * 4)] * 2)
    model.set_attn_implementation("blocks")
    batch = runtime.pack_for("blocks", encoded, torch.device("cpu"))
    common.candidate_logprobs(model, batch)
    assert seen == [(8, 8), (8, 16), (8, 18), (8, 20)] * 2
    assert batch.attention_mask.untyped_storage().nbytes() == 1


class TestRefused:
    """Never silently wrong: what would give other scores than padded rows is an error, padded rows still work."""

    @pytest.mark.parametrize(
        "attn, kind",
        [("eager", k) for k in ("llama", "gpt2", "opt", "gpt_neox")]
        + [("flex_attention", k) for k in ("llama", "opt")],
    )
    def test_attention_that_misreads_the_mask(self, attn, kind):
        model = make(kind)
        model.set_attn_implementation(attn)
        with pytest.raises(common.UserError, match=attn):
            candidate_logprobs(model, pack(ENCODED))
        if attn == "eager":
            got, _ = candidate_logprobs(model, pack_padded(ENCODED))
            want, _ = candidate_logprobs(make(kind), pack(ENCODED))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)

    @pytest.mark.parametrize("window, refused", [(17, True), (18, False)])
    def test_a_window_shorter_than_prompt_and_response(self, window, refused):
        model = make("mistral", sliding_window=window)  # the longest prompt and response: 11 + 7 tokens
        if refused:
            with pytest.raises(common.UserError, match="window of 17 is shorter than 18"):
                candidate_logprobs(model, pack(ENCODED))
        else:
            got, want = (candidate_logprobs(model, make_row(ENCODED))[0] for make_row in (pack, pack_padded))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)

    @pytest.mark.parametrize("kind", sorted(HYBRIDS))
    def test_layers_whose_state_runs_on(self, kind):
        """Barely trained, some of them come within rounding of padded rows: their config tells."""
        model = make(kind, **HYBRIDS[kind])
        assert model.config._attn_implementation == "sdpa"
        for read in (candidate_logprobs, reward_model.candidate_rewards):
            with pytest.raises(common.UserError, match="read a packed row as one text"):
                read(model, pack(ENCODED))
        assert candidate_logprobs(model, pack_padded(ENCODED))[0].isfinite().all()


DATA_SETS = [
    make_encoded(*[(9 + k, responses)] * 6) for responses in ([2, 2, 2], [1, 1], [20, 31, 26]) for k in range(4)
]


def without(what, batch):
    """A batch as a model sees it that ignores the mask or the positions."""
    T = batch.input_ids.shape[1]
    own = {"attention_mask": common.dense_mask(torch.full((T,), T)), "position_ids": torch.arange(T)[None]}
    return batch if batch.position_ids is None else dataclasses.replace(batch, **{what: own[what]})


class TestCheckPacking:
    """In bf16, on answers of one word and on explanations: right rows pass, both kinds of wrong ones do not."""

    @pytest.fixture(scope="class")
    def bf16(self):
        return make("llama", initializer_range=0.2).bfloat16()

    @pytest.mark.parametrize("encoded", DATA_SETS)
    def test_bf16_passes_and_what_ignores_mask_or_positions_does_not(self, bf16, encoded):
        bf16.set_attn_implementation("sdpa")
        common.check_packing(bf16, encoded)
        for what in ("attention_mask", "position_ids"):
            with pytest.raises(common.UserError, match="packed and padded rows differ by"):
                score = lambda b, what=what: torch.div(*candidate_logprobs(bf16, without(what, b)))  # noqa: E731
                common.check_packing(bf16, encoded, score=score)

    @pytest.mark.parametrize("what", ["attention_mask", "position_ids"])
    def test_a_model_that_drops_them_is_refused(self, what):
        """Nothing else tells: its config is that of a Llama with SDPA."""

        class Drops(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = make("llama", initializer_range=0.2)

            def forward(self, input_ids, **inputs):
                dropped = {what: None} if "position_ids" in inputs else {}  # of packed rows
                return self.module(input_ids, **inputs | dropped)

        with pytest.raises(common.UserError, match="packed and padded rows differ by"):
            common.check_packing(Drops(), ENCODED)

    @pytest.mark.parametrize("encoded", DATA_SETS)
    def test_reward_models(self, bf16, encoded):
        args = types.SimpleNamespace(padded=False, attn="sdpa", model="x")
        config = type(bf16.config).from_dict(bf16.config.to_dict() | {"num_labels": 1})
        model = transformers.AutoModelForSequenceClassification.from_config(config).bfloat16()
        model.score.weight.data.zero_()
        reward_model.add_score_forward(model)
        reward_model.check_packing(model, encoded, args, make_tokenizer(), torch.device("cpu"))
        forward = model.forward
        ignores = lambda ids, mask, positions, last: forward(  # noqa: E731
            ids, mask, positions if positions is None else torch.arange(ids.shape[1])[None], last
        )
        model.forward = ignores
        with pytest.raises(common.UserError, match="add --padded"):
            reward_model.check_packing(model, encoded, args, make_tokenizer(), torch.device("cpu"))


def test_a_wrapped_model_and_a_device_by_name():
    runtime.init_distributed()
    model = make("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    common.check_packing(wrapped, ENCODED)
    assert wrapped.training and model.plain_head
    want, want_grads = gradients(model, pack(ENCODED))
    wrapped.zero_grad()
    got, lengths = candidate_logprobs(wrapped, pack(ENCODED).to("cpu"), max_logits=4 * 64)
    (got / lengths**0.85 * torch.linspace(-1, 2, len(got))).sum().backward()
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-5)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, want_grads)


class TestFlex:
    @pytest.mark.parametrize("encoded", [LONG, LONG[1:2], make_encoded((128, [64, 64])), FEW_SHOT, TREE])
    def test_blocks_are_those_of_the_dense_mask(self, encoded):
        """Block by block: partly visible, wholly visible, or absent, as the T x T mask says; nothing is left out."""
        T, flex = pack(encoded).input_ids.shape[1], runtime.pack_for("flex_attention", encoded, torch.device("cpu"))
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
            plain, flex = pack(encoded), runtime.pack_for("flex_attention", encoded, torch.device("cpu"))
            T, filled = plain.input_ids.shape[1], flex.input_ids.shape[1]
            q, k, v = torch.randn(3, 1, 2, filled, 16)
            with torch.no_grad():
                got = flex_attention(q, k, v, block_mask=flex.attention_mask)[:, :, :T]
            q, k, v = (x[:, :, :T] for x in (q, k, v))
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=plain.attention_mask)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class TestChunks:
    @pytest.mark.parametrize("sharded", [False, True])
    def test_same_scores_and_gradients(self, sharded):
        """7 chunks of at most 4 of the 28 response tokens; under FSDP2 the head's weight is there again for them."""
        model, batch = make("llama", tie_word_embeddings=True), pack(ENCODED)
        want, want_grads = gradients(model, batch)
        if sharded:
            runtime.init_distributed()
            fully_shard(model.model.layers[0])
            fully_shard(model)
        seen, head = [], type(model.lm_head)
        model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        model.plain_head = True
        got, grads = gradients(model, batch, max_logits=4 * 64)
        assert seen == [(1, 28, 1)] and model.lm_head.forward.__func__ is head.forward
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert_same_gradients(grads, want_grads)
        if sharded:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize(
        "kind, plain", [("llama", True), ("gpt2", True), ("cohere", False), ("gemma3_text", False)]
    )
    def test_models_that_change_their_logits_are_found_out(self, kind, plain):
        model = make(kind, **({"final_logit_softcapping": 0.5} if kind == "gemma3_text" else {}))
        args = argparse.Namespace(padded=False, attn="sdpa", model=kind)
        runtime.check_packing(model, ENCODED, args, make_tokenizer(), torch.device("cpu"))
        assert model.plain_head is plain
        want, _ = gradients(model, pack(ENCODED))
        got, _ = gradients(model, pack(ENCODED), max_logits=1)  # a scaled or capped model's stay whole
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every, twice", [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1])])
def test_activation_checkpointing_every_nth_layer(every, twice, tmp_path, monkeypatch):
    make("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    monkeypatch.setattr(runtime, "load_tokenizer", lambda name: types.SimpleNamespace(get_vocab=lambda: {"a": 0}))
    runtime.init_distributed()
    args = types.SimpleNamespace(model=str(tmp_path), attn="sdpa", padded=False, max_length=64, allow_pickle=False)
    args.compile = False
    found = []
    for args.activation_checkpointing in ("auto", every):  # auto: none on a CPU
        model, _ = runtime.load_for_training(args, torch.device("cpu"))
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
    empty = runtime.unfilled(transformers.AutoModelForCausalLM, model.config, model.generation_config)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight and empty.device.type == "cpu"
    assert empty.generation_config is model.generation_config
    empty.load_state_dict(model.state_dict())
    for buffer, filled in zip(empty.buffers(), model.buffers(), strict=True):  # they are in no state dict
        buffer.copy_(filled)
    torch.testing.assert_close(gradients(empty, pack(ENCODED))[0], gradients(model, pack(ENCODED))[0])


def test_rows_are_the_plan_in_order():
    """Each row with its own prompts' tokens and values; the repeated one has weight 0."""
    runtime.init_distributed()
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


def test_describe_plan():
    """Two processes: rows of 80 and 60 tokens, then 50 and 70; the wait is for 80 + 70 = 150, the mean is 130."""
    plan = [[([0], 1.0), ([1, 2], 1.0)], [([3], 1.0), ([4], 1.0)]]
    encoded = make_encoded((70, [5, 5]), (15, [5]), (20, [10]), (50, [10]), (60, [10]))
    text = runtime.describe_plan(plan, encoded, 100)
    assert text == "2 rows each, 65% full, the slowest process 15% over the mean"


def test_prompts_that_share_a_start_are_planned_into_one_row():
    """Three templates of 50 tokens, three prompts each: 3 rows of 50 + 3 (2 + 5) = 71, where unshared it takes 9."""
    templates = [e.prompt_ids for e in make_encoded(*[(50, [1])] * 3)]
    encoded = [Encoded(str(i), templates[i % 3] + [60, i], [[7, 8, 9, 3, 1]], 0, 0) for i in range(9)]
    plan = runtime.plan_rows(encoded, 80, 1)
    assert sorted(plan[0]) == [([i, i + 3, i + 6], 1.0) for i in range(3)]
    assert runtime.unique_tokens([encoded[i] for i in plan[0][0][0]]) == 50 + 1 + 3 * 6
    assert runtime.describe_plan(plan, encoded, 80).startswith("3 rows each, 86% full")


class TestAttention:
    """What --attn gives a model, and what becomes of it."""

    def args(self, attn):
        return types.SimpleNamespace(attn=attn)

    @pytest.mark.parametrize(
        "kind, more, why",
        [
            ("gpt2", {}, "GPT2LMHeadModel has no FlexAttention"),
            ("llama", {"attention_dropout": 0.1}, "has attention_dropout 0.1, which FlexAttention lacks"),
        ],
    )
    def test_models_that_flex_is_not_for(self, kind, more, why):
        model, args = make(kind, **more), self.args("auto")
        runtime.set_attention(model, "flex", args)
        assert args.attn == "blocks" == model.config._attn_implementation
        with pytest.raises(common.UserError, match=why):
            runtime.set_attention(model, "flex", self.args("flex"))

    def test_models_that_flex_is_for(self):
        args = self.args("auto")
        runtime.set_attention(make("llama"), "flex", args)
        assert args.attn == "flex_attention"

    def test_blocks_survive_the_way_to_the_device(self, monkeypatch):
        """Pinning returns another tensor, without the attribute: a stand-in for CUDA does as much."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x.clone())
        batch = runtime.pack_for("blocks", ENCODED, torch.device("cpu"))
        moved = batch.to(torch.device("cuda"))
        assert moved.attention_mask.blocks and moved.input_ids is not batch.input_ids

    @pytest.mark.parametrize("inside, after", [("flex_attention", "sdpa"), ("blocks", "blocks")])
    def test_generation_in_training_is_not_flexs(self, inside, after):
        runtime.init_distributed()
        model = make("llama", attn_implementation=inside)
        with runtime.gathered(model), torch.no_grad():
            assert model.config._attn_implementation == after
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        torch.distributed.destroy_process_group()
        assert model.config._attn_implementation == inside


class TestMemory:
    @pytest.mark.parametrize("name, world", [("7B", 4), ("13B", 8), ("70B", 64)])
    def test_bytes_are_those_of_scale(self, name, world):
        want = scale.predict(scale.SHAPES[name], world)
        fixed = sum(want[k] for k in ("state", "gathered", "reduced", "logits"))
        got = runtime.training_bytes(scale.build(scale.SHAPES[name], "meta"), scale.T, world)
        assert got == (fixed + want["activations"], fixed + want["checkpointed"])

    @pytest.mark.parametrize("free, every", [(80e9, 0), (1e9, 1)])
    def test_auto_decides_by_free_memory(self, free, every, monkeypatch, capsys):
        runtime.init_distributed()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
        args = types.SimpleNamespace(max_tokens_per_row=None)
        assert runtime.decide_checkpointing(make("llama"), args, torch.device("cuda")) == every
        torch.distributed.destroy_process_group()
        line = "a GPU needs 1 GB as it is, 1 GB with activation checkpointing, and has"
        assert line in (out := capsys.readouterr().out) and out.count("\n") == 1

    def test_out_of_memory_is_a_sentence(self, capsys):
        def main():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")

        with pytest.raises(SystemExit) as left:
            runtime.run_cli(main)
        message = capsys.readouterr().err
        assert left.value.code == 2 and message.count("\n") == 1
        assert "Tried to allocate 2.50 GiB" in message and "--activation_checkpointing" in message

    def test_expandable_segments_unless_the_user_says_otherwise(self, monkeypatch):
        for own, want in ((None, "expandable_segments:True"), ("max_split_size_mb:64", None)):
            monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
            if own:
                monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
            runtime.init_distributed()
            torch.distributed.destroy_process_group()
            assert os.environ.get("PYTORCH_ALLOC_CONF") == want


def test_compiled_layers_learn_the_same():
    """Before fully_shard, over rows of two lengths; aot_eager traces as on CUDA and leaves inductor's minutes out."""
    runtime.init_distributed()
    found = []
    for compiled in (False, True):
        model = make("llama", num_hidden_layers=1)
        if compiled:
            runtime.compile_layers(model, backend="aot_eager")
        for layer in model.model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        model.set_attn_implementation("sdpa")
        found.append([gradients(model, pack(e)) for e in (ENCODED, ENCODED[:1])])
    torch.distributed.destroy_process_group()
    for (want, want_grads), (got, got_grads) in zip(*found):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert_same_gradients(got_grads, want_grads)


def test_mfu_counts_layers_alone(monkeypatch):
    runtime.init_distributed()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)  # q, o; k, v; MLP; norms
    figures = speed(make("llama"), 1000, 0.5, torch.device("cuda"))
    torch.distributed.destroy_process_group()
    assert figures == {"tok/s": 2000.0, "MFU": pytest.approx(6 * layers * 2000 / 989e12)}
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 NVL") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("some other") is None
