"""Time and memory of one training step: ours, the padded step, and peers, on the same preferences in one process.

A step is forward, loss and backward of --prompts prompts with n responses of R tokens each, from token ids to
gradients. With --optimizer it also clips and takes AdamW's update. Contenders take turns, so whatever slows the machine
slows all of them. Ratios are taken turn by turn, and medians are shown. With OMP_NUM_THREADS=1 on a CPU, seconds are
those that the process computed, so the figures stand on a busy machine too.

    ours            packed rows: one pass a prompt, logits at response positions only; FlexAttention on CUDA, in blocks
                    on a CPU, as the scripts train
    padded          what the papers' released code does: one sequence a response, each with its own copy of the prompt,
                    padded; a softmax at every position
    list            what the list losses of ordinal-preference-optimization compute, written plainly (its trainer needs
                    an old TRL): the padded step, and a second forward without gradient for the reference model
    dpo, cpo        TRL's DPOTrainer and CPOTrainer, their compute_loss on n - 1 pairs: the best response against each
                    other one, the fewest pairs that name every response
    prefix_grouper  PrefixGrouper with SDPA: one row a prompt, whose attention takes the prompt apart from the responses

`+checkpoint` behind a name recomputes every layer in the backward, `+compile` compiles each layer.

MFU: the FLOPs that must be computed (each token once through the layers, the head at response positions, forward and
backward) for each second, over the dense bf16 peak of a known GPU. Of products: the same over what plain matrix
products of the model's own shapes, as many tokens tall, reach in the same turn.

    make bench                                                             # CPU: the 135M model, four workloads
    make bench ARGS="--contenders ours padded list dpo cpo prefix_grouper --workloads pairs"       # n = 2, 4, 8
    make bench ARGS="--workloads candidates prompt --repeats 3"            # time and memory against n and against P
    make bench ARGS="--model llama-6m"                                     # random weights in a small shape: seconds
"""

import ctypes
import functools
import gc
import importlib.metadata
import json
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
import common  # noqa: E402
from common import in_range, say  # noqa: E402
from recipes.tiny import make_model, make_tokenizer  # noqa: E402

WORKLOADS = {  # the papers' shapes: (prompt tokens, responses, tokens of each)
    "e-SNLI": [(250, 5, 40)],
    "multi-document QA": [(1500, 5, 40)],
    "HH": [(250, 3, 80)],
    "Alpaca": [(60, 5, 60)],
    "candidates": [(250, n, 40) for n in (2, 4, 8, 16)],
    "prompt": [(P, 5, 40) for P in (125, 250, 500, 1000)],
    "pairs": [(250, n, 40) for n in (2, 4, 8)],
}
GEOMETRIES = {  # random weights in a known shape, where no weights can be had
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
    "llama-6m": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"vocab_size": 8192, "tie_word_embeddings": True},
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s


def make_encoded(shape, prompts, vocab_size, seed=0):
    """Random token ids: time depends on shapes alone."""
    P, n, R = shape
    g = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randint(3, vocab_size, size, generator=g).tolist()  # noqa: E731
    return [common.Encoded(str(i), draw((P,)), draw((n, R)), 0, 0) for i in range(prompts)]


def preference_loss(scores):
    """A stand-in for the papers' losses, which cost nothing beside the model: -log sigmoid over all ordered pairs."""
    gaps = scores[:, None] - scores[None, :]
    return -F.logsigmoid(gaps[torch.ones_like(gaps).triu(1).bool()]).sum()


# -------------------- contenders: (model, encoded records) -> (loss, scores [N] or None)


def ours(model, encoded):
    batch = common.pack_for(model, encoded)
    scores = common.length_normalized(*common.candidate_logprobs(model, batch), 0.85)
    return sum(map(preference_loss, scores.split(batch.sizes))), scores


def filled(rows, device, value=0):
    """Lists of numbers -> [N, L], filled on the right."""
    L = max(map(len, rows))
    return torch.tensor([x + [value] * (L - len(x)) for x in rows], device=device)


