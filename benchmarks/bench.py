"""Time and memory of one training step: ours, the padded step, and peers, on the same preferences in one process.

A step is forward, loss and backward of one prompt with its n responses of R tokens each (--prompts: of several), from
token ids to gradients. With --optimizer (on CUDA without --no_optimizer) clipping and AdamW's update are in it too.
Contenders take turns, so that whatever slows the machine slows all of them; ratios are taken turn by turn, and medians
are shown. With OMP_NUM_THREADS=1 on a CPU seconds are those that the thread computed, so that figures stand on a busy
machine too.

    ours        common.pack, common.candidate_logprobs: one pass a prompt, logits at response positions only; with
                FlexAttention on CUDA, in blocks on a CPU, as the scripts train
    ours_compiled   the same with --compile, each layer compiled
    padded      what the papers' released code does: one sequence a response, each with its own copy of the prompt,
                padded; a softmax over the vocabulary at every position, then the responses' tokens are picked
    trl         TRL's CPO trainer with the SimPO loss, its compute_loss, where `trl` is installed: the best response
                against each other one, n - 1 pairs (the fewest that name every response, so the cheapest for it)
    prefix_grouper  PrefixGrouper with SDPA, where `prefix_grouper` is installed: one row a prompt too, whose attention
                takes the prompt apart from the responses; logits at every position, as its documentation has it
    flash_pref  flash_pref.shared_prefix around the padded step, where it and flash-attn are installed (CUDA)

ideal: n (P + R) / (P + n R), tokens that the padded step reads for each one that we read; and FLOPs that it computes
(the head at every position, attention over whole rows) for each one that must be.
MFU: the work that must be done (each token once through the layers, the head at response positions, forward and
backward) for each second, over the dense bf16 peak of a known GPU.
of products: the same over what plain matrix products of the model's own shapes, as many tokens tall, reach in the same
turn: the limit of a step that did nothing else. Under 75% of it on a CPU a profile of one more step goes into the file.

    make bench                                                  # CPU: the 135M model, four workloads
    make bench ARGS="--growth --repeats 3"                      # time and memory against n and against P
    make bench ARGS="--contenders ours trl prefix_grouper --workloads pairs"    # n = 2, 4, 8
    make bench ARGS="--model llama-6m --growth"                 # random weights in a small shape: seconds
    make bench ARGS="--model llama-1b --prompts 4"              # on CUDA: random weights in that shape, full optimizer
    make bench ARGS="--model llama-2-7b --no_optimizer"         # 7B on a card of 80 GB: weights and gradients take 54
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import run as training_run  # noqa: E402

import common  # noqa: E402
from collecting.files import write_atomically  # noqa: E402
from common import in_range, say  # noqa: E402

WORKLOADS = {  # the papers' shapes: (prompt tokens, responses, tokens of each)
    "e-SNLI": [(250, 5, 40)],
    "multi-document QA": [(1500, 5, 40)],
    "HH": [(250, 3, 80)],
    "Alpaca": [(60, 5, 60)],
    "candidates": [(250, n, 40) for n in (2, 4, 8, 16)],
    "prompt": [(P, 5, 40) for P in (125, 250, 500, 1000)],
    "pairs": [(250, n, 40) for n in (2, 4, 8)],
}
PAPERS, GROWTH = ["e-SNLI", "multi-document QA", "HH", "Alpaca"], ["candidates", "prompt"]
GEOMETRIES = {  # random weights in a known shape, where no weights can be had
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
    "llama-6m": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"vocab_size": 8192, "tie_word_embeddings": True},  # a smoke run of seconds
}


def make_encoded(shape, prompts, vocab_size, seed):
    """Random token ids: time depends on shapes alone."""
    P, n, R = shape
    g = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randint(3, vocab_size, size, generator=g).tolist()  # noqa: E731
    return [common.Encoded(str(i), draw((P,)), draw((n, R)), 0, 0) for i in range(prompts)]


def preference_loss(scores):
    """A stand-in for the papers' losses, which cost nothing beside the model: -log sigmoid over all ordered pairs."""
    gaps = scores[:, None] - scores[None, :]
    return -F.logsigmoid(gaps[torch.ones_like(gaps).triu(1).bool()]).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Contenders: (model, encoded records) -> (loss to call backward on, scores or None)


def ours(model, encoded, device, pack_for=common.pack_for):
    batch = pack_for(model.config._attn_implementation, encoded, device)
    scores = common.length_normalized(*common.candidate_logprobs(model, batch), 0.85)
    return sum(map(preference_loss, scores.split(batch.sizes))), scores


