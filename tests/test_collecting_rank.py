"""collecting/rank*.py: how answers and replies are read, and the rankers of RESCUE's orderings."""

import math

import pytest
import torch
from api_server import Server, chat
from conftest import nli, rank, refused, write_jsonl
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import rescue
from collecting.answers import has_answer, normalize_answer, parse_nli
from collecting.rank_asked import parse_ranking


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


def test_has_answer_is_the_best_subspan_rule():
    assert normalize_answer("The  U.S.A., an island!") == "usa island"
    assert has_answer("It was the WILLIAM-Shakespeare!", ["x", "a williamshakespeare"])
    assert not has_answer("Will Shakespeare", ["William Shakespeare"])
    assert not has_answer("anything", ["The"])  # nothing left of it: it must not match every text


def test_by_label(monkeypatch, tmp_path, capfd, cli):
    texts = ["x #### Entailment", "x #### Neutral", "nothing", "An entailment."]
    [record] = rank(monkeypatch, tmp_path, [nli(0, "h", *texts, label="entailment")], "--by", "label")
    found = [(c["label"], c["correct"]) for c in record["candidates"][1:]]
    assert found == [("entailment", True), ("neutral", False), (None, False), ("entailment", True)]
    assert "m: 4 total, 2 correct, 2 well-formed, 1 unparsed" in capfd.readouterr().out
    qa = {"id": "q", "task": "multidoc_qa", "prompt": "p", "answers": ["Oslo"]}
    qa["candidates"] = [{"source": "m", "anchor": "gold", "text": text} for text in ("In Oslo.", "In Rome.")]
    [record] = rank(monkeypatch, tmp_path, [qa], "--by", "label", "--mark_answers", output="qa.jsonl")
    assert [c["text"] for c in record["candidates"]] == ["In Oslo. #### Correct", "In Rome. #### Incorrect"]
    assert "m from gold: 2 total, 1 correct" in capfd.readouterr().out
    source = write_jsonl(tmp_path / "in.jsonl", [{k: v for k, v in nli(0, "h").items() if k != "label"}])
    flags = ("--by", "label", "--input", source, "--output", tmp_path / "none.jsonl")
    refused(cli("collect_candidates", "rank", *flags), "r0")
    assert not (tmp_path / "none.jsonl").exists()


def test_malformed_responses_and_prompts_with_too_few_can_be_dropped(tmp_path, monkeypatch, capfd, cli):
    records = [
        nli(0, "h #### Neutral", "a #### Neutral", "b #### Entailment", "no label"),
        nli(1, "h #### Neutral", "neutral it is", "b #### Neutral and so on", "no label"),
        nli(2, "h", "a\nand so\n#### Neutral", "b #### neutral", "```c #### Contradiction.```"),
    ]
    records[0]["candidates"][1] |= {"logprob": -3.0, "num_tokens": 5, "teacher": "m", "finished": False}
    drop = ("--by", "label", "--drop_malformed")
    rows = rank(monkeypatch, tmp_path, records, *drop, "--min_candidates", 3)
    assert {r["id"]: [c["text"] for c in r["candidates"]] for r in rows} == {
        "r0": ["h #### Neutral", "a #### Neutral", "b #### Entailment"],
        "r2": ["h", "a and so #### Neutral", "b #### Neutral", "c #### Contradiction"],  # in the human responses' form
    }
    assert rows[0]["candidates"][1].keys() == {"text", "source", "label", "correct"}  # whole, of unknown likelihood
    out = capfd.readouterr().out
    assert "well-formed: 5 of 9 by m\nleft out: 1 prompts with fewer than --min_candidates 3" in out
    write_jsonl(tmp_path / "d.jsonl", records[1:2])
    flags = ("rank", "--by", "label", "--input", tmp_path / "d.jsonl", "--output", tmp_path / "none.jsonl")
    for more in (["--per_source", 3], ["--drop_malformed", "--min_candidates", 3]):
        refused(cli("collect_candidates", *flags, *more), "--drop_malformed")


def test_of_each_model_the_first_well_formed_are_kept(tmp_path, monkeypatch):
    """As RESCUE's released code: six samples, of which the first three with the form are kept."""
    good = [f"{x} #### Neutral" for x in "abcd"]
    records = [nli(0, "h #### Neutral", "no", *good), nli(1, "h #### Neutral", "no", *good[:2])]
    records[0]["candidates"].append({"text": "t #### Neutral", "source": "teacher"})
    more = ("--by", "label", "--drop_malformed", "--min_candidates", 4, "--per_source", 3)
    [record] = rank(monkeypatch, tmp_path, records, *more)
    assert [c["text"][0] for c in record["candidates"]] == ["h", "a", "b", "c", "t"]


