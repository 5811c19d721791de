"""rescue.py: the loss against hand-worked numbers and naive loops, the orderings, what is trained and refused."""

import json
import math
import random
import types

import pytest
import torch
from conftest import make_records, nli, read_jsonl, refused, stopped_after, weights, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import pair_statistics
from rescue import draw_candidates, load_data, preference, ranking_loss, sft_loss, sft_target


def naive_ranking_loss(scores, ranks):
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if ranks[i] > ranks[j]:
                total += max(0.0, scores[j] - scores[i])
    return total


class TestLoss:
    def test_by_hand(self):
        # human 2, right 1, wrong 0; violated: (0, 1): 0.5, (0, 2): 1.0, (1, 2): 0.5
        scores = torch.tensor([-2.0, -1.5, -1.0], requires_grad=True)
        loss = ranking_loss(scores, torch.tensor([2.0, 1.0, 0.0]))
        assert loss.item() == pytest.approx(2.0)
        loss.backward()
        assert scores.grad.tolist() == [-2.0, 0.0, 2.0]  # up by two pairs, up and down by one each, down by two

    def test_ties_are_not_compared(self):
        scores = torch.tensor([-3.0, -1.0, -2.0], requires_grad=True)
        loss = ranking_loss(scores, torch.tensor([1.0, 1.0, 1.0]))
        loss.backward()
        assert loss.item() == 0.0 and scores.grad.tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("seed", range(20))
    def test_against_loops(self, seed):
        rng = random.Random(seed)
        n = rng.randint(1, 6)
        values, ranks = [rng.uniform(-4, 0) for _ in range(n)], [rng.randint(0, 2) for _ in range(n)]
        scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        loss = ranking_loss(scores, torch.tensor(ranks))
        assert loss.item() == pytest.approx(naive_ranking_loss(values, ranks), abs=1e-12)
        loss.backward()
        for i in range(n):  # central differences: the hinge is linear away from its kinks
            up, down = ([v + (k == i) * d for k, v in enumerate(values)] for d in (1e-7, -1e-7))
            slope = (naive_ranking_loss(up, ranks) - naive_ranking_loss(down, ranks)) / 2e-7
            assert scores.grad[i].item() == pytest.approx(slope, abs=1e-5)

    def test_infinite_levels(self):  # similarity puts the human response at infinity
        assert ranking_loss(torch.tensor([-2.0, -1.0]), torch.tensor([math.inf, 0.3])).item() == pytest.approx(1.0)

    def test_sft_is_the_mean_over_the_target(self):
        logprobs, lengths = torch.tensor([-6.0, -4.0, -9.0]), torch.tensor([3.0, 4.0, 3.0])
        assert sft_loss(logprobs, lengths, torch.tensor([False, False, True])).item() == pytest.approx(3.0)
        assert sft_loss(logprobs, lengths, torch.tensor([False] * 3)).item() == 0.0

    def test_length_scaling_by_hand(self):
        # s(y): -8 / 4**0.85 and -8 / 4**1
        got = common.length_normalized(torch.tensor([-8.0, -8.0]), torch.tensor([4.0, 4.0]), torch.tensor([0.85, 1.0]))
        assert got.tolist() == pytest.approx([-8 / 3.2490095854, -2.0])

    def test_pair_statistics(self):
        best, right, pairs, gap = pair_statistics(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([2.0, 1.0, 0.0]))
        assert (best.item(), right.item(), pairs.item(), gap.item()) == (-1, 1, 3, pytest.approx(1.0 - 0.5 - 1.5))