def padded_rows(encoded, device):
    """-> (input_ids [N, L], attention_mask [N, L], labels [N, L], -100 where no response token stands)."""
    rows = [(e.prompt_ids, r) for e in encoded for r in e.responses]
    L = max(len(p) + len(r) for p, r in rows)
    fill = lambda x, value: x + [value] * (L - len(x))  # noqa: E731
    ids = torch.tensor([fill(p + r, 0) for p, r in rows], device=device)
    mask = torch.tensor([fill([1] * len(p + r), 0) for p, r in rows], device=device)
    return ids, mask, torch.tensor([fill([-100] * len(p) + r, -100) for p, r in rows], device=device)


def padded(model, encoded, device):
    ids, mask, labels = padded_rows(encoded, device)
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * kept
    scores = common.length_normalized(picked.sum(1), kept.sum(1), 0.85)
    return sum(map(preference_loss, scores.split([len(e.responses) for e in encoded]))), scores


def flash_pref(model, encoded, device):
    from flash_pref import shared_prefix

    ids, mask, _ = padded_rows(encoded, device)
    with shared_prefix(model, input_ids=ids, attention_mask=mask, group_size=len(encoded[0].responses)):
        loss, scores = padded(model, encoded, device)
        loss.backward()  # its patches must hold during the backward
    return None, scores


def prefix_grouper(model, encoded, device):
    from prefix_grouper import PrefixGrouper

    def filled(rows):
        L = max(map(len, rows))
        ids = torch.tensor([r + [0] * (L - len(r)) for r in rows], device=device)
        return ids, torch.tensor([[1] * len(r) + [0] * (L - len(r)) for r in rows], device=device)

    prompts, responses = filled([e.prompt_ids for e in encoded]), filled([r for e in encoded for r in e.responses])
    lengths, sizes = [len(e.prompt_ids) for e in encoded], [len(e.responses) for e in encoded]
    grouper = PrefixGrouper.from_ungrouped_masks(prompts[1], responses[1], sizes, device=device)
    for name, width in (("prefix_attn_mask", prompts[0].shape[1]), ("suffix_attn_mask", responses[0].shape[1])):
        keys = getattr(grouper.group_info, name)  # [B, K]; SDPA takes [B, 1, Q, K], the queries being the last keys
        causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=device).tril()[-width:]
        setattr(grouper.group_info, name, keys[:, None, None, :].bool() & causal)
    depths = [[*range(P)] + [P + i for r in e.responses for i in range(len(r))] for P, e in zip(lengths, encoded)]
    inputs = {"input_ids": grouper.concat_input(*prompts, *responses), "position_ids": filled(depths)[0]}
    logits = model(**inputs, prefix_grouper=grouper, use_cache=False).logits
    _, _, logits, kept = grouper.split_output(logits.float(), include_prefix_last=1)
    logits, kept = logits[:, :-1], kept[:, 1:]
    picked = (logits.gather(-1, responses[0][..., None])[..., 0] - logits.logsumexp(-1)) * kept
    scores = common.length_normalized(picked.sum(1), kept.sum(1), 0.85)
    return sum(map(preference_loss, scores.split(sizes))), scores


def prefix_grouper_attention(module, query, key, value, attention_mask, prefix_grouper, **options):
    def attend(q, k, v, mask):
        return sdpa_attention_forward(module, q, k, v, mask, **options)[0]

    return prefix_grouper.forward(attend, query, key, value), None


AttentionInterface.register("prefix_grouper", prefix_grouper_attention)


