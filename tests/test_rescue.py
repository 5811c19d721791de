"""rescue.py: the orderings, what is trained and refused."""

import json
import math
import types

import pytest
import torch
from conftest import make_records, nli, read_jsonl, refused, weights, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from rescue import draw_candidates, load_data, preference, sft_target

RECORD = [
    {"source": "human", "correct": True, "similarity": 1.0, "rank": 1, "reward": 0.1},
    {"source": "m", "correct": True, "similarity": 0.4, "rank": 0, "reward": 0.5},
    {"source": "m", "correct": False, "similarity": 0.6, "rank": 3, "reward": -2.0},
    {"source": "m", "correct": False, "similarity": 0.2, "rank": 2, "reward": 0.4},
]
WRONG_HUMAN = [c | {"correct": c["source"] == "m"} for c in RECORD]
ANCHORED = [("distractor", True), ("gold", True), ("gold", False), ("distractor", False)]
ANCHORED = [{"source": "m", "anchor": a, "correct": c} for a, c in ANCHORED]
RANKED = [{"source": "human"}, *({"source": "m", "rank": r} for r in (1, None, 0))]  # null: the ranker gave none


@pytest.mark.parametrize(
    "candidates, ordering, levels, y_star",
    [
        (RECORD, "human", [1, 0, 0, 0], 0),
        (RECORD, "label", [1, 1, 0, 0], 0),
        (RECORD, "hybrid", [2, 1, 0, 0], 0),
        (RECORD, "similarity", [math.inf, 0.4, 0.6, 0.2], 0),
        (RECORD, "gpt", [math.inf, 0, -3, -2], 0),
        (RECORD, "reward", [0.1, 0.5, -2.0, 0.4], 1),  # RRHF: the best-rewarded
        (RECORD[::-1], "label", [0, 0, 1, 1], 3),  # not the first of the best level
        (WRONG_HUMAN, "hybrid", [2, 1, 1, 1], 0),
        (WRONG_HUMAN, "label", [0, 1, 1, 1], 0),  # "irrespective of whether they are human" (Sec. 4)
        (ANCHORED, "hybrid", [1, 2, 0, 0], 1),  # multi-document QA; y* is the best correct one
        (ANCHORED, "label", [1, 1, 0, 0], 0),
        (ANCHORED[2:], "label", [0, 0], None),  # never a wrong answer
        (RANKED, "gpt", [math.inf, -1, math.nan, 0], 0),
        (RANKED[2:3], "gpt", [math.nan], None),
    ],
)
def test_orderings_and_y_star(candidates, ordering, levels, y_star):
    record = {"candidates": candidates}
    assert preference(record, ordering) == pytest.approx(levels, nan_ok=True)
    assert sft_target(record, levels, ordering) == y_star


def test_selection_keeps_the_human():
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
