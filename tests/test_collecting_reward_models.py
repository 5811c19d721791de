"""collecting/reward_models.py for PRO: reward models, ranking by them, longer rankings."""

import json
import shutil
import sys
import types

import pytest
import torch
from conftest import change, change_weights, make_records, rank, read_jsonl, refused, write_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXModel

import common
from collecting import reward_models
from collecting.rank import expand_ranking, rank_flags

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def oasst(tiny, tmp_path_factory):
    """A tiny random checkpoint of OpenAssistant's type, with a tokenizer that has its marks."""
    folder = tmp_path_factory.mktemp("oasst")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|prompter|>", "<|assistant|>", "<|system|>"]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = reward_models.RewardModel(reward_models.RewardModelConfig(vocab_size=len(tokenizer), **sizes))
    torch.nn.init.normal_(model.out_proj.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(oasst, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(oasst, tmp_path / "copy")


def test_bin_weights_are_converted_once(oasst, tmp_path, cli, monkeypatch):
    """A folder and a hub id with .bin weights alone are refused, with both ways out; `convert` keeps the rewards."""
    hub = tmp_path / "hub/models--some--rm"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("abc")
    pickled = hub / "snapshots/abc"
    shutil.copytree(oasst, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    write_jsonl(tmp_path / "train.jsonl", make_records(3))
    rank = ["collect_candidates", "rank", "--by", "reward", "--input", str(tmp_path / "train.jsonl"), "--output"]
    ways = ("--allow_pickle", "collect_candidates.py convert --model")
    refused(cli(*rank, str(tmp_path / "a.jsonl"), "--reward_model", str(pickled)), *ways)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(cli(*rank, str(tmp_path / "b.jsonl"), "--reward_model", "some/rm"), *ways)
    safe = tmp_path / "safe"
    for said in ("safe", "is there"):
        result = cli("collect_candidates", "convert", "--model", str(pickled), "--output", str(safe))
        assert result.code == 0 and said in result.out
    for model, out in ((oasst, "c.jsonl"), (safe, "d.jsonl")):
        assert cli(*rank, str(tmp_path / out), "--reward_model", str(model)).code == 0
    rewards = [[c["reward"] for r in read_jsonl(tmp_path / x) for c in r["candidates"]] for x in ("c.jsonl", "d.jsonl")]
    assert rewards[0] == rewards[1] and (safe / "model.safetensors").exists()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_oasst_logits_are_the_direct_computation(copy, pooling):
    """Through the plain GPT-NeoX body of the saved weights, one dialogue at a time, against a padded batch."""
    config = json.loads((copy / "config.json").read_text())
    assert config["model_type"] == "gpt_neox_reward_model" and config["pooling"] == "last"
    change(copy / "config.json", pooling=pooling)
    dialogue = [("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")]
    records = [
        {"prompt": "Human: Why?", "messages": [{"role": r, "content": c} for r, c in dialogue]},
        {"prompt": "no messages: one turn of the user"},
    ]
    pairs = [(records[i], {"text": text}) for i, text in ((0, "Because of that."), (1, "Ok"), (0, ""))]
    got = reward_models.reward_logits(str(copy), CPU, pairs)
    weights, tokenizer = load_file(copy / "model.safetensors"), AutoTokenizer.from_pretrained(copy)
    known = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    body = GPTNeoXModel(GPTNeoXConfig(**{k: config[k] for k in known})).eval()
    body.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in weights.items() if k.startswith("gpt_neox.")})
    texts = [
        "<|prompter|>Hi</s><|assistant|>Hello.</s><|prompter|>Why?</s><|assistant|>Because of that.</s>",
        "<|prompter|>no messages: one turn of the user</s><|assistant|>Ok</s>",
        "<|prompter|>Hi</s><|assistant|>Hello.</s><|prompter|>Why?</s><|assistant|></s>",
    ]
    for reward, text in zip(got, texts):
        with torch.no_grad():
            states = body(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).last_hidden_state[0]
        state = states[-1] if pooling == "last" else states.mean(0)
        want = (weights["out_proj.weight"][0] @ state + weights["out_proj.bias"][0]).item()
        assert reward == pytest.approx(want, abs=1e-4)
    assert len({round(x, 4) for x in got}) == 3


def test_rank_by_reward_sorts(monkeypatch, oasst, tmp_path):
    """The candidates stand best first, and equal rewards share a rank."""
    before = make_records(3)
    before[0]["candidates"].append(before[0]["candidates"][1])
    after = rank(monkeypatch, tmp_path, before, "--by", "reward", "--reward_model", oasst)
    for old, new in zip(before, after, strict=True):
        rewards = [c["reward"] for c in new["candidates"]]
        assert rewards == sorted(rewards, reverse=True) and new["reward_model"] == str(oasst)
        assert [c["rank"] for c in new["candidates"]] == [sum(x > y for x in rewards) for y in rewards]
        assert sorted(c["text"] for c in new["candidates"]) == sorted(c["text"] for c in old["candidates"])
        alone = reward_models.reward_logits(str(oasst), CPU, [(old, new["candidates"][1])])
        assert rewards[1] == pytest.approx(alone[0], abs=1e-4)
    assert len({c["rank"] for c in after[0]["candidates"]}) == 4 < len(after[0]["candidates"])


def test_what_gives_no_reward_is_refused(cli, tiny, copy, data, tmp_path):
    """A causal language model; a reward that is not finite."""
    change_weights(copy, lambda weights: weights["out_proj.bias"].fill_(float("inf")))
    for model, message in ((tiny, "not a reward model"), (copy, "record 'r0'")):
        flags = ("--by", "reward", "--input", data, "--output", tmp_path / "r.jsonl", "--reward_model", model)
        refused(cli("collect_candidates", "rank", *flags), message)


def expanded(**flags):
    parser = common.Parser()
    rank_flags(parser.add_argument)
    args = parser.parse_args(["--by", "reward", *(x for k, v in flags.items() for x in (f"--{k}", str(v)))])
    sources = ["rejected", "chosen", "alpaca-7b", "gpt-3.5-turbo", "text-curie-001", "alpaca-7b", "alpaca-7b"]
    candidates = [{"text": f"{i}", "source": s} for i, s in enumerate(sources)]
    return [c["text"] for c in expand_ranking({"id": "a", "candidates": candidates}, args)["candidates"]]


def test_expansions():
    assert expanded(expand="ascending", ranking_length=3) == ["0", "1", "4"]  # curie first
    assert expanded(expand="ascending", ranking_length=5) == ["0", "1", "4", "2", "3"]
    assert expanded(expand="descending", ranking_length=4) == ["0", "1", "3", "2"]
    assert expanded(expand="alpacas", ranking_length=5) == ["0", "1", "2", "5", "6"]
    assert expanded(expand="chatgpt", ranking_length=3) == ["0", "1", "3"]
    draws = {tuple(expanded(expand="random", ranking_length=5, seed=s)) for s in range(30)}
    assert len(draws) == 6 and {d[:2] for d in draws} == {("0", "1")}
    with pytest.raises(common.UserError, match="too few responses of gpt-3.5-turbo.* for --expand chatgpt"):
        expanded(expand="chatgpt", ranking_length=4)
    with pytest.raises(common.UserError, match="too few responses of curie"):  # not Alpaca's in its place
        expanded(expand="ascending", ranking_length=3, expand_sources="curie")


def test_dialogue_forms(tiny):
    tokenizer = common.load_tokenizer(tiny)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    record = {"prompt": "Human: Hi\n\nAssistant:", "messages": [{"role": "user", "content": "Hi"}]}
    forms = {"plain": "<s>Human: Hi\n\nAssistant: Yes</s>", "chat_template": "[user]Hi;[assistant]Yes;"}
    forms["oasst"] = "<|prompter|>Hi</s><|assistant|>Yes</s>"
    for form, text in forms.items():
        assert tokenizer.decode(reward_models.dialogue_ids(tokenizer, record, {"text": "Yes"}, form)) == text
        long = record | {"prompt": "\n" * 3000, "messages": [{"role": "user", "content": "\n" * 3000}]}
        ids = reward_models.dialogue_ids(tokenizer, long, {"text": "the end"}, form)
        assert len(ids) == 1024 and tokenizer.decode(ids).rstrip("</s>;").endswith("the end")
    cut = reward_models.dialogue_ids(tokenizer, record, {"text": "Yes", "finished": False}, "plain")
    assert tokenizer.decode(cut) == forms["plain"].removesuffix("</s>")


def test_a_rule_is_a_reward_model_by_name(monkeypatch, tmp_path):
    """`rank --by reward --reward_model vader`, with a stand-in for the package; the mean is over sentences."""
    points = {"Good.": 0.5, "Bad!": -0.25, "So.": 0.0}
    analyzer = types.SimpleNamespace(polarity_scores=lambda sentence: {"compound": points[sentence]})
    fake = types.SimpleNamespace(SentimentIntensityAnalyzer=lambda: analyzer)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", fake)
    monkeypatch.setitem(sys.modules, "afinn", None)  # as if not installed
    reward_models.analyzer.cache_clear()
    texts = ("Bad!\nSo.", "Good.", "Good. Bad!")
    record = {"id": "1", "prompt": "p", "candidates": [{"text": t, "source": "m"} for t in texts]}
    [got] = rank(monkeypatch, tmp_path, [record], "--by", "reward", "--reward_model", "vader")
    found = [(c["text"], c["reward"], c["rank"]) for c in got["candidates"]]
    assert found == [("Good.", 2.0, 0), ("Good. Bad!", 0.5, 1), ("Bad!\nSo.", -0.5, 2)]
    with pytest.raises(common.UserError, match="pip install afinn"):
        reward_models.reward_logits("afinn", None, [({}, {"text": "Good."})])
    fake = types.SimpleNamespace(Afinn=lambda: types.SimpleNamespace(score=lambda text: 3.0 * ("good" in text)))
    monkeypatch.setitem(sys.modules, "afinn", fake)
    pairs = [({}, {"text": t}) for t in ("a good day", "", "bad")]
    assert reward_models.reward_logits("afinn", None, pairs) == [10.0, 0.0, 0.0]
    reward_models.analyzer.cache_clear()
