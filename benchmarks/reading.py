"""What is read besides the training step, ours beside what users write: seconds and memory, to compare two trees with.

    rewards   rank --by reward: 16 dialogues of 3 responses; padded: 16 sequences at once, as long as the longest
    ranking   evaluate.py ranking: a prompt of 1,500 tokens with 5 responses; padded: all at once, a softmax everywhere
    samples   4 responses to each of 4 prompts that begin alike; plain: generate(num_return_sequences=4)

    make bench PAGE=reading ARGS="--jobs rewards ranking --repeats 3"

Contenders take turns; medians are shown. Tokens are random; EOS is switched off, so that all generate equally much.
"""

import pathlib
import statistics
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import bench  # noqa: E402

import common  # noqa: E402
from collecting import generation, reward_models, scoring  # noqa: E402

# jobs: (model, tokenizer, draw) -> (ours, the other: functions whose results must agree)


def rewards(model, tokenizer, draw):
    prompts = [draw(137) for _ in range(16)]
    dialogues = [prompt + draw(R) for prompt in prompts for R in (20, 43, 66)]

    def padded():
        logits = []
        for some in (dialogues[i : i + 16] for i in range(0, len(dialogues), 16)):
            batch = common.pack_padded([common.Encoded(None, x[:-1], [x[-1:]], 0, 0) for x in some]).to(model.device)
            logits.append(model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0])
        return torch.cat(logits)

    return lambda: torch.as_tensor(reward_models.score_dialogues(model, dialogues)), padded


def ranking(model, tokenizer, draw, prompt=1500):
    encoded = [common.Encoded("a", draw(prompt), [draw(40) for _ in range(5)], 0, 0)]
    padded = lambda: bench.padded_scores(model, encoded) * 40**0.85  # noqa: E731
    return lambda: scoring.score_encoded(model, encoded)[0][0], padded


def samples(model, tokenizer, draw, new=40):
    start = draw(185)
    texts = [tokenizer.decode(start + draw(65)) for _ in range(4)]
    model.generation_config.eos_token_id = None

    def plain():
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": new, "pad_token_id": 0}
        return torch.tensor(model.generate(**batch, num_return_sequences=4, **options).shape[0])

    options = {"num_samples": 4, "temperature": 0.8, "max_new_tokens": new}
    return lambda: torch.tensor(sum(map(len, generation.generate(model, tokenizer, texts, **options)))), plain


@torch.inference_mode()
def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "demo/model"), help="folder or hub id")
    parser.add_argument("--jobs", nargs="+", choices=["rewards", "ranking", "samples"])
    parser.add_argument("--repeats", type=common.in_range(int, 1), default=5, help="turns that count")
    args = parser.parse_args()
    device, tokenizer = common.init_distributed()[2], common.load_tokenizer(args.model)
    g = torch.Generator().manual_seed(0)
    words = torch.tensor([i for token, i in tokenizer.get_vocab().items() if token[1:].isalpha()]).sort().values
    draw = lambda n: words[torch.randint(len(words), (n,), generator=g)].tolist()  # noqa: E731
    for job in args.jobs or ["rewards", "ranking", "samples"]:
        kind, options = AutoModelForCausalLM, {}
        if job == "rewards":
            kind, options = AutoModelForSequenceClassification, {"num_labels": 1}
        model = common.load_pretrained(kind, args.model, dtype=torch.float32, **options).to(device).eval()
        model.config.pad_token_id = 0
        seconds, memory = ([], []), ([], [])
        for turn in range(1 + args.repeats):
            values = []
            for i, run in enumerate(globals()[job](model, tokenizer, draw)):
                model.set_attn_implementation("sdpa")
                with bench.PeakMemory(device) as peak:
                    began = bench.clock(device)
                    values.append(run().float())
                    if turn:
                        seconds[i].append(bench.clock(device) - began)
                memory[i].append(peak.step_bytes)
            torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)
        times, (ours, other) = [y / x for x, y in zip(*seconds)], map(statistics.median, seconds)
        gb = " and ".join(f"{statistics.median(x) / 1e9:.2f}" for x in memory)
        print(f"{job}: ours {ours:.2f} s, the other {other:.2f} s, {statistics.median(times):.2f} times; {gb} GB")


if __name__ == "__main__":
    common.run_cli(main)
