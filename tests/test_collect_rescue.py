"""collect_candidates.py for RESCUE: teacher, flip, anchor, prepare --task multidoc_qa."""

import gzip
import json
import sys
import types

import pytest
import torch
from api_server import Server
from conftest import nli, read_jsonl, refused, write_jsonl

import collect_candidates
import rescue
from collecting import generation
from collecting.answers import parse_nli
from collecting.flip import clean_sentence
from collecting.prompts import shown_prompts
from common import UserError


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["collect_candidates.py", *map(str, words)])
    collect_candidates.main()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# -- teacher


def test_teacher_against_a_hostile_server_loses_and_doubles_nothing(tmp_path, monkeypatch, capsys):
    faults = [429, 500, b"<html>", "half", "silence"]
    records = write_jsonl(tmp_path / "in.jsonl", [nli(i, "because #### Neutral") for i in range(12)])

    def behave(prompt, nth, body):
        i = int(prompt.split()[1])
        return 500 if i == 7 else faults[i] if i < len(faults) and nth == 1 else None

    with Server(behave) as server:
        command = ["teacher", "--input", records, "--output", tmp_path / "out.jsonl", "--base_url", server.url]
        command += ["--model", "gpt", "--retries", "2", "--timeout", "0.6"]
        run(monkeypatch, *command)
        out = capsys.readouterr().out
        assert "r7 failed: HTTP 500" in out and "11 of 12 done, 1 missing" in out
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 11  # a usable file
        server.asked.clear()
        monkeypatch.setattr(server, "answer", lambda handler, fault, text: Server.answer(server, handler, None, text))
        run(monkeypatch, *command)  # the same command does the rest and only that
    assert dict(server.asked) == {"prompt 7": 1}
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [r["id"] for r in rows] == [f"r{i}" for i in range(12)]
    for r in rows:
        assert [c["source"] for c in r["candidates"]] == ["human", "gpt"]
        assert r["candidates"][1]["text"] == f"echo {r['prompt']}"


def test_teacher_keeps_secrets_out_of_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    records = write_jsonl(tmp_path / "in.jsonl", [nli(0, "x #### Neutral")])
    with Server(lambda *a: (400, {}, b'{"error": {"message": "sk-very-secret is no good"}}')) as server:
        run(monkeypatch, "teacher", "--input", records, "--output", tmp_path / "o.jsonl", "--base_url", server.url,
            "--model", "m")  # fmt: skip
    told = capsys.readouterr()
    for text in (told.out, told.err, *(p.read_text() for p in tmp_path.iterdir())):
        assert "very-secret" not in text
    assert "HTTP 400" in told.out


# -- flip


def test_flip_keeps_both_halves_provenance_and_counts_what_is_unusable(tmp_path, monkeypatch, capsys):
    """Every model response, as Sec. 5.1; the human one stays as it is."""
    records = [
        nli(
            0,
            "Nobody flips me. #### Neutral",
            "The man sleeps. #### Neutral",
            "no mark in it",
            "He dozes. #### Entailment",
        ),
        nli(1, "h #### Neutral", "Stubborn one. #### Neutral", "No label comes. #### Neutral", " #### Neutral"),
        nli(2, "h #### Neutral", "Bad mark. #### yes"),
        {k: v for k, v in nli(3, "x").items() if k != "candidates"},
    ]
    answers = {
        "The man sleeps.": '"The man is awake."',
        "He dozes.": "He is awake.",
        "Stubborn one.": "Stubborn one.",
        "No label comes.": "A label comes.",
    }

    def rewrite(prompt, nth, body):
        text = next(v for k, v in answers.items() if prompt.endswith(f"Sentence: {k}"))
        return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()

    def label(prompt, nth, body):
        assert prompt.startswith(
            ("prompt 0\nThe man is awake. ####", "prompt 0\nHe is", "prompt 1\nA label comes. ####")
        )
        text = " Contradiction." if "awake" in prompt else "entailment or neutral"
        return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()

    source = write_jsonl(tmp_path / "in.jsonl", records)
    with Server(rewrite) as one, Server(label) as two:
        for name, more in (("o", ()), ("replaced", ("--replace",))):
            run(monkeypatch, "flip", "--input", source, "--output", tmp_path / f"{name}.jsonl",
                "--base_url", one.url, "--model", "org/writer", "--label_base_url", two.url,
                "--label_model", "judge", *more)  # fmt: skip
            out = capsys.readouterr().out
            for words in (
                "3 malformed response",
                "1 unusable rewriting",
                "1 unusable label",
                "2 label differs",
                "2 labelled",
            ):
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


def test_flip_of_the_human_responses_shares_one_budget(tmp_path, monkeypatch, capsys):
    records = write_jsonl(tmp_path / "in.jsonl", [nli(i, f"Sentence {i}. #### Neutral") for i in range(4)])
    with pytest.raises(UserError):
        run(monkeypatch, "flip", "--input", records, "--output", tmp_path / "none.jsonl", "--model", "m")
    with Server(lambda *a: None) as server:
        run(monkeypatch, "flip", "--of", "human", "--input", records, "--output", tmp_path / "o.jsonl",
            "--base_url", server.url, "--model", "m", "--max_requests", "6")  # fmt: skip
    assert sum(server.asked.values()) == 6
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, want",
    [("No.", "No."), ('"No."', "No."), ("", None), ("A b", None), ("a, B!", None), ("x\ny", None), ("x #### y", None)],
)
def test_clean_sentence(text, want):
    assert clean_sentence(text, "a b") == want


