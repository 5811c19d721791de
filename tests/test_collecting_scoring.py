"""collecting/scoring.py: one reading for likelihoods and rewards, against one sequence at a time."""

import json

import architectures
import pytest
import torch
import transformers
from conftest import command, make_model, make_records, make_tokenizer, read_jsonl, run, write_jsonl

import common
from collecting import reward_models, scoring

SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.2}
HEADS = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "gpt_neox_reward_model": SIZES,
}


@pytest.fixture
def small_rows(monkeypatch):
    monkeypatch.setitem(scoring.ROW_TOKENS, "cpu", 300)


def make_classifier(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, num_labels=1, **(HEADS.get(kind, SIZES) | more))
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def test_likelihoods_are_those_of_one_sequence_at_a_time(monkeypatch):
    tokenizer, model = make_tokenizer(), make_model().eval()
    encoded, rows, pack_for = [common.encode(tokenizer, r, 200) for r in make_records(5)], [], common.pack_for
    monkeypatch.setitem(scoring.ROW_TOKENS, "cpu", 600)
    monkeypatch.setattr(common, "pack_for", lambda *x: rows.append(len(x[1])) or pack_for(*x))
    got = scoring.score_encoded(model, encoded)
    assert rows == [1, 1, 10, 10]  # the check, right and without a mask; five prompts of four candidates, one in both
    model.set_attn_implementation("sdpa")
    for e, (logprobs, lengths) in zip(encoded, got, strict=True):
        assert lengths.tolist() == [len(r) for r in e.responses]
        alone = [common.Encoded("", e.prompt_ids, [r], 0, 0) for r in e.responses]
        want = torch.cat([common.candidate_logprobs(model, common.pack_padded([x]))[0] for x in alone])
        torch.testing.assert_close(logprobs, want, atol=1e-3, rtol=1e-5)


def rewards(model, records):
    """-> (the rewards of the records' dialogues in rows, and those of the model's own forward, one at a time)"""
    tokenizer = make_tokenizer()
    dialogues = [reward_models.dialogue_ids(tokenizer, r, c, "plain") for r in records for c in r["candidates"]]
    got = reward_models.score_dialogues(model, dialogues)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        inputs = [torch.tensor([ids]) for ids in dialogues]
        return got, torch.cat([model(input_ids=x, attention_mask=torch.ones_like(x)).logits[0] for x in inputs])


@pytest.mark.parametrize("kind, pad", [*((kind, 1) for kind in HEADS), ("llama", None), ("llama", 2)])
def test_rewards_are_those_of_one_dialogue_at_a_time(kind, pad, small_rows):
    """Dialogues that share a beginning, as the model's own forward scores each: where EOS pads, up to what precedes."""
    model = make_classifier(kind, pad_token_id=pad)
    torch.nn.init.normal_(model.score.weight)
    got, want = rewards(model, make_records(6))
    assert model.reads_rows
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert len({round(x, 5) for x in got.tolist()}) == len(got)


@pytest.mark.parametrize(
    "kind, more, rows",
    [
        ("gpt_neox_reward_model", {"pooling": "mean"}, False),
        ("bert", {"max_position_embeddings": 512}, False),
        ("mistral", {"sliding_window": 70, "num_key_value_heads": 2}, True),  # its window is a term of the rows' mask
    ],
)
def test_what_cannot_read_rows_reads_one_dialogue_at_a_time(kind, more, rows, capsys):
    model = make_classifier(kind, pad_token_id=2, **more)
    got, want = rewards(model, make_records(2))
    said = capsys.readouterr().out.count("now one sequence at a time")
    assert (model.reads_rows, said) == (rows, not rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, attention", [("gpt2", "blocks"), ("llama", "flex_attention")])
def test_on_cuda_a_model_without_flex_attention_reads_blocks(kind, attention, monkeypatch):
    """GPT-2 has none: it must not end the run."""
    model = architectures.make(kind, head_dim=16)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(KeyError):  # as soon as the rows are checked
        scoring.score_rows(model, [common.Encoded(None, [5, 6], [[7]], 0, 0)], None, lambda some: {}["here"])
    assert model.config._attn_implementation == attention


def test_two_processes_score_what_one_does(monkeypatch, tiny, reward_folder, tmp_path):
    """And both stop and go on: what the second run finds done stays."""
    argv = ["rank", "--by", "reward", "--reward_model", reward_folder]
    argv += ["--input", write_jsonl(tmp_path / "in.jsonl", make_records(100)), "--output"]
    run(monkeypatch, *argv, tmp_path / "one.jsonl")
    command("torchrun", "--nproc_per_node", 2, "collect_candidates.py", *argv, tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").rename(tmp_path / "whole.jsonl")
    (tmp_path / "one.jsonl.part0").write_text("".join(lines[:5]) + lines[5][:50])
    run(monkeypatch, *argv, tmp_path / "one.jsonl")
    assert read_jsonl(tmp_path / "one.jsonl") == [json.loads(line) for line in lines]
