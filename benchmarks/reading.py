"""The second page of `make bench`: what is read besides the training step, ours beside what users write.

    few-shot      a training step on 4 prompts behind the same examples: one row, which reads them once
                  rows: a row for each prompt; padded: a sequence for each response
    rewards       rank --by reward, 3 responses a prompt; padded: 16 dialogues at once, as long as the longest
    ranking       evaluate.py ranking, a long prompt with 5 responses; padded: all at once, a softmax at every position
    many          the same for --candidates responses to one prompt; padded is left out
    samples       4 responses to a prompt; plain: generate(num_return_sequences=4)
    answers       one answer to each of 16 few-shot prompts; plain: generate on the padded prompts

Contenders take turns in one process; ratios are taken turn by turn, and medians are shown. Tokens are random, lengths
those of e-SNLI (few-shot, answers), HH (rewards) and multi-document QA (ranking, many); EOS is switched off, so that
all generate equally much. Memory is what a turn adds to what was held before it.

    make bench PAGE=reading
    make bench PAGE=reading ARGS="--jobs rewards ranking --repeats 3"
"""

import json
import pathlib
import statistics
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402

import common  # noqa: E402
import runtime  # noqa: E402
from collecting import generation, reward_models, scoring  # noqa: E402
from common import in_range  # noqa: E402
from files import write_atomically  # noqa: E402
from runtime import say  # noqa: E402

LONG = 1500  # tokens of a prompt with its documents
LM, CLASSIFIER = AutoModelForCausalLM, AutoModelForSequenceClassification


def few_shot(draw, prompts=4, shared=185, own=65, n=4, R=19):
    examples = draw(shared)
    return [common.Encoded(str(i), examples + draw(own), [draw(R) for _ in range(n)], 0, 0) for i in range(prompts)]


# ----------------------------------------------------------------------------------------------------------------------
# Jobs: (model, draw, args) -> {contender: a function that does it, and gives what all must agree on}


def job_few_shot(model, draw, args):
    encoded = few_shot(draw)

    def step(rows, contender, attn):
        model.train().zero_grad()
        model.set_attn_implementation(attn)
        scores = []
        for row in rows:
            loss, s = contender(model, row, model.device)
            loss.backward()
            scores.append(s.detach())
        return torch.cat(scores)

    attn = "blocks" if model.device.type == "cpu" else "sdpa"
    one = [[e] for e in encoded]
    return {
        "ours": lambda: step([encoded], bench.ours, attn),
        "rows": lambda: step(one, bench.ours, attn),
        "padded": lambda: step(one, bench.padded, "sdpa"),
    }


def job_rewards(model, draw, args):
    dialogues = []
    for _ in range(16):
        prompt = draw(137)
        dialogues += [prompt + draw(R) for R in (20, 43, 66)]

    @torch.inference_mode()
    def padded():
        model.set_attn_implementation("sdpa")
        logits = []
        for some in (dialogues[i : i + 16] for i in range(0, len(dialogues), 16)):
            L = max(map(len, some))
            ids = torch.tensor([x + [model.config.pad_token_id] * (L - len(x)) for x in some], device=model.device)
            logits.append(model(ids, attention_mask=(ids != model.config.pad_token_id).long()).logits[:, 0])
        return torch.cat(logits)

    def ours():
        model.set_attn_implementation("sdpa")  # the first call chooses its own
        return reward_models.score_dialogues(model, dialogues)

    return {"ours": ours, "padded": padded}


def job_ranking(model, draw, args, n=5, padded=True):
    encoded = [common.Encoded("a", draw(LONG), [draw(40) for _ in range(n)], 0, 0)]

    def ours():
        model.set_attn_implementation("sdpa")
        return scoring.score_encoded(model, encoded)[0][0]

    @torch.inference_mode()
    def plain():
        model.set_attn_implementation("sdpa")
        ids, mask, labels = bench.padded_rows(encoded, model.device)
        logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        kept = labels[:, 1:] != -100
        return (logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * kept).sum(1)

    return {"ours": ours} | ({"padded": plain} if padded else {})


def job_many(model, draw, args):
    return job_ranking(model, draw, args, args.candidates, padded=False)


def job_samples(model, draw, args):
    return generating(model, args.tokenizer, [draw(500)], 4)


