"""collecting/rank*.py: how answers and replies are read, and the rankers of RESCUE's orderings."""

import json
import math

import pytest
import torch
from api_server import Server
from conftest import make_records, nli, read_jsonl, refused, run, write_jsonl

import rescue
from collecting.answers import has_answer, normalize_answer, parse_nli
from collecting.rank_asked import parse_ranking

# ----------------------------------------------------------------------------------------------------------------------
# By label


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
    assert parse_nli(text) == (label, well_formed)


def test_normalize_answer():
    assert normalize_answer("The  U.S.A., an island!") == "usa island"


def test_has_answer_is_the_best_subspan_rule():
    assert has_answer("It was the WILLIAM-Shakespeare!", ["x", "a williamshakespeare"])
    assert not has_answer("Will Shakespeare", ["William Shakespeare"])
    assert not has_answer("anything", ["The"])  # nothing left of it: it must not match every text


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


# ----------------------------------------------------------------------------------------------------------------------
# By gpt


@pytest.mark.parametrize(
    "text, want",
    [
        ("2 > 1 > 3", [2, 1, 3]),
        ("I think so.\nRanking: 3 > 1 > 2\n", [3, 1, 2]),
        ("Response 3 > Response 2 > Response 1", [3, 2, 1]),
        ("[1], [3], [2]", [1, 3, 2]),
        ("**1 > 2 > 3**", [1, 2, 3]),
        ("1 > 2 > 3\n3 > 2 > 1", [3, 2, 1]),
        ("1 > 2", None),
        ("1 > 2 > 2", None),
        ("1 > 2 > 3 > 4", None),
        ("0 > 1 > 2", None),
        ("1 > 2 = 3", None),
        ("the best is 1, then 2, then 3", None),
        ("1 2 3", None),
        ("123", None),
        ("", None),
    ],
)
def test_parse_ranking_is_strict(text, want):
    assert parse_ranking(text, 3) == want


def test_rank_by_gpt_undoes_its_shuffle_and_marks_what_is_unranked(tmp_path, monkeypatch, capsys):
    texts = ["human", "b", "cccc", "dd", "eee"]
    records = [nli(i, *texts) for i in range(8)] + [nli(8, "mumble", "x", "y")]

    def behave(prompt, nth, body):
        if "mumble" in prompt:
            return json.dumps({"choices": [{"message": {"content": "both"}, "finish_reason": "stop"}]}).encode()
        shown = [line.split(": ")[1] for line in prompt.splitlines() if line.startswith("Response ")]
        assert "Reference: human" in prompt and "human" not in shown
        order = sorted(range(4), key=lambda k: -len(shown[k]))  # the longest is the best
        text = " > ".join(str(k + 1) for k in order)
        return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server(behave) as server:
        run(monkeypatch, "rank", "--by", "gpt", "--input", write_jsonl(tmp_path / "in.jsonl", records), "--output",
            tmp_path / "o.jsonl", "--base_url", server.url, "--model", "m")  # fmt: skip
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert all([c["rank"] for c in r["candidates"]] == [0, 4, 1, 3, 2] for r in rows[:8])
    assert [c["rank"] for c in rows[8]["candidates"]] == [0, None, None]
    first = [[line for line in p.splitlines() if line.startswith("Response 1")][0] for p in server.asked if "cccc" in p]
    assert len(set(first)) > 1  # shuffled
    assert server.asked.most_common(1)[0][1] == 3  # two re-asks
    out = capsys.readouterr().out
    assert "8 ranked" in out and "1 unranked" in out
    assert rescue.preference(rows[0], "gpt") == [
        math.inf,
        -4.0,
        -1.0,
        -3.0,
        -2.0,
    ]  # the human response is first in training
    human, *unranked = rescue.preference(rows[8], "gpt")
    assert human == math.inf and all(map(math.isnan, unranked))  # compared with nothing
    refused = [nli(0, "human")], [records[0] | {"candidates": records[0]["candidates"][1:]}]
    for k, rows in enumerate(refused):
        with pytest.raises(SystemExit):
            run(monkeypatch, "rank", "--by", "gpt", "--input", write_jsonl(tmp_path / "in.jsonl", rows), "--output",
                tmp_path / f"none{k}.jsonl", "--model", "m", "--base_url", "http://127.0.0.1:9/v1")  # fmt: skip
        assert "needs a human response and another one" in capsys.readouterr().err