# -- multi-document QA


def passage(title, text, gold=False):
    return {"title": title, "text": text, "hasanswer": gold, "isgold": gold}


def questions():
    return [
        {"question": "who wrote hamlet", "answers": ["William Shakespeare"],
         "ctxs": [passage("Hamlet", "Hamlet is a play by William Shakespeare.", True)]},
        {"question": "who wrote faust", "answers": ["Goethe"],
         "ctxs": [passage("Faust", "Faust is a play by Goethe.", True)]},
        {"question": "where is oslo", "answers": ["Norway"],
         "ctxs": [passage("Oslo", "Oslo is a city of Norway.", True)]},
        {"question": "who else wrote a faust", "answers": ["Thomas Mann", "the Mann"],
         "ctxs": [passage("Doktor Faustus", "A novel; the play of Goethe came before Mann.", True)]},
    ]  # fmt: skip


def test_distractors_are_the_most_similar_passages_without_an_answer(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "nq.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(q) + "\n" for q in questions())
    run(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", tmp_path / "nq.jsonl.gz", "--num_documents", "3",
        "--gold_position", "1", "3", "--skip", "1", "--limit", "2", "--output", tmp_path / "o.jsonl")  # fmt: skip
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows] == ["nq-1-gold1", "nq-1-gold3", "nq-2-gold1", "nq-2-gold3"]
    # Doktor Faustus is the most similar to the second question, but names Goethe: Hamlet comes first, then Oslo
    assert [d["title"] for d in rows[0]["documents"]] == ["Faust", "Hamlet", "Oslo"]
    assert [d["title"] for d in rows[1]["documents"]] == ["Hamlet", "Oslo", "Faust"]
    assert [r["gold_position"] for r in rows] == [1, 3, 1, 3]
    assert [[d["gold"] for d in r["documents"]].index(True) + 1 for r in rows] == [1, 3, 1, 3]
    assert rows[0]["prompt"].index("Document 1 (Faust)") < rows[0]["prompt"].index("Document 2 (Hamlet)")
    assert rows[0]["prompt"].endswith("Question: who wrote faust\nAnswer:")


def test_a_files_own_distractors_come_first_in_its_order_and_the_gold_place_is_seeded(tmp_path, monkeypatch):
    own = [passage(t, f"about {t}") for t in ("c", "b", "a")] + [passage("x", "of Goethe")]
    rows = [q | {"ctxs": own[:1] + q["ctxs"] + own[1:]} for q in questions()[1:2] * 30]
    file = write_jsonl(tmp_path / "nq.jsonl", rows)
    places = []
    for name in ("one", "two"):
        run(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "4",
            "--output", tmp_path / name)  # fmt: skip
        places.append([r["gold_position"] for r in read_jsonl(tmp_path / name)])
    first = read_jsonl(tmp_path / "one")[0]["documents"]
    assert [d["title"] for d in first if not d["gold"]] == ["c", "b", "a"]
    assert places[0] == places[1] and set(places[0]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ctxs": "x"}, "'ctxs'"),
        ({"ctxs": [{"title": 3, "text": "x"}]}, "'ctxs'"),
        ({"answers": []}, "'answers'"),
        ({"ctxs": [passage("x", "y")]}, "isgold"),
        ({}, "only 3 passages without the answer"),
    ],
)
def test_malformed_questions_are_named(tmp_path, monkeypatch, change, message):
    file = write_jsonl(tmp_path / "nq.jsonl", [*questions()[:2], questions()[2] | change, questions()[3]])
    with pytest.raises(UserError, match=message) as e:
        run(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "5", "--skip", "2",
            "--output", tmp_path / "o.jsonl")  # fmt: skip
    assert "nq.jsonl:3" in str(e.value)


