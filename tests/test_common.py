"""common.py: flags, records, encoding, the row plan, packed against padded rows in values and gradients, what is
refused."""

import pytest
import torch
import transformers
from architectures import ENCODED, assert_same_gradients, gradients, make, make_encoded, score_alone
from conftest import make_model, make_records, make_tokenizer
from transformers import AutoModelForCausalLM

import common
import reward_model
from common import Encoded, candidate_logprobs, encode, pack, pack_padded, plan_rows


class TestEncode:
    def test_the_boundary_never_merges(self, tokenizer):
        """Two line ends joined would be another token sequence: the prompt's ids must be those of the prompt alone."""
        merging = make_tokenizer()
        merging.add_tokens(["\n\n"])
        together = merging("ma\n\nn", add_special_tokens=False).input_ids
        apart = encode(merging, {"id": "a", "prompt": "ma\n", "candidates": [{"text": "\nn"}]})
        assert apart.prompt_ids[1:] + apart.responses[0][:-1] != together
        assert merging.decode(apart.prompt_ids[1:] + apart.responses[0][:-1]) == "ma\n\nn"

    def test_response_from_the_right_then_prompt_from_the_left(self, tokenizer):
        candidates = [{"text": "x y z u v w"}, {"text": "x"}]
        record = {"id": "a", "prompt": "one two three four five six", "candidates": candidates}
        full = encode(tokenizer, record)
        longest = len(full.responses[0])
        e = encode(tokenizer, record, max_length=longest + 7)  # responses first
        assert e.responses == full.responses and e.responses_cut == 0
        assert len(e.prompt_ids) == 7 and e.prompt_ids == full.prompt_ids[:1] + full.prompt_ids[-6:]
        assert e.prompt_cut == len(full.prompt_ids) - 7
        short = encode(tokenizer, record, max_length=5)  # a response longer than everything leaves some prompt
        assert len(short.prompt_ids) == 2 and len(short.responses[0]) == 3
        e = encode(tokenizer, record, max_length=12, max_prompt_length=7)  # prompts first
        assert (e.responses_cut, [len(r) for r in e.responses]) == (1, [5, len(full.responses[1])])
        assert e.responses[0] == full.responses[0][:5]  # cut, so without EOS
        assert e.prompt_ids == full.prompt_ids[:1] + full.prompt_ids[-6:]

    @pytest.mark.parametrize("words", [3, 383, 1000])
    def test_prompts_first(self, tokenizer, words):
        """PRO: prompts to 384 tokens, prompt and response to 512; the response has all that the prompt leaves."""
        texts = ["y" * 10, "y" * 120, "y" * 128, "y" * 5000]
        record = {"id": "a", "prompt": "\n" * words, "candidates": [{"text": t, "source": "m"} for t in texts]}
        e = encode(tokenizer, record, 512, max_prompt_length=384)
        P = min(words + 1, 384)  # a token a character, and BOS
        assert len(e.prompt_ids) == P and e.prompt_ids[0] == tokenizer.bos_token_id
        for text, ids in zip(texts, e.responses):
            whole = len(text) + 1 <= 512 - P  # with EOS
            assert len(ids) == (len(text) + 1 if whole else 512 - P)
            assert (ids[-1] == tokenizer.eos_token_id) == whole
        assert e.responses_cut == sum(len(t) + 1 > 512 - P for t in texts) and e.prompt_cut == words + 1 - P

    def test_only_whole_responses_end_with_eos(self, tokenizer):
        finished = [{}, {"finished": True}, {"finished": False}]
        e = encode(tokenizer, {"id": "a", "prompt": "p", "candidates": [{"text": "x y"} | f for f in finished]})
        assert [r[-1] == tokenizer.eos_token_id for r in e.responses] == [True, True, False]
        assert e.responses[2] == e.responses[0][:-1] and e.responses_cut == 0
        empty = encode(tokenizer, {"id": "a", "prompt": "p", "candidates": [{"text": "", "finished": False}]})
        assert empty.responses == [[tokenizer.eos_token_id]]  # something must be scored

    def test_no_bos_where_the_tokenizer_adds_none(self):
        plain = make_tokenizer(bos=False)
        e = encode(plain, {"id": "a", "prompt": "hello", "candidates": [{"text": "x"}]}, max_length=512)
        assert plain.bos_token_id not in e.prompt_ids


class TestPlan:
    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("budget", [1, 100, 5000])
    def test_every_prompt_once_equal_rows_within_budget(self, world, budget):
        """The last process may have no prompt of its own: a row of weight 0."""
        lengths = [30, 500, 70, 40, 99, 10, 55, 23, 41][: 9 if budget > 1 else 3]
        encoded = [Encoded(str(i), [i] * (n - 2), [[1, 2]], 0, 0) for i, n in enumerate(lengths)]
        plan = plan_rows(encoded, budget, world)
        assert len(plan) == world and len({len(rows) for rows in plan}) == 1
        counted = sorted(i for rows in plan for row, weight in rows if weight for i in row)
        assert counted == list(range(len(lengths)))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for rows in plan for row, _ in rows)

    def test_prompts_that_share_a_start_stand_in_one_row(self):
        """Three templates of 50 tokens, three prompts each: 3 rows of 50 + 1 + 3 x 6, where unshared it takes 9."""
        templates = [e.prompt_ids for e in make_encoded(*[(50, [1])] * 3)]
        encoded = [Encoded(str(i), templates[i % 3] + [60, i], [[7, 8, 9, 3, 1]], 0, 0) for i in range(9)]
        [rows] = plan_rows(encoded, 80, 1)
        assert sorted(rows) == [([i, i + 3, i + 6], 1.0) for i in range(3)]
        assert all(pack([encoded[i] for i in row]).input_ids.shape == (1, 69) for row, _ in rows)


