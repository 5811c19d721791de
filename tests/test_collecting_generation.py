"""collecting/generation.py: what generate() draws."""

import pytest
import torch

import common
from collecting import generation
from common import UserError


class Nothing:
    """A tokenizer that drops what it does not know."""

    bos_token, input_ids = None, []

    def __call__(self, text, add_special_tokens=True):
        return self


class TestGenerate:
    def test_samples_are_those_of_plain_generate(self, tiny, tokenizer, monkeypatch):
        """The prompt is read once, and the draw is the plain one: same seed, same tokens; log-probabilities are those
        before temperature and top_p, even where the model's own configuration asks for a repetition penalty."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
        options = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9}
        prompts = ["A man sleeps on the", "Two"]
        torch.manual_seed(1)
        ours = generation.generate(model, tokenizer, prompts, num_samples=3, **options)
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        torch.manual_seed(1)
        plain = {"num_return_sequences": 3, "do_sample": True, "top_k": 0, "repetition_penalty": 1.0}
        out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **plain, **options)
        tokens = out[:, batch.input_ids.shape[1] :]
        want = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
        assert [r["text"] for group in ours for r in group] == want and len(set(want)) > 3
        for response, row in zip((r for group in ours for r in group), out):
            row = row[row != tokenizer.pad_token_id][None]
            with torch.no_grad():
                logp = model(row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])
            n = response["num_tokens"]
            assert response["logprob"] == pytest.approx(logp[-n:].sum().item(), abs=1e-3)

    @pytest.mark.parametrize("num_samples", [1, 3])
    def test_what_prompts_begin_with_is_read_once(self, tiny, tokenizer, num_samples):
        """Prompts of different lengths behind the same examples: the answers and log-probabilities of each alone."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        few = "Two men carry a sofa up the stairs: the men are brothers? Neutral. "
        prompts = [few + x for x in ("A dog runs:", "An old man with a hat sits on a bench in a park:", "x", "")]
        read, options = [], {"max_new_tokens": 8, "num_samples": num_samples}
        spy = lambda m, x, inputs: read.append((x[0] if x else inputs["input_ids"]).numel())  # noqa: E731
        hook = model.register_forward_pre_hook(spy, with_kwargs=True)
        together = generation.generate(model, tokenizer, prompts, **options)
        hook.remove()
        shared = len(common.prompt_ids(tokenizer, few)) - 1
        longest = max(len(common.prompt_ids(tokenizer, p)) for p in prompts)
        assert read[0] == shared > 32 and sum(read[:2]) <= shared + 4 * (longest - shared)
        for prompt, answers in zip(prompts, together):
            [alone] = generation.generate(model, tokenizer, [prompt], **options)
            assert [a["text"] for a in answers] == [a["text"] for a in alone]
            assert [a["logprob"] for a in answers] == pytest.approx([a["logprob"] for a in alone], abs=1e-4)

    @pytest.mark.parametrize("ends", ["xx", "xy"])
    def test_prompts_that_differ_in_their_last_token_or_not_at_all(self, tiny, tokenizer, ends):
        """All before it is the shared start: nothing is left of them to read."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        few = "Two men carry a sofa up the stairs: the men are brothers? Neutral. "
        options = {"max_new_tokens": 8, "num_samples": 3}
        for x, answers in zip(ends, generation.generate(model, tokenizer, [few + x for x in ends], **options)):
            [alone] = generation.generate(model, tokenizer, [few + x], **options)
            assert [a["text"] for a in answers] == [a["text"] for a in alone]
            assert [a["logprob"] for a in answers] == pytest.approx([a["logprob"] for a in alone], abs=1e-4)

    def test_every_eos_of_the_folder_ends_a_response(self, tiny, tokenizer, monkeypatch):
        """With several EOS ids, as of Llama-3, tokens and log-probabilities stop at the first of them; what else the
        folder's generation_config asks for shapes nothing."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        config, options = model.generation_config, {"max_new_tokens": 8, "temperature": 0.0}
        ids = common.prompt_ids(tokenizer, "A man")
        plain = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        n = plain.index(plain[3])  # another EOS, in the middle of the response
        monkeypatch.setattr(config, "eos_token_id", [tokenizer.eos_token_id, plain[3]])
        monkeypatch.setattr(config, "suppress_tokens", [plain[0]])
        monkeypatch.setattr(config, "no_repeat_ngram_size", 1)
        with torch.no_grad():
            logp = model(torch.tensor([ids + plain])).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        both = generation.generate(model, tokenizer, ["A man", "Two girls sit"], **options)
        for got in (both[0][0], generation.generate(model, tokenizer, ["A man"], **options)[0][0]):
            assert got["num_tokens"] == max(1, n) and got["finished"]
            assert got["text"] == tokenizer.decode(plain[:n], skip_special_tokens=True)  # nothing of it is stripped
            want = logp[range(max(1, n)), plain[: max(1, n)]].sum().item()
            assert got["logprob"] == pytest.approx(want, abs=1e-3)
        assert model.generation_config is config

    @pytest.mark.parametrize("beams", [1, 2])
    def test_eos_is_not_among_the_first_tokens(self, tiny, tokenizer, monkeypatch, beams):
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        options = {"max_new_tokens": 6, "num_beams": beams}
        [[plain]] = generation.generate(model, tokenizer, ["A man"], **options)
        first = tokenizer(plain["text"], add_special_tokens=False).input_ids[0]
        monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, first])
        if beams == 1:
            assert generation.generate(model, tokenizer, ["A man"], **options)[0][0]["text"] == ""
        [[got], _] = generation.generate(model, tokenizer, ["A man", "Two girls sit"], min_new_tokens=2, **options)
        assert got["num_tokens"] >= 2 and got["text"]

    def test_what_would_empty_every_response_is_refused(self, tiny, tokenizer):
        with pytest.raises(UserError, match="--stop"):
            generation.unescape(["x", ""])
        with pytest.raises(UserError, match="no tokens"):
            common.prompt_ids(Nothing(), "\u200b")

    def test_samples_follow_the_models_distribution(self, tiny, tokenizer, monkeypatch):
        """4,000 first tokens of a batch of unequal prompts against the exact softmax: chi-square of the 20 likeliest
        and the rest; 45.3 is passed by chance once in 1,000 times with 20 degrees of freedom, and the seed is fixed."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        seen, generate = [], type(model).generate
        monkeypatch.setattr(type(model), "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
        prompts = ["A man sleeps on the bench", "Two girls"]
        torch.manual_seed(0)
        for _ in range(4):
            generation.generate(model, tokenizer, prompts, num_samples=1000, max_new_tokens=1, temperature=0.8)
        for i, prompt in enumerate(prompts):
            drawn = torch.cat([out.sequences[i * 1000 : (i + 1) * 1000, -1] for out in seen])
            with torch.no_grad():
                exact = (model(torch.tensor([common.prompt_ids(tokenizer, prompt)])).logits[0, -1] / 0.8).softmax(-1)
            top = exact.topk(20).indices
            counts = torch.bincount(drawn, minlength=400).double()
            p = torch.cat([exact[top].double(), 1 - exact[top].double().sum()[None]])
            observed = torch.cat([counts[top], 4000 - counts[top].sum()[None]])
            assert ((observed - 4000 * p) ** 2 / (4000 * p)).sum() < 45.3

    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    def test_a_batch_goes_on_without_the_rows_that_have_ended(self, tiny, tokenizer, monkeypatch, temperature):
        """One token in ten ends a response, or a stop string does: what is drawn from a seed is what an uncut batch
        draws, log-probabilities too, in fewer row-steps."""
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        monkeypatch.setattr(model.generation_config, "eos_token_id", [*range(1, 400, 10)])
        prompts = ["A man sleeps on the bench", "Two girls", "Snow", "A dog runs after a red ball"]
        found = []
        for cut in (True, False):
            monkeypatch.setattr(generation, "is_plain", lambda model: cut)  # noqa: B023
            read = []
            hook = model.register_forward_pre_hook(
                lambda m, x, inputs: read.append(inputs["input_ids"].numel()),  # noqa: B023
                with_kwargs=True,
            )
            torch.manual_seed(3)
            options = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.95, "stop": ("e", "an")}
            found.append(generation.generate(model, tokenizer, prompts, num_samples=4, **options))
            hook.remove()
            found.append(sum(read))
        for a, b in zip(sum(found[0], []), sum(found[2], []), strict=True):
            assert (a["text"], a["num_tokens"], a["finished"]) == (b["text"], b["num_tokens"], b["finished"])
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)
        assert found[1] < 0.8 * found[3]

    def test_stop_strings(self, tiny, tokenizer):
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        options = {"max_new_tokens": 12, "temperature": 0.0}
        [[free]] = generation.generate(model, tokenizer, ["A man"], **options)
        cut = free["text"][2]
        [[stopped]] = generation.generate(model, tokenizer, ["A man"], stop=(cut,), **options)
        assert stopped["text"] == free["text"][: free["text"].index(cut)].rstrip() and stopped["finished"]
        assert stopped["num_tokens"] < free["num_tokens"] and stopped["logprob"] > free["logprob"]

    def test_prompt_is_cut_from_the_left(self, tiny, tokenizer):
        model, _ = generation.load_generator(str(tiny), torch.device("cpu"))
        ids = common.prompt_ids(tokenizer, "one two three four")
        tail = tokenizer.decode(ids[-4:])
        options = {"max_new_tokens": 5, "temperature": 0.0}
        long = generation.generate(model, tokenizer, ["one two three four"], max_prompt_length=5, **options)
        assert long[0][0]["text"] == generation.generate(model, tokenizer, [tail], **options)[0][0]["text"]


def test_bf16_on_a_cpu(tiny):
    """The log-probabilities of --bf16's answers are those of fp32's, to a bf16's precision."""
    found = {}
    for bf16 in (False, True):
        model, tokenizer = generation.load_generator(str(tiny), torch.device("cpu"), bf16)
        [[found[bf16]]] = generation.generate(model, tokenizer, ["the cat sat"], max_new_tokens=1)
    assert model.dtype == torch.bfloat16 and found[True]["logprob"] != found[False]["logprob"]
    assert found[True]["logprob"] == pytest.approx(found[False]["logprob"], rel=0.02)
