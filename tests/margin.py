"""What `rescue.py --margin` does where `--no_sft` degenerates, on the look-up task of test_learning.py.

    python -m tests.margin      -> a Markdown table: 3 seeds a row, mean and range; minutes on a CPU

A model is fine-tuned (--ordering none), then goes on with the label ordering and without an SFT term. Figures: the
share of held-out prompts whose greedy answer holds symbols of a right grade alone and ends; best_score in the log's
first and last line; the share of held-out pairs in order.
"""

import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import torch
from conftest import ROOT, make_model, make_tokenizer, read_jsonl, write_jsonl
from test_learning import ALPHABETS, METHODS, SEEDS, STEPS, held_out, make_records, pair_accuracy
from transformers import AutoModelForCausalLM

MARGINS = (0, 0.1, 0.5, 2)


def train(script, model, output, *flags):
    argv = ["--model", model, "--output", output, "--ordering", *flags, *STEPS.replace(" --log_every 64", "").split()]
    subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, argv)], check=True, capture_output=True)
    return output / "model"


@torch.no_grad()
def right_answers(folder, tokenizer):
    """The share of held-out prompts whose greedy answer is symbols of the two right grades, then EOS."""
    model, right, records = AutoModelForCausalLM.from_pretrained(folder).eval(), 0, []
    for alphabet in ALPHABETS:
        records += [(r, ALPHABETS[alphabet]) for r in make_records(alphabet, "held-out", 48)]
    for record, symbols in records:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)[
            0, ids.shape[1] :
        ]
        text, key = tokenizer.decode(out, skip_special_tokens=True).strip(), symbols.index(record["prompt"][-2])
        grades = [(symbols.index(c) - key) % 8 // 2 if c in symbols else 9 for c in text]
        right += out[-1].item() == tokenizer.eos_token_id and bool(grades) and max(grades) < 2
    return right / len(records)


def row(name, runs):
    columns = (
        [f(*run) for run in runs] for f in (lambda r, *_: r, lambda _, a, *__: a, lambda *x: x[2], lambda *x: x[3])
    )
    cells = (f"{sum(c) / len(c):.2f} [{min(c):.2f}, {max(c):.2f}]" for c in columns)
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    tokenizer, levels = make_tokenizer(), METHODS["label"][1]
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = pathlib.Path(folder), {}
        data = write_jsonl(folder / "train.jsonl", [r for a in ALPHABETS for r in make_records(a, "train", 96)])
        for seed in SEEDS:
            model = make_model(seed, hidden_size=64, intermediate_size=128, initializer_range=0.14)
            model.save_pretrained(folder / f"start-{seed}")
            tokenizer.save_pretrained(folder / f"start-{seed}")
            same = ["--data", data, "--seed", seed]
            sft = train("rescue", folder / f"start-{seed}", folder / f"sft-{seed}", "none", *same)
            systems = {"SFT": sft}
            for m in MARGINS:
                flags = ["label", "--alpha", 1, "--no_sft", "--margin", m, *same]
                systems[f"then no SFT term, margin {m}"] = train("rescue", sft, folder / f"m{m}-{seed}", *flags)
            systems["then with the SFT term"] = train(
                "rescue", sft, folder / f"both-{seed}", "label", "--alpha", 1, *same
            )
            for name, model in systems.items():
                log = read_jsonl(model.parent / "log.jsonl")
                accuracy = pair_accuracy(held_out(model, tokenizer, False), levels, 0.85)
                found = right_answers(model, tokenizer), log[0]["best_score"], log[-1]["best_score"], accuracy
                rows.setdefault(name, []).append(found)
    print("| | answers right | best_score, first step | last step | pairs in order |\n|---|---|---|---|---|")
    for name, runs in rows.items():
        row(name, runs)


if __name__ == "__main__":
    main()
