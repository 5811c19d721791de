"""collect_candidates.py: prepare, and sample with its runs that are killed and go on."""

import csv
import json

import pytest
import torch
from conftest import command, make_records, read_jsonl, refused, write_jsonl

import common
from collecting import generation


class TestPrepareESNLI:
    def test_original_csv(self, cli, tmp_path):
        """The columns of the files at OanaMariaCamburu/e-SNLI; two files are read one after the other."""
        for k in (1, 2):
            with open(tmp_path / f"{k}.csv", "w", newline="") as f:
                writer = csv.writer(f)
                writer.writerow(["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1", "WorkerId"])
                writer.writerow(
                    [f"p{k}", "neutral", "A {man} sits.", "He, too, waits.", "Sitting is not\nwaiting.", "w"]
                )
        out = tmp_path / "out.jsonl"
        assert (
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                tmp_path / "1.csv",
                tmp_path / "2.csv",
                "--output",
                out,
            ).code
            == 0
        )
        records = read_jsonl(out)
        assert [r["id"] for r in records] == ["p1", "p2"] and records[0]["label"] == "neutral"
        assert "Premise: A {man} sits.\nHypothesis: He, too, waits." in records[0]["prompt"]
        assert records[0]["candidates"] == [{"text": "Sitting is not\nwaiting. #### Neutral", "source": "human"}]

    def test_skip_limit_and_prompt_file(self, cli, tmp_path):
        rows = [
            {"premise": f"p{i}", "hypothesis": "{premise}", "label": "neutral", "explanation_1": "e"} for i in range(6)
        ]
        source = write_jsonl(tmp_path / "in.jsonl", rows)
        (tmp_path / "t.txt").write_text("<{premise}|{hypothesis}>")
        result = cli(
            "collect_candidates",
            "prepare",
            "--task",
            "esnli",
            "--input",
            source,
            "--output",
            tmp_path / "o.jsonl",
            "--skip",
            2,
            "--limit",
            3,
            "--prompt_file",
            tmp_path / "t.txt",
        )
        assert result.code == 0, result.err
        records = read_jsonl(tmp_path / "o.jsonl")
        assert [r["prompt"] for r in records] == [
            "<p2|{premise}>",
            "<p3|{premise}>",
            "<p4|{premise}>",
        ]  # filled in once
        assert [r["id"] for r in records] == ["esnli-2", "esnli-3", "esnli-4"]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"label": "maybe"}, ["label", "maybe"]),
            ({"premise": " "}, ["premise"]),
            ({"hypothesis": None}, ["hypothesis"]),
        ],
    )
    def test_bad_rows(self, cli, tmp_path, change, words):
        row = {"premise": "p", "hypothesis": "h", "label": "neutral", "explanation_1": "e"}
        source = write_jsonl(tmp_path / "in.jsonl", [row, row | change])
        result = cli(
            "collect_candidates", "prepare", "--task", "esnli", "--input", source, "--output", tmp_path / "o.jsonl"
        )
        refused(result, "in.jsonl:2", *words)
        assert not (tmp_path / "o.jsonl").exists()

    def test_template_asks_for_what_is_not_there(self, cli, tmp_path):
        (tmp_path / "t.txt").write_text("{premise} {colour}")
        source = write_jsonl(
            tmp_path / "in.jsonl", [{"premise": "p", "hypothesis": "h", "label": "neutral", "explanation": "e"}]
        )
        refused(
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                source,
                "--prompt_file",
                tmp_path / "t.txt",
                "--output",
                tmp_path / "o.jsonl",
            ),
            "colour",
        )


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
