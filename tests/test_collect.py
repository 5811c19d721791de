"""collect_candidates.py: prepare, sample, rank --by label, and the journal that survives a kill."""

import csv
import fcntl
import json

import pytest
import torch
from conftest import command, make_records, read_jsonl, refused, write_jsonl

import collect_candidates as collect
import common
from common import UserError


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


@pytest.mark.parametrize(
    "text, label, well_formed",
    [
        ("Because. #### Neutral", "neutral", True),
        ("Because. ####  entailment.", "entailment", True),
        ("#### Neutral", "neutral", False),  # no explanation
        ("Because. #### Neutral or Entailment", None, False),
        ("Not neutral at all. #### Contradiction", "contradiction", True),  # the label after the mark counts
        ("It is a contradiction.", "contradiction", False),  # no mark: exactly one label in it
        ("Neutral, not entailment.", None, False),
        ("Because. #### Contention", None, False),
        ("Because. #### Neutral\nPremise: x", "neutral", False),
        ("neutrality", None, False),
        ("", None, False),
    ],
)
def test_parse_nli(text, label, well_formed):
    assert collect.parse_nli(text) == (label, well_formed)


def test_normalize_answer():
    assert collect.normalize_answer("The  U.S.A., an island!") == "usa island"


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
        model, tokenizer = collect.load_generator(str(tiny), torch.device("cpu"))
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
            want = torch.log_softmax(logits, -1).gather(1, out[:, None]).sum().item()
            assert a["logprob"] == pytest.approx(want, abs=1e-3) and a["num_tokens"] == len(out)
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

    def test_samples_are_those_of_plain_generate(self, tiny, tokenizer):
        """The prompt is read once, and the draw is the plain one: same seed, same tokens; log-probabilities are those
        before temperature and top_p, even where the model's own configuration asks for a repetition penalty."""
        model, _ = collect.load_generator(str(tiny), torch.device("cpu"))
        model.generation_config.repetition_penalty = 1.5
        options = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9}
        prompts = ["A man sleeps on the", "Two"]
        torch.manual_seed(1)
        ours = collect.generate(model, tokenizer, prompts, num_samples=3, **options)
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

    def test_samples_follow_the_models_distribution(self, tiny, tokenizer):
        """4,000 first tokens of a batch of unequal prompts against the exact softmax: chi-square of the 20 likeliest
        and the rest; 45.3 is passed by chance once in 1,000 times with 20 degrees of freedom, and the seed is fixed."""
        model, _ = collect.load_generator(str(tiny), torch.device("cpu"))
        seen, generate = [], model.generate
        model.generate = lambda **k: seen.append(generate(**k)) or seen[-1]
        prompts = ["A man sleeps on the bench", "Two girls"]
        torch.manual_seed(0)
        for _ in range(4):
            collect.generate(model, tokenizer, prompts, num_samples=1000, max_new_tokens=1, temperature=0.8)
        for i, prompt in enumerate(prompts):
            drawn = torch.cat([out[i * 1000 : (i + 1) * 1000, -1] for out in seen])
            with torch.no_grad():
                exact = (model(torch.tensor([common.prompt_ids(tokenizer, prompt)])).logits[0, -1] / 0.8).softmax(-1)
            top = exact.topk(20).indices
            counts = torch.bincount(drawn, minlength=400).double()
            p = torch.cat([exact[top].double(), 1 - exact[top].double().sum()[None]])
            observed = torch.cat([counts[top], 4000 - counts[top].sum()[None]])
            assert ((observed - 4000 * p) ** 2 / (4000 * p)).sum() < 45.3

    def test_stop_strings(self, tiny, tokenizer):
        model, _ = collect.load_generator(str(tiny), torch.device("cpu"))
        options = {"max_new_tokens": 12, "temperature": 0.0}
        [[free]] = collect.generate(model, tokenizer, ["A man"], **options)
        cut = free["text"][2]
        [[stopped]] = collect.generate(model, tokenizer, ["A man"], stop=(cut,), **options)
        assert stopped["text"] == free["text"][: free["text"].index(cut)].strip() and stopped["finished"]
        assert stopped["num_tokens"] < free["num_tokens"] and stopped["logprob"] > free["logprob"]

    def test_prompt_is_cut_from_the_left(self, tiny, tokenizer):
        model, _ = collect.load_generator(str(tiny), torch.device("cpu"))
        ids = common.prompt_ids(tokenizer, "one two three four")
        tail = tokenizer.decode(ids[-4:])
        options = {"max_new_tokens": 5, "temperature": 0.0}
        long = collect.generate(model, tokenizer, ["one two three four"], max_prompt_length=5, **options)
        assert long[0][0]["text"] == collect.generate(model, tokenizer, [tail], **options)[0][0]["text"]

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
        refused(sample(cli, tiny, prompts, tmp_path / "s.jsonl"), "sha256")
        assert (tmp_path / "s.jsonl").read_bytes() == before


