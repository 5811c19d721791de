"""The second page of `make bench`: what is read besides the training step, ours beside what users write.

    few-shot      a training step on 4 prompts behind the same examples: one row, which reads them once
                  flat: prompts in one row share nothing; rows: each has its own; padded: each response has
    rewards       rank --by reward, 3 responses a prompt; padded: 16 dialogues at once, as long as the longest
    ranking       evaluate.py ranking, a long prompt with 5 responses; padded: all at once, a softmax at every position
    many          the same for --candidates responses to one prompt; padded is left out
    samples       4 responses to a prompt; plain: generate(num_return_sequences=4)
    answers       one answer to each of 16 few-shot prompts; plain: generate on the padded prompts

With --data, on --prompts records drawn from each file with candidates instead:

    step          a training step, as few-shot
    sample        4 responses to each prompt, as samples

Contenders take turns in one process; ratios are taken turn by turn, and medians are shown. Tokens are random, lengths
those of e-SNLI (few-shot, answers), HH (rewards) and multi-document QA (ranking, many); EOS is switched off, so that
all generate equally much. Memory is what a turn adds to what was held before it. The limit is how long plain matrix
products of the model's shapes take, measured in each turn, for the FLOPs that must be done: each token once, the head
where a response token is predicted; while responses are generated, as many rows at a time as there are responses.

    make bench PAGE=reading
    make bench PAGE=reading ARGS="--jobs rewards ranking --repeats 3"
    make bench PAGE=reading ARGS="--data data/esnli/ranked.jsonl data/hh/ranked.jsonl --contenders flat"
"""

import functools
import itertools
import json
import pathlib
import random
import statistics
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402

import common  # noqa: E402
from collecting import (  # noqa: E402
    files,  # noqa: E402
    generation,
    reward_models,
    scoring,
)
from collecting.files import write_atomically  # noqa: E402
from common import in_range, say  # noqa: E402

LONG = 1500  # tokens of a prompt with its documents
CONTENDERS = ["flat", "rows", "padded", "plain"]
LM, CLASSIFIER = AutoModelForCausalLM, AutoModelForSequenceClassification


def few_shot(draw, prompts=4, shared=185, own=65, n=4, R=19):
    examples = draw(shared)
    return [common.Encoded(str(i), examples + draw(own), [draw(R) for _ in range(n)], 0, 0) for i in range(prompts)]