class TestPacking:
    @pytest.mark.parametrize("prompts", [1, 3])
    def test_packed_is_padded_is_one_by_one(self, tokenizer, prompts):
        """Also lengths, EOS among them, which neither padding nor a neighbour changes (RRHF divided by the padded)."""
        model, encoded = make_model(), [encode(tokenizer, r) for r in make_records(prompts)]
        packed, grads = gradients(model, pack(encoded))
        padded, padded_grads = gradients(model, pack_padded(encoded, tokenizer.pad_token_id))
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
        assert_same_gradients(grads, padded_grads)
        alone, lengths = zip(*(found for e in encoded for found in score_alone(model, e)))
        torch.testing.assert_close(packed, torch.tensor(alone), atol=1e-4, rtol=1e-5)
        for batch in (pack(encoded), pack_padded(encoded)):
            assert candidate_logprobs(model, batch)[1].tolist() == [*lengths]

    def test_layout(self):
        """Two prompts, one the start of the other, and responses that begin alike: 5 6 7 1, 5 6 7 9 1 and 5 8 1."""
        a = common.Encoded("a", [5, 6], [[7, 9, 1], [7, 1]], 0, 0)
        batch = pack([a, common.Encoded("b", [5], [[8, 1]], 0, 0), a])
        assert batch.input_ids[0].tolist() == [5, 6, 7, 1, 9, 1, 8, 1]
        assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 3, 4, 1, 2]
        predicted = list(zip(batch.logit_positions.tolist(), batch.targets.tolist()))
        assert predicted == [(1, 7), (2, 1), (2, 9), (4, 1), (0, 8), (6, 1)]  # 7 once, for four candidates
        uses = sorted(zip(batch.candidate_index.tolist(), batch.token_index.tolist()))
        assert uses == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (2, 4), (2, 5), (3, 0), (3, 2), (3, 3), (4, 0), (4, 1)]
        assert batch.last_positions.tolist() == [5, 3, 7, 5, 3] and batch.sizes == [2, 1, 2]
        visible = batch.attention_mask[0, 0].int().tolist()
        assert visible[3] == [1, 1, 1, 1, 0, 0, 0, 0]
        assert visible[5] == [1, 1, 1, 0, 1, 1, 0, 0]  # its ancestors and itself
        assert visible[7] == [1, 0, 0, 0, 0, 0, 1, 1]

    def test_flex_scores(self, tokenizer, tmp_path):
        make_model().save_pretrained(tmp_path)
        encoded = [encode(tokenizer, r) for r in make_records(2)]
        load = AutoModelForCausalLM.from_pretrained
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            want, _ = candidate_logprobs(load(tmp_path), pack(encoded))
            model = load(tmp_path, attn_implementation="flex_attention").eval()
            got, _ = candidate_logprobs(model, common.pack_for(model, encoded))
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_in_range():
    assert common.in_range(float, 0)("0.5") == 0.5
    for value in ("-1", "nan", "inf"):
        with pytest.raises(common.argparse.ArgumentTypeError):
            common.in_range(float, 0)(value)


DATA_SETS = [make_encoded(*[(9 + k, responses)] * 6) for responses in ([2, 2, 2], [1, 1], [20, 31, 26]) for k in (0, 3)]


class Drops(torch.nn.Module):
    """A model whose packed rows lose their mask or their positions; its config does not tell."""

    def __init__(self, model, what):
        super().__init__()
        self.module, self.what = model, what

    def forward(self, input_ids, **inputs):
        return self.module(input_ids, **inputs | ({self.what: None} if "position_ids" in inputs else {}))


class TestCheckPacking:
    """In bf16, on answers of one word and on explanations: right rows pass, both kinds of wrong ones do not."""

    @pytest.fixture(scope="class")
    def bf16(self):
        return make("llama").bfloat16()

    @pytest.mark.parametrize("encoded", DATA_SETS)
    def test_right_rows_pass_and_wrong_ones_do_not(self, bf16, encoded):
        bf16.set_attn_implementation("sdpa")
        common.check_packing(bf16, encoded)
        for what in ("attention_mask", "position_ids"):
            with pytest.raises(common.UserError, match="packed and padded rows differ by"):
                common.check_packing(Drops(bf16, what), encoded)

    @pytest.mark.parametrize("encoded", DATA_SETS)
    def test_reward_models(self, bf16, encoded):
        config = type(bf16.config).from_dict(bf16.config.to_dict() | {"num_labels": 1})
        model = transformers.AutoModelForSequenceClassification.from_config(config).bfloat16()
        model.score.weight.data.zero_()
        reward_model.add_score_forward(model)
        reward_model.check_packing(model, encoded)
        forward = model.forward
        text = lambda ids, positions: positions if positions is None else torch.arange(ids.shape[1])[None]  # noqa: E731
        model.forward = lambda ids, mask, positions, last: forward(ids, mask, text(ids, positions), last)
        with pytest.raises(common.UserError, match="add --padded"):
            reward_model.check_packing(model, encoded)

    def test_a_wrapped_model(self):
        """DistributedDataParallel's: what it wraps is checked, and left in training mode."""
        common.init_distributed()
        wrapped = torch.nn.parallel.DistributedDataParallel(make("llama"))
        common.check_packing(wrapped, ENCODED)
        torch.distributed.destroy_process_group()
        assert wrapped.training