class TestJournal:
    def test_two_writers_refuse_each_other(self, tmp_path):
        with open(tmp_path / "o.jsonl.args.json", "a+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another run"):
                collect.Journal(tmp_path / "o.jsonl", ["a"], {})

    def test_ids_of_another_input(self, tmp_path):
        collect.Journal(tmp_path / "o.jsonl", ["a"], {}).write([{"id": "a"}])
        with pytest.raises(UserError, match="'a' is not in the input"):
            collect.Journal(tmp_path / "o.jsonl", ["b"], {})

    def test_a_broken_line_in_the_middle(self, tmp_path):
        collect.Journal(tmp_path / "o.jsonl", ["a"], {})
        (tmp_path / "o.jsonl.part0").write_text('{"id": "a"\n{"id": "b"}\n')
        with pytest.raises(UserError, match="no record"):
            collect.Journal(tmp_path / "o.jsonl", ["a", "b"], {})

    def test_a_file_of_unknown_origin(self, tmp_path):
        (tmp_path / "o.jsonl").write_text('{"id": "a"}\n')
        with pytest.raises(UserError, match="not written by this script"):
            collect.Journal(tmp_path / "o.jsonl", ["a"], {})

    def test_order_and_what_is_missing(self, tmp_path, capfd):
        journal = collect.Journal(tmp_path / "o.jsonl", ["a", "b", "c"], {})
        journal.write([{"id": "c"}, {"id": "a"}])
        assert journal.finish() == 2 and not (tmp_path / "o.jsonl").exists() and "1 missing" in capfd.readouterr().out
        del journal
        journal = collect.Journal(tmp_path / "o.jsonl", ["a", "b", "c"], {})
        assert journal.done == {"a", "c"}
        journal.write([{"id": "b"}])
        journal.finish()
        assert [r["id"] for r in read_jsonl(tmp_path / "o.jsonl")] == ["a", "b", "c"]


class TestRank:
    def test_by_label(self, cli, tmp_path):
        record = make_records(1)[0]  # gold label: entailment
        texts = ["x #### Entailment", "x #### Neutral", "nothing", "An entailment."]
        record["candidates"] = record["candidates"][:1] + [{"text": t, "source": "m"} for t in texts]
        source = write_jsonl(tmp_path / "in.jsonl", [record])
        result = cli("collect_candidates", "rank", "--by", "label", "--input", source, "--output", tmp_path / "o.jsonl")
        assert result.code == 0, result.err
        got = read_jsonl(tmp_path / "o.jsonl")[0]["candidates"]
        assert [(c["label"], c["correct"]) for c in got[1:]] == [
            ("entailment", True),
            ("neutral", False),
            (None, False),
            ("entailment", True),
        ]
        assert "m: 4 total, 2 well-formed, 2 malformed, 2 correct, 1 wrong, 1 unparsed" in result.out

    def test_no_label_to_compare_with(self, cli, tmp_path):
        record = make_records(1)[0]
        del record["label"]
        source = write_jsonl(tmp_path / "in.jsonl", [record])
        refused(
            cli("collect_candidates", "rank", "--by", "label", "--input", source, "--output", tmp_path / "o.jsonl"),
            "r0",
        )
        assert not (tmp_path / "o.jsonl").exists()
