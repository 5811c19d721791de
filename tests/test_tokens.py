"""The tokens of a response are those of prompt + join + text, whatever the tokenizer puts before a text; EOS once."""

import functools

import pytest
import torch
from conftest import make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import common
from collecting import generation
from common import encode, prompt_ids, response_ids
from recipes.tiny import ROWS

SPECIAL = ["<s>", "</s>", "<unk>"]
TEXTS = [f"{row['premise']} {row['hypothesis']} {row['explanation']}" for row in ROWS]


def finished(tokenizer, prefix="<s>"):
    special = [(t, tokenizer.token_to_id(t)) for t in prefix.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{prefix} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(old=True):
    """A BPE over whole texts that begins each with a space, as Llama's: by a normalizer (old) or by Metaspace."""
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = space
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=[":", "\n"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if old:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return finished(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": SPECIAL, "unk_token": "<unk>", "initial_alphabet": [":", "\n"], "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=400, **options))
    return finished(tokenizer)


@functools.cache
def make(kind):
    return {
        "bytes": make_tokenizer,
        "prepend": sentencepiece,
        "metaspace": lambda: sentencepiece(old=False),
        "unigram": unigram,
    }[kind]()


KINDS = ["bytes", "prepend", "metaspace", "unigram"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["a dog", "a dog:", "a dog ", "a dog\n", "a dog\n\n"])
@pytest.mark.parametrize("text", ["man", ": man", " man", "\nman", "man:\nis it", ""])
class TestTheRule:
    def test_tokens_are_those_of_the_text(self, kind, prompt, text):
        """Where no token crosses the boundary, they are what prompt + join + text has behind the prompt's."""
        tokenizer = make(kind)
        e = encode(tokenizer, {"id": "a", "prompt": prompt, "candidates": [{"text": text}]})
        joined = prompt + common.space_before(prompt, text) + text
        whole, head = tokenizer(joined).input_ids, tokenizer(prompt).input_ids
        assert e.prompt_ids == head
        if whole[: len(head)] == head:
            assert e.responses[0] == whole[len(head) :] + [tokenizer.eos_token_id]
        else:  # "a dog " + "man": the space is the prompt's
            assert prompt.endswith(" ") and text.startswith("man")
        assert tokenizer.decode(e.prompt_ids + e.responses[0], skip_special_tokens=True) == joined

    def test_what_generation_returns_scores_as_what_was_drawn(self, kind, prompt, text):
        """A model draws the tokens of a text; the text that `generate` writes down has these tokens again."""
        tokenizer = make(kind)
        drawn, model = response_ids(tokenizer, prompt, text), make_model(vocab_size=len(tokenizer))
        script = iter([*drawn, tokenizer.eos_token_id])
        model.lm_head.register_forward_hook(
            lambda m, x, y: torch.full_like(y, -50).index_fill(-1, torch.tensor([next(script)]), 9.0)
        )
        [[got]] = generation.generate(model.eval(), tokenizer, [prompt], max_new_tokens=99)
        again = encode(tokenizer, {"id": "a", "prompt": prompt, "candidates": [got]})
        assert got["finished"] and got["num_tokens"] == max(1, len(drawn))
        assert again.responses[0] == [*drawn, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "prompt, text, joined",
    [("Assistant:", "Sure", "Assistant: Sure"), ("Answer:\n", "Sure", "Answer:\nSure")]
    + [("a ", "Sure", "a Sure"), ("a", "\nSure", "a\nSure"), ("a", "", "a")],
)
def test_the_join(prompt, text, joined):
    """One rule: what training scores is what export writes, and what a model says after the prompt."""
    assert prompt + common.space_before(prompt, text) + text == joined


def test_the_default_models_tokens():
    """e-SNLI's prompt ends with a line end. Alone, the response began with a space that no sampled answer had."""
    tokenizer = make("prepend")
    pieces = lambda *texts: tokenizer.convert_ids_to_tokens(response_ids(tokenizer, *texts))  # noqa: E731
    assert pieces("Answer:\n", "man")[0] != "\u2581man" == pieces("Answer:", "man")[0]
    assert pieces("Answer:", " man") == pieces("Answer:", "man")  # a leading space is not doubled
    assert pieces("Answer:", "\nman")[0] == "\n" and pieces("Answer:\n", " man") == ["\u2581man"]


class TestPrefix:
    @pytest.mark.parametrize("prefix", ["<s>", "<unk> <s>", "<unk>"])
    def test_stands_once_and_stays_when_a_prompt_is_cut(self, prefix):
        """A tokenizer's own prefix, BOS or not: added, or already written by a chat template."""
        tokenizer = finished(Tokenizer.from_str(make("metaspace").backend_tokenizer.to_str()), prefix)
        own = [tokenizer.convert_tokens_to_ids(t) for t in prefix.split()]
        for prompt in ("a man sleeps", prefix.replace(" ", "") + "a man sleeps"):
            ids = prompt_ids(tokenizer, prompt)
            assert ids[: len(own)] == own and not {*own} & {*ids[len(own) :]}
            assert common.cut_left(tokenizer, ids, len(own) + 1) == own + ids[-1:]

    def test_a_tokenizer_that_closes_texts_with_eos(self):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        ids = prompt_ids(tokenizer, "a man")
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids

    def test_bos_and_eos_may_be_one_token(self):
        """OPT's."""
        tokenizer = finished(Tokenizer.from_str(make("unigram").backend_tokenizer.to_str()), "</s>")
        assert prompt_ids(tokenizer, "a man")[0] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s> \n\n"])
def test_eos_stands_once(kind, end):
    """Rendered chat pairs end with EOS already, some with a line end behind it."""
    tokenizer = make(kind)
    texts = ["a man" + end, "a man", end]
    e = encode(tokenizer, {"id": "a", "prompt": "two", "candidates": [{"text": t} for t in texts]})
    assert e.responses[0] == e.responses[1] and e.responses[1].count(tokenizer.eos_token_id) == 1
    assert e.responses[2] == [tokenizer.eos_token_id]
