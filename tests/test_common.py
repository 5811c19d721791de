"""common.py: flags, records, encoding, the row plan, packed against padded rows in values and gradients, what is
refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import ARCHITECTURES, ENCODED, TREE, assert_same_gradients, gradients, make, make_encoded
from conftest import make_model, make_records, make_tokenizer
from transformers import AutoModelForCausalLM

import common
import reward_model
from common import Encoded, candidate_logprobs, encode, pack, pack_padded, plan_rows


class TestEncode:
    def test_prompt_and_responses_apart_and_eos(self, tokenizer):
        record = {"id": "a", "prompt": "A man", "candidates": [{"text": " sleeps"}, {"text": "runs"}]}
        e = encode(tokenizer, record)
        assert e.prompt_ids[0] == tokenizer.bos_token_id and tokenizer.decode(e.prompt_ids[1:]) == "A man"
        assert [r[-1] for r in e.responses] == [tokenizer.eos_token_id] * 2
        assert [tokenizer.decode(r[:-1]) for r in e.responses] == [" sleeps", " runs"]  # the join: see space_before
        assert all(tokenizer.bos_token_id not in r for r in e.responses)

    def test_the_boundary_never_merges(self, tokenizer):
        """Two line ends joined would be another token sequence: the prompt's ids must be those of the prompt alone."""
        merging = make_tokenizer()
        merging.add_tokens(["\n\n"])
        together = merging("ma\n\nn", add_special_tokens=False).input_ids
        apart = encode(merging, {"id": "a", "prompt": "ma\n", "candidates": [{"text": "\nn"}]})
        assert apart.prompt_ids[1:] + apart.responses[0][:-1] != together
        assert merging.decode(apart.prompt_ids[1:] + apart.responses[0][:-1]) == "ma\n\nn"

    def test_response_from_the_right_then_prompt_from_the_left(self, tokenizer):
        record = {
            "id": "a",
            "prompt": "one two three four five six",
            "candidates": [{"text": "x y z u v w"}, {"text": "x"}],
        }
        full = encode(tokenizer, record)
        longest = len(full.responses[0])
        e = encode(tokenizer, record, max_length=longest + 7)  # responses first
        assert e.responses == full.responses and e.responses_cut == 0
        assert len(e.prompt_ids) == 7 and e.prompt_ids == full.prompt_ids[:1] + full.prompt_ids[-6:]
        assert e.prompt_cut == len(full.prompt_ids) - 7
        e = encode(tokenizer, record, max_length=12, max_prompt_length=7)  # prompts first
        assert (e.responses_cut, [len(r) for r in e.responses]) == (1, [5, len(full.responses[1])])
        assert e.responses[0] == full.responses[0][:5]  # cut, so without EOS
        assert e.prompt_ids == full.prompt_ids[:1] + full.prompt_ids[-6:]

    def test_a_response_longer_than_everything_leaves_some_prompt(self, tokenizer):
        e = encode(tokenizer, {"id": "a", "prompt": "one two", "candidates": [{"text": "word " * 50}]}, max_length=16)
        assert len(e.prompt_ids) == 2 and len(e.responses[0]) == 14 and tokenizer.eos_token_id not in e.responses[0]

    @pytest.mark.parametrize("words, kept", [(3, 384), (383, 384), (1000, 384)])
    def test_prompts_first(self, tokenizer, words, kept):
        """PRO: prompts to 384 tokens, prompt and response to 512; the response has all that the prompt leaves."""
        texts = ["y" * 10, "y" * 120, "y" * 128, "y" * 5000]
        record = {"id": "a", "prompt": "\n" * words, "candidates": [{"text": t, "source": "m"} for t in texts]}
        e = encode(tokenizer, record, 512, max_prompt_length=384)
        P = min(words + 1, kept)  # a token a character, and BOS
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

    @pytest.mark.parametrize(
        "prompt, text, joined",
        [("Assistant:", "Sure", "Assistant: Sure"), ("Answer:\n", "Sure", "Answer:\nSure")]
        + [("a ", "Sure", "a Sure"), ("a", "\nSure", "a\nSure"), ("a", "", "a")],
    )
    def test_the_join(self, tokenizer, prompt, text, joined):
        """One rule: what training scores is what export writes, and what a model says after the prompt."""
        e = encode(tokenizer, {"id": "a", "prompt": prompt, "candidates": [{"text": text}]})
        assert tokenizer.decode(e.prompt_ids[1:] + e.responses[0][:-1]) == joined
        assert prompt + common.space_before(prompt, text) + text == joined

    def test_a_tokenizer_that_begins_every_text_with_a_space(self):
        """SentencePiece, as Llama's: one space all the same, and the token that stands in running text."""
        from tokenizers import Tokenizer, decoders, models, normalizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<s>": 0, "</s>": 1, "\u2581Sure": 2, "\u2581": 3, "\u2581a": 4, "a": 5, ":": 6}
        merges = [("\u2581", "a")]
        for k in range(len("Sure")):
            vocabulary |= {"Sure"[k]: 10 + k, "\u2581" + "Sure"[: k + 1]: 2 if k == 3 else 20 + k}
            merges.append(("\u2581" + "Sure"[:k], "Sure"[k]))
        model = Tokenizer(models.BPE(vocabulary, merges))
        model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        model.decoder = decoders.Metaspace()
        plain = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
        e = encode(plain, {"id": "a", "prompt": "a:", "candidates": [{"text": "Sure"}]})
        assert e.prompt_ids + e.responses[0] == [4, 6, 2, 1] == [*plain("a: Sure").input_ids, 1]

    def test_bos_written_by_a_template_is_not_doubled(self, tokenizer):
        e = encode(tokenizer, {"id": "a", "prompt": "<s>hello", "candidates": [{"text": "x"}]})
        assert e.prompt_ids.count(tokenizer.bos_token_id) == 1

    def test_no_bos_where_the_tokenizer_adds_none(self):
        plain = make_tokenizer(bos=False)
        e = encode(plain, {"id": "a", "prompt": "hello", "candidates": [{"text": "x"}]}, max_length=512)
        assert plain.bos_token_id not in e.prompt_ids


