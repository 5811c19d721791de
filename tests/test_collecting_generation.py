"""collecting/generation.py: what generate() draws."""

import argparse

import architectures
import pytest
import torch

import common
from collecting import generation
from collecting.flags import stop_string
from common import UserError

FEW = "Two men carry a sofa up the stairs: the men are brothers? Neutral. "


@pytest.fixture
def model(tiny):
    return generation.load_generator(str(tiny), torch.device("cpu"))[0]


def tokens_read(model, call):
    """-> (how many tokens each forward of the model reads in the call, what the call returns)"""
    read = []
    spy = lambda m, x, inputs: read.append((x[0] if x else inputs["input_ids"]).numel())  # noqa: E731
    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    returned = call()
    hook.remove()
    return read, returned


def assert_same(ours, theirs, within=1e-4):
    """Two lists of responses: the same, log-probabilities up to rounding."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a["text"], a["num_tokens"], a["finished"]) == (b["text"], b["num_tokens"], b["finished"])
        assert a["logprob"] == pytest.approx(b["logprob"], abs=within)


class TestGenerate:
    def test_samples_are_those_of_plain_generate(self, model, tokenizer, monkeypatch):
        """The prompt is read once, and the draw is the plain one: same seed, same tokens; log-probabilities are those
        before temperature and top_p, even where the model's own configuration asks for a repetition penalty."""
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
        options = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9}
        prompts = ["A man sleeps on the", "Two"]
        torch.manual_seed(1)
        ours = sum(generation.generate(model, tokenizer, prompts, num_samples=3, **options), [])
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        torch.manual_seed(1)
        plain = {"num_return_sequences": 3, "do_sample": True, "top_k": 0, "repetition_penalty": 1.0}
        out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **plain, **options)
        tokens = out[:, batch.input_ids.shape[1] :]
        want = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
        assert [r["text"] for r in ours] == want and len(set(want)) > 3
        for response, row in zip(ours, out):
            row = row[row != tokenizer.pad_token_id][None]
            with torch.no_grad():
                logp = model(row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])
            n = response["num_tokens"]
            assert response["logprob"] == pytest.approx(logp[-n:].sum().item(), abs=1e-3)

    @pytest.mark.parametrize(
        "ends", [("A dog runs:", "An old man with a hat sits on a bench in a park:", "x", ""), "xx"]
    )
    def test_what_prompts_begin_with_is_read_once(self, model, tokenizer, ends):
        """Prompts of different lengths behind the same examples: the answers and log-probabilities of each alone."""
        prompts, options = [FEW + x for x in ends], {"max_new_tokens": 8, "num_samples": 3}
        read, together = tokens_read(model, lambda: generation.generate(model, tokenizer, prompts, **options))
        ids = [common.prompt_ids(tokenizer, p) for p in prompts]
        shared = min(common.shared_start(ids[0], x[:-1]) for x in ids)
        rest = len(prompts) * (max(map(len, ids)) - shared)
        assert read[0] == shared > 32 and sum(read) <= shared + rest + 3 * len(prompts) * 8
        for prompt, answers in zip(prompts, together):
            assert_same(answers, generation.generate(model, tokenizer, [prompt], **options)[0])

    def test_every_eos_of_the_folder_ends_a_response(self, model, tokenizer, monkeypatch):
        """With several EOS ids, as of Llama-3, tokens and log-probabilities stop at the first of them; what else the
        folder's generation_config asks for shapes nothing."""
        config, options = model.generation_config, {"max_new_tokens": 8, "temperature": 0.0}
        ids = common.prompt_ids(tokenizer, "A man")
        plain = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        n = plain.index(plain[3])  # another EOS, in the middle of the response
        monkeypatch.setattr(config, "eos_token_id", [tokenizer.eos_token_id, plain[3]])
        monkeypatch.setattr(config, "suppress_tokens", [plain[0]])
        monkeypatch.setattr(config, "no_repeat_ngram_size", 1)
        with torch.no_grad():
            logp = model(torch.tensor([ids + plain])).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        [[got], _] = generation.generate(model, tokenizer, ["A man", "Two girls sit"], **options)
        assert_same([got], generation.generate(model, tokenizer, ["A man"], **options)[0])
        assert got["num_tokens"] == max(1, n) and got["finished"]
        assert got["text"] == tokenizer.decode(plain[:n], skip_special_tokens=True)  # nothing of it is stripped
        want = logp[range(max(1, n)), plain[: max(1, n)]].sum().item()
        assert got["logprob"] == pytest.approx(want, abs=1e-3)
        [[beams]] = generation.generate(model, tokenizer, ["A man"], num_beams=2, **options)
        assert "logprob" not in beams and model.generation_config is config

    @pytest.mark.parametrize("beams", [1, 2])
    def test_eos_is_not_among_the_first_tokens(self, model, tokenizer, monkeypatch, beams):
        options = {"max_new_tokens": 6, "num_beams": beams}
        [[plain]] = generation.generate(model, tokenizer, ["A man"], **options)
        first = tokenizer(plain["text"], add_special_tokens=False).input_ids[0]
        monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, first])
        if beams == 1:
            assert generation.generate(model, tokenizer, ["A man"], **options)[0][0]["text"] == ""
        [[got], _] = generation.generate(model, tokenizer, ["A man", "Two girls sit"], min_new_tokens=2, **options)
        assert got["num_tokens"] >= 2 and got["text"]
        monkeypatch.undo()
        stop = [tokenizer.decode(first)]  # then the whole response was this first token
        if beams == 1:
            assert generation.generate(model, tokenizer, ["A man"], stop=stop, **options)[0][0]["text"] == ""
        assert generation.generate(model, tokenizer, ["A man"], min_new_tokens=1, stop=stop, **options)[0][0]["text"]

    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    def test_a_batch_goes_on_without_the_rows_that_have_ended(self, model, tokenizer, monkeypatch, temperature):
        """One token in ten ends a response, or a stop string does: what is drawn from a seed is what an uncut batch
        draws, log-probabilities too, in fewer row-steps."""
        monkeypatch.setattr(model.generation_config, "eos_token_id", [*range(1, 400, 10)])
        prompts = ["A man sleeps on the bench", "Two girls", "Snow", "A dog runs after a red ball"]
        options = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.95, "stop": ("e", "an")}
        found = {}
        for kept in ("all", "window"):
            monkeypatch.setattr(generation, "kept_by", lambda model: kept)  # noqa: B023
            torch.manual_seed(3)
            read, rows = tokens_read(
                model, lambda: generation.generate(model, tokenizer, prompts, num_samples=4, **options)
            )
            found[kept] = sum(read), sum(rows, [])
        assert_same(found["all"][1], found["window"][1], within=1e-3)
        assert found["all"][0] < 0.8 * found["window"][0]

    @pytest.mark.parametrize("kind, kept", [("mistral", "window"), ("bamba", "state")])
    def test_models_that_keep_less_than_all(self, tokenizer, kind, kept):
        """A window, a state: each prompt's greedy answer is that of plain generate, and several can be drawn."""
        model = architectures.make(kind, vocab_size=len(tokenizer)).eval()
        assert generation.kept_by(model) == kept
        prompts = [FEW + x for x in ("A dog runs:", "An old man with a hat")]
        for prompt, [got] in zip(prompts, generation.generate(model, tokenizer, prompts, max_new_tokens=8)):
            ids = torch.tensor([common.prompt_ids(tokenizer, prompt)])
            plain = {"attention_mask": torch.ones_like(ids), "eos_token_id": tokenizer.eos_token_id}
            out = model.generate(ids, max_new_tokens=8, do_sample=False, **plain)[0, ids.shape[1] :]
            assert got["text"] == tokenizer.decode(out, skip_special_tokens=True)
            with torch.no_grad():
                logp = model(torch.cat([ids, out[None]], 1)).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            n = got["num_tokens"]
            assert got["logprob"] == pytest.approx(logp[range(n), out[:n]].sum().item(), abs=1e-3)
        options = {"max_new_tokens": 8, "num_samples": 3, "temperature": 0.9}
        drawn = generation.generate(model, tokenizer, prompts, **options)
        assert all(len({r["text"] for r in responses}) == 3 for responses in drawn)

    def test_stop_strings(self, model, tokenizer):
        options = {"max_new_tokens": 12, "temperature": 0.0}
        [[free]] = generation.generate(model, tokenizer, ["A man"], **options)
        cut = free["text"][2]
        [[stopped]] = generation.generate(model, tokenizer, ["A man"], stop=(cut,), **options)
        assert stopped["text"] == free["text"][: free["text"].index(cut)].rstrip() and stopped["finished"]
        assert stopped["num_tokens"] < free["num_tokens"] and stopped["logprob"] > free["logprob"]
        assert stop_string("a\\nb") == "a\nb"
        with pytest.raises(ValueError):  # it would end every response
            stop_string("")

    def test_prompt_is_cut_from_the_left(self, model, tokenizer):
        ids = common.prompt_ids(tokenizer, "one two three four")
        tail = tokenizer.decode(ids[-4:])
        options = {"max_new_tokens": 5, "temperature": 0.0}
        [long] = generation.generate(model, tokenizer, ["one two three four"], max_prompt_length=5, **options)
        assert_same(long, generation.generate(model, tokenizer, [tail], **options)[0])


def test_what_cannot_be_asked_is_refused(model, tokenizer):
    empty = argparse.Namespace(input_ids=[])
    unknown = type("", (), {"__call__": lambda *_, **k: empty, "bos_token": None})()  # it drops what it does not know
    with pytest.raises(UserError, match="no tokens"):
        common.prompt_ids(unknown, "\u200b")
    with pytest.raises(UserError, match="--temperature 0.0001"):
        generation.generate(model, tokenizer, ["A man"], max_new_tokens=1, temperature=0.0001)


def test_bf16_on_a_cpu(tiny):
    """The log-probabilities of --bf16's answers are those of fp32's, to a bf16's precision."""
    found = {}
    for bf16 in (False, True):
        model, tokenizer = generation.load_generator(str(tiny), torch.device("cpu"), bf16)
        [[found[bf16]]] = generation.generate(model, tokenizer, ["the cat sat"], max_new_tokens=1)
    assert model.dtype == torch.bfloat16 and found[True]["logprob"] != found[False]["logprob"]
    assert found[True]["logprob"] == pytest.approx(found[False]["logprob"], rel=0.02)