def make_trl(model, tokenizer):
    """-> the contender: TRL's trainer, made once; its batch is collated from the same token ids."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    folder = tempfile.mkdtemp()
    precision = {"bf16": False, "use_cpu": True} if model.device.type == "cpu" else {"bf16": True}
    config = CPOConfig(output_dir=folder, loss_type="simpo", cpo_alpha=0.0, report_to=[], **precision)
    config.gradient_checkpointing = False
    trainer = CPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)

    def step(model, encoded, device):
        batch = {}
        for side, pick in (
            ("chosen", lambda e: e.responses[:1] * (len(e.responses) - 1)),
            ("rejected", lambda e: e.responses[1:]),
        ):
            pairs = [common.Encoded(e.id, e.prompt_ids, pick(e), 0, 0) for e in encoded]
            names = (f"{side}_input_ids", f"{side}_attention_mask", f"{side}_labels")
            batch |= dict(zip(names, padded_rows(pairs, device)))
        return trainer.compute_loss(model, batch), None

    return step


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` -> peak.bytes: the most that the process (Linux) or the GPU held, weights
    and gradients included, and peak.step_bytes: what the block added to what was held before."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back to the system first
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *error):
        self.bytes = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.step_bytes = self.bytes - self.before

    def _resident(self, name):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name))


def clock(device):
    """Seconds. One thread on a CPU: those it computed, so that other programs on the machine do not count; else all."""
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one else time.perf_counter()


def timed_step(contender, model, optimizer, encoded, device):
    """-> (seconds, PeakMemory, scores) of one step; gradients stay allocated, as within an accumulated batch."""
    optimizer.zero_grad(set_to_none=False)
    with PeakMemory(device) as peak:
        synchronize(device)
        began = clock(device)
        loss, scores = contender(model, encoded, device)
        if loss is not None:
            loss.backward()
            del loss
        if optimizer.param_groups[0]["lr"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        synchronize(device)
        seconds = clock(device) - began
    return seconds, peak, None if scores is None else scores.detach().float().cpu()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Bench:
    """What is measured: model, optimizer and contenders {name: function}, made anew after a step that failed, since
    FSDP2's layers are then left half gathered."""

    def __init__(self, names, args, device):
        self.names, self.args, self.device = names, args, device
        self.renew()

    def renew(self):
        self.model = self.optimizer = self.contenders = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.model, tokenizer = load(self.args, self.device)
        makers = {"ours": ours, "ours_compiled": ours, "padded": padded, "flash_pref": flash_pref}
        makers |= {"prefix_grouper": prefix_grouper}
        self.contenders = {name: makers.get(name) or make_trl(self.model, tokenizer) for name in self.names}
        lr = 1e-6 if self.args.optimizer else 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)


def measure(bench, shape, args, device):
    """Interleaved turns over one shape -> ({contender: {"seconds": [...], "peak_bytes": [...]}}, FLOP/s of plain matrix
    products in each turn), less the warm-up; of a contender that fails on CUDA {"failed": why}."""
    P, n, R = shape
    encoded = make_encoded(shape, args.prompts, bench.model.config.vocab_size, args.seed)
    products, rates = Products(bench.model, args.prompts * (P + n * R), args.prompts * n * R), []
    result = {name: {"seconds": [], "peak_bytes": [], "step_bytes": []} for name in bench.names}
    for turn in range(args.warmup + args.repeats):
        scores = {}
        rates += [products.rate()] * (turn >= args.warmup)
        for name in bench.names:
            if "failed" in result[name]:
                continue
            set_up(bench.model, name)
            step = bench.contenders[name], bench.model, bench.optimizer, encoded, device
            try:
                seconds, peak, scores[name] = timed_step(*step)
            except Exception as e:  # out of memory, or what does not compile: the others may hold
                if device.type == "cpu":
                    raise
                memory = isinstance(e, torch.OutOfMemoryError)
                result[name] = {"failed": "out of memory" if memory else f"{type(e).__name__}: {str(e)[:200]}"}
            if "failed" in result[name]:
                del step
                bench.renew()
                continue
            if turn >= args.warmup:
                result[name]["seconds"].append(seconds)
                result[name]["peak_bytes"].append(peak.bytes)
                result[name]["step_bytes"].append(peak.step_bytes)
        known = [s for s in scores.values() if s is not None]
        if not all(torch.allclose(s, known[0], rtol=1e-4 if device.type == "cpu" else 5e-2) for s in known):
            raise SystemExit(f"{shape}: the contenders do not score alike: {scores}")
    reached = of_products(step_flops(bench.model, shape, args.prompts)[0], rates, result.get("ours", {}))
    if device.type == "cpu" and reached and reached < 0.75:
        set_up(bench.model, "ours")
        result["ours"]["profile"] = profile(bench.contenders["ours"], bench.model, bench.optimizer, encoded, device)
    return result, rates


