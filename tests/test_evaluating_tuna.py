"""evaluate.py, Tuna's benchmarks: metrics by hand, the verbs on small clones of the benchmarks' layouts."""

import json
import re

import pytest
import torch
from conftest import make_records, make_tokenizer, read_jsonl, refused, write_jsonl
from transformers import AutoModelForCausalLM

import common
import runtime
from evaluating import judge, lmentry, superni


def metrics_of(folder, verb, name="tiny"):
    return json.loads((folder / f"runs/eval/{name}/{verb}.metrics.json").read_text())["metrics"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# nll, ranking by the teacher's score


def test_nll_against_one_by_one(cli, tiny, here):
    records = make_records(5)
    write_jsonl(here / "d.jsonl", records)
    assert cli("evaluate", "nll", "--model", tiny, "--name", "tiny", "--input", "d.jsonl").code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = runtime.load_tokenizer(tiny)
    values = []
    for record in records:
        prompt = common.prompt_ids(tokenizer, record["prompt"])
        response = [*tokenizer(record["candidates"][0]["text"], add_special_tokens=False).input_ids, 1]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values.append(-logits.gather(-1, torch.tensor(response)[:, None]).flatten())
    got = metrics_of(here, "nll")
    assert got["token_nll"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-4)
    assert got["response_nll"] == pytest.approx(sum(v.mean().item() for v in values) / 5, abs=1e-4)
    assert got["tokens"] == sum(map(len, values)) and got["prompts"] == 5
    assert got["cut_responses"] == got["cut_prompts"] == 0
    longest = max(map(len, values))
    short = ["--max_length", longest + 1, "--name", "short"]  # the longest leaves the prompt nothing beyond its BOS
    assert cli("evaluate", "nll", "--model", tiny, "--input", "d.jsonl", *short).code == 0
    cut = metrics_of(here, "nll", "short")
    assert cut["cut_responses"] == sum(len(v) == longest for v in values) > 0 and cut["cut_prompts"] == 5
    records[3]["candidates"].pop(0)
    write_jsonl(here / "e.jsonl", records)
    refused(cli("evaluate", "nll", "--model", tiny, "--input", "e.jsonl"), "record 'r3' has no reference response")


def test_ranking_by_the_teachers_score(cli, tiny, here):
    """The original response has no logprob and takes no part; beta decides which of the others is the better one."""
    record = {"id": "a", "prompt": "p", "candidates": [{"text": "original", "source": "reference"}]}
    for text, logprob, n in (("short", -4.0, 2), ("long", -15.0, 9)):
        record["candidates"].append({"text": text, "source": "t", "logprob": logprob, "num_tokens": n})
    write_jsonl(here / "d.jsonl", [record])
    accuracy = []
    for beta in (0.5, 1.3):  # -2.83 > -5; -1.62 < -0.86
        flags = ["--model", tiny, "--input", "d.jsonl", "--by", "logprob", "--length_penalty", beta]
        assert cli("evaluate", "ranking", *flags, "--name", f"beta{beta}").code == 0
        got = metrics_of(here, "ranking", f"beta{beta}")
        assert got["pairs"] == 1
        accuracy.append(got["pair_accuracy"])
    assert sorted(accuracy) == [0, 1]
    del record["candidates"][1]["logprob"]
    write_jsonl(here / "e.jsonl", [record])
    result = cli("evaluate", "ranking", "--model", tiny, "--input", "e.jsonl", "--by", "logprob")
    refused(result, "record 'a'", "'logprob'", "rank --by logprob")


# ----------------------------------------------------------------------------------------------------------------------
# Super-NaturalInstructions


def make_superni(folder):
    (folder / "splits/default").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "splits/default/test_tasks.txt").write_text("task1_add\ntask2_say\n")
    for name in ("task1_add", "task2_say"):
        task = {
            "Definition": ["Do the thing"],
            "Positive Examples": [{"input": f"in {k}", "output": f"out {k}!", "explanation": "-"} for k in range(3)],
            "Negative Examples": [],
            "Instances": [{"id": f"{name}-x{i}", "input": f"case {i}?", "output": ["one", "two"]} for i in range(5)],
        }
        (folder / f"tasks/{name}.json").write_text(json.dumps(task))
    return folder


