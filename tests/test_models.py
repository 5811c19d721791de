"""Windows, chunks, soft caps and sinks in packed rows; which architectures read them; what is loaded, checkpointed and
saved."""

import pytest
import torch
from architectures import ENCODED, LONG, TREE, assert_same_gradients, gradients, make, tiny

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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_eager_attention_reads_packed_rows(kind):
    model = make(kind)
    model.set_attn_implementation("eager")
    packed, grads = gradients(model, common.pack_for(model, ENCODED))
    padded, padded_grads = gradients(model, pack_padded(ENCODED))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
    assert_same_gradients(grads, padded_grads)