class TestOrderings:
    record = {
        "id": "w",
        "candidates": [
            {"text": "h", "source": "human", "correct": True, "similarity": 1.0, "rank": 1, "reward": 0.1},
            {"text": "a", "source": "m", "correct": True, "similarity": 0.4, "rank": 0, "reward": 0.5},
            {"text": "b", "source": "m", "correct": False, "similarity": 0.6, "rank": 3, "reward": -2.0},
            {"text": "c", "source": "m", "correct": False, "similarity": 0.2, "rank": 2, "reward": 0.4},
        ],
    }

    @pytest.mark.parametrize(
        "ordering, levels",
        [
            ("human", [1, 0, 0, 0]),
            ("label", [1, 1, 0, 0]),
            ("hybrid", [2, 1, 0, 0]),
            ("similarity", [math.inf, 0.4, 0.6, 0.2]),
            ("gpt", [math.inf, 0, -3, -2]),
            ("reward", [0.1, 0.5, -2.0, 0.4]),
        ],
    )
    def test_worked_example(self, ordering, levels):
        assert preference(self.record, ordering) == levels

    def test_multi_document_hybrid(self):
        anchors = [("gold", True), ("distractor", True), ("gold", False), ("distractor", False)]
        record = {"candidates": [{"source": "m", "anchor": a, "correct": c} for a, c in anchors]}
        assert preference(record, "hybrid") == [2, 1, 0, 0]
        assert preference(record, "label") == [1, 1, 0, 0]

    def test_the_human_response_is_first_whatever_it_was_marked(self):
        wrong = {"candidates": [c | {"correct": c["source"] == "m"} for c in self.record["candidates"]]}
        assert preference(wrong, "hybrid") == [2, 1, 1, 1]
        assert preference(wrong, "label") == [0, 1, 1, 1]  # "irrespective of whether they are human" (Sec. 4)
        for ordering in ("human", "label", "hybrid", "similarity", "gpt"):
            assert sft_target(wrong, preference(wrong, ordering), ordering) == 0

    def test_gpt_compares_nothing_with_the_unranked(self):
        ranks = [None, 1, None, 0]  # the human one is the ranker's reference and has none
        record = {"candidates": [{"source": s, "rank": r} for s, r in zip("hmmm", ranks)]}
        record["candidates"][0]["source"] = "human"
        levels = torch.tensor(preference(record, "gpt"))
        pairs = (levels[:, None] > levels[None, :]).nonzero().tolist()
        assert pairs == [[0, 1], [0, 3], [3, 1]]
        levels = torch.tensor(preference({"candidates": [{"source": "m", "rank": None}] * 2}, "gpt"))
        assert not (levels[:, None] > levels[None, :]).any()

    @pytest.mark.parametrize(
        "candidates, ordering, at",
        [
            ([("m", True), ("m", False), ("human", True)], "label", 2),  # not the first of the best level
            ([("m", False), ("m", True), ("m", True)], "label", 1),
            ([("m", False), ("m", False)], "label", None),  # never a wrong answer
            ([("m", None), ("m", None)], "gpt", None),
        ],
    )
    def test_y_star(self, candidates, ordering, at):
        record = {"candidates": [{"source": s, "correct": c, "rank": None} for s, c in candidates]}
        record["candidates"] = [{k: v for k, v in c.items() if v is not None} for c in record["candidates"]]
        assert sft_target(record, preference(record, ordering), ordering) == at

    def test_y_star_is_the_best_correct_one(self):
        anchors = [("distractor", True), ("gold", True), ("gold", False)]
        record = {"candidates": [{"source": "m", "anchor": a, "correct": c} for a, c in anchors]}
        assert sft_target(record, preference(record, "hybrid"), "hybrid") == 1
        assert sft_target(self.record, preference(self.record, "reward"), "reward") == 1  # RRHF: the best-rewarded

    def test_selection_keeps_the_human(self):
        record = make_records(1, candidates=6)[0]
        record["candidates"] = record["candidates"][1:] + record["candidates"][:1]  # the human one last
        drawn = {s: [c["text"] for c in draw_candidates(record, 3, s)["candidates"]] for s in range(8)}
        assert all(len(d) == 3 and d[-1] == record["candidates"][-1]["text"] for d in drawn.values())
        assert len({tuple(d) for d in drawn.values()}) > 1
        assert drawn[0] == [c["text"] for c in draw_candidates(record, 3, 0)["candidates"]]


class TestWhatIsTrained:
    def test_only_what_is_compared_or_fine_tuned_is_computed(self, train, tmp_path):
        """Four prompts without a human response: right and wrong ones; all wrong; all right; one that is right."""
        marks = [[True, False, False], [False, False], [True, True], [False] * 4 + [True]]
        records = [nli(i, *(f"t{j}" for j in range(len(m)))) | {"id": f"r{i}"} for i, m in enumerate(marks)]
        for record, m in zip(records, marks):
            for c, correct in zip(record["candidates"], m):
                c |= {"correct": correct, "source": "m"}
        data = write_jsonl(tmp_path / "d.jsonl", records)
        out = train("a", "--no_sft", "--data", data).out
        assert "4 prompts, 6 ordered pairs" in out and "2 prompts are left out" in out
        out = train("b", "--num_candidates", 4, "--data", data).out
        assert "the human response in 0, the best correct response in 3, none in 1" in out
        assert "1 prompts are left out" in out and "leaves out 1 model responses" in out
        args = types.SimpleNamespace(ordering="label", no_sft=False, num_candidates=5, seed=0)
        selected = load_data(args, data)
        assert [len(record["candidates"]) for record, *_ in selected] == [3, 1, 5]  # of two right ones y* alone
        assert [y.tolist() for *_, y in selected] == [[True, False, False], [True], [False] * 4 + [True]]

    @pytest.mark.parametrize("ordering", ["label", "human", "hybrid", "gpt"])
    def test_an_ordering_without_a_pair_is_refused(self, train, tmp_path, ordering):
        """Every model response dropped as malformed: it would be SFT under another name."""
        data = write_jsonl(tmp_path / "d.jsonl", [nli(i, f"so {i} #### Neutral") for i in range(3)])
        done = train("o", "--ordering", ordering, "--data", data, code=2)
        refused(done, "no two candidates of different preference")
        out = train("o", "--ordering", "none", "--max_train_samples", 4, "--data", data).out
        assert f"WARNING: {data} holds fewer prompts than --max_train_samples 4" in out

    def test_no_sft_and_alpha(self, train, tmp_path):
        train("a", "--no_sft", "--alpha", 0.5, "--max_train_samples", 4)
        line = read_jsonl(tmp_path / "a/log.jsonl")[0]
        assert line["loss"] == pytest.approx(0.5 * line["rank_loss"])

    def test_saved_folder_gives_the_same_logits(self, train, tmp_path, monkeypatch):
        seen, save = {}, common.save_model
        monkeypatch.setattr(common, "save_model", lambda model, *more: (seen.update(model=model), save(model, *more)))
        train("run", "--ordering", "none")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "run/model")("A man sleeps.").input_ids])
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, seen["model"].eval()(ids).logits)
        assert (tmp_path / "run/model/generation_config.json").exists() and loaded.config.use_cache
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        assert "lm_head.weight" not in weights(tmp_path / "run")  # tied


