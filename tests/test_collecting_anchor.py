"""collecting/anchor.py: answers from one passage alone."""

import torch
from conftest import call, read_jsonl, write_jsonl
from test_collecting_prepare import questions

import rescue
from collecting import generation


def test_anchor_answers_from_one_passage_alone_then_label_and_hybrid(tmp_path, monkeypatch, tiny):
    file = write_jsonl(tmp_path / "nq.jsonl", questions())
    call(monkeypatch, "prepare", "--task", "multidoc_qa", "--input", file, "--num_documents", "3",
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
    call(monkeypatch, *command, "--num_distractors", "2", "--max_new_tokens", "4", "--source", "tiny")
    torch.distributed.destroy_process_group()
    assert len(seen) == 6 and all(p.count("Document") == 1 and "Document 1 (" in p for p in seen)
    call(monkeypatch, "rank", "--task", "multidoc_qa", "--by", "label", "--input", tmp_path / "a.jsonl",
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
