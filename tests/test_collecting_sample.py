"""collecting/sample.py: what a record holds, seeds, prompts, kills, and Tuna's diversity rule."""

import argparse
import types

import pytest
from conftest import command, make_records, read_jsonl, refused, run, write_jsonl

from collecting.answers import parse_nli
from collecting.prompts import shown_prompts
from collecting.sample import keep_diverse, max_similarity
from common import UserError


class TestSample:
    FLAGS = ("--num_samples", 2, "--max_new_tokens", 6, "--batch_size", 2, "--source", "tiny")

    @pytest.fixture
    def prompts(self, tmp_path):
        return write_jsonl(tmp_path / "p.jsonl", [r | {"candidates": r["candidates"][:1]} for r in make_records(6)])

    @pytest.fixture
    def sample(self, cli, tiny, prompts, tmp_path):
        """sample(name, *flags) -> (Result, the output file)"""

        def call(name, *flags):
            own = ("--model", tiny, "--input", prompts, "--output", tmp_path / name)
            return cli("collect_candidates", "sample", *own, *self.FLAGS, *flags), tmp_path / name

        return call

    def test_seeded_and_independent_of_ranks(self, sample, tiny, prompts, tmp_path):
        own = ("--model", tiny, "--input", prompts, "--output", tmp_path / "two.jsonl", *self.FLAGS, "--seed", 3)
        command("torchrun", "--nproc_per_node", 2, "collect_candidates.py", "sample", *own)
        files = [tmp_path / "two.jsonl", *(sample(f"{seed}.jsonl", "--seed", seed)[1] for seed in (3, 4))]
        texts = [[[c["text"] for c in r["candidates"]] for r in read_jsonl(file)] for file in files]
        assert texts[0] == texts[1] != texts[2]
        for record, before in zip(read_jsonl(files[1]), read_jsonl(prompts), strict=True):
            assert record["id"] == before["id"] and record["candidates"][:1] == before["candidates"]
            assert [c["source"] for c in record["candidates"]] == ["human", "tiny", "tiny"]

    def test_killed_and_run_again(self, sample):
        """Half a run, its last line torn, goes on to the very file of an uninterrupted run."""
        file = sample("s.jsonl")[1]
        whole = file.read_bytes()
        file.rename(part := file.with_name("s.jsonl.part0"))
        part.write_bytes(b"".join(whole.splitlines(keepends=True)[:3])[:-30])
        assert sample("s.jsonl")[0].code == 0 and file.read_bytes() == whole and not part.exists()

    def test_other_arguments_are_refused(self, sample, prompts):
        file = sample("s.jsonl")[1]
        before = file.read_bytes()
        refused(sample("s.jsonl", "--temperature", 0.5)[0], "temperature", "s.jsonl")
        prompts.write_text(prompts.read_text().replace("Answer", "Reply"))
        refused(sample("s.jsonl")[0], "content of")
        assert file.read_bytes() == before


def test_shown_prompts(tmp_path):
    record = {"prompt": "P", "premise": "A {man} sits.", "hypothesis": "He sleeps.", "candidates": []}
    args = types.SimpleNamespace(shots=0, prompt_file=None)
    assert shown_prompts(args, [record]) == ["P"]
    args.prompt_file = tmp_path / "t.txt"
    args.prompt_file.write_text("Look: {prompt} {hypothesis}")
    assert shown_prompts(args, [record]) == ["Look: P He sleeps."]
    args.shots = 3
    *examples, asked = shown_prompts(args, [record])[0].split("\n\n")
    answers = [(label, True) for label in ("contradiction", "neutral", "entailment")]
    assert [parse_nli(e.split(":\n")[1]) for e in examples] == answers
    assert "Premise: A {man} sits.\nHypothesis: He sleeps.\n" in asked and asked.endswith("entailment:\n")
    with pytest.raises(UserError, match="premise"):
        shown_prompts(args, [{"prompt": "P"}])