class TestPlan:
    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("budget", [1, 100, 5000])
    def test_every_prompt_once_equal_rows_within_budget(self, world, budget):
        lengths = [30, 500, 70, 40, 99, 10, 55, 23, 41]
        encoded = [Encoded(str(i), [i] * (n - 2), [[1, 2]], 0, 0) for i, n in enumerate(lengths)]
        plan = plan_rows(encoded, budget, world)
        assert len(plan) == world and len({len(rows) for rows in plan}) == 1
        counted = sorted(i for rows in plan for row, weight in rows if weight for i in row)
        assert counted == list(range(len(lengths)))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for rows in plan for row, _ in rows)

    def test_fewer_prompts_than_ranks(self):
        plan = plan_rows([Encoded("a", [1] * 8, [[1, 2]], 0, 0)], 100, 4)
        assert [rows[0][1] for rows in plan] == [1.0, 0.0, 0.0, 0.0]

    def test_prompts_that_share_a_start_stand_in_one_row(self):
        """Three templates of 50 tokens, three prompts each: 3 rows of 50 + 1 + 3 x 6, where unshared it takes 9."""
        templates = [e.prompt_ids for e in make_encoded(*[(50, [1])] * 3)]
        encoded = [Encoded(str(i), templates[i % 3] + [60, i], [[7, 8, 9, 3, 1]], 0, 0) for i in range(9)]
        [rows] = plan_rows(encoded, 80, 1)
        assert sorted(rows) == [([i, i + 3, i + 6], 1.0) for i in range(3)]
        assert all(pack([encoded[i] for i in row]).input_ids.shape == (1, 69) for row, _ in rows)


def scores_and_gradients(model, batch, exponent=0.85):
    model.zero_grad()
    logprobs, lengths = candidate_logprobs(model, batch)
    weights = torch.linspace(-1, 1, len(logprobs))
    (common.length_normalized(logprobs, lengths, exponent) * weights).sum().backward()
    return logprobs.detach(), lengths, {n: p.grad.clone() for n, p in model.named_parameters()}


