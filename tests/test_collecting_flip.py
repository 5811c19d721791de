"""collecting/flip.py: both halves' provenance, one budget, what is unusable."""

import pytest
from api_server import Server, chat
from conftest import call, nli, read_jsonl, refused, write_jsonl

from collecting.flip import clean_sentence


def test_flip_keeps_both_halves_provenance_and_counts_what_is_unusable(tmp_path, monkeypatch, capsys):
    """Every model response, as RESCUE Sec. 5.1; the human one stays as it is."""
    first = [
        "Nobody flips me. #### Neutral",
        "The man sleeps. #### Neutral",
        "no mark in it",
        "He dozes. #### Entailment",
    ]
    second = ["h #### Neutral", "Stubborn one. #### Neutral", "No label comes. #### Neutral", " #### Neutral"]
    records = [nli(0, *first), nli(1, *second), nli(2, "h #### Neutral", "Bad mark. #### yes")]
    records.append({k: v for k, v in nli(3, "x").items() if k != "candidates"})
    answers = {"The man sleeps.": '"The man is awake."', "He dozes.": "He is awake.", "Stubborn one.": "Stubborn one."}
    answers["No label comes."] = "A label comes."
    contexts = ("prompt 0\nThe man is awake. ####", "prompt 0\nHe is", "prompt 1\nA label comes. ####")

    def rewrite(prompt, nth, body):
        return chat(next(v for k, v in answers.items() if prompt.endswith(f"Sentence: {k}")))

    def label(prompt, nth, body):
        assert prompt.startswith(contexts)
        return chat(" Contradiction." if "awake" in prompt else "entailment or neutral")

    source = write_jsonl(tmp_path / "in.jsonl", records)
    with Server(rewrite) as one, Server(label) as two:
        for name, more in (("o", ()), ("replaced", ("--replace",))):
            call(monkeypatch, "flip", "--input", source, "--output", tmp_path / f"{name}.jsonl",
                "--base_url", one.url, "--model", "org/writer", "--label_base_url", two.url,
                "--label_model", "judge", *more)  # fmt: skip
            out = capsys.readouterr().out
            for words in ("3 malformed response", "1 unusable rewriting", "1 unusable label", "2 labelled"):
                assert words in out
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [len(r.get("candidates", [])) for r in rows] == [6, 4, 2, 0]
    assert rows[0]["candidates"][:4] == records[0]["candidates"]
    assert rows[0]["candidates"][4] == {
        "text": "The man is awake. #### Contradiction",
        "source": "flip-writer-judge",
        "label": "contradiction",
        "explanation_by": "writer",
        "label_by": "judge",
        "flip_of": "m",
    }
    replaced = [[c["source"] for c in r.get("candidates", [])] for r in read_jsonl(tmp_path / "replaced.jsonl")]
    assert replaced == [["human"] + ["flip-writer-judge"] * 2, ["human"], ["human"], []]
    assert one.asked[next(p for p in one.asked if "Stubborn" in p)] == 6  # two re-asks, twice
    assert two.bodies[0]["temperature"] == 0 and one.bodies[0]["temperature"] == 1


def test_both_models_share_one_budget(tmp_path, cli):
    records = write_jsonl(tmp_path / "in.jsonl", [nli(i, "h", f"Sentence {i}. #### Neutral") for i in range(4)])
    flags = ("flip", "--input", records, "--output", tmp_path / "o.jsonl", "--model", "m", "--max_requests", "6")
    with Server(lambda *a: None) as server:
        refused(cli("collect_candidates", *flags, "--base_url", server.url), "4 missing, and nothing new was done")
    assert sum(server.asked.values()) == 6


def test_a_refused_response_is_left_out_and_its_record_is_done(tmp_path, cli):
    """Of two responses of a record the server refuses to rewrite one, of another record to label it: what is left is
    flipped, and a second run asks nothing."""
    records = [nli(0, "h #### Neutral", "Fine. #### Neutral", "Rude. #### Neutral"), nli(1, "h", "Odd. #### Neutral")]
    source, out = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl"

    def behave(prompt, nth, body):
        if prompt.endswith("Rude.") or prompt.startswith("prompt 1"):
            return 400, {}, b'{"error": {"message": "filtered"}}'
        return chat("Entailment" if prompt.startswith("prompt") else f"Not {prompt.rpartition(' ')[2]}")

    with Server(behave) as server:
        flags = ["--input", source, "--output", out, "--base_url", server.url, "--model", "m", "--concurrency", 1]
        result = cli("collect_candidates", "flip", *flags)
        assert result.code == 0 and "2 refused, 1 labelled" in result.out and "HTTP 400 (filtered)" in result.out
        assert [len(r["candidates"]) for r in read_jsonl(out)] == [4, 2]
        asked = sum(server.asked.values())
        assert cli("collect_candidates", "flip", *flags).code == 0 and sum(server.asked.values()) == asked


@pytest.mark.parametrize(
    "text, want",
    [("No.", "No."), ('"No."', "No."), ("", None), ("A b", None), ("a, B!", None), ("x\ny", None), ("x #### y", None)],
)
def test_clean_sentence(text, want):
    assert clean_sentence(text, "a b") == want