def test_superni_in_a_template(tokenizer):
    """An instruction-tuned model meets definition and examples as its instruction, the input as its input."""
    examples = [{"input": "x", "output": "y"}]
    template = "T {instruction} I {input} R:\n---\nT {instruction} R:\n"
    prompt = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000, template)
    assert prompt == "T Definition: Do it.\n\nPositive Example 1 -\nInput: x.\nOutput: y. I a b. R:"
    own = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000)
    assert superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000, "[{prompt}]") == f"[{own}]"


def test_superni_prompt(tokenizer):
    examples = [{"input": f"in {k}", "output": f"out {k}!"} for k in range(2)]
    plain = "Definition: Do it.\n\nNow complete the following example -\nInput: a b.\nOutput: "
    assert superni.superni_prompt("Do it", [], " a b ", tokenizer, 1000) == plain
    both = superni.superni_prompt("Do it", examples, "a b", tokenizer, 1000)
    shots = [f"Positive Example {k} -\nInput: in {k - 1}.\nOutput: out {k - 1}!\n\n" for k in (1, 2)]
    assert both == plain.replace("Now", "".join(shots) + "Now")
    room = len(common.prompt_ids(tokenizer, both)) - 1  # the second one no longer fits
    assert superni.superni_prompt("Do it", examples, "a b", tokenizer, room) == plain.replace("Now", shots[0] + "Now")


def test_superni_metrics_by_hand():
    rows = [
        {"task": "a", "text": "The running cats.", "answers": ["a dog", "the run cat"]},  # stemmed: 1; not exact
        {"task": "a", "text": "Yes!", "answers": ["no", "yes"]},  # 1; exact but for case and punctuation
        {"task": "b", "text": "one two", "answers": ["one three four"]},  # P 1/2, R 1/3: 0.4
        {"task": "b", "text": "the cat", "answers": ["cat"]},  # P 1/2, R 1: 2/3; articles stay, so not exact
    ]
    got = superni.superni_metrics(rows)
    assert got["rouge_l"] == pytest.approx(100 * (1 + 1 + 0.4 + 2 / 3) / 4)
    assert got["exact_match"] == 25 and got["tasks"] == 2 and got["prompts"] == 4
    assert got["by_task"]["b"]["rouge_l"] == pytest.approx(100 * (0.4 + 2 / 3) / 2)


def test_bertscore_against_loops(tmp_path):
    """Against plain loops over token states of a tiny encoder; a text that is its reference scores 1."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    model = BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, initializer_range=0.5, **sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)

    def states(text):
        inputs = {"input_ids": torch.tensor([tokenizer(text).input_ids])}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0, 1:]  # without <s>
        return [v / v.norm() for v in hidden]

    def f1(a, b):
        p = sum(max((u @ v).item() for v in b) for u in a) / len(a)
        r = sum(max((u @ v).item() for u in a) for v in b) / len(b)
        return 2 * p * r / (p + r)

    one, two, three = "a man sleeps", "the dog runs fast", "nobody is here"
    expected = max(f1(states(one), states(two)), f1(states(one), states(three)))
    got = superni.bert_f1([one, two, ""], [[two, three], [one, two], [one]], str(tmp_path), 2)
    assert got == pytest.approx([expected, 1.0, 0.0], abs=1e-5) and expected < 0.99


def test_superni(cli, tiny, here):
    make_superni(here / "ni")
    flags = ["--model", tiny, "--name", "tiny", "--superni_dir", "ni", "--max_new_tokens", 4]
    assert cli("evaluate", "superni", *flags, "--max_instances", 3, "--shots", 2).code == 0
    rows = read_jsonl(here / "runs/eval/tiny/superni-2shot.jsonl")
    assert [r["id"] for r in rows] == [f"{t}-{i}" for t in ("task1_add", "task2_say") for i in range(3)]
    assert "Positive Example 2 -" in rows[0]["prompt"] and "Example 3" not in rows[0]["prompt"]
    got = metrics_of(here, "superni-2shot")
    assert got["tasks"] == 2 and "rouge_l_2shot" in got and "rouge_l" not in got
    [items] = json.loads((here / "runs/eval/tiny/superni-2shot.items.json").read_text()).items()
    assert items[0] == "rouge_l_2shot" and sum(items[1].values()) / 6 == pytest.approx(got["rouge_l_2shot"])
    refused(cli("evaluate", "superni", *flags, "--tasks", "task9"), "--tasks task9", "not among the test tasks")
    flags[flags.index("ni")] = "."
    refused(cli("evaluate", "superni", *flags), "no splits/default/test_tasks.txt")


# ----------------------------------------------------------------------------------------------------------------------
# LMentry

SCORERS = """
class Contains:
    def score_prediction(self, prediction, example, truncate_prediction=False):
        return int(example["metadata"]["answer"] in prediction), 1