class TestPacking:
    @pytest.mark.parametrize("prompts", [1, 3])
    def test_packed_is_padded_is_one_by_one(self, tokenizer, prompts):
        model = make_model()
        encoded = [encode(tokenizer, r) for r in make_records(prompts)]
        packed, lengths, grads = scores_and_gradients(model, pack(encoded))
        padded, padded_lengths, padded_grads = scores_and_gradients(model, pack_padded(encoded, tokenizer.pad_token_id))
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
        assert torch.equal(lengths, padded_lengths)
        for name, g in padded_grads.items():
            assert (grads[name] - g).norm() <= 1e-5 * g.norm(), name
        plain = []  # the plainest way: one candidate at a time, no mask, no padding
        for e in encoded:
            for r in e.responses:
                with torch.no_grad():
                    logits = model(torch.tensor([e.prompt_ids + r])).logits[0, len(e.prompt_ids) - 1 : -1]
                plain.append(F.log_softmax(logits, -1).gather(1, torch.tensor(r)[:, None]).sum())
        torch.testing.assert_close(packed, torch.stack(plain), atol=1e-4, rtol=1e-5)
        assert lengths.tolist() == [len(r) for e in encoded for r in e.responses]

    def test_a_neighbour_changes_nothing(self, tokenizer):
        model, records = make_model(), make_records(2)
        a, b = (encode(tokenizer, r) for r in records)
        with torch.no_grad():
            alone, _ = candidate_logprobs(model, pack([a]))
            beside, _ = candidate_logprobs(model, pack([b, a]))
        torch.testing.assert_close(alone, beside[len(b.responses) :], atol=1e-4, rtol=1e-5)

    def test_eos_counts(self, tokenizer):
        """Length and sum include EOS: dropping it from the targets must change both."""
        e = encode(tokenizer, make_records(1)[0])
        batch = pack([e])
        assert (batch.targets == tokenizer.eos_token_id).sum() == len(e.responses)

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

    def test_length_normalisation_ignores_padding(self, tokenizer):
        """RRHF's bug: scores divided by the padded length. A long neighbour must leave a short one's score alone."""
        model, e = make_model(), encode(tokenizer, make_records(1)[0])
        longer = encode(tokenizer, {"id": "b", "prompt": "x " * 90, "candidates": [{"text": "y " * 60}]})
        with torch.no_grad():
            alone = common.length_normalized(*candidate_logprobs(model, pack_padded([e])), 1.0)
            beside = common.length_normalized(*candidate_logprobs(model, pack_padded([e, longer])), 1.0)
        torch.testing.assert_close(alone, beside[: len(alone)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value, low, ok", [("0.5", 0, True), ("-1", 0, False), ("nan", 0, False), ("inf", 0, False)])
def test_in_range(value, low, ok):
    parse = common.in_range(float, low)
    if ok:
        assert parse(value) == float(value)
    else:
        with pytest.raises(common.argparse.ArgumentTypeError):
            parse(value)


HYBRIDS = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("attn", ["blocks", "sdpa"])
@pytest.mark.parametrize("encoded", [ENCODED, TREE], ids=["two prompts", "tree"])
def test_gradients_packed_and_padded(kind, attn, encoded, monkeypatch):
    monkeypatch.setattr(common, "CPU_BLOCK", 16)  # a span begins and ends within one, and reaches over several
    model = make(kind)
    model.set_attn_implementation(attn)
    packed, grads = gradients(model, common.pack_for(model, encoded))
    padded, padded_grads = gradients(model, pack_padded(encoded))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-5)
    assert_same_gradients(grads, padded_grads)


class TestRefused:
    """Never silently wrong: what would give other scores than padded rows is an error, padded rows still work."""

    @pytest.mark.parametrize("kind", sorted(HYBRIDS))
    def test_layers_whose_state_runs_on(self, kind):
        """Barely trained, some of them come within rounding of padded rows: their config tells."""
        model = make(kind, **HYBRIDS[kind])
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(common.UserError, match="read a packed row as one text"):
            common.check_packing(model, ENCODED)
        assert candidate_logprobs(model, pack_padded(ENCODED))[0].isfinite().all()


DATA_SETS = [
    make_encoded(*[(9 + k, responses)] * 6) for responses in ([2, 2, 2], [1, 1], [20, 31, 26]) for k in range(4)
]


def without(what, batch):
    """A batch as a model sees it that ignores the mask or the positions."""
    T = batch.input_ids.shape[1]
    own = {
        "attention_mask": common.dense_mask(torch.full((T,), T), torch.arange(T)),
        "position_ids": torch.arange(T)[None],
    }
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
        config = type(bf16.config).from_dict(bf16.config.to_dict() | {"num_labels": 1})
        model = transformers.AutoModelForSequenceClassification.from_config(config).bfloat16()
        model.score.weight.data.zero_()
        reward_model.add_score_forward(model)
        reward_model.check_packing(model, encoded)
        forward = model.forward
        ignores = lambda ids, mask, positions, last: forward(  # noqa: E731
            ids, mask, positions if positions is None else torch.arange(ids.shape[1])[None], last
        )
        model.forward = ignores
        with pytest.raises(common.UserError, match="add --padded"):
            reward_model.check_packing(model, encoded)


def test_a_wrapped_model_and_a_device_by_name():
    common.init_distributed()
    model = make("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    common.check_packing(wrapped, ENCODED)
    assert wrapped.training
    want, want_grads = gradients(model, pack(ENCODED))
    wrapped.zero_grad()
    got, lengths = candidate_logprobs(wrapped, pack(ENCODED).to("cpu"))
    (got / lengths**0.85 * torch.linspace(-1, 2, len(got))).sum().backward()
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-5)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, want_grads)