class Work:
    """FLOPs that must be done, and the plain matrix products, `rows` tokens tall, that say how fast they can be."""

    def __init__(self, model, tokens, head_rows, pairs, rows, passes=1):
        self.flops = bench.needed_flops(model, tokens, head_rows, pairs, passes)
        every = 1 if rows < 64 else 4  # so few rows wait for weights from memory, which the cache must not hold
        self.products = bench.Products(model, rows, rows * head_rows // tokens, passes, every)


def tree_work(model, sequences, passes=1):
    """What reading `sequences`, Encoded, takes: each token of their tree, each pair of one and one that it sees."""
    tree = common.pack(sequences, mask_of=lambda end, depth: end)
    end, tokens = tree.attention_mask, tree.input_ids.numel()
    pairs = (end - torch.arange(len(end))).sum().item()
    return Work(model, tokens, len(tree.targets), pairs, min(tokens, scoring.ROW_TOKENS[model.device.type]), passes)


def whole(ids):
    """Token ids that are read and not scored, as tree_work takes them."""
    return common.Encoded(None, ids[:-1], [ids[-1:]], 0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Jobs: (model, draw or records, args) -> ({contender: a function that does it, and gives what all must agree on},
# [Work that must be done])


def job_few_shot(model, draw, args):
    return training(model, few_shot(draw))


def job_step(model, records, args):
    return training(model, [common.encode(args.tokenizer, r) for r in records])


def training(model, encoded):
    sizes = [len(e.responses) for e in encoded]

    def step(rows, contender, attn):
        model.train().zero_grad()
        model.set_attn_implementation(attn)
        scores = [None] * len(encoded)
        for row in rows:
            loss, found = contender(model, [encoded[i] for i in row], model.device)
            loss.backward()
            for i, part in zip(row, found.detach().split([sizes[i] for i in row])):
                scores[i] = part
        return torch.cat(scores)

    def plan(encoded):
        return [row for row, _ in common.plan_rows(encoded, scoring.ROW_TOKENS[model.device.type], 1)[0]]

    apart = [common.Encoded(e.id, [-i, *e.prompt_ids], e.responses, 0, 0) for i, e in enumerate(encoded)]
    trees, flat, rows = plan(encoded), plan(apart), [[i] for i in range(len(encoded))]
    read = lambda rows: sum(common.pack([encoded[i] for i in row]).input_ids.numel() for row in rows)  # noqa: E731
    longest = [len(e.prompt_ids) + max(map(len, e.responses)) for e in encoded]
    tokens = {"ours": read(trees), "flat, rows": read(rows), "padded": sum(map(int.__mul__, sizes, longest))}
    say(f"{len(encoded)} prompts; tokens read:", tokens)
    attn = "blocks" if model.device.type == "cpu" else "sdpa"
    contenders = {
        "ours": lambda: step(trees, bench.ours, attn),
        "flat": lambda: step(flat, functools.partial(bench.ours, pack_for=pack_flat), attn),
        "rows": lambda: step(rows, bench.ours, attn),
        "padded": lambda: step(rows, bench.padded, "sdpa"),
    }
    return contenders, [tree_work(model, encoded, passes=3)]


def pack_flat(attn, encoded, device):
    """common.pack_for, but prompts stand side by side and share nothing: rows as they were before they were trees."""
    parts = [common.pack([e], mask_of=lambda end, depth: end) for e in encoded]

    def joined(name, dim=0, counted=None):  # each part's numbers go on where those of the parts before it end
        starts = itertools.accumulate([0, *(len(getattr(p, counted or name)) for p in parts[:-1])])
        return torch.cat([getattr(p, name) + (start if counted else 0) for p, start in zip(parts, starts)], dim)

    end = joined("attention_mask", counted="attention_mask")
    return common.PackedBatch(
        input_ids=joined("input_ids", 1),
        position_ids=joined("position_ids", 1),
        attention_mask=(common.key_blocks if attn == "blocks" else common.dense_mask)(end, None, device=device),
        logit_positions=joined("logit_positions", counted="attention_mask"),
        targets=joined("targets"),
        token_index=joined("token_index", counted="targets"),
        candidate_index=joined("candidate_index", counted="last_positions"),
        last_positions=joined("last_positions", counted="attention_mask"),
        sizes=[p.num_candidates for p in parts],
        num_candidates=sum(p.num_candidates for p in parts),
        longest=max(p.longest for p in parts),
    ).to(device)


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

    return {"ours": ours, "padded": padded}, [tree_work(model, [whole(x) for x in dialogues])]


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

    return {"ours": ours} | ({"padded": plain} if padded else {}), [tree_work(model, encoded)]


def job_many(model, draw, args):
    return job_ranking(model, draw, args, args.candidates, padded=False)


def job_samples(model, draw, args):
    return generating(model, args.tokenizer, [args.tokenizer.decode(draw(500))], 4)


def job_answers(model, draw, args):
    texts = [args.tokenizer.decode(e.prompt_ids) for e in few_shot(draw, prompts=16)]
    return generating(model, args.tokenizer, texts, 1)


def job_sample(model, records, args):
    return generating(model, args.tokenizer, [r["prompt"] for r in records], 4)


def generating(model, tokenizer, texts, num_samples, new=40):
    """Contenders that draw num_samples responses of `new` tokens to each prompt."""
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("sdpa")

    def ours():
        generation.generate(model, tokenizer, texts, num_samples=num_samples, temperature=0.8, max_new_tokens=new)
        return torch.zeros(())

    def plain():
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": new, "pad_token_id": 0}
        model.generate(**batch, num_return_sequences=num_samples, **options)
        return torch.zeros(())

    prompts = [common.prompt_ids(tokenizer, t) for t in texts]
    steps, rows = new - 1, num_samples * len(texts)  # the first of the new tokens is the prompt's to predict
    pairs = steps * num_samples * sum(len(p) + new / 2 for p in prompts)
    later = Work(model, steps * rows, steps * rows, pairs, rows)
    return {"ours": ours, "plain": plain}, [tree_work(model, [whole(p) for p in prompts]), later]


# ----------------------------------------------------------------------------------------------------------------------


JOBS = {"few-shot": (LM, job_few_shot), "rewards": (CLASSIFIER, job_rewards), "ranking": (LM, job_ranking)}
JOBS |= {"many": (LM, job_many), "samples": (LM, job_samples), "answers": (LM, job_answers)}
DATA_JOBS = {"step": (LM, job_step), "sample": (LM, job_sample)}


def measure(contenders, works, device, repeats):
    """-> {"limit": [seconds], "contenders": {name: {"seconds": [...], "step_bytes": [...]}}}, interleaved, less the
    first turn."""
    result, limits = {name: {"seconds": [], "step_bytes": []} for name in contenders}, []
    for turn in range(1 + repeats):
        values = []
        limits.append(sum(work.flops / work.products.rate() for work in works))
        for name, run in contenders.items():
            with bench.PeakMemory(device) as peak:
                bench.synchronize(device)
                began = bench.clock(device)
                values.append(run())
                bench.synchronize(device)
                seconds = bench.clock(device) - began
            if turn:
                result[name]["seconds"].append(seconds)
                result[name]["step_bytes"].append(peak.step_bytes)
        if not all(torch.allclose(v.float(), values[0].float(), rtol=1e-3, atol=1e-3) for v in values):
            raise SystemExit(f"the contenders do not agree: {values}")
    return {"flops": sum(work.flops for work in works), "limit": limits[1:], "contenders": result}


def drawer(args):
    """draw(n): n random tokens, each a word of its own, so that their text has as many."""
    vocabulary = sorted(args.tokenizer.get_vocab().items(), key=lambda x: x[1])
    words = torch.tensor([i for token, i in vocabulary if token[0] in "\u0120\u2581" and token[1:].isalpha()])
    g = torch.Generator().manual_seed(0)
    return lambda n: words[torch.randint(len(words), (n,), generator=g)].tolist()


def jobs_of(args):
    """Yield (name, auto class, job, what it works on: draw, or a file's records)."""
    if not args.data:
        yield from ((name, *JOBS[name], drawer(args)) for name in args.jobs or JOBS)
    for path in args.data:
        records = files.load_candidates(path)
        records = random.Random(0).sample(records, min(args.prompts, len(records)))
        yield from ((f"{name} {pathlib.Path(path).stem}", *DATA_JOBS[name], records) for name in args.jobs or DATA_JOBS)


def describe(name, job):
    """What is shown of a job: each contender's seconds and memory, and how near ours comes to the limit."""
    ours, median = job["contenders"]["ours"], statistics.median
    for other, its in job["contenders"].items():
        times = median(b / a for a, b in zip(ours["seconds"], its["seconds"]))
        memory = median(its["step_bytes"]) / 1e9
        say(f"{name}: {other} {median(its['seconds']):.2f} s, {times:.2f} times ours; {memory:.2f} GB")
    reached = median(limit / s for limit, s in zip(job["limit"], ours["seconds"]))
    say(f"{name}: {job['flops'] / 1e12:.2f} TFLOP must be, {median(job['limit']):.2f} s at best, ours at {reached:.0%}")


def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo/model"), help="folder or hub id")
    add("--jobs", nargs="+", choices=[*JOBS, *DATA_JOBS], help="default: all; with --data step and sample")
    add("--data", nargs="+", default=[], help="candidates files, JSONL")
    add("--prompts", type=in_range(int, 1), default=8, help="records of each that are taken")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="that are measured beside ours")
    add("--candidates", type=in_range(int, 1), default=3000, help="of the job `many`")
    add("--repeats", type=in_range(int, 1), default=5, help="turns that count")
    add("--output", help="results, JSON: same jobs in it are replaced (default benchmarks/results/DEVICE-reading.json)")
    args = parser.parse_args()
    _, _, device = common.init_distributed()
    args.tokenizer = common.load_tokenizer(args.model)
    args.tokenizer.eos_token = args.tokenizer.all_special_tokens[-1]  # which is never drawn
    output = pathlib.Path(args.output or ROOT / f"benchmarks/results/{device.type}-reading.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, auto_class, job, data in jobs_of(args):
        options = {"num_labels": 1} if auto_class is CLASSIFIER else {}
        model = common.load_pretrained(auto_class, args.model, dtype=torch.float32, **options).to(device).eval()
        model.config.pad_token_id = args.tokenizer.eos_token_id
        contenders, works = job(model, data, args)
        contenders = {k: v for k, v in contenders.items() if k in ("ours", *args.contenders)}
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers")}
        report = json.loads(output.read_text()) if output.exists() else {}
        report[name] = {"device": bench.device_name(device), "versions": versions}
        report[name] |= measure(contenders, works, device, args.repeats)
        write_atomically(output, json.dumps(report, indent=1) + "\n")
        describe(name, report[name])


if __name__ == "__main__":
    common.run_cli(main)