"""


def make_lmentry(folder):
    """A clone's layout with two core tasks, one of them with two further files, and a scorer of our own."""
    (folder / "data").mkdir(parents=True)
    (folder / "lmentry/scorers").mkdir(parents=True)
    for file in ("lmentry/__init__.py", "lmentry/scorers/__init__.py"):
        (folder / file).write_text("")
    mapping = SCORERS + "task_name_to_scorer = {'more_letters': Contains, 'word_after': Contains}\n"
    (folder / "lmentry/scorers/scorer_mapping.py").write_text(mapping)
    for name in ("more_letters", "more_letters_length_diff_1", "more_letters_length_diff_3plus", "word_after"):
        examples = {}
        for i in range(6):
            metadata = {"template_id": i // 2, "answer": "e", "answer_index": i % 2}
            examples[str(i + 1)] = {"input": f"Q {i}:", "metadata": metadata}
        (folder / f"data/{name}.json").write_text(json.dumps({"settings": {}, "examples": examples}))
    return folder


def test_lmentry(cli, tiny, here):
    make_lmentry(here / "lm")
    flags = ["--model", tiny, "--name", "tiny", "--lmentry_dir", "lm", "--max_new_tokens", 6]
    tasks = ["--tasks", "word_after", "more_letters_length_diff_1"]
    assert cli("evaluate", "lmentry", *flags, *tasks, "--max_examples", 4).code == 0
    (here / "t.txt").write_text("T {instruction} I {input}\n---\nT {instruction} R:\n")
    told = [*flags, *tasks, "--max_examples", 4, "--prompt_file", "t.txt", "--output", "told.jsonl"]
    assert cli("evaluate", "lmentry", *told).code == 0
    plain, wrapped = read_jsonl(here / "runs/eval/tiny/lmentry.jsonl"), read_jsonl("told.jsonl")
    assert [r["prompt"] for r in wrapped] == [f"T {r['prompt']} R:" for r in plain]
    rows = read_jsonl(here / "runs/eval/tiny/lmentry.jsonl")
    assert [r["id"] for r in rows[:4]] == [f"word_after/{i}" for i in (1, 3, 5, 2)]  # spread over the templates
    got = metrics_of(here, "lmentry")
    right = sum("e" in r["text"] for r in rows if r["task"] == "word_after")
    assert got["accuracy"] == 25 * right and "lmentry_score" not in got
    assert got["core_tasks"] == 1 and got["files"] == 2
    items = json.loads((here / "runs/eval/tiny/lmentry.items.json").read_text())["accuracy"]
    assert items.keys() == {r["id"] for r in rows if r["task"] == "word_after"}
    assert sum(items.values()) / len(items) == got["accuracy"]
    layout = json.loads((here / "runs/eval/tiny/predictions/word_after/tiny.json").read_text())
    assert layout["1"]["prediction"] == rows[0]["text"] and layout["1"]["score"] == int("e" in rows[0]["text"])
    refused(cli("evaluate", "lmentry", *flags, "--tasks", "nope"), "lm", "nope")


def test_lmentry_score_by_hand():
    """Every task is all right, but more_letters: right where answer_index is 0, so a gap of 100 in argument order;
    its two files differ by 50; templates 0, 1, 2 of word_after have 100, 100, 0."""
    rows = []
    core = {t for pair in lmentry.ADJACENT for t in pair} | {*lmentry.ARGUMENT_ORDER}
    assert len(core) == 25 and len(lmentry.ADJACENT) == 17
    for task in [*core, "more_letters_length_diff_1", "more_letters_length_diff_3plus"]:
        for template in range(3):
            for index in (0, 1):
                score = 1
                if task == "more_letters" or task == "more_letters_length_diff_1":
                    score = int(index == 0)
                elif task == "word_after":
                    score = int(template < 2)
                row = {"task": task, "template": template, "answer_index": index, "score": score}
                rows.append(row | {"core": "more_letters" if task.startswith("more") else task})
    got = lmentry.lmentry_metrics(rows, complete=True)
    assert got["accuracy"] == pytest.approx((23 * 100 + 50 + 200 / 3) / 25)
    assert got["argument_order"] == pytest.approx((6 * 100 + 0) / 7)
    assert got["argument_content"] == pytest.approx(50)
    assert got["template"] == pytest.approx((24 * 100 + 0) / 25)
    assert got["adjacent_tasks"] == pytest.approx((15 * 100 + 50 + 200 / 3) / 17)
    more = [{"task": "word_after", "core": "word_after", "score": 0, "template": 0, "answer_index": 0}] * 3
    uneven = [r | {"id": str(i)} for i, r in enumerate(rows + more)]  # a task of nine examples counts as one of six
    items = lmentry.lmentry_items(uneven)["accuracy"].values()
    assert sum(items) / len(items) == pytest.approx(lmentry.lmentry_metrics(uneven, complete=False)["accuracy"])
    parts = ("argument_order", "argument_content", "template", "adjacent_tasks")
    assert got["robustness"] == pytest.approx(sum(got[k] for k in parts) / 4)
    assert got["lmentry_score"] == pytest.approx(got["accuracy"] * got["robustness"] / 100)
    assert "lmentry_score" not in lmentry.lmentry_metrics(rows, complete=False)


# ----------------------------------------------------------------------------------------------------------------------
# Vicuna and the judge


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A is right. [[A]]", "A"),
        ("[[C]] both. So: [[C]]", "C"),
        ("A is better.", None),
        ("[[A]] or [[B]]", None),
        ("[[D]] [A]", None),
    ],
)
def test_verdict(text, expected):
    assert judge.verdict(text) == expected