@pytest.mark.parametrize(
    "text, want",
    [
        ("2 > 1 > 3", [2, 1, 3]),
        ("I think so.\nRanking: 3 > 1 > 2\n", [3, 1, 2]),
        ("Response 3 > Response 2 > Response 1", [3, 2, 1]),
        ("[1], [3], [2]", [1, 3, 2]),
        ("**1 > 2 > 3**", [1, 2, 3]),
        ("1 > 2 > 3\n3 > 2 > 1", [3, 2, 1]),
        *[
            (text, None)
            for text in ("1 > 2", "1 > 2 > 2", "1 > 2 > 3 > 4", "0 > 1 > 2", "1 > 2 = 3", "1 2 3", "123", "")
        ],
        ("the best is 1, then 2, then 3", None),
    ],
)
def test_parse_ranking_is_strict(text, want):
    if want:
        assert parse_ranking(text, 3) == want
    else:
        with pytest.raises(ValueError, match="all 3 responses"):
            parse_ranking(text, 3)


def test_rank_by_gpt_undoes_its_shuffle_and_marks_what_is_unranked(tmp_path, monkeypatch, capfd, cli):
    records = [nli(i, "human", "b", "cccc", "dd", "eee") for i in range(8)] + [nli(8, "mumble", "x", "y")]

    def behave(prompt, nth, body):
        if "mumble" in prompt:
            return chat("both")
        shown = [line.split(": ")[1] for line in prompt.splitlines() if line.startswith("Response ")]
        assert "Reference: human" in prompt and "human" not in shown
        order = sorted(range(4), key=lambda k: -len(shown[k]))  # the longest is the best
        return chat(" > ".join(str(k + 1) for k in order))

    with Server(behave) as server:
        flags = ("--by", "gpt", "--model", "m", "--base_url", server.url)
        rows = rank(monkeypatch, tmp_path, records, *flags)
    assert all([c["rank"] for c in r["candidates"]] == [0, 4, 1, 3, 2] for r in rows[:8])
    assert [c["rank"] for c in rows[8]["candidates"]] == [0, None, None]
    first = [[line for line in p.splitlines() if line.startswith("Response 1")][0] for p in server.asked if "cccc" in p]
    assert len(set(first)) > 1  # shuffled
    assert server.asked.most_common(1)[0][1] == 3  # two re-asks
    out = capfd.readouterr().out
    assert "replies: 8 parsed, 1 unparsed" in out
    assert rescue.preference(rows[0], "gpt") == [math.inf, -4, -1, -3, -2]  # the human response is first in training
    human, *unranked = rescue.preference(rows[8], "gpt")
    assert human == math.inf and all(map(math.isnan, unranked))  # compared with nothing
    flags = ("--input", write_jsonl(tmp_path / "in.jsonl", [nli(0, "human")]), "--output", tmp_path / "none.jsonl")
    result = cli("collect_candidates", "rank", "--by", "gpt", *flags, "--model", "m", "--base_url", server.url)
    refused(result, "needs a human response and another one")


def test_rank_by_similarity_is_the_cosine_of_mean_token_states(tmp_path, monkeypatch):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    BertTokenizerFast(str(encoder / "vocab.txt")).save_pretrained(encoder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=13, **sizes)).save_pretrained(encoder)

    records = [nli(0, "a b c", "a b c", "d e f g h a", "b"), nli(1, "c d", "e")]
    rows = rank(monkeypatch, tmp_path, records, "--by", "similarity", "--encoder", encoder)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for row in rows:
        vectors = []
        for c in row["candidates"]:  # one by one: no padding to mask
            with torch.no_grad():
                vectors.append(model(**tokenizer(c["text"], return_tensors="pt")).last_hidden_state[0].mean(0))
        want = [torch.cosine_similarity(vectors[0], vector, dim=0).item() for vector in vectors]
        assert [c["similarity"] for c in row["candidates"]] == pytest.approx(want, abs=1e-5)
    assert row["candidates"][0]["similarity"] == pytest.approx(1, abs=1e-5)