def padded_rows(sequences, device):
    """[(prompt, response)] -> (input_ids [N, L], attention_mask [N, L], labels [N, L], -100 where no response is)."""
    ids = filled([p + r for p, r in sequences], device)
    mask = filled([[1] * len(p + r) for p, r in sequences], device)
    return ids, mask, filled([[-100] * len(p) + r for p, r in sequences], device, -100)


def padded_scores(model, encoded):
    sequences = [(e.prompt_ids, r) for e in encoded for r in e.responses]
    ids, mask, labels = padded_rows(sequences, model.device)
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * kept
    return common.length_normalized(picked.sum(1), kept.sum(1), 0.85)


def padded(model, encoded, reference=False):
    scores, sizes = padded_scores(model, encoded), [len(e.responses) for e in encoded]
    with torch.no_grad():  # the model itself: a frozen copy takes as long, and its memory beside
        offset = padded_scores(model, encoded) if reference else 0
    return sum(map(preference_loss, (scores - offset).split(sizes))), scores


def prefix_grouper(model, encoded):
    from prefix_grouper import PrefixGrouper

    sides = [e.prompt_ids for e in encoded], [r for e in encoded for r in e.responses]
    prompts, responses = ([filled(x, model.device), filled([[1] * len(r) for r in x], model.device)] for x in sides)
    lengths, sizes = [len(e.prompt_ids) for e in encoded], [len(e.responses) for e in encoded]
    grouper = PrefixGrouper.from_ungrouped_masks(prompts[1], responses[1], sizes, device=model.device)
    for name, width in (("prefix_attn_mask", prompts[0].shape[1]), ("suffix_attn_mask", responses[0].shape[1])):
        keys = getattr(grouper.group_info, name)  # [B, K]; SDPA takes [B, 1, Q, K], the queries being the last keys
        causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=model.device).tril()[-width:]
        setattr(grouper.group_info, name, keys[:, None, None, :].bool() & causal)
    depths = [[*range(P)] + [P + i for r in e.responses for i in range(len(r))] for P, e in zip(lengths, encoded)]
    inputs = {"input_ids": grouper.concat_input(*prompts, *responses), "position_ids": filled(depths, model.device)}
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


@functools.cache
def trl_trainer(kind, model):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    cpu = model.device.type == "cpu"
    options = {"output_dir": tempfile.mkdtemp(), "report_to": [], "gradient_checkpointing": False}
    options |= {"use_cpu": cpu, "bf16": not cpu}
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    rest = {"model": model, "train_dataset": rows, "processing_class": make_tokenizer()}
    if kind == "cpo":
        return CPOTrainer(args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, **options), **rest)
    trainer = DPOTrainer(args=DPOConfig(**options), ref_model=make_model(), **rest)
    trainer.ref_model, trainer.precompute_ref_logps = None, True  # as after precompute_ref_log_probs
    return trainer


def trl(kind, model, encoded):
    best = [(e.prompt_ids, r) for e in encoded for r in e.responses[:1] * (len(e.responses) - 1)]
    others = [(e.prompt_ids, r) for e in encoded for r in e.responses[1:]]
    if kind == "cpo":
        batch = {}
        for side, sequences in (("chosen", best), ("rejected", others)):
            names = (f"{side}_input_ids", f"{side}_attention_mask", f"{side}_labels")
            batch |= dict(zip(names, padded_rows(sequences, model.device)))
    else:
        ids, mask, labels = padded_rows(best + others, model.device)
        zeros = torch.zeros(len(best), device=model.device)
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}
        batch |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    return trl_trainer(kind, model).compute_loss(model, batch), None


