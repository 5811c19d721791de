"""The four training loops alike: rows, padding, processes and a restart change no step; the first loss is that of every
candidate scored alone, by plain transformers and the printed equations."""

import pytest
from architectures import score_alone
from conftest import command, difference, killed_in_step, launch, ranked_records, read_jsonl, stopped_after, write_jsonl
from test_losses import naive_pro, naive_rescue, naive_tuna
from transformers import AutoModelForCausalLM

import common

SCRIPTS = {
    "rescue": ["--ordering", "label"],
    "pro": ["--max_prompt_length", 400],
    "tuna": ["--stage", "contextual", "--margin", 1],
    "reward_model": [],
}


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(request, tiny, tmp_path_factory):
    """-> (script, its flags but --output, the folder of a run: 9 prompts in steps of 4, 4 and 1)."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_jsonl(folder / "data.jsonl", ranked_records(9))
    held_out = write_jsonl(folder / "held-out.jsonl", ranked_records(12)[9:])
    flags = [*SCRIPTS[request.param], "--model", tiny, "--data", data, "--eval_data", held_out, "--eval_every", 2]
    flags += ["--lr", 1e-3, "--batch_size", 4, "--epochs", 1, "--max_tokens_per_row", 10_000]
    assert launch(request.param, *flags, "--output", folder / "whole") == 0
    return request.param, flags, folder / "whole"


def assert_same_steps(one, other, rel=1e-3):
    """Two runs logged the same figures; in the order of the additions they may differ."""
    for a, b in zip(read_jsonl(one / "log.jsonl"), read_jsonl(other / "log.jsonl"), strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=rel, abs=1e-5)


@pytest.mark.parametrize("flags", [("--max_tokens_per_row", 1), ("--padded",), ("--activation_checkpointing",)])
def test_rows_padding_and_recomputing_change_nothing(whole, tmp_path, flags):
    script, same, folder = whole
    assert launch(script, *same, *flags, "--output", tmp_path / "other") == 0
    assert difference(folder, tmp_path / "other") < 2e-6
    assert_same_steps(folder, tmp_path / "other")


def test_two_processes_are_one(whole, tmp_path):
    """The last step has one prompt for two processes."""
    script, flags, folder = whole
    command("torchrun", "--nproc_per_node", 2, f"{script}.py", *flags, "--output", tmp_path / "two")
    assert difference(folder, tmp_path / "two") < 2e-6
    assert_same_steps(folder, tmp_path / "two")


@pytest.mark.parametrize("how", ["stopped before the first step", "stopped", "killed"])
def test_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path, capsys, how):
    """A step after the checkpoint is taken again, also the evaluation there."""
    script, flags, folder = whole
    flags = [*flags, "--checkpoint_every", 1, "--output", tmp_path / "parts"]
    if how == "killed":
        with killed_in_step(3):
            assert launch(script, *flags) == 2
        assert [line["step"] for line in read_jsonl(tmp_path / "parts/log.jsonl")] == [0, 1, 2, 2]
    else:
        with stopped_after(0 if "before" in how else 1):
            assert launch(script, *flags) == 0
        assert "--resume" in capsys.readouterr().out and not (tmp_path / "parts/model").exists()
    assert launch(script, *flags, "--resume") == 0
    for name in ("model", "best"):
        assert difference(folder, tmp_path / "parts", name) == 0.0
    assert_same_steps(folder, tmp_path / "parts", rel=0)


def expected_rescue(record, logprobs, lengths):
    lambdas = [1.0, 0.85, 0.85, 0.85]  # the human one first
    right = [c["correct"] for c in record["candidates"]]
    ranking = naive_rescue([p / n**lam for p, n, lam in zip(logprobs, lengths, lambdas)], right)
    return -logprobs[0] / lengths[0] + 0.1 * ranking


def expected_pro(record, logprobs, lengths):
    ranking = naive_pro([p / n for p, n in zip(logprobs, lengths)], [c["reward"] for c in record["candidates"]])
    return float(ranking) - 0.05 * 3**2 * logprobs[0]


def expected_contextual(record, logprobs, lengths):
    scores = [p / n for p, n in zip(logprobs, lengths)]
    return naive_tuna(scores, [0, 1, 2, 3], 0.1) - scores[0]


def expected_probabilistic(record, logprobs, lengths):
    scores = [p / n for p, n in zip(logprobs, lengths)]
    worth = [c["logprob"] / c["num_tokens"] ** 1.3 for c in record["candidates"]]
    ranks = [sorted(worth, reverse=True).index(w) for w in worth]
    return naive_tuna(scores, ranks, 0.1) - scores[0]


def expected_sft(record, logprobs, lengths):
    return -logprobs[0] / lengths[0]


def expected_mul(record, logprobs, lengths):
    """Alpaca-Mul (Tuna, Sec. 3.4): Eq. 2 on every response, each an example of its own."""
    return sum(-p / n for p, n in zip(logprobs, lengths)) / 4


@pytest.mark.parametrize(
    "command, expected",
    [
        ("rescue --ordering label", expected_rescue),
        ("rescue --ordering none", expected_sft),
        ("pro --max_prompt_length 400", expected_pro),
        ("tuna --stage contextual", expected_contextual),
        ("tuna --stage contextual --mle_weight 0", lambda r, p, n: expected_contextual(r, p, n) + p[0] / n[0]),
        ("tuna --stage probabilistic", expected_probabilistic),
        ("tuna --stage sft", expected_sft),
        ("tuna --stage sft --all_candidates", expected_mul),
    ],
)
def test_the_first_loss_is_that_of_the_records(cli, tiny, tmp_path, command, expected):
    records = ranked_records(3)
    for record in records:
        record["candidates"] = [
            c | {"logprob": -3.0 - k, "num_tokens": 2 + k} for k, c in enumerate(record["candidates"])
        ]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    script, *flags = command.split()
    flags += ["--model", tiny, "--data", data, "--eval_data", data, "--epochs", 1, "--batch_size", 12]
    assert cli(script, *flags, "--output", tmp_path / "run").code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), common.load_tokenizer(tiny)
    want = [expected(r, *zip(*score_alone(model, common.encode(tokenizer, r)))) for r in records]
    before, step, _ = read_jsonl(tmp_path / "run/log.jsonl")
    assert before["eval_loss"] == pytest.approx(sum(want) / 3, rel=1e-4)  # before the first step
    assert step["loss"] == pytest.approx(sum(want) / 3, rel=1e-4)
