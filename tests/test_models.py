"""Windows, chunks, soft caps and sinks in packed rows; which architectures read them; what is loaded, checkpointed and
saved."""

import json

import pytest
import torch
from architectures import ENCODED, LONG, TREE, assert_same_gradients, gradients, make, tiny
from conftest import ROOT, make_model, make_tokenizer, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import common
from common import pack, pack_padded

WINDOWED = ["mistral", "mixtral", "phi3", "starcoder2", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"]
WINDOWED += ["ministral", "exaone4", "llama4_text", "vaultgemma"]


class TestWindows:
    @pytest.mark.parametrize("kind", WINDOWED)
    @pytest.mark.parametrize("encoded", [ENCODED, TREE], ids=["two prompts", "tree"])
    def test_packed_is_padded(self, kind, encoded, monkeypatch):
        """Windows shorter than a prompt, in blocks (or, where there is no SDPA, eager) and in prompts that share a
        start. Without the window's term log-probabilities are off by 0.1 and more."""
        monkeypatch.setattr(common, "CPU_BLOCK", 16)
        model = tiny(kind)
        common.set_attention(model, torch.device("cpu"))
        packed, grads = gradients(model, common.pack_for(model, encoded))
        padded, padded_grads = gradients(model, pack_padded(encoded))
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
        assert_same_gradients(grads, padded_grads)
        eager = model.config._attn_implementation == "eager"
        without = gradients(model, pack(encoded, common.added_mask if eager else common.dense_mask))
        assert (without[0] - padded).abs().max() > 0.01
        common.check_packing(model, encoded)

    @pytest.mark.parametrize("size", [1, 7, 300])
    @pytest.mark.parametrize("encoded", [LONG, TREE], ids=["long", "tree"])
    def test_all_forms_of_the_mask_say_the_same(self, size, encoded):
        """Token by token against the naive rule, on the path from the root: the last `size` ancestors."""
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
        assert torch.equal(blocks, dense)
        flex = pack(encoded, lambda end, depth: common.block_mask(end, depth, depth - size + 1), common.FLEX_BLOCK)
        index = torch.arange(T)
        assert torch.equal(flex.attention_mask.mask_mod(0, 0, index[:, None], index[None]), dense)

    def test_attention_that_follows_the_place_in_the_row(self):
        """Llama 4 scales queries by how many tokens of the row stand before them, from `floor_scale` tokens on."""
        rows = len(pack(ENCODED).input_ids[0])
        model = tiny("llama4_text", floor_scale=rows)
        with pytest.raises(common.UserError, match=f"set --max_tokens_per_row below {rows}"):
            common.pack_for(model, ENCODED)
        assert common.pack_for(tiny("llama4_text", floor_scale=rows + 1), ENCODED)

    def test_one_mask_where_no_window_binds(self):
        """The longest sequence has 18 tokens: at a window of 18 a row is packed as before, with one mask for all."""
        model = tiny("gemma3_text", sliding_window=18)
        assert isinstance(common.pack_for(model, ENCODED).attention_mask, torch.Tensor)
        model = tiny("gemma3_text", sliding_window=17)
        assert common.pack_for(model, ENCODED).attention_mask.keys() == {"full_attention", "sliding_attention"}

    def test_the_check_makes_the_window_matter(self):
        """A model that reads its window packed and not padded is found out, though the check's rows are short."""
        model = tiny("mistral", sliding_window=400)
        forward = model.forward
        model.forward = lambda input_ids, attention_mask, **inputs: forward(
            input_ids, attention_mask=attention_mask if attention_mask.dim() == 4 else full(input_ids), **inputs
        )
        with pytest.raises(common.UserError, match="packed and padded rows differ by"):
            common.check_packing(model, LONG + ENCODED)
        assert model.config.sliding_window == 400


def full(ids):
    return common.dense_mask(torch.full((ids.shape[1],), ids.shape[1]), torch.arange(ids.shape[1]))


TABLE = (ROOT / "PAPERS.md").read_text().partition("## Architectures")[2].partition("\n## ")[0]
READS = {how.strip(): names.split(", ") for _, how, names, _ in (x.split("|") for x in TABLE.splitlines() if "|" in x)}


class TestTheTable:
    """PAPERS.md says what reads packed rows and what does not; `python -m tests.architectures` writes it anew."""

    @pytest.mark.parametrize("name", map(str.strip, READS["packed"]))
    def test_packed_is_padded(self, name):
        model = tiny(name)
        common.set_attention(model, torch.device("cpu"))
        common.check_packing(model, TREE)
        model.eval()  # some drop or add noise in training
        packed, grads = gradients(model, common.pack_for(model, TREE))
        padded, padded_grads = gradients(model, pack_padded(TREE))
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
        assert_same_gradients(grads, padded_grads, floor=1e-2)

    @pytest.mark.parametrize("name", map(str.strip, READS["--padded"]))
    def test_the_others_are_refused(self, name):
        model = tiny(name)
        common.set_attention(model, torch.device("cpu"))
        with pytest.raises(common.UserError, match="add --padded"):
            common.check_packing(model, TREE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_eager_attention_reads_packed_rows(kind):
    model = make(kind)
    model.set_attn_implementation("eager")
    packed, grads = gradients(model, common.pack_for(model, ENCODED))
    padded, padded_grads = gradients(model, pack_padded(ENCODED))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
    assert_same_gradients(grads, padded_grads)


@pytest.fixture
def train(cli, data, tmp_path):
    """train(folder, *flags) -> the result of a run of rescue.py that takes two steps, in OUTPUT tmp_path/run."""

    def run(model, *flags):
        own = [
            "--ordering",
            "label",
            "--data",
            data,
            "--model",
            model,
            "--output",
            tmp_path / "run",
            "--max_length",
            128,
        ]
        return cli("rescue", *own, "--batch_size", 6, "--lr", 1e-9, *flags)

    return run


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "own", make_model())


def change(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def saved(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class TestRefused:
    """One sentence that says what to do, exit code 2, before a step is taken."""

    def test_max_length_beyond_learned_positions(self, train, tmp_path):
        sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 100}
        model = saved(tmp_path / "m", GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)))
        refused(train(model), "--max_length 128: it has 100 positions: set --max_length 100")
        refused(train(model, "--padded"), "set --max_length 100")

    @pytest.mark.parametrize("kind, more", [("dynamic", {}), ("longrope", {"original_max_position_embeddings": 100})])
    def test_positions_that_follow_the_longest_sequence_of_a_row(self, train, tmp_path, kind, more):
        """Scores of a prompt must not depend on what stands in its row: the same prompt beside a longer one."""
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | more
        if kind == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        model = make_model(rope_parameters=rope, max_position_embeddings=100)
        long = common.Encoded("b", [*range(3, 110)], [[5, 6]], 0, 0)
        with torch.no_grad():
            scores = [common.candidate_logprobs(model, pack(rows))[0][:3] for rows in (ENCODED[:1], [ENCODED[0], long])]
        assert (scores[0] - scores[1]).abs().max() > 1e-3  # this is what is refused
        refused(
            train(saved(tmp_path / "m", model)), f"beyond 100 tokens its {kind} positions change", "--max_length 100"
        )

    def test_an_adapter(self, train, tmp_path):
        (tmp_path / "m").mkdir()
        change(tmp_path / "m/adapter_config.json", base_model_name_or_path="x")
        refused(train(tmp_path / "m"), "it is an adapter: merge it into its base model")

    @pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
    def test_quantised_weights(self, train, folder, method):
        change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
        refused(train(folder), "its weights are quantised: give the model that is not")

    @pytest.mark.parametrize("name", ["bloom", "mpt", "falcon (alibi)", "mamba", "rwkv"])
    def test_what_cannot_read_packed_rows(self, name):
        """No sentence that does not help: alibi, running states and recurrence have no other attention to turn to."""
        model = tiny(name)
        common.set_attention(model, torch.device("cpu"))
        with pytest.raises(common.UserError, match="add --padded$"):
            common.check_packing(model, ENCODED)
        assert common.candidate_logprobs(model, pack_padded(ENCODED))[0].isfinite().all()

    def test_an_attention_that_the_model_has_not(self, train, tmp_path):
        model = tiny("gemma2", vocab_size=400, bos_token_id=0, eos_token_id=1)
        refused(train(saved(tmp_path / "m", model), "--attn", "sdpa"), "--attn sdpa: Gemma2ForCausalLM has no such")