def job_answers(model, draw, args):
    return generating(model, args.tokenizer, [e.prompt_ids for e in few_shot(draw, prompts=16)], 1)


def generating(model, tokenizer, prompts, num_samples):
    """Contenders that draw num_samples responses of 40 tokens to each prompt."""
    texts = [tokenizer.decode(ids) for ids in prompts]
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("sdpa")

    def ours():
        generation.generate(model, tokenizer, texts, num_samples=num_samples, temperature=0.8, max_new_tokens=40)
        return torch.zeros(())

    def plain():
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 40, "pad_token_id": 0}
        model.generate(**batch, num_return_sequences=num_samples, **options)
        return torch.zeros(())

    return {"ours": ours, "plain": plain}


# ----------------------------------------------------------------------------------------------------------------------


JOBS = {"few-shot": (LM, job_few_shot), "rewards": (CLASSIFIER, job_rewards), "ranking": (LM, job_ranking)}
JOBS |= {"many": (LM, job_many), "samples": (LM, job_samples), "answers": (LM, job_answers)}


def measure(job, model, args):
    """-> {contender: {"seconds": [...], "step_bytes": [...]}}, interleaved, less the first turn."""
    contenders = job(model, drawer(args), args)
    result = {name: {"seconds": [], "step_bytes": []} for name in contenders}
    for turn in range(1 + args.repeats):
        values = []
        for name, run in contenders.items():
            with bench.PeakMemory(model.device) as peak:
                bench.synchronize(model.device)
                began = bench.clock(model.device)
                values.append(run())
                bench.synchronize(model.device)
                seconds = bench.clock(model.device) - began
            if turn:
                result[name]["seconds"].append(seconds)
                result[name]["step_bytes"].append(peak.step_bytes)
        if not all(torch.allclose(v.float(), values[0].float(), rtol=1e-3, atol=1e-3) for v in values):
            raise SystemExit(f"the contenders do not agree: {values}")
    return result


def drawer(args):
    """draw(n): n random tokens, each a word of its own, so that their text has as many."""
    vocabulary = sorted(args.tokenizer.get_vocab().items(), key=lambda x: x[1])
    words = torch.tensor([i for token, i in vocabulary if token[0] in "\u0120\u2581" and token[1:].isalpha()])
    g = torch.Generator().manual_seed(0)
    return lambda n: words[torch.randint(len(words), (n,), generator=g)].tolist()


def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo/model"), help="folder or hub id")
    add("--jobs", nargs="+", choices=sorted(JOBS), default=list(JOBS))
    add("--candidates", type=in_range(int, 1), default=3000, help="of the job `many`")
    add("--repeats", type=in_range(int, 1), default=5, help="turns that count")
    add("--output", help="results, JSON: same jobs in it are replaced (default benchmarks/results/DEVICE-reading.json)")
    args = parser.parse_args()
    _, _, device = runtime.init_distributed()
    args.tokenizer = runtime.load_tokenizer(args.model)
    args.tokenizer.eos_token = args.tokenizer.all_special_tokens[-1]  # which is never drawn
    output = pathlib.Path(args.output or ROOT / f"benchmarks/results/{device.type}-reading.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.jobs:
        auto_class, job = JOBS[name]
        options = {"num_labels": 1} if auto_class is CLASSIFIER else {}
        model = runtime.load_pretrained(auto_class, args.model, dtype=torch.float32, **options).to(device).eval()
        model.config.pad_token_id = args.tokenizer.eos_token_id
        result = measure(job, model, args)
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers")}
        report = json.loads(output.read_text()) if output.exists() else {}
        report[name] = {"device": bench.device_name(device), "versions": versions, "contenders": result}
        write_atomically(output, json.dumps(report, indent=1) + "\n")
        median = lambda key, x: statistics.median(result[x][key])  # noqa: B023, E731
        for other in result:
            times = statistics.median(b / a for a, b in zip(result["ours"]["seconds"], result[other]["seconds"]))
            memory = median("step_bytes", other) / 1e9
            say(f"{name}: {other} {median('seconds', other):.2f} s, {times:.2f} times ours; {memory:.2f} GB")


if __name__ == "__main__":
    runtime.run_cli(main)