@pytest.mark.parametrize("verb", ["collect_candidates sample", "collect_candidates teacher", "evaluate nli"])
def test_two_prompts_at_once_are_refused(cli, verb):
    flags = ("--model", "m", "--input", "x.jsonl", "--shots", 3, "--prompt_file", "t.txt")
    refused(cli(*verb.split(), *flags), "--prompt_file", "--shots")


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat": precision 3/4, recall 3/5, F1 2/3
    assert max_similarity("the cat sat down", ["the old cat sat there", "nothing"]) == pytest.approx(2 / 3)
    assert max_similarity("a b", []) == 0
    assert max_similarity("你好", ["你好"]) == 1 and max_similarity("", [""]) == 1


def diverse(first, *later, **changes):
    """Run the rule: `first` are each prompt's texts, `later` what is drawn for each at the trials -> (kept texts of
    each, what was asked for)."""
    settings = {"max_rouge_l": 0.8, "temperature": 1.0, "temperature_step": 0.1, "max_trials": 3} | changes
    asked, trials = [], iter(later)

    def draw(numbers, n, temperature):
        asked.append((list(numbers), n, temperature))
        return [[{"text": text} for text in texts[:n]] for texts in next(trials)]

    responses = [[{"text": t} for t in texts] for texts in first]
    kept = keep_diverse(responses, draw, argparse.Namespace(**settings))
    assert all(("temperature" in r) == (r["text"] not in texts) for k, texts in zip(kept, first) for r in k)
    return [[r["text"] for r in k] for k in kept], asked


def test_similar_responses_are_drawn_again_at_rising_temperatures():
    different = [["a b c", "d e f", "g h i", "j k l"]]
    assert diverse(different) == (different, [])
    kept, asked = diverse([["a b c", "a b c", "a b c", "d e f"]], [["a b c", "g h i"]], [["j k l"]])
    assert kept == [["a b c", "d e f", "g h i", "j k l"]] and asked == [([0], 2, 1.1), ([0], 1, 1.2)]


def test_after_the_last_trial_the_least_similar_stays():
    first = ["a b c d e f g h i j", "a b c d e f g h i j"]
    # each shares 9 of 10 words in order with the first (F1 0.9), the third trial's 9 of 11 (F1 18/21)
    later = ["a b c d e f g h i x", "x b c d e f g h i j", "a b c d e f g h i x y"]
    kept, asked = diverse([first], *[[[text]] for text in later])
    assert kept == [[first[0], later[2]]] and [temperature for *_, temperature in asked] == [1.1, 1.2, 1.3]
    assert diverse([first], max_trials=0) == ([first], [])


def test_each_prompt_gets_what_it_lacks():
    first = [["a b", "c d", "e f"], ["a", "a", "a"], ["a", "b", "b"]]
    kept, asked = diverse(first, [["new x", "new y"], ["new z", "more"]], temperature=0.5, temperature_step=0.25)
    assert asked[0] == ([1, 2], 2, 0.75)
    assert kept == [first[0], ["a", "new x", "new y"], ["a", "b", "new z"]]


def test_sample_with_the_rule(tmp_path, tiny, monkeypatch, capsys):
    """At temperature 0 all four samples agree, so the rule must run; the first one stays as it was."""
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": f"r{i}", "prompt": f"Word {i}:"} for i in range(3)])
    flags = ["--input", data, "--model", tiny, "--temperature", 0, "--max_new_tokens", 8, "--max_rouge_l", 0.5]
    run(monkeypatch, "sample", *flags, "--output", tmp_path / "o.jsonl", "--temperature_step", 1)
    assert "responses: 12 drawn, 12 cut at --max_new_tokens, 0 empty" in capsys.readouterr().out
    for record in read_jsonl(tmp_path / "o.jsonl"):
        assert len({c["text"] for c in record["candidates"]}) == 4
        assert [c.get("temperature", 0) >= 1 for c in record["candidates"]] == [False, True, True, True]
