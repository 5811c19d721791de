"""collecting/sample.py: what a record holds, seeds, runs that are killed and go on."""

import json

import pytest
import torch
from conftest import command, make_records, read_jsonl, refused, write_jsonl

import common
from collecting import generation


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
            assert a["text"] == tokenizer.decode(out, skip_special_tokens=True).strip()

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