SHARED = "FlexAttention on CUDA, in blocks on a CPU"
CONTENDERS = {  # name: (step, attention, package, which of its options)
    "ours": (ours, None, None, SHARED),
    "padded": (padded, "sdpa", None, "SDPA"),
    "list": (functools.partial(padded, reference=True), "sdpa", None, "SDPA; the reference is the model itself"),
    "dpo": (functools.partial(trl, "dpo"), "sdpa", "trl", "sigmoid loss, precompute_ref_log_probs, its fused head"),
    "cpo": (functools.partial(trl, "cpo"), "sdpa", "trl", "loss_type simpo, cpo_alpha 0"),
    "prefix_grouper": (prefix_grouper, "prefix_grouper", "prefix-grouper", "SDPA, include_prefix_last=1"),
}


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def set_up(model, spec):
    """Give `model` what "NAME+checkpoint+compile" asks for -> the contender's step. Each layer is compiled once."""
    name, *options = spec.split("+")
    step, attention, *_ = CONTENDERS[name]
    cuda = model.device.type == "cuda"
    model.set_attn_implementation(attention or ("flex_attention" if cuda else "blocks"))
    if "checkpoint" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    for layer in common.decoder_layers(model):
        if "compile" in options and not hasattr(layer, "compiled"):
            layer.compile(dynamic=True)
            layer.compiled = layer._compiled_call_impl
        layer._compiled_call_impl = layer.compiled if "compile" in options else None
    return step


