"""collecting/sample.py: what a record holds, seeds, prompts, kills, and Tuna's diversity rule."""

import argparse
import json
import types
from collections import Counter

import pytest
import torch
from conftest import command, make_records, read_jsonl, refused, run, write_jsonl

import common
from collecting import generation
from collecting.answers import parse_nli
from collecting.prompts import shown_prompts
from collecting.sample import keep_diverse, max_similarity
from common import UserError


@pytest.fixture
def prompts(tmp_path):
    records = make_records(6)
    for r in records:
        r["candidates"] = r["candidates"][:1]
    return write_jsonl(tmp_path / "prompts.jsonl", records)


def sample(cli, tiny, prompts, out, *args):
    flags = ("--num_samples", 2, "--max_new_tokens", 6, "--batch_size", 2, "--source", "tiny")
    return cli("collect_candidates", "sample", "--model", tiny, "--input", prompts, "--output", out, *flags, *args)


class TestSample:
    def test_records_and_log_probabilities(self, cli, tiny, prompts, tmp_path):
        """Every response's logprob is what a plain forward gives its tokens (raw tokens, so greedy text is
        re-tokenised here)."""
        assert sample(cli, tiny, prompts, tmp_path / "s.jsonl", "--temperature", 0).code == 0
        model, tokenizer = generation.load_generator(str(tiny), torch.device("cpu"))
        for record, source in zip(read_jsonl(tmp_path / "s.jsonl"), read_jsonl(prompts)):
            assert record["id"] == source["id"] and record["candidates"][0] == source["candidates"][0]
            a, b = record["candidates"][1:]
            assert a == b and a["source"] == "tiny" and 1 <= a["num_tokens"] <= 6  # greedy: both the same
            ids = torch.tensor([common.prompt_ids(tokenizer, record["prompt"])])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[
                0, ids.shape[1] :
            ]
            with torch.no_grad():
                logits = model(torch.cat([ids, out[None]], 1)).logits[0, ids.shape[1] - 1 : -1]
            counted = len(out) - (a["finished"] and len(out) > 1)  # EOS does not count
            want = torch.log_softmax(logits, -1).gather(1, out[:, None])[:counted].sum().item()
            assert a["logprob"] == pytest.approx(want, abs=1e-3) and a["num_tokens"] == counted
            assert a["text"] == tokenizer.decode(out, skip_special_tokens=True)  # the prompt ends with white space

    def test_seeded_and_independent_of_ranks(self, cli, tiny, prompts, tmp_path):
        for name in ("a", "b"):
            sample(cli, tiny, prompts, tmp_path / f"{name}.jsonl", "--seed", 3)
        sample(cli, tiny, prompts, tmp_path / "c.jsonl", "--seed", 4)
        flags = ["--num_samples", "2", "--max_new_tokens", "6", "--batch_size", "2", "--source", "tiny", "--seed", "3"]
        command(
            "torchrun",
            "--nproc_per_node",
            2,
            "collect_candidates.py",
            "sample",
            "--model",
            tiny,
            "--input",
            prompts,
            "--output",
            tmp_path / "d.jsonl",
            *flags,
        )
        a, b, c, d = ((tmp_path / f"{x}.jsonl").read_text() for x in "abcd")
        assert a == b and a != c
        assert [[x["text"] for x in json.loads(line)["candidates"]] for line in d.splitlines()] == [
            [x["text"] for x in json.loads(line)["candidates"]] for line in a.splitlines()
        ]

    def test_killed_and_run_again(self, cli, tiny, prompts, tmp_path):
        """Half a run, its last line torn, goes on to the very file of an uninterrupted run."""
        out = tmp_path / "s.jsonl"
        sample(cli, tiny, prompts, out)
        whole = out.read_bytes()
        lines = whole.splitlines(keepends=True)
        out.unlink()
        (tmp_path / "s.jsonl.part0").write_bytes(lines[4] + lines[1] + lines[3][:50])
        assert sample(cli, tiny, prompts, out).code == 0
        assert out.read_bytes() == whole and not list(tmp_path.glob("s.jsonl.part*"))

    def test_torn_output_itself(self, cli, tiny, prompts, tmp_path):
        out = tmp_path / "s.jsonl"
        sample(cli, tiny, prompts, out)
        whole = out.read_bytes()
        out.write_bytes(whole[:-30])
        assert sample(cli, tiny, prompts, out).code == 0 and out.read_bytes() == whole

    def test_other_arguments_are_refused(self, cli, tiny, prompts, tmp_path):
        sample(cli, tiny, prompts, tmp_path / "s.jsonl")
        before = (tmp_path / "s.jsonl").read_bytes()
        refused(sample(cli, tiny, prompts, tmp_path / "s.jsonl", "--temperature", 0.5), "temperature", "s.jsonl")
        prompts.write_text(prompts.read_text().replace("Answer", "Reply"))
        refused(sample(cli, tiny, prompts, tmp_path / "s.jsonl"), "content of")
        assert (tmp_path / "s.jsonl").read_bytes() == before


def test_shown_prompts(tmp_path):
    record = {"prompt": "P", "premise": "A {man} sits.", "hypothesis": "He sleeps.", "candidates": []}
    args = types.SimpleNamespace(shots=0, prompt_file=None)
    assert shown_prompts(args, [record]) == ["P"]
    (tmp_path / "t.txt").write_text("Look: {prompt} {hypothesis}")
    args.prompt_file = str(tmp_path / "t.txt")
    assert shown_prompts(args, [record]) == ["Look: P He sleeps."]
    args.shots = 3
    [text] = shown_prompts(args, [record])
    *examples, asked = text.split("\n\n")
    assert [parse_nli(e.split(":\n")[1]) for e in examples] == [
        (x, True) for x in ("contradiction", "neutral", "entailment")
    ]
    assert "Premise: A {man} sits.\nHypothesis: He sleeps.\n" in asked and asked.endswith("entailment:\n")
    with pytest.raises(UserError, match="premise"):
        shown_prompts(args, [{"prompt": "P"}])