def test_judge_metrics_by_hand():
    pairs = [
        ("A", "B"),  # system 1 wins in both orders
        ("B", "A"),  # loses in both
        ("A", "A"),  # the first place wins: a tie, flipped
        ("C", "B"),  # a tie, then system 1: a tie, flipped
        ("C", "C"),
        ("A", None),
        ("A", "B"),
        ("B", "B"),  # the second place: a tie, flipped
    ]
    got = judge.judge_metrics(pairs, "agree")
    assert (got["win"], got["lose"], got["tie"], got["unparsed"]) == (2 / 8, 1 / 8, 4 / 8, 1 / 8)
    assert got["flip_rate"] == pytest.approx(3 / 7)
    assert got["first_place_preferred"] == pytest.approx(6 / 12)  # A: 1, 1, 2, 0, 0, 1, 1, 0
    mean = judge.judge_metrics(pairs, "average")  # system 1 wins 2, 0, 1, 1, 0, 1, 2, 1 of 16 verdicts
    assert (mean["win"], mean["lose"], mean["tie"], mean["unparsed"]) == (8 / 16, 4 / 16, 3 / 16, 1 / 16)
    assert {k: mean[k] for k in ("flip_rate", "first_place_preferred")} == {
        k: got[k] for k in ("flip_rate", "first_place_preferred")
    }


def test_judges_items_are_what_its_shares_are_the_mean_of():
    pairs = [("A", "B"), ("B", "A"), ("A", "A"), ("C", "B"), ("A", None)]
    for verdicts in ("agree", "average"):
        items = judge.judge_items("abcde", pairs, verdicts)
        got = judge.judge_metrics(pairs, verdicts)
        for figure in ("win", "lose"):
            assert sum(items[figure].values()) / 5 == pytest.approx(got[figure])
        assert items["win"]["a"] == 1 and items["win"]["d"] == (0 if verdicts == "agree" else 0.5)