# -------------------- measuring


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` -> peak.bytes: the most that the process (Linux) or the GPU held, weights
    and gradients included; peak.step_bytes: what the block added."""

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
    """Seconds, after the device has finished. One thread on a CPU: those that the process computed."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one else time.perf_counter()


def timed_step(spec, model, optimizer, encoded):
    """-> (seconds, PeakMemory, scores) of one step; gradients stay allocated, as within an accumulated batch."""
    step = set_up(model, spec)
    for p in model.parameters():
        p.grad.zero_()
    with PeakMemory(model.device) as peak:
        began = clock(model.device)
        loss, scores = step(model, encoded)
        loss.backward()
        del loss
        if optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        seconds = clock(model.device) - began
    return seconds, peak, None if scores is None else scores.detach().float().cpu()


def measure(make, specs, shape, prompts, repeats=3, warmup=1, optimize=False):
    """Interleaved turns of the contenders `specs` over one shape. make() -> a model in training mode.

    -> a row of the results: {"shape", "prompts", "flops", "product_flops": FLOP/s of plain products a turn,
    "contenders": {spec: {"seconds", "peak_bytes", "step_bytes"}, lists less the warm-up}}. A contender that fails on
    CUDA is {"failed": why}, and the model is made anew: FSDP2's layers are then left half gathered.
    """

    def begin():
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model = make()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True) if optimize else None

    model, optimizer = begin()
    device, (P, n, R) = model.device, shape
    encoded = make_encoded(shape, prompts, model.config.vocab_size)
    products, rates = Products(model, prompts * (P + n * R), prompts * n * R), []
    result = {spec: {"seconds": [], "peak_bytes": [], "step_bytes": []} for spec in specs}
    for turn in range(warmup + repeats):
        scores = {}
        rates += [products.rate()] * (turn >= warmup)
        for spec in (s for s in specs if "failed" not in result[s]):
            try:
                seconds, peak, scores[spec] = timed_step(spec, model, optimizer, encoded)
            except Exception as e:  # out of memory, or what does not compile: the others may hold
                if device.type == "cpu":
                    raise
                memory = isinstance(e, torch.OutOfMemoryError)
                result[spec] = {"failed": "out of memory" if memory else f"{type(e).__name__}: {str(e)[:300]}"}
            if "failed" in result[spec]:
                model = optimizer = None
                trl_trainer.cache_clear()
                model, optimizer = begin()
            elif turn >= warmup:
                for key, value in zip(result[spec], (seconds, peak.bytes, peak.step_bytes)):
                    result[spec][key].append(value)
        known = [s for s in scores.values() if s is not None]
        rtol = 1e-4 if device.type == "cpu" and not optimize else 5e-2  # bf16; weights that the optimizer has moved
        if not all(torch.allclose(s, known[0], rtol=rtol) for s in known):
            raise SystemExit(f"{shape}: the contenders do not score alike: {scores}")
    flops = step_flops(model, shape, prompts)
    trl_trainer.cache_clear()
    return {"shape": shape, "prompts": prompts, "flops": flops, "product_flops": rates, "contenders": result}


class Products:
    """Matrix products of the shapes of a model's weights and nothing else, forward and backward: `tokens` through every
    fourth layer, a fourth of `head_tokens` through the head."""

    def __init__(self, model, tokens, head_tokens):
        self.device, head = model.device, model.get_output_embeddings()
        linear = [
            m for layer in common.decoder_layers(model)[::4] for m in layer.modules() if hasattr(m, "in_features")
        ]
        self.shapes = [(tokens, *m.weight.shape) for m in linear] + [(-(-head_tokens // 4), *head.weight.shape)]
        self.flops = sum(6 * rows * out * of for rows, out, of in self.shapes)

    @torch.no_grad()
    def rate(self):
        """-> FLOP/s. What it multiplies is made anew and freed: it is in no contender's memory."""
        options = {"device": self.device, "dtype": torch.bfloat16 if self.device.type == "cuda" else torch.float32}
        inputs = {(rows, of): torch.randn(rows, of, **options) for rows, _, of in self.shapes}
        factors = [(inputs[rows, of], torch.randn(out, of, **options)) for rows, out, of in self.shapes]
        began = clock(self.device)
        for x, weight in factors:
            y = x @ weight.T
            y @ weight, y.T @ x
        return self.flops / (clock(self.device) - began)


def step_flops(model, shape, prompts):
    """What a step must compute: each token once through the layers, 6 FLOPs a parameter; the head at response positions
    only; attention to what a token sees, 12 FLOPs a pair and channel."""
    (P, n, R), config = shape, model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if config.tie_word_embeddings else 2)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 12 * config.num_hidden_layers * config.num_attention_heads * width
    pairs = P * P / 2 + n * (R * P + R * R / 2)
    return prompts * (6 * body * (P + n * R) + 6 * head * n * R + pair * pairs)


# -------------------- results


def ratio(row, spec, key="seconds", base="ours"):
    """The median over turns of a contender's seconds, or bytes, over ours; None where either has none."""
    a, b = row["contenders"][spec].get(key), row["contenders"].get(base, {}).get(key)
    return statistics.median(i / j for i, j in zip(a, b)) if a and b else None


def of_products(row, spec):
    """What a contender computes each second of the FLOPs that must be, over what the products reach: the median of the
    turns."""
    seconds = row["contenders"][spec]["seconds"]
    return statistics.median(row["flops"] / s / rate for s, rate in zip(seconds, row["product_flops"]))


def table(report):
    """The results as a Markdown table, then each contender's version and options."""
    lines = ["| workload | prompt / n x R | step | seconds, median of | times ours | peak GB (step's own) | "]
    lines[0] += "unique tokens/s | MFU | of products |"
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        P, n, R = row["shape"]
        where = f"| {row['workload']} | {row['prompts']} of {P} / {n} x {R} |"
        for spec, c in row["contenders"].items():
            if not c.get("seconds"):
                why = c.get("failed", "").replace("\n", " ").replace("|", "/")
                lines.append(f"{where} {spec} | {why} | | | | | |")
                continue
            seconds, peak, own = (statistics.median(c[k]) for k in ("seconds", "peak_bytes", "step_bytes"))
            times, peak_flops = ratio(row, spec), report["peak_flops"]
            cells = [spec, f"{seconds:.3g} ({len(c['seconds'])})", f"{times:.2f}" if times else ""]
            cells += [f"{peak / 1e9:.2f} ({own / 1e9:.2f})", f"{row['prompts'] * (P + n * R) / seconds:.0f}"]
            cells += [f"{row['flops'] / seconds / peak_flops:.0%}" if peak_flops else ""]
            lines.append(f"{where} {' | '.join(cells)} | {of_products(row, spec):.0%} |")
    names = dict.fromkeys(spec.partition("+")[0] for row in report["rows"] for spec in row["contenders"])
    for name in names:
        _, _, package, options = CONTENDERS[name]
        version = f" {report['versions'].get(package)}" if package else ""
        lines.append(f"\n{name}: {package or 'this tree'}{version}, {options}")
    return "\n".join(lines)


def plot(report, path):
    """Seconds and memory of a step, a picture each: a group of bars a workload."""
    from pandas import DataFrame

    rows, panels = report["rows"], {"seconds": "seconds a step", "step_bytes": "bytes that a step adds"}
    titles = ["{}\n{} / {} x {}".format(row["workload"], *row["shape"]) for row in rows]
    for key, label in panels.items():
        cells = [{n: statistics.median(c[key]) for n, c in row["contenders"].items() if c.get(key)} for row in rows]
        title = f"One training step, {report['model']}, {report['device']}"
        axes = DataFrame(cells, titles).plot.bar(rot=0, ylabel=label, title=title, figsize=(3 + 2 * len(rows), 4))
        axes.figure.savefig(path.with_suffix(f".{key}.png"), bbox_inches="tight")


def new_report(model_name, device, **more):
    names = ("torch", "transformers", *sorted({package for *_, package, _ in CONTENDERS.values() if package}))
    versions = {name: found for name in names if (found := installed(name))}
    peak = next((v for k, v in PEAKS.items() if k in device_name(device)), None)
    return {"model": model_name, "device": device_name(device), "versions": versions, "peak_flops": peak} | more


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} thread(s)"


def random_model(name, device, dtype=torch.float32, **more):
    config = AutoConfig.for_model("llama", use_cache=False, **(GEOMETRIES[name] | more))
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    shapes = f"folder or hub id, or one of {', '.join(GEOMETRIES)}: random weights"
    add("--model", default=str(ROOT / "demo/model"), help=shapes)
    add("--workloads", nargs="+", choices=sorted(WORKLOADS), default=[*WORKLOADS][:4])
    add("--contenders", nargs="+", default=["ours", "padded"], help=f"{', '.join(CONTENDERS)}; +checkpoint, +compile")
    add("--repeats", type=in_range(int, 1), default=5, help="turns that count")
    add("--warmup", type=in_range(int, 0), default=1, help="turns before")
    add("--prompts", type=in_range(int, 1), default=1, help="prompts a step")
    add("--optimizer", action="store_true", help="clipping and AdamW in the step")
    add("--output", help="results, JSON (default benchmarks/results/DEVICE-MODEL.json)")
    add("--show", action="store_true", help="measure nothing: print the table of --output and draw the plot beside it")
    args = parser.parse_args()
    for name in {spec.partition("+")[0] for spec in args.contenders}:
        if name not in CONTENDERS:
            parser.error(f"--contenders {name}: not one of {', '.join(CONTENDERS)}")
        if (package := CONTENDERS[name][2]) and not installed(package):
            parser.error(f"--contenders {name}: pip install {package}")
    _, _, device = common.init_distributed()
    name = "SmolLM2-135M" if args.model == str(ROOT / "demo/model") else pathlib.Path(args.model).name
    output = pathlib.Path(args.output or ROOT / f"benchmarks/results/{device.type}-{name.lower()}.json")

    def make():
        if args.model in GEOMETRIES:
            return common.shard(random_model(args.model, device), device)
        model = common.load_pretrained(AutoModelForCausalLM, args.model, dtype=torch.float32)
        model.config.use_cache = False
        return common.shard(model.train(), device)

    report = new_report(name, device, optimizer=args.optimizer, rows=[])
    if args.show:
        report = json.loads(output.read_text())
    for workload, shape in [(w, s) for w in args.workloads for s in WORKLOADS[w]] * (not args.show):
        row = measure(make, args.contenders, shape, args.prompts, args.repeats, args.warmup, args.optimizer)
        report["rows"].append({"workload": workload} | row)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        say(table(report | {"rows": report["rows"][-1:]}))
    print(table(report))
    plot(report, output)


if __name__ == "__main__":
    common.run_cli(main)