def test_two_prompts_at_once_are_refused(cli):
    for script, verb in (("collect_candidates", "sample"), ("collect_candidates", "teacher"), ("evaluate", "nli")):
        flags = ("--model", "m", "--input", "x.jsonl", "--shots", 3, "--prompt_file", "t.txt")
        refused(cli(script, verb, *flags), "--prompt_file", "--shots")


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat": precision 3/4, recall 3/5, F1 2/3
    assert max_similarity("the cat sat down", ["the old cat sat there", "nothing"]) == pytest.approx(2 / 3)
    assert max_similarity("a b", []) == 0
    assert max_similarity("你好", ["你好"]) == 1 and max_similarity("", [""]) == 1


def diverse(first, later, **changes):
    """Run the rule on one prompt; `later` are the texts drawn at each trial -> (kept texts, temperatures, counts)."""
    settings = {"max_rouge_l": 0.8, "temperature": 1.0, "temperature_step": 0.1, "max_trials": 3} | changes
    asked, count, trials = [], Counter(), iter(later)

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n, temperature))
        return [[{"text": text} for text in next(trials)[:n]] for _ in numbers]

    [kept] = keep_diverse([[{"text": t} for t in first]], draw, argparse.Namespace(**settings), count)
    return [r["text"] for r in kept], asked, count


def test_diverse_responses_stay():
    kept, asked, count = diverse(["a b c", "d e f", "g h i", "j k l"], [])
    assert kept == ["a b c", "d e f", "g h i", "j k l"] and asked == []
    assert count == {"kept at once": 4, "pairs": 6, "similar pairs before": 0, "similar pairs after": 0}


def test_similar_responses_are_drawn_again_at_rising_temperatures():
    kept, asked, count = diverse(["a b c", "a b c", "a b c", "d e f"], [["a b c", "g h i"], ["j k l"]])
    assert kept == ["a b c", "d e f", "g h i", "j k l"]
    assert asked == [([0], 2, 1.1), ([0], 1, 1.2)]
    assert count["similar pairs before"] == 3 and count["similar pairs after"] == 0
    assert (count["kept at once"], count["too similar"], count["kept at trial 1"], count["kept at trial 2"]) == (
        2,
        3,
        1,
        1,
    )


def test_after_the_last_trial_the_least_similar_stays():
    first = ["a b c d e f g h i j", "a b c d e f g h i j"]
    # each shares 9 of 10 words in order with the first (F1 0.9), the third trial's 9 of 11 (F1 18/21)
    later = [["a b c d e f g h i x"], ["x b c d e f g h i j"], ["a b c d e f g h i x y"]]
    kept, asked, count = diverse(first, later)
    assert [temperature for _, _, temperature in asked] == [1.1, 1.2, 1.3]
    assert kept == [first[0], "a b c d e f g h i x y"]
    assert count["least similar kept"] == 1 and count["similar pairs after"] == 1
    kept, asked, count = diverse(first, [], max_trials=0)
    assert kept == first and asked == [] and count["least similar kept"] == 1


def test_each_prompt_gets_what_it_lacks():
    count, asked = Counter(), []

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n))
        return [[{"text": f"new {i} {k}"} for k in "xyz"[:n]] for i in numbers]

    responses = [[{"text": t} for t in texts] for texts in (["a b", "c d", "e f"], ["a", "a", "a"], ["a", "b", "b"])]
    args = argparse.Namespace(max_rouge_l=0.8, temperature=0.5, temperature_step=0.25, max_trials=3)
    kept = keep_diverse(responses, draw, args, count)
    assert asked[0] == ([1, 2], 2)
    assert [[r["text"] for r in k] for k in kept] == [
        ["a b", "c d", "e f"],
        ["a", "new 1 x", "new 1 y"],
        ["a", "b", "new 2 x"],
    ]
    assert kept[2][2]["temperature"] == 0.75


def test_sample_with_the_rule(tmp_path, tiny, monkeypatch, capsys):
    """At temperature 0 all four samples agree, so the rule must run; the first one stays as it was."""
    write_jsonl(tmp_path / "d.jsonl", [{"id": f"r{i}", "prompt": f"Word {i}:"} for i in range(3)])
    flags = ["--input", tmp_path / "d.jsonl", "--model", tiny, "--temperature", 0, "--max_new_tokens", 8]
    for name, extra in (("plain", []), ("diverse", ["--max_rouge_l", 0.5, "--temperature_step", 1])):
        run(monkeypatch, "sample", *flags, "--output", tmp_path / f"{name}.jsonl", *extra)
    out = capsys.readouterr().out
    assert "pairs 18, similar pairs before 18, similar pairs after 0" in out
    for plain, new in zip(read_jsonl(tmp_path / "plain.jsonl"), read_jsonl(tmp_path / "diverse.jsonl")):
        texts = [c["text"] for c in new["candidates"]]
        assert texts[0] == plain["candidates"][0]["text"] and len(set(texts)) == 4
        assert "temperature" not in new["candidates"][0] and new["candidates"][1]["temperature"] >= 1.0