def test_router_losses_are_left_out_and_say_so(train, tmp_path):
    """A config that asks for them ended packed rows in a crash, and padded rows ignored it without a word."""
    model = tiny("mixtral", vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.config.output_router_logits = True
    done = train(saved(tmp_path / "m", model))
    assert done.code == 0 and "the router loss that its config asks for" in done.out
    assert not json.loads((tmp_path / "run/model/config.json").read_text())["output_router_logits"]


def test_a_response_ends_where_the_saved_model_stops(train, folder, tmp_path):
    change(folder / "generation_config.json", eos_token_id=[7, 9])
    assert train(folder).code == 0
    ends = json.loads((tmp_path / "run/model/generation_config.json").read_text())["eos_token_id"]
    assert ends == [make_tokenizer().eos_token_id, 7, 9]


class TestWhatIsSaved:
    def test_two_matrices_that_the_config_calls_tied(self, train, folder, tmp_path):
        """Merged adapters: the head was dropped at the end, and logits were off by 7.9 after a run at lr 1e-9."""
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        ids = torch.arange(3, 20)[None]
        want = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert train(folder, "--checkpoint_every", 1).code == 0
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        torch.testing.assert_close(got(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert not got.config.tie_word_embeddings and got.lm_head.weight is not got.model.embed_tokens.weight

    def test_a_generation_config_that_cannot_be_saved(self, train, folder, tmp_path):
        """Vicuna's: a temperature without do_sample. The run trained to its end, and failed there."""
        change(folder / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False, eos_token_id=[1, 7])
        done = train(folder)
        assert done.code == 0 and "its generation_config.json is not valid" in done.out
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