class Products:
    """Matrix products of the shapes of a model's weights and nothing else: `rows` tokens through every fourth layer's
    (or each layer's), `head_rows` of four through the head; with passes 3 the backward's two of each as well."""

    def __init__(self, model, rows, head_rows, passes=3, every=4):
        self.device, self.passes = model.device, passes
        layers = common.decoder_layers(model)[::every]
        self.shapes = [(rows, *m.weight.shape) for x in layers for m in x.modules() if isinstance(m, torch.nn.Linear)]
        if (head := model.get_output_embeddings()) is not None:
            self.shapes += [(max(1, head_rows // every), *head.weight.shape)]
        self.flops = sum(2 * passes * rows * out * of for rows, out, of in self.shapes)

    @torch.no_grad()
    def rate(self):
        """-> FLOP/s. What it multiplies is made anew and freed: it is in no contender's memory."""
        options = {"device": self.device, "dtype": torch.bfloat16 if self.device.type == "cuda" else torch.float32}
        inputs = {(rows, of): torch.randn(rows, of, **options) for rows, _, of in self.shapes}
        factors = [(inputs[rows, of], torch.randn(out, of, **options)) for rows, out, of in self.shapes]
        synchronize(self.device)
        began = clock(self.device)
        for x, weight in factors:
            y = x @ weight.T
            if self.passes == 3:
                y @ weight, y.T @ x
        synchronize(self.device)
        return self.flops / (clock(self.device) - began)


def of_products(flops, rates, result):
    """What a contender computes each second of the FLOPs that must be, over what the products reach: the median of the
    turns, None without any."""
    turns = [flops / s / rate for s, rate in zip(result.get("seconds", []), rates)]
    return statistics.median(turns) if turns else None


def limit_sentence(flops, rates, result):
    reached = of_products(flops, rates, result)
    text = f"{flops / 1e12:.2f} TFLOP must be; products reach {statistics.median(rates) / 1e12:.3f} TFLOP/s"
    return text + (f", ours {reached:.0%} of that" if reached else "")


def profile(contender, model, optimizer, encoded, device):
    """-> {operation: its own share of one step's time}, the ten largest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        timed_step(contender, model, optimizer, encoded, device)
    times = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:10]
    return {name: round(times[name] / sum(times.values()), 4) for name in largest}


ATTENTION = {"padded": "sdpa", "trl": "sdpa", "prefix_grouper": "prefix_grouper", "flash_pref": "flash_attention_2"}


PEERS = {"trl": "trl", "prefix_grouper": "prefix-grouper", "flash_pref": "flash-pref"}  # contender: its package


def set_up(model, name):
    """The attention of a contender for the steps that follow, and --compile or not; each layer is compiled once."""
    ours_attention = "blocks" if model.device.type == "cpu" else "flex_attention"
    model.set_attn_implementation(ATTENTION.get(name, ours_attention))
    on = name == "ours_compiled"
    for layer in common.decoder_layers(model):
        if on and not hasattr(layer, "compiled_call"):
            layer.compile(dynamic=True)
            layer.compiled_call = layer._compiled_call_impl
        layer._compiled_call_impl = layer.compiled_call if on else None


def needed_flops(model, tokens, head_rows, pairs, passes=3):
    """FLOPs of `tokens` through the layers, `head_rows` of them through the head and `pairs` of a query and a key that
    it sees: 2 a parameter and token, 4 a pair and channel; with passes 3 twice that again for the backward."""
    config = model.config.get_text_config()
    embedding = config.vocab_size * config.hidden_size
    head = 0 if model.get_output_embeddings() is None else embedding
    tied = head == 0 or config.tie_word_embeddings
    body = sum(p.numel() for p in model.parameters()) - embedding * (1 if tied else 2)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return passes * (2 * body * tokens + 2 * head * head_rows + 4 * config.num_hidden_layers * width * pairs)


def step_flops(model, shape, prompts):
    """-> (FLOPs that the step needs, FLOPs of the padded step). Needed: each token once, the head at response positions
    only, attention to what a token sees."""
    P, n, R = shape
    pairs = P * P / 2 + n * (R * P + R * R / 2)
    needed = needed_flops(model, P + n * R, n * R, pairs)
    return prompts * needed, prompts * n * needed_flops(model, P + R, P + R, (P + R) ** 2)


def peak_flops(device):
    """-> (FLOP/s, what it is), or (None, None)."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = training_run.peak_flops(name)
    return (known, f"{name}, dense bf16") if known else (None, None)


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


def ratios(row, name, base="ours"):
    """-> medians over turns: the contender's time over ours, and our memory over its, all of it and the step's own."""
    a, b = row["contenders"][name], row["contenders"].get(base)
    if b is None or "failed" in b:
        return None, None, None
    over = lambda x, y, key: statistics.median(i / j for i, j in zip(x[key], y[key]))  # noqa: E731
    return over(a, b, "seconds"), over(b, a, "peak_bytes"), over(b, a, "step_bytes")


def table(report):
    """The results as a Markdown table."""
    lines = [
        "| workload | prompt / n x R | step | seconds, median of | times ours | ideal, tokens and FLOPs | "
        "peak GB (step's own) | ours / its peak (step's own) | unique tokens/s | MFU | of products |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        P, n, R = row["shape"]
        for name, c in row["contenders"].items():
            if "failed" in c:
                why = c["failed"].replace("\n", " ").replace("|", "/")
                lines.append(f"| {row['workload']} | {P} / {n} x {R} | {name} | {why} | | | | | | | |")
                continue
            seconds, peak, own = (statistics.median(c[k]) for k in ("seconds", "peak_bytes", "step_bytes"))
            times, memory, own_memory = ratios(row, name)
            ideal = (n * (P + R) / (P + n * R), row["padded_flops"] / row["flops"]) if name == "padded" else None
            cells = [row["workload"], f"{P} / {n} x {R}", name, f"{seconds:.2f} ({len(c['seconds'])})"]
            cells += [f"{times:.2f}" if times else "", "{:.2f}, {:.2f}".format(*ideal) if ideal else ""]
            cells += [f"{peak / 1e9:.2f} ({own / 1e9:.2f})"]
            cells += [f"{memory:.2f} ({own_memory:.2f})" if memory else ""]
            cells += [f"{row['prompts'] * (P + n * R) / seconds:.0f}"]
            cells += [f"{row['flops'] / seconds / report['peak_flops'][0]:.0%}" if report["peak_flops"][0] else ""]
            reached = of_products(row["flops"], row.get("product_flops", []), c)
            cells += [f"{reached:.0%}" if reached else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report, path):
    """Time (top) and peak memory (bottom): the papers' workloads, against candidates, against prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    units = {"seconds": ("seconds a step", 1), "step_bytes": ("the step's own peak memory, GB", 1e-9)}
    for line, (key, (label, scale)) in zip(axes, units.items()):
        value = lambda c: statistics.median(c.get(key, [0])) * scale  # noqa: B023, E731
        rows = [r for r in report["rows"] if r["workload"] in PAPERS]
        names = list(dict.fromkeys(n for r in rows for n in r["contenders"]))
        for i, name in enumerate(names):
            x = [k + 0.8 * i / len(names) for k in range(len(rows))]
            y = [value(r["contenders"][name]) if name in r["contenders"] else 0 for r in rows]
            bars = line[0].bar(x, y, width=0.8 / len(names), label=name)
            line[0].bar_label(bars, fmt="%.3g", fontsize=7)
        titles = ["{}\n{} / {} x {}".format(r["workload"], *r["shape"]) for r in rows]
        line[0].set_xticks([k + 0.4 * (1 - 1 / max(1, len(names))) for k in range(len(rows))], titles, fontsize=7)
        for axis, workload, index in ((line[1], "candidates", 1), (line[2], "prompt", 0)):
            rows = sorted((r for r in report["rows"] if r["workload"] == workload), key=lambda r: r["shape"][index])
            for name in list(dict.fromkeys(n for r in rows for n in r["contenders"])):
                points = [(r["shape"][index], value(r["contenders"][name])) for r in rows if name in r["contenders"]]
                axis.plot(*zip(*points), marker="o", label=name)
            if rows and key == "seconds" and "ours" in rows[0]["contenders"]:
                unique = [r["shape"][0] + r["shape"][1] * r["shape"][2] for r in rows]
                first = value(rows[0]["contenders"]["ours"]) / unique[0]
                x = [r["shape"][index] for r in rows]
                axis.plot(x, [first * u for u in unique], "k:", label="as P + nR from ours' first")
            axis.set_xlabel({1: "candidates n (P 250, R 40)", 0: "prompt tokens P (n 5, R 40)"}[index])
        for axis in line:
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    figure.suptitle(f"One training step, {report['model']}, {report['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--model", default=str(ROOT / "demo/model"), help=f"folder or hub id, or one of {', '.join(GEOMETRIES)}: random"
    )
    add("--workloads", nargs="+", choices=sorted(WORKLOADS), default=PAPERS)
    add("--growth", action="store_true", help="the workloads that vary n and the prompt length")
    add(
        "--contenders",
        nargs="+",
        choices=["ours", "ours_compiled", *sorted(ATTENTION)],
        help="default: ours padded; on CUDA all that are installed",
    )
    add("--repeats", type=in_range(int, 1), default=5, help="turns that count")
    add("--warmup", type=in_range(int, 0), default=1, help="turns before")
    add("--prompts", type=in_range(int, 1), default=1, help="prompts a step")
    add("--optimizer", action="store_true", default=torch.cuda.is_available(), help="clipping and AdamW in the step")
    add("--no_optimizer", dest="optimizer", action="store_false", help="neither: the default on a CPU")
    add("--seed", type=int, default=0)
    add(
        "--output",
        help="results, JSON: same workloads in it are replaced (default benchmarks/results/DEVICE-MODEL.json)",
    )
    add("--show", action="store_true", help="measure nothing: print the table of --output and draw the plot beside it")
    args = parser.parse_args()
    args.workloads = GROWTH if args.growth else args.workloads
    return args


def load(args, device):
    """-> (model, tokenizer or None), as the training scripts load it: fp32 weights; on CUDA FSDP2 computes in bf16."""
    if args.model in GEOMETRIES:
        config = AutoConfig.for_model("llama", **GEOMETRIES[args.model])
        with device:
            model, tokenizer = AutoModelForCausalLM.from_config(config, dtype=torch.float32), None
    else:
        model = common.load_pretrained(AutoModelForCausalLM, args.model, dtype=torch.float32)
        tokenizer = common.load_tokenizer(args.model)
    model.config.use_cache = False
    return common.shard(model.train(), device), tokenizer


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} thread(s)"


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    args = parse_args()
    _, _, device = common.init_distributed()
    model_name = pathlib.Path(args.model).name
    model_name = "SmolLM2-135M" if args.model == str(ROOT / "demo/model") else model_name
    output = pathlib.Path(args.output or ROOT / f"benchmarks/results/{device.type}-{model_name.lower()}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: installed(name) for name in ("torch", "transformers", *PEERS.values(), "flash-attn")}
    report = {"model": model_name, "device": device_name(device), "optimizer": args.optimizer}
    report |= {"versions": {k: v for k, v in versions.items() if v}, "peak_flops": peak_flops(device), "rows": []}
    before = json.loads(output.read_text()) if output.exists() else report
    if args.show:
        report = before
    else:
        same = all(before[k] == report[k] for k in ("model", "device", "optimizer"))
        if not same:
            raise common.UserError(
                f"--output {output} holds results of another model, device or kind: name another file"
            )
        report["peak_flops"] = before["peak_flops"]
        run(args, report, output, device)
    print(table(report))
    plot(report, output.with_suffix(".png"))


def run(args, report, output, device):
    names = args.contenders or ["ours", "padded"]
    if device.type == "cpu":
        say("no CUDA device: FlexAttention, flash-pref and bf16 are left out; the same command measures them on one")
    if device.type == "cuda" and not args.contenders:
        names = ["ours", "ours_compiled", "padded"]
        names += ["trl"] * bool(installed("trl") and args.model not in GEOMETRIES)  # it wants a tokenizer
        names += ["prefix_grouper"] * bool(installed("prefix-grouper"))
        names += ["flash_pref"] * bool(installed("flash-pref") and installed("flash-attn"))
    for name in set(names) & set(PEERS):
        if not installed(PEERS[name]):
            raise common.UserError(f"--contenders {name}: {PEERS[name]} is not installed")
    bench = Bench(names, args, device)
    for workload in args.workloads:
        for shape in WORKLOADS[workload]:
            result, rates = measure(bench, shape, args, device)
            row = {"workload": workload, "shape": shape, "prompts": args.prompts}
            row |= dict(zip(("flops", "padded_flops"), step_flops(bench.model, shape, args.prompts)))
            row |= {"product_flops": rates, "contenders": result}
            same = lambda r: (r["workload"], tuple(r["shape"])) == (workload, shape)  # noqa: B023, E731
            rows = json.loads(output.read_text())["rows"] if output.exists() else []
            report["rows"] = [r for r in rows if not same(r)] + [row]
            write_atomically(output, json.dumps(report, indent=1) + "\n")
            medians = {n: round(statistics.median(c.get("seconds", [math.nan])), 2) for n, c in result.items()}
            say(workload, shape, medians, limit_sentence(row["flops"], rates, result.get("ours", {})))


if __name__ == "__main__":
    common.run_cli(main)
