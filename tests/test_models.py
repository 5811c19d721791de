"""Windows, chunks, soft caps and sinks in packed rows; which architectures read them; what is loaded, checkpointed and
saved."""

import json

import pytest
import torch
import transformers
from architectures import ENCODED, FEW_SHOT, LONG, TREE, assert_packed_is_padded, gradients, make, make_encoded
from conftest import ROOT, change, change_weights, make_model, make_tokenizer, refused, saved
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import common
from common import pack, pack_padded

WINDOWED = ["mistral", "mixtral", "phi3", "starcoder2", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"]
WINDOWED += ["ministral", "exaone4", "llama4_text", "vaultgemma"]
EXACT = [*WINDOWED, "llama", "qwen3", "gpt_neox", "gpt2"]  # gradients agree to 1e-5 even where they are small
TABLE = (ROOT / "PAPERS.md").read_text().partition("## Architectures")[2].partition("\n## ")[0]
READS = {how.strip(): names.split(", ") for _, how, names, _ in (x.split("|") for x in TABLE.splitlines() if "|" in x)}


def known(how):
    """The names of the table that this version of transformers has."""
    return [n for n in map(str.strip, READS[how]) if n.partition(" ")[0] in transformers.CONFIG_MAPPING]


class TestTheTable:
    """PAPERS.md says what reads packed rows and what does not; `python -m tests.architectures` writes it anew."""

    @pytest.mark.parametrize("name", known("packed"))
    def test_packed_is_padded(self, name, monkeypatch):
        """Prompts that share a start, in blocks (or, where there is no SDPA, eager), each over several of them. Windows
        are shorter than a prompt: without their term log-probabilities are off by 0.01 and more."""
        monkeypatch.setattr(common, "CPU_BLOCK", 16)
        model = make(name)
        common.set_attention(model, torch.device("cpu"))
        common.check_packing(model, TREE)
        model.eval()  # some drop or add noise in training
        padded = assert_packed_is_padded(model, TREE, floor=1e-4 if name in EXACT else 1e-2)
        if name in WINDOWED:
            eager = model.config._attn_implementation == "eager"
            without, _ = gradients(model, pack(TREE, common.added_mask if eager else common.dense_mask))
            assert (without - padded).abs().max() > 0.01

    @pytest.mark.parametrize("name", known("--padded"))
    def test_the_others_are_refused(self, name):
        """No other remedy is named: alibi, running states and recurrence have no attention to turn to."""
        model = make(name)
        common.set_attention(model, torch.device("cpu"))
        with pytest.raises(common.UserError, match="add --padded$"):
            common.check_packing(model, TREE)
        assert common.candidate_logprobs(model, pack_padded(ENCODED))[0].isfinite().all()

    @pytest.mark.parametrize("attn", ["blocks", "sdpa", "eager"])
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_each_attention(self, kind, attn):
        model = make(kind)
        model.set_attn_implementation(attn)
        assert_packed_is_padded(model, ENCODED)


class TestWindows:
    @pytest.mark.parametrize("size", [1, 7, 300])
    @pytest.mark.parametrize("encoded", [LONG, FEW_SHOT, TREE, make_encoded((128, [64, 64]))])
    def test_all_forms_of_the_mask_say_the_same(self, size, encoded):
        """Token by token against the naive rule, on the path from the root: the last `size` ancestors. FlexAttention's
        blocks are partly visible, wholly visible, or absent, as the T x T mask says."""
        end, depth = pack(encoded, lambda *tree: tree).attention_mask
        T = len(end)
        dense = common.dense_mask(end, depth, depth - size + 1)[0, 0]
        path = []
        for query in range(T):
            path = path[: depth[query]] + [query]
            assert dense[query].nonzero()[:, 0].tolist() == path[-size:]
        added = common.added_mask(end, depth, depth - size + 1)[0, 0]
        assert torch.equal(added == 0, dense) and added.masked_fill(dense, 0).isinf().sum() == (~dense).sum()
        blocks = torch.zeros(T, T, dtype=torch.bool)
        for i, (keys, visible) in enumerate(common.key_blocks(end, depth, depth - size + 1).blocks):
            blocks[i * common.CPU_BLOCK : i * common.CPU_BLOCK + len(visible), keys] = visible == 0
            assert (visible == 0).any(0).all()  # a key that no query of the block sees is not there
        assert torch.equal(blocks, dense)
        row = pack(encoded, lambda end, depth: common.block_mask(end, depth, depth - size + 1), common.FLEX_BLOCK)
        flex, index = row.attention_mask, torch.arange(row.input_ids.shape[1])
        filled = flex.mask_mod(0, 0, index[:, None], index[None])
        assert torch.equal(filled[:T, :T], dense) and not filled[:T, T:].any() and not filled[T:, :T].any()
        blocks = filled.view(len(index) // 128, 128, -1, 128)
        some, every = blocks.any(3).any(1), blocks.all(3).all(1)
        for want, number, indices in (
            (some & ~every, flex.kv_num_blocks, flex.kv_indices),
            (every, flex.full_kv_num_blocks, flex.full_kv_indices),
        ):
            for line, n, order in zip(want, number[0, 0], indices[0, 0]):
                assert sorted(order[:n].tolist()) == line.nonzero().flatten().tolist()

    def test_attention_that_follows_the_place_in_the_row(self):
        """Llama 4 scales queries by how many tokens of the row stand before them, from `floor_scale` tokens on."""
        rows = len(pack(ENCODED).input_ids[0])
        model = make("llama4_text", floor_scale=rows)
        with pytest.raises(common.UserError, match=f"set --max_tokens_per_row below {rows}"):
            common.pack_for(model, ENCODED)
        assert common.pack_for(make("llama4_text", floor_scale=rows + 1), ENCODED)

    @pytest.mark.parametrize("kind, size", [("gemma3_text", "sliding_window"), ("llama4_text", "attention_chunk_size")])
    def test_one_mask_where_no_window_binds(self, kind, size):
        """The longest sequence has 18 tokens: 18 leave out nothing, 17 do."""
        one, two = (common.pack_for(make(kind, **{size: n}), ENCODED).attention_mask for n in (18, 17))
        assert isinstance(one, torch.Tensor) and len(two) == 2

    def test_the_check_makes_the_window_matter(self):
        """A model that reads its window packed and not padded is found out, though the check's rows are short."""
        model = make("mistral", sliding_window=400)
        forward = model.forward

        def forget_the_window(input_ids, attention_mask, **inputs):
            T = input_ids.shape[1]
            padded = attention_mask.dim() == 2
            mask = common.dense_mask(torch.full((T,), T), torch.arange(T)) if padded else attention_mask
            return forward(input_ids, attention_mask=mask, **inputs)

        model.forward = forget_the_window
        with pytest.raises(common.UserError, match="packed and padded rows differ by"):
            common.check_packing(model, LONG + ENCODED)
        assert model.config.sliding_window == 400


@pytest.fixture
def step(train):
    """step(folder, *flags) -> the result of a run of this model, at a learning rate that changes no weight."""
    same = ["--max_length", 128, "--lr", 1e-9]
    return lambda folder, *flags, code=0: train("run", "--model", folder, *same, *flags, code=code)


class TestRefused:
    """One sentence that says what to do, exit code 2, before a step is taken."""

    def test_max_length_beyond_learned_positions(self, step, tmp_path):
        sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 100}
        model = saved(tmp_path / "m", GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)))
        refused(step(model, code=2), "--max_length 128: it has 100 positions: set --max_length 100")
        refused(step(model, "--padded", code=2), "set --max_length 100")

    @pytest.mark.parametrize("kind, more", [("dynamic", {}), ("longrope", {"original_max_position_embeddings": 100})])
    def test_positions_that_follow_the_longest_sequence_of_a_row(self, step, tmp_path, kind, more):
        """Scores of a prompt must not depend on what stands in its row: the same prompt beside a longer one."""
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | more
        if kind == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        model = make_model(rope_parameters=rope, max_position_embeddings=100)
        long = common.Encoded("b", [*range(3, 110)], [[5, 6]], 0, 0)
        with torch.no_grad():
            scores = [common.candidate_logprobs(model, pack(rows))[0][:3] for rows in (ENCODED[:1], [ENCODED[0], long])]
        assert (scores[0] - scores[1]).abs().max() > 1e-3  # this is what is refused
        done = step(saved(tmp_path / "m", model), code=2)
        refused(done, f"beyond 100 tokens its {kind} positions change", "--max_length 100")

    def test_an_adapter(self, step, tmp_path):
        (tmp_path / "m").mkdir()
        change(tmp_path / "m/adapter_config.json", base_model_name_or_path="x")
        refused(step(tmp_path / "m", code=2), "it is an adapter: merge it into its base model")

    @pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
    def test_quantised_weights(self, step, own, method):
        change(own / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
        refused(step(own, code=2), "its weights are quantised: give the model that is not")


def test_router_losses_are_left_out_and_say_so(step, tmp_path):
    """A config that asks for them ended packed rows in a crash, and padded rows ignored it without a word."""
    model = make("mixtral", vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.config.output_router_logits = True
    done = step(saved(tmp_path / "m", model))
    assert "the router loss that its config asks for" in done.out
    assert not json.loads((tmp_path / "run/model/config.json").read_text())["output_router_logits"]


def test_a_response_ends_where_the_saved_model_stops(step, own, tmp_path):
    change(own / "generation_config.json", eos_token_id=[7, 9])
    step(own)
    ends = json.loads((tmp_path / "run/model/generation_config.json").read_text())["eos_token_id"]
    assert ends == [make_tokenizer().eos_token_id, 7, 9]


class TestWhatIsSaved:
    def test_two_matrices_that_the_config_calls_tied(self, step, own, tmp_path):
        """Merged adapters: the head was dropped at the end, and logits were off by 7.9 after a run at lr 1e-9."""
        change_weights(own, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].flip(0).contiguous()}))
        ids = torch.arange(3, 20)[None]
        want = AutoModelForCausalLM.from_pretrained(own)(ids).logits
        step(own, "--checkpoint_every", 1)
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        torch.testing.assert_close(got(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert not got.config.tie_word_embeddings and got.lm_head.weight is not got.model.embed_tokens.weight

    def test_a_generation_config_that_cannot_be_saved(self, step, own, tmp_path):
        """Vicuna's: a temperature without do_sample. The run trained to its end, and failed there."""
        change(own / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False, eos_token_id=[1, 7])
        done = step(own)
        assert "its generation_config.json is not valid" in done.out
        kept = json.loads((tmp_path / "run/model/generation_config.json").read_text())
        assert kept["eos_token_id"] == [1, 7] and "temperature" not in kept


def test_parameters_without_gradients_are_no_obstacle_to_resuming(tmp_path):
    """A vision tower, a router's bias: they have no optimizer state. The next steps are those of the first run."""
    common.init_distributed()
    (tmp_path / "checkpoints").mkdir()

    def begin():
        model = make("llama")
        model.tower = torch.nn.Linear(3, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def steps(model, optimizer, number):
        for _ in range(number):
            (-common.candidate_logprobs(model, common.pack_for(model, ENCODED))[0].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = begin()
    steps(whole, optimizer, 3)
    common.save_checkpoint(tmp_path, 3, whole, optimizer)
    steps(whole, optimizer, 2)
    resumed, optimizer = begin()
    assert common.load_checkpoint(tmp_path, resumed, optimizer) == 3
    steps(resumed, optimizer, 2)
    torch.distributed.destroy_process_group()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.tower.weight not in optimizer.state