@pytest.mark.parametrize(
    "pairs, average, agree",  # verdicts with system 1 as A, then as B; win, tie, lose
    [
        ([("A", "B"), ("A", "A"), ("B", "B"), ("C", "A")], (4 / 8, 1 / 8, 3 / 8), (1 / 4, 3 / 4, 0)),
        ([("A", "B")] * 2, (1, 0, 0), (1, 0, 0)),
        ([("A", "A")] * 2, (1 / 2, 0, 1 / 2), (0, 1, 0)),  # always the first place
        ([("C", "C"), ("B", "A")], (0, 1 / 2, 1 / 2), (0, 1 / 2, 1 / 2)),
        ([("A", None), ("B", "A")], (1 / 4, 0, 2 / 4), (0, 0, 1 / 2)),  # one order unparsed
    ],
)
def test_both_readings_of_two_orders(pairs, average, agree):
    for name, want in (("average", average), ("agree", agree)):
        got = judge.judge_metrics(pairs, name)
        assert (got["win"], got["tie"], got["lose"]) == want


QUESTIONS = [{"question_id": k, "category": "generic", "turns": [f"What {{is}} {k}?"]} for k in range(3)]


def test_vicuna_and_judge(cli, tiny, here, monkeypatch):
    write_jsonl(here / "q.jsonl", QUESTIONS)
    for name, tokens in (("long", 12), ("short", 3)):
        flags = ["--model", tiny, "--name", name, "--input", "q.jsonl", "--max_new_tokens", tokens]
        assert cli("evaluate", "vicuna", *flags).code == 0
    rows = read_jsonl(here / "runs/eval/long/vicuna.jsonl")
    assert [r["id"] for r in rows] == ["0", "1", "2"] and "What {is} 0?" in rows[0]["prompt"]
    assert rows[0]["question"] == "What {is} 0?" and metrics_of(here, "vicuna", "long")["prompts"] == 3

    answers = ["--answers", "runs/eval/long/vicuna.jsonl", "runs/eval/short/vicuna.jsonl", "--max_new_tokens", 8]
    assert cli("evaluate", "judge", *answers, "--model", tiny, "--name", "noise", "--limit", 2).code == 0
    got = metrics_of(here, "judge", "noise")  # a random model gives no verdicts: counted, and kept for a look
    assert got["unparsed"] == 1 and got["questions"] == 2 and got["win"] + got["lose"] + got["tie"] == 0
    assert all(r["verdict"] is None and "text" in r for r in read_jsonl(here / "runs/eval/noise/judge.jsonl"))

    asked = []

    def longest(args, prompts, done=(), **options):  # prefers the longer answer, and A among equals; fails once
        for i, prompt in enumerate(prompts):
            if i in done:
                continue
            asked.append(prompt)
            if len(asked) == 2:
                yield i, None, "HTTP 500"
                continue
            a = prompt.partition("[A's answer]\n")[2].partition("\n[End of A")[0]
            b = prompt.partition("[B's answer]\n")[2].partition("\n[End of B")[0]
            yield i, [{"text": f"So [[{'A' if len(a) >= len(b) else 'B'}]]"}], None

    monkeypatch.setattr("collecting.asking.complete", longest)
    result = cli("evaluate", "judge", *answers, "--model", "x")
    assert "question 0/21: HTTP 500" in result.out and "1 missing" in result.out
    assert not (here / "runs/eval/long-vs-short/judge.metrics.json").exists()
    assert cli("evaluate", "judge", *answers, "--model", "x").code == 0
    assert len(asked) == 7  # only the one that failed was asked again
    got = metrics_of(here, "judge", "long-vs-short")
    lengths = [
        [len(r["text"]) for r in read_jsonl(here / f"runs/eval/{name}/vicuna.jsonl")] for name in ("long", "short")
    ]
    wins = sum(a > b for a, b in zip(*lengths))
    out = cli("evaluate", "report", "long-vs-short", "noise", "--paired").out
    assert re.search(rf"\| long-vs-short - noise, win \| {min(a > b for a, b in zip(*lengths)):d}.* \| 2 \|", out)
    assert got["win"] == pytest.approx(wins / 3) and got["unparsed"] == 0 and got["mean_words_1"] >= 1
    refused(cli("evaluate", "judge", *answers[:2], "d.jsonl", "--model", "x"), "d.jsonl: no such file")