def test_anchor_answers_from_one_passage_alone_then_label_and_hybrid(tmp_path, monkeypatch, tiny):
    file = write_jsonl(tmp_path / "nq.jsonl", questions())
    run(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "3",
        "--output", tmp_path / "train.jsonl", "--limit", "2")  # fmt: skip
    seen = []
    real = generation.generate

    def spy(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        answers = real(model, tokenizer, prompts, **options)
        for prompt, [answer] in zip(prompts, answers):
            answer["text"] = "William Shakespeare" if "Document 1 (Hamlet)" in prompt else answer["text"]
        return answers

    monkeypatch.setattr(generation, "generate", spy)
    command = ["anchor", "--input", tmp_path / "train.jsonl", "--output", tmp_path / "a.jsonl", "--model", tiny]
    run(monkeypatch, *command, "--num_distractors", "2", "--max_new_tokens", "4", "--source", "tiny")
    torch.distributed.destroy_process_group()
    assert len(seen) == 6 and all(p.count("Document") == 1 and "Document 1 (" in p for p in seen)
    run(monkeypatch, "rank", "--task", "multidoc_qa", "--by", "label", "--input", tmp_path / "a.jsonl",
        "--output", tmp_path / "r.jsonl")  # fmt: skip
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [[c["anchor"] for c in r["candidates"]] for r in rows] == [["gold", "distractor", "distractor"]] * 2
    for r in rows:
        assert sorted(c["document"] for c in r["candidates"]) == [1, 2, 3]
        for c in r["candidates"]:
            assert r["documents"][c["document"] - 1]["gold"] == (c["anchor"] == "gold")
    hamlet = rows[0]
    assert [c["correct"] for c in hamlet["candidates"]] == [True, False, False]
    hamlet["candidates"][2]["correct"] = True  # right, but not from the gold passage
    assert rescue.preference(hamlet, "label") == [1.0, 0.0, 1.0]
    assert rescue.preference(hamlet, "hybrid") == [2.0, 0.0, 1.0]


# -- prompts that collect and evaluate, apart from those that train


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


# -- the authors' files


def test_from_release(tmp_path, monkeypatch):
    """Their records train as they are: --ordering reward chooses y* and the pairs by their scores."""
    data = {
        "premise": "A man sits.",
        "hypothesis": "He stands.",
        "label": "contradiction",
        "explanation": "e",
        "index": 7,
    }
    responses = ["```e #### Contradiction```", "```No. #### Neutral```", "```Never. #### Contradiction```"]
    rows = [{"data_dict": data, "responses": responses, "scores": [2.0, 1.0, 2.0]}]
    (tmp_path / "rank_1k.json").write_text(json.dumps(rows))
    flags = ("--from_release", "--output", tmp_path / "o.jsonl", "--input", tmp_path / "rank_1k.json")
    run(monkeypatch, "prepare", "--task", "esnli", *flags)
    [record] = read_jsonl(tmp_path / "o.jsonl")
    assert [c["text"] for c in record["candidates"]] == responses and record["label"] == "contradiction"
    assert [c["source"] for c in record["candidates"]] == ["human", "model", "model"]
    levels = rescue.preference(record, "reward")
    assert levels == [2.0, 1.0, 2.0] and rescue.sft_target(record, levels, "reward") == 0
    assert [parse_nli(r) for r in responses] == [(x, True) for x in ("contradiction", "neutral", "contradiction")]

    qa = {
        "data_dict": questions()[0],
        "responses": ["It was William Shakespeare #### Correct", "Goethe"],
        "scores": [2.0, 1.0],
    }
    qa["data_dict"]["ctxs"].insert(0, passage("Faust", "Faust is a play by Goethe."))
    (tmp_path / "rank_1k.json").write_text(json.dumps([qa]))
    (tmp_path / "o.jsonl").unlink()
    for more in ((), ("--gold_prompt",)):
        output = ("--output", tmp_path / f"qa{len(more)}.jsonl")
        run(monkeypatch, "prepare", "--task", "multidoc_qa", *flags, *output, *more)
    whole, gold = (read_jsonl(tmp_path / f"qa{k}.jsonl")[0] for k in range(2))
    assert whole["gold_position"] == 2 and [c["reward"] for c in whole["candidates"]] == [2.0, 1.0]
    assert "Goethe" in whole["prompt"] and "Goethe" not in gold["prompt"] and "Shakespeare" in gold["prompt"]

    (tmp_path / "rank_1k.json").write_text(json.dumps([qa | {"scores": [1.0]}]))
    with pytest.raises(UserError, match="as many scores"):
        run(monkeypatch, "prepare", "--task", "multidoc_qa", *flags, "--output", tmp_path / "bad.jsonl")


def test_shuffle_draws_from_all_rows_and_long_passages_can_be_left_out(tmp_path, monkeypatch):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": "neutral", "explanation": "e"} for i in range(60)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    drawn = {}
    for seed, limit in ((0, 10), (0, 20), (1, 10)):
        out = tmp_path / f"{seed}-{limit}.jsonl"
        run(
            monkeypatch,
            "prepare",
            "--task",
            "esnli",
            "--input",
            source,
            "--shuffle",
            seed,
            "--limit",
            limit,
            "--output",
            out,
        )
        drawn[seed, limit] = [r["id"] for r in read_jsonl(out)]
    assert drawn[0, 20][:10] == drawn[0, 10] != drawn[1, 10]  # subsets of one draw
    assert max(int(i.removeprefix("esnli-")) for i in drawn[0, 10]) > 20 and len(set(drawn[0, 20])) == 20
    file, out = write_jsonl(tmp_path / "nq.jsonl", questions()), tmp_path / "short.jsonl"
    flags = ("--num_documents", 2, "--max_words", 6, "--output", out)
    run(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, *flags)
    assert [r["question"] for r in read_jsonl(out)] == ["who wrote faust", "where is oslo"]
    assert all(len(d["text"].split()) <= 6 for r in read_jsonl(out) for d in r["documents"])
