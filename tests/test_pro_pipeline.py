"""PRO's whole way on tiny models, with the README's commands: HH rows in, one table out."""

import json

from conftest import read_jsonl, write_jsonl


def hh_rows(n):
    for i in range(n):
        context = f"\n\nHuman: What about the {'very ' * (i % 3)}old thing number {i}?\n\nAssistant:"
        yield {"chosen": f"{context} I would rather not.", "rejected": f"{context} Take it {i}."}


def test_from_rows_to_a_table(cli, tiny, monkeypatch, tmp_path):
    def ok(script, *args):
        result = cli(script, *args)
        assert result.code == 0, result.err
        return result.out

    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "hh.jsonl", hh_rows(10))
    ok("collect_candidates", "prepare", "--task", "hh", "--input", rows, "--validation", 3)
    data, held_out = tmp_path / "data" / "hh", tmp_path / "data" / "hh" / "validation.jsonl"
    small = ["--epochs", 1, "--batch_size", 4, "--max_length", 64, "--max_prompt_length", 48]
    ok("reward_model", "--model", tiny, "--eval_data", held_out, *small)
    assert [x["best"] for x in read_jsonl("runs/reward-rank/log.jsonl") if "best" in x] == [False, True]
    reward = tmp_path / "runs" / "reward-rank" / "model"
    more = ["--max_new_tokens", 8, "--num_samples", 1, "--source", "alpaca-7b"]
    ok("collect_candidates", "sample", "--task", "hh", "--model", tiny, *more, "--stop", "Human:", "Assistant:")
    expand = ["--expand", "alpacas", "--expand_sources", "alpaca-7b"]
    ok("collect_candidates", "rank", "--task", "hh", "--by", "reward", "--reward_model", reward, *expand)
    ranked = read_jsonl(data / "ranked.jsonl")
    assert [len(r["candidates"]) for r in ranked] == [3] * 7

    ok("pro", "--model", tiny, *small)
    ok("pro", "--model", tiny, *small, "--no_ranking")
    rrhf = ["--ordering", "reward", "--alpha", 1, "--length_scaling", 1, "--human_length_scaling", 1]
    ok("rescue", "--model", tiny, *small, *rrhf, "--data", data / "ranked.jsonl")
    hindsight = data / "hindsight.jsonl"
    ok("collect_candidates", "hindsight", "--input", data / "ranked.jsonl", "--output", hindsight)
    ok("pro", "--model", tiny, *small, "--no_ranking", "--data", hindsight, "--output", tmp_path / "runs" / "coh")

    runs = ["pro-full", "pro-no_ranking", "rescue-reward", "coh"]
    for run in runs:
        model = tmp_path / "runs" / run / "model"
        out = ok(
            "evaluate", "hh", "--model", model, "--input", held_out, "--reward_model", reward, "--max_new_tokens", 4
        )
        assert "its rewards flatter this model" in out
    table = ok("evaluate", "report", *runs, "--columns", "bleu", "char_bleu", "reward")
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert lines == ["", *runs]
    figures = json.loads((tmp_path / "runs" / "eval" / "pro-full" / "hh.metrics.json").read_text())["metrics"]
    assert 0 < figures["reward"] < 100 and figures["prompts"] == 3
