"""collecting/anchor.py: answers from one passage alone."""

from conftest import read_jsonl, refused, write_jsonl
from test_collecting_prepare import QA, questions

import rescue
from collecting import generation


def test_anchor_answers_from_one_passage_alone_then_label_and_hybrid(tmp_path, cli, preparing, monkeypatch, tiny):
    seen, real = [], generation.generate

    def spy(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        answers = real(model, tokenizer, prompts, **options)
        for prompt, [answer] in zip(prompts, answers):
            answer["text"] = "William Shakespeare" if "Document 1 (Hamlet)" in prompt else answer["text"]
        return answers

    monkeypatch.setattr(generation, "generate", spy)
    anchored, ranked = tmp_path / "a.jsonl", tmp_path / "r.jsonl"
    flags = ["--input", preparing(questions(), *QA, 3, "--limit", 2)[1], "--output", anchored, "--source", "tiny"]
    flags += ["--model", tiny, "--num_distractors", 2, "--max_new_tokens", 4]
    assert cli("collect_candidates", "anchor", *flags).code == 0
    assert len(seen) == 6 and all(p.count("Document") == 1 and "Document 1 (" in p for p in seen)
    flags = ["--task", "multidoc_qa", "--by", "label", "--input", anchored, "--output", ranked]
    assert cli("collect_candidates", "rank", *flags).code == 0
    rows = read_jsonl(ranked)
    for r in rows:
        assert [c["anchor"] for c in r["candidates"]] == ["gold", "distractor", "distractor"]
        assert sorted(c["document"] for c in r["candidates"]) == [1, 2, 3]
        for c in r["candidates"]:
            assert r["documents"][c["document"] - 1]["gold"] == (c["anchor"] == "gold")
    hamlet = rows[0]
    assert [c["correct"] for c in hamlet["candidates"]] == [True, False, False]
    hamlet["candidates"][2]["correct"] = True  # right, but not from the gold passage
    assert rescue.preference(hamlet, "label") == [1.0, 0.0, 1.0]
    assert rescue.preference(hamlet, "hybrid") == [2.0, 0.0, 1.0]
    bare = write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "prompt": "p"}])
    refused(cli("collect_candidates", "anchor", "--input", bare, "--model", "x"), "record 'a' has no documents")
