"""pro.py: rankings, every ablation, Algorithm 1 from end to end."""

import json
import signal

import pytest
import torch
from conftest import command, killed_in_step, launch, make_records, read_jsonl, refused, weights, write_jsonl

import pro
from collecting import generation


def rewarded(*rewards):
    return [{"text": f"{i}", "source": "m", "reward": r} for i, r in enumerate(rewards)]


@pytest.mark.parametrize("reward, place", [(9.0, 1), (1.5, 1), (1.0, 2), (0.5, 2), (-3.0, 3)])
def test_the_new_candidate_is_inserted_by_its_reward_and_never_first(reward, place):
    ranking = pro.insert_candidate(rewarded(2.0, 1.0, 0.0), {"text": "new", "source": "bootstrap", "reward": reward})
    assert [c["text"] for c in ranking].index("new") == place and [c["rank"] for c in ranking] == [0, 1, 2, 3]
    assert ranking[place]["reward"] == reward  # as the reward model gave it
    # handed out anew, descending: what the loss reads
    assert pro.ranking_levels(ranking).tolist() == sorted([2.0, 1.0, 0.0, reward], reverse=True)
    ranks = [{"text": "x", "source": "m", "rank": r} for r in (0, 1, 1)]
    assert pro.ranking_levels(ranks).tolist() == [0, -1, -1]


def test_ranking_length_keeps_the_datas_own_pair():
    sampled = [{"text": f"s{i}", "source": "alpaca"} for i in range(4)]
    pair = [{"text": "c", "source": "chosen"}, {"text": "r", "source": "rejected"}]
    record = {"id": "a", "candidates": [*sampled[:2], pair[0], *sampled[2:], pair[1]]}
    for length in (2, 3, 4, 5, 9):
        kept = pro.draw_candidates(record, length, seed=0)["candidates"]
        assert len(kept) == min(length, 6)
        assert {"c", "r"} <= {c["text"] for c in kept}
        assert kept == [c for c in record["candidates"] if c in kept]
    draws = {tuple(c["text"] for c in pro.draw_candidates(record, 4, seed=s)["candidates"]) for s in range(20)}
    assert len(draws) > 1


# ----------------------------------------------------------------------------------------------------------------------
# From end to end


def write_data(path, num_records=6, rewards=(0.5, 2.0, -1.0)):
    words, sources = ["red", "green", "blue", "a long grey one", "yellow"], ["chosen", "rejected", "alpaca"]
    records = []
    for i in range(num_records):
        texts = [{"text": f"{words[(i + k) % 5]} {i}", "source": sources[k]} for k in range(len(rewards))]
        candidates = [c if r is None else c | {"reward": r} for c, r in zip(texts, rewards)]
        records.append({"id": f"r{i}", "prompt": f"Name colour {i}. ", "candidates": candidates})
    return write_jsonl(path, records)


FLAGS = ["--lr", 1e-3, "--batch_size", 3, "--epochs", 1, "--max_length", 64, "--max_prompt_length", 40]


ABLATIONS = ["", "--no_sft", "--no_ranking", "--no_temperature", "--first_only", "--first_only --no_temperature"]
ABLATIONS += ["--sft_reduction mean", "--ranking_length 2", "--beta 0.1", "--no_temperature --no_sft"]