def test_malformed_responses_and_prompts_with_too_few_can_be_dropped(tmp_path, monkeypatch, capsys):
    records = [
        nli(0, "h #### Neutral", "a #### Neutral", "b #### Entailment", "no label"),
        nli(1, "h #### Neutral", "neutral it is", "b #### Neutral and so on", "no label"),
        nli(2, "h", "a\nand so\n#### Neutral", "b #### neutral", "```c #### Contradiction.```"),
    ]
    records[0]["candidates"][1] |= {"logprob": -3.0, "num_tokens": 5, "teacher": "m", "finished": False}
    source = write_jsonl(tmp_path / "in.jsonl", records)
    flags = ("--drop_malformed", "--min_candidates", "3", "--output", tmp_path / "o.jsonl")
    run(monkeypatch, "rank", "--by", "label", "--input", source, *flags)
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert {r["id"]: [c["text"] for c in r["candidates"]] for r in rows} == {
        "r0": ["h #### Neutral", "a #### Neutral", "b #### Entailment"],
        "r2": ["h", "a and so #### Neutral", "b #### Neutral", "c #### Contradiction"],  # in the human responses' form
    }
    assert rows[0]["candidates"][1].keys() == {"text", "source", "label", "correct"}  # whole, of unknown likelihood
    out = capsys.readouterr().out
    assert "malformed and left out: 4 of 9 by m\nleft out: 1 prompts with fewer than --min_candidates 3" in out
    assert "WARNING" not in out
    qa = {"id": "q", "task": "multidoc_qa", "prompt": "p", "answers": ["Oslo"]}
    qa["candidates"] = [{"source": "m", "text": text} for text in ("In Oslo.", "In Rome.")]
    flags = ("--mark_answers", "--output", tmp_path / "qa.jsonl")
    run(monkeypatch, "rank", "--by", "label", "--input", write_jsonl(tmp_path / "in.jsonl", [qa]), *flags)
    texts = [c["text"] for c in read_jsonl(tmp_path / "qa.jsonl")[0]["candidates"]]
    assert texts == ["In Oslo. #### Correct", "In Rome. #### Incorrect"]
    capsys.readouterr()
    records = [nli(i, "h #### Neutral", *["what?"] * 4, "a #### Neutral") for i in range(2)]
    for c in (c for r in records for c in r["candidates"][5:] if r["id"] == "r0"):
        c["text"] = "what?"
    source = write_jsonl(tmp_path / "in.jsonl", records)
    run(monkeypatch, "rank", "--by", "label", "--input", source, "--output", tmp_path / "loud.jsonl")
    assert "WARNING: of the responses by m 10% can be read" in capsys.readouterr().out
    run(monkeypatch, "rank", "--by", "label", "--drop_malformed", "--input", source, "--output", tmp_path / "few.jsonl")
    assert "WARNING: of the responses by m 10% are well-formed" in capsys.readouterr().out
    flags = ("--min_candidates", "3", "--input", source, "--output", tmp_path / "none.jsonl")
    with pytest.raises(SystemExit):
        run(monkeypatch, "rank", "--by", "label", *flags)
    assert "--drop_malformed" in capsys.readouterr().err


def test_of_each_model_the_first_well_formed_are_kept(tmp_path, monkeypatch, capsys):
    """As RESCUE's released code: six samples, of which the first three with the form are kept."""
    good = [f"{x} #### Neutral" for x in "abcd"]
    records = [nli(0, "h #### Neutral", "no", *good), nli(1, "h #### Neutral", "no", *good[:2])]
    records[0]["candidates"].append({"text": "t #### Neutral", "source": "teacher"})
    source, output = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl"
    more = ("--drop_malformed", "--min_candidates", "4", "--per_source", "3", "--output", output)
    run(monkeypatch, "rank", "--by", "label", "--input", source, *more)
    [record] = read_jsonl(output)
    assert [c["text"][0] for c in record["candidates"]] == ["h", "a", "b", "c", "t"]
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            "rank",
            "--by",
            "label",
            "--input",
            source,
            "--per_source",
            "3",
            "--output",
            tmp_path / "x.jsonl",
        )
    assert "--drop_malformed" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# By similarity


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=13, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rank_by_similarity_is_the_cosine_of_mean_token_states(tmp_path, monkeypatch, cli, tiny_encoder):
    from transformers import AutoModel, AutoTokenizer

    records = [nli(0, "a b c", "a b c", "d e f g h a", "b"), nli(1, "c d", "e")]
    run(monkeypatch, "rank", "--by", "similarity", "--input", write_jsonl(tmp_path / "in.jsonl", records), "--output",
        tmp_path / "o.jsonl", "--encoder", tiny_encoder)  # fmt: skip
    model, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    for row in read_jsonl(tmp_path / "o.jsonl"):
        vectors = []
        for c in row["candidates"]:  # one by one: no padding to mask
            with torch.no_grad():
                states = model(**tokenizer(c["text"], return_tensors="pt")).last_hidden_state[0]
            vectors.append(states.mean(0))
        for c, vector in zip(row["candidates"], vectors):
            want = torch.cosine_similarity(vectors[0], vector, dim=0).item()
            assert c["similarity"] == pytest.approx(want, abs=1e-5)
    assert row["candidates"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    no_human = nli(0, "a")
    no_human["candidates"][0]["source"] = "m"
    flags = ["--by", "similarity", "--input", write_jsonl(tmp_path / "n.jsonl", [no_human])]
    flags += ["--output", tmp_path / "p.jsonl", "--encoder", tiny_encoder]
    refused(cli("collect_candidates", "rank", *flags), "no human response")