class TestRefusals:
    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--data", "none.jsonl"], ["none.jsonl", "collect_candidates.py prepare"]),
            (["--ordering", "best"], ["--ordering", "best"]),
            (["--alpha=-1"], ["--alpha", "-1"]),
            (["--alph", "1"], ["--alph"]),  # no abbreviations
            (["--model", "tests"], ["--model"]),
            (["--ordering", "none", "--no_sft"], ["--no_sft"]),
        ],
    )
    def test_flags(self, train, tmp_path, flags, words):
        refused(train("out", *flags, code=2), *words)
        assert not (tmp_path / "out/model").exists()

    def test_pickled_weights(self, train, own):
        """A .bin file can run code when it is read: refused unless asked for, and then it trains."""
        torch.save(AutoModelForCausalLM.from_pretrained(own).state_dict(), own / "pytorch_model.bin")
        (own / "model.safetensors").unlink()
        refused(train("out", "--model", own, code=2), "--model", "--allow_pickle")
        train("out", "--model", own, "--allow_pickle", "--max_train_samples", 4)

    def test_missing_annotation_names_the_command(self, train, tmp_path):
        records = make_records(2)
        del records[1]["candidates"][2]["correct"]
        data = write_jsonl(tmp_path / "d.jsonl", records)
        refused(train("out", "--data", data, code=2), "r1", "candidates[2]", "correct", "rank --by label")

    def test_changed_arguments(self, train):
        with stopped_after(1):
            train("out")
        refused(train("out", "--resume", "--alpha", "0.2", code=2), "--alpha 0.1 -> 0.2")
        train("out", "--resume", "--checkpoint_every", 1, "--max_tokens_per_row", 90)

    def test_nan_names_the_records(self, train, tmp_path, monkeypatch):
        import rescue

        original, calls = rescue.candidate_logprobs, []

        def poisoned(model, batch):
            logprobs, lengths = original(model, batch)
            calls.append(1)
            return (logprobs * float("nan") if len(calls) == 2 else logprobs), lengths

        monkeypatch.setattr(rescue, "candidate_logprobs", poisoned)
        message = refused(train("out", "--checkpoint_every", 1, code=2), "loss is not finite")
        assert sum(f"r{i}" in message for i in range(12)) == 4  # those of the second row
        assert not (tmp_path / "out/model").exists() and (tmp_path / "out/checkpoints/step-00000001").exists()

    def test_a_gradient_that_is_not_finite_names_the_records(self, train, tmp_path, monkeypatch):
        """In bf16 a gradient may overflow where the loss did not."""
        clip = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * float("inf"))
        message = refused(train("out", code=2), "gradient of records", "not finite", "--lr")
        assert sum(f"r{i}" in message.split() or f"r{i}," in message for i in range(12)) == 4
        assert not (tmp_path / "out/model").exists() and not (tmp_path / "out/checkpoints").exists()


def test_default_paths(cli, tiny, here):
    """Without a path: data/esnli/ranked.jsonl -> runs/rescue-label. The message for absent data shows the commands."""
    done = cli("rescue", "--ordering", "label", "--model", tiny)
    refused(done, "data/esnli/ranked.jsonl", "prepare", "sample", "rank", "--by label")
    (here / "data/esnli").mkdir(parents=True)
    write_jsonl(here / "data/esnli/ranked.jsonl", make_records(4))
    assert cli("rescue", "--ordering", "label", "--model", tiny).code == 0
    settings = json.loads((here / "runs/rescue-label/args.json").read_text())["settings"]
    assert settings["alpha"] == 0.1 and settings["length_scaling"] == 0.85 and settings["batch_size"] == 64