def test_every_ablation_changes_the_loss_as_its_equation_says(tiny, tmp_path):
    """The first step of each on the same batch, 6 prompts with 3 responses."""
    same, lines = [*FLAGS, "--batch_size", 6, "--model", tiny, "--data", write_data(tmp_path / "d.jsonl")], []
    for i, flags in enumerate(ABLATIONS):
        assert launch("pro", *same, *flags.split(), "--output", tmp_path / f"run{i}") == 0
        lines += read_jsonl(tmp_path / f"run{i}/log.jsonl")
    full, no_sft, bon, plain, first, both, mean, two, more, plain_no_sft = lines
    assert full["loss"] == pytest.approx(full["pro_loss"] + 0.05 * 2**2 * full["sft_loss"], rel=1e-5)  # n = 3
    assert no_sft["loss"] == pytest.approx(full["pro_loss"], rel=1e-5)
    assert bon["pro_loss"] == 0 and bon["loss"] == pytest.approx(bon["sft_loss"], rel=1e-6)
    assert len({x["pro_loss"] for x in (full, plain, first, both)}) == 4
    assert both["pro_loss"] < plain["pro_loss"] and first["pro_loss"] < full["pro_loss"]
    for line in (plain, first, both):
        assert line["sft_loss"] == pytest.approx(full["sft_loss"], rel=1e-5)
    assert mean["sft_loss"] == pytest.approx(bon["sft_loss"], rel=1e-5)
    assert full["sft_loss"] > 3 * mean["sft_loss"]  # the sum over tokens
    assert two["loss"] == pytest.approx(two["pro_loss"] + 0.05 * two["sft_loss"], rel=1e-5)  # (n - 1)^2 = 1
    assert more["loss"] == pytest.approx(full["pro_loss"] + 0.1 * 4 * full["sft_loss"], rel=1e-5)
    assert plain_no_sft["loss"] == pytest.approx(plain["pro_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "rewards, more, words",
    [
        ((None, None, None), [], ["candidates[0] has no 'reward'", "rank --by reward"]),
        ((None, None, None), ["--no_temperature"], ["neither 'reward' nor 'rank'"]),
        ((1.0,), [], ["one candidate", "--no_ranking"]),
        ((1.0, 0.0), ["--no_ranking", "--first_only"], ["--no_ranking"]),
        ((1.0, 0.0), ["--bootstrap_splits", 2], ["--bootstrap_splits needs --reward_model"]),
        ((1.0, 0.0), ["--reward_model", "x"], ["--bootstrap_splits or --eval_data"]),
        ((1.0, 0.0), ["--eval_data", "x.jsonl"], ["x.jsonl is not there"]),
        ((1.0, 0.0), ["--bootstrap_splits", 9, "--reward_model", "x"], ["more than the 6 prompts"]),
        ((1.0, 0.0), ["--score_scale", 2], ["--no_temperature"]),
    ],
)
def test_mistakes_are_one_sentence(cli, tiny, tmp_path, rewards, more, words):
    data = write_data(tmp_path / "d.jsonl", rewards=rewards)
    done = cli("pro", *FLAGS, "--model", tiny, "--data", data, "--output", tmp_path / "run", *more)
    message = refused(done, *words)
    assert "train on ranks only" not in message  # no record has ranks either


def test_ranks_alone_are_enough_without_temperature(cli, tiny, tmp_path):
    argv = ["--model", tiny, "--output", tmp_path / "run", "--data"]
    records = [{**r, "candidates": [c | {"rank": k} for k, c in enumerate(r["candidates"])]} for r in make_records(3)]
    argv.append(write_jsonl(tmp_path / "d.jsonl", records))
    refused(cli("pro", *argv), "(or train on ranks only: --no_temperature)")
    assert cli("pro", *argv, "--no_temperature").code == 0


# ----------------------------------------------------------------------------------------------------------------------
# --eval_data


def eval_lines(output):
    return [line for line in read_jsonl(output / "log.jsonl") if "eval_loss" in line]


def test_the_best_step_is_kept_and_is_not_the_last(cli, tiny, reward_folder, tmp_path):
    """At a learning rate at which the held-out reward goes up and down in 8 steps."""
    output, held_out = tmp_path / "run", write_data(tmp_path / "e.jsonl", 5, rewards=(1.0, 0.5, 0.0))
    argv = [*FLAGS, "--lr", 1e-2, "--epochs", 4, "--model", tiny, "--data", write_data(tmp_path / "d.jsonl")]
    argv += ["--eval_data", held_out, "--eval_every", 2, "--reward_model", reward_folder, "--max_new_tokens", 8]
    assert cli("pro", *argv, "--output", output).code == 0
    lines = eval_lines(output)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    best = max(lines[1:], key=lambda line: line["eval_reward"])  # the untrained model is no candidate
    assert best["step"] < 8 and [line for line in lines if line["best"]][-1] == best
    # the folder holds that step's weights: its figures again, by training's evaluation and by evaluate.py hh
    assert cli("pro", *argv, "--model", output / "best", "--epochs", 1, "--output", tmp_path / "again").code == 0
    again = eval_lines(tmp_path / "again")[0]
    assert again == pytest.approx(best | {"step": 0, "best": False}, rel=1e-4)
    hh = ["hh", "--model", output / "best", "--input", held_out, "--reward_model", reward_folder, "--max_new_tokens", 8]
    assert cli("evaluate", *hh, "--max_prompt_length", 40, "--output", tmp_path / "hh.jsonl").code == 0
    document = json.loads((tmp_path / "hh.metrics.json").read_text())
    assert document["name"] == "run-best"
    assert document["metrics"]["reward"] == pytest.approx(best["eval_reward"], abs=1e-3)


def test_sft_is_held_out_on_whole_rankings(cli, tiny, tmp_path):
    argv = ["--no_ranking", "--data", write_data(tmp_path / "d.jsonl"), "--eval_data", write_data(tmp_path / "e.jsonl")]
    done = cli("pro", *FLAGS, "--model", tiny, *argv, "--output", tmp_path / "run")
    assert "d.jsonl: 6 prompts, ranking lengths 1\n" in done.out and "e.jsonl: 6 prompts, ranking lengths 3" in done.out
    lines = eval_lines(tmp_path / "run")
    assert len(lines) == 2
    for x in lines:
        assert x["eval_gap"] != 0 == x["eval_pro_loss"] and x["eval_loss"] == x["eval_sft_loss"]


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def bootstrap_flags(tiny, reward_folder, data, output):
    argv = [*FLAGS, "--batch_size", 10, "--max_new_tokens", 12, "--model", tiny, "--data", data]
    return [*argv, "--bootstrap_splits", 2, "--reward_model", reward_folder, "--output", output]


def is_new(candidate):
    return candidate["source"] == "bootstrap"


def split_files(output):
    return [read_jsonl(output / "bootstrap" / f"split-{k}.jsonl") for k in (1, 2)]


def check_splits(output, data):
    """Both splits together hold every record once, each with one more candidate, never first, rewards descending."""
    before = {r["id"]: r for r in read_jsonl(data)}
    first, second = split_files(output)
    assert len(first) == len(second) == 20 and {r["id"] for r in first + second} == before.keys()
    for record in first + second:
        candidates = record["candidates"]
        rewards = [c["reward"] for c in candidates]
        assert len(candidates) == 4 and rewards[1:] == sorted(rewards[1:], reverse=True)
        assert [c["rank"] for c in candidates] == [0, 1, 2, 3]
        assert sum(map(is_new, candidates)) == 1
        best = max(before[record["id"]]["candidates"], key=lambda c: c["reward"])
        assert candidates[0]["text"] == best["text"] and not is_new(candidates[0])


@pytest.fixture(scope="module")
def whole_run(tiny, reward_folder, tmp_path_factory):
    """40 prompts in two splits, without an interruption -> (data, output)."""
    folder = tmp_path_factory.mktemp("bootstrap")
    data = write_data(folder / "d.jsonl", 40)
    assert launch("pro", *bootstrap_flags(tiny, reward_folder, data, folder / "run")) == 0
    return data, folder / "run"


def test_bootstrap_inserts_scored_answers(whole_run):
    data, output = whole_run
    check_splits(output, data)
    first, second = split_files(output)
    assert sum(c["text"] != "" for r in first + second for c in r["candidates"] if is_new(c)) > 20
    log = read_jsonl(output / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[0]["loss"] == pytest.approx(log[0]["pro_loss"] + 0.05 * 3**2 * log[0]["sft_loss"], rel=1e-5)  # n = 4


def test_rewards_of_answers_are_those_of_rank(cli, reward_folder, whole_run, tmp_path):
    """One scale in one ranking: an answer's reward is what `rank --by reward` gives it."""
    split, again = whole_run[1] / "bootstrap/split-1.jsonl", tmp_path / "again.jsonl"
    rank = ["rank", "--by", "reward", "--reward_model", reward_folder, "--input", split, "--output", again]
    assert cli("collect_candidates", *rank).code == 0
    answers = [
        [c["reward"] for r in sorted(read_jsonl(path), key=lambda r: r["id"]) for c in r["candidates"] if is_new(c)]
        for path in (split, again)
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-5) and len(answers[0]) == 20


def same_run(one, other):
    """Two runs took the same steps and ended with the same weights."""
    for a, b in zip(*(read_jsonl(x / "log.jsonl") for x in (one, other)), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert split_files(one) == split_files(other)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["while sampling", "while training"])
def test_bootstrap_resumes_in_the_second_split(cli, monkeypatch, tiny, reward_folder, whole_run, tmp_path, where):
    """Told to stop between two batches of split 2's samples, or killed in its last step: the same run in the end."""
    data, whole = whole_run
    argv = bootstrap_flags(tiny, reward_folder, data, tmp_path / "run")
    calls = []
    if where == "while sampling":
        generate = generation.generate

        def stop_at_third(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:  # the first batch of split 2
                signal.raise_signal(signal.SIGTERM)
            return generate(*args, **kwargs)

        monkeypatch.setattr(generation, "generate", stop_at_third)
        result = cli("pro", *argv)
        assert result.code == 0 and "--resume" in result.out
        assert not (tmp_path / "run" / "bootstrap" / "split-2.jsonl").exists()
        part = tmp_path / "run" / "bootstrap" / "split-2.jsonl.part0"
        lines = part.read_text().splitlines(keepends=True)
        assert len(lines) == 16
        part.write_text("".join(lines[:5]))  # killed within the batch: it must be drawn again whole
        monkeypatch.setattr(generation, "generate", generate)
    else:
        with killed_in_step(4):
            assert cli("pro", *argv).code == 2
        monkeypatch.setattr(generation, "generate", None)  # the second split is sampled: nothing to generate
    result = cli("pro", *argv, "--resume")
    assert result.code == 0, result.err
    same_run(tmp_path / "run", whole)


def test_bootstrap_on_two_ranks(tiny, reward_folder, whole_run, tmp_path):
    """Generation from sharded weights, each rank its own prompts: the rankings keep their form."""
    data = whole_run[0]
    argv = bootstrap_flags(tiny, reward_folder, data, tmp_path / "run")
    command("torchrun", "--standalone", "--nproc_per_node", 2, "pro.py", *argv)
    check_splits(tmp_path / "run", data)
    log, alone = read_jsonl(tmp_path / "run/log.jsonl"), read_jsonl(whole_run[1] / "log.jsonl")
    # the first split's samples come before any step: same prompts a batch, same seed, so the same first loss
    assert len(log) == 4 and log[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-3)
