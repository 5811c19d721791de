"""One command for one GPU, under 40 minutes, without a hub: is the CUDA path right, how fast is it, do the recipes run?

    make gpu                                    # everything; without CUDA it says so and ends with exit code 0
    make gpu ARGS="--parts kernel recompiles"   # some of it

Each part stands alone: one that fails is recorded with its reason, and the next begins. JSON and a Markdown page go to
benchmarks/results/DEVICE/. tests/test_gpu.py runs the checks under pytest, in small sizes where there is no GPU:

    kernel      FlexAttention over a packed row in bf16, output and gradients, beside fp32 dense SDPA, over head shapes
    packed      scores of packed rows as a run makes them, beside padded ones
    tolerance   check_packing passes on answers of 40, 3 and 1 tokens
    recompiles  compilations of FlexAttention over rows of many lengths
    head        heads of 152k and 256k tokens in chunks: scores and gradients, peak memory
    processes   two processes on this one device over gloo: scores and gradients of one process
    resume      a run of rescue.py that was interrupted and resumed ends in the weights of one that was not
    bench_1b, bench_7b   benchmarks/bench.py at sizes that fit one card; what does not is recorded as out of memory
    recipes     recipes/*.sh that know SCALE=135m, with demo/model
"""

import gc
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.flex_attention import flex_attention_forward

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import runtime  # noqa: E402
from common import Encoded, UserError  # noqa: E402
from files import write_atomically  # noqa: E402

HEADS = ((32, 32, 128), (32, 8, 128), (28, 4, 128), (14, 2, 64), (8, 4, 256), (32, 32, 80))  # query, key, head size
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def records(count, P=250, n=5, R=40, vocab=400, seed=0):
    """Random prompts of about P tokens with n responses of at most 2 R."""
    draw = random.Random(seed)
    ids = lambda length: [draw.randrange(3, vocab) for _ in range(max(1, length))]  # noqa: E731
    one = lambda: [ids(R + draw.randint(-R + 1, R)) for _ in range(n)]  # noqa: E731
    return [Encoded(str(i), ids(P + draw.randint(-P // 4, P // 4)), one(), 0, 0) for i in range(count)]


def build(device, attn=None, **more):
    """A random Llama as training has it: fp32 weights, on CUDA FSDP2 computing in bf16; alone on a CPU fp32."""
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "use_cache": False} | (LARGE if device.type == "cuda" else SMALL) | more
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.float32)
    model.set_attn_implementation(attn or ("flex_attention" if device.type == "cuda" else "blocks"))
    return runtime.shard(model.train(), device)


def learn(model, encoded, device, **options):
    """-> (log-probabilities [N], the norm of each parameter's gradient) of a packed row."""
    batch = runtime.pack_for(model.config._attn_implementation, encoded, device)
    logprobs, lengths = common.candidate_logprobs(model, batch, **options)
    (logprobs / lengths).mean().backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    norms = torch.stack([whole(p.grad).norm().cpu() for p in model.parameters()])
    model.zero_grad()
    return (logprobs / lengths).detach().cpu(), norms


def apart(a, b):
    """The relative distance of two tensors."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Checks: device -> {"passed": bool, figure: value}


def kernel(device):
    cuda, worst = device.type == "cuda", {}
    rows = (records(16), records(1, 60, 2, 8), records(5)) if cuda else (records(2, 100, 3, 20),)
    for H, K, D in HEADS if cuda else ((4, 2, 16),):
        for row in rows:
            flex, dense = runtime.pack_for("flex_attention", row, device), common.pack(row)
            T, L = dense.input_ids.shape[1], flex.input_ids.shape[1]
            tensors = [torch.randn(1, h, L, D, device=device, dtype=torch.bfloat16) for h in (H, K, K)]
            ours = [x.clone().requires_grad_(cuda) for x in tensors]  # FlexAttention has no backward on CPU
            plain = [x[:, :, :T].float().requires_grad_(cuda) for x in tensors]
            module = torch.nn.Module().train(cuda)
            got, _ = flex_attention_forward(module, *ours, flex.attention_mask, scaling=D**-0.5)
            mask = dense.attention_mask.to(device)
            want = F.scaled_dot_product_attention(*plain, attn_mask=mask, enable_gqa=H != K).transpose(1, 2)
            errors = [apart(got[:, :T], want)]
            if cuda:
                back = torch.randn_like(got)
                back[:, T:] = 0
                pairs = zip(torch.autograd.grad(got, ours, back), torch.autograd.grad(want, plain, back[:, :T].float()))
                errors += [apart(a[:, :, :T], b) for a, b in pairs]
            worst[f"{H}/{K} heads of {D}"] = max([*errors, worst.get(f"{H}/{K} heads of {D}", 0)])
    return {"passed": max(worst.values()) < 0.02, "relative error": worst}


def packed(device):
    model, rows = build(device).eval(), records(6)
    with torch.no_grad():
        batch = runtime.pack_for(model.config._attn_implementation, rows, device)
        got = torch.div(*common.candidate_logprobs(model, batch))
        model.set_attn_implementation("sdpa")
        want = torch.div(*common.candidate_logprobs(model, common.pack_padded(rows).to(device)))
    error = (got - want).abs().max().item()
    return {"passed": error < (0.05 if device.type == "cuda" else 1e-4), "nats a token": error}


def tolerance(device):
    model, refused = build(device, initializer_range=0.05), {}
    for R in (40, 3, 1):
        refused[R] = 0
        for seed in range(12):
            try:
                pack_row = lambda row: runtime.pack_for(model.config._attn_implementation, row, device)  # noqa: E731
                common.check_packing(model, records(4, 60, 3, R, seed=seed), pack_row)
            except UserError:
                refused[R] += 1
    return {"passed": not any(refused.values()), "refused of 12": refused}


def recompiles(device):
    import torch.nn.attention.flex_attention as flex
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as entries

    torch._dynamo.reset()
    model, rows, seconds = build(device, "flex_attention"), records(16, 100 if device.type == "cpu" else 250), []
    for i in range(20 if device.type == "cuda" else 4):
        row, began = random.Random(i).sample(rows, 1 + i % 16), time.perf_counter()
        with torch.set_grad_enabled(device.type == "cuda"):
            batch = runtime.pack_for("flex_attention", row, device)
            total = common.candidate_logprobs(model.train(device.type == "cuda"), batch)[0].sum()
            if total.requires_grad:
                total.backward()
        seconds.append(round(time.perf_counter() - began, 3))
    count = len(entries(flex.flex_attention.__code__))
    return {"passed": count <= 5, "compilations": count, "of a limit of": 8, "seconds a row": seconds}


def head(device):
    figures = {"passed": True}
    for V in (151936, 256000) if device.type == "cuda" else (1000,):
        found = {}
        model = build(device, vocab_size=V, tie_word_embeddings=True, num_hidden_layers=2)
        model.plain_head = True
        for cap in (2**27 if device.type == "cuda" else 16 * V, 2**40):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found[cap] = learn(model, records(12, vocab=V), device, max_logits=cap)
            if device.type == "cuda":
                chunked = "in chunks" if cap < 2**40 else "whole"
                figures[f"GB, V {V}, {chunked}"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        errors = [apart(a, b) for a, b in zip(*found.values())]
        figures[f"relative error, V {V}"] = errors
        figures["passed"] &= max(errors) < 0.02
    return figures


def worker(process, device, file, folder):
    """One of two processes on one device: a row each, gradients averaged by FSDP2 over gloo."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=process, world_size=2)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.save(learn(build(device), records(2, seed=process), device), f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def processes(device):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (device, f"{folder}/meet", folder), nprocs=2)
        got = [torch.load(f"{folder}/{i}.pt") for i in (0, 1)]
    model = build(device)
    scores = [learn(model, records(2, seed=i), device)[0] for i in (0, 1)]
    both = learn(model, records(2, seed=0) + records(2, seed=1), device)[1]  # as many candidates each: the same mean
    errors = [apart(g, w) for (g, _), w in zip(got, scores)] + [apart(got[0][1], both)]
    return {"passed": max(errors) < (0.02 if device.type == "cuda" else 1e-4), "relative error": errors}


def resume(device):
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        run_command([sys.executable, "recipes/tiny.py", f"{folder}/tiny"], 120)
        data = pathlib.Path(folder, "data.jsonl")
        texts = [("human", "yes it is"), ("m", "no it is not"), ("m", "who knows")]
        candidates = [{"text": t, "source": s, "correct": s == "human"} for s, t in texts]
        rows = [{"id": str(i), "prompt": f"question {i}?", "candidates": candidates} for i in range(8)]
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        base = [sys.executable, "rescue.py", "--ordering", "label", "--model", f"{folder}/tiny/model", "--data"]
        base += [str(data), "--batch_size", "2", "--checkpoint_every", "1", "--lr", "1e-3", "--seed", "0", "--output"]
        run_command([*base, f"{folder}/whole"], 300)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        stopped = subprocess.Popen([*base, f"{folder}/parts"], cwd=ROOT, **quiet)
        log = pathlib.Path(folder, "parts/log.jsonl")
        while stopped.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.01)
        stopped.kill()
        stopped.wait()
        run_command([*base, f"{folder}/parts", "--resume"], 300)
        a, b = (load_file(f"{folder}/{x}/model/model.safetensors") for x in ("parts", "whole"))
        error = max(apart(a[k], b[k]) for k in b)
        return {"passed": error < 1e-2 if device.type == "cuda" else error == 0, "relative error of weights": error}


CHECKS = [kernel, packed, tolerance, recompiles, head, processes, resume]

# ----------------------------------------------------------------------------------------------------------------------
# Figures and recipes, in processes of their own


def run_command(command, limit, **env):
    """-> the end of what it printed; RuntimeError with it where it fails, TimeoutExpired past `limit` seconds."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"cwd": ROOT, "env": os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | env, "text": True}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ...: exit code {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout[-6000:]


def bench(folder, model, limit, *more):
    argv = [sys.executable, "benchmarks/bench.py", "--model", model, "--repeats", "3", *more]
    printed = run_command([*argv, "--output", str(folder / f"{model}.json")], limit)
    return {"passed": True, "table": "\n".join(x for x in printed.splitlines() if x.startswith("|"))}


def recipes(folder):
    figures = {"passed": True}
    for script in sorted((ROOT / "recipes").glob("*.sh")):
        if "135m" in script.read_text() and script.name != "lib.sh":
            began = time.perf_counter()
            try:
                run_command(["bash", str(script)], 300, SCALE="135m", OUT=str(folder / "runs"))
                figures[script.stem] = f"{time.perf_counter() - began:.0f} s"
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                figures |= {"passed": False, script.stem: str(e)[-600:]}
    return figures


def main():
    parser = common.Parser(description=__doc__)
    others = ["bench_1b", "bench_7b", "recipes"]
    parser.add_argument("--parts", nargs="+", choices=[c.__name__ for c in CHECKS] + others, help="default: all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run (tests/test_gpu.py runs the checks that a CPU can)")
        return
    _, _, device = runtime.init_distributed()
    name = torch.cuda.get_device_name()
    folder = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", name.lower())
    folder.mkdir(parents=True, exist_ok=True)
    parts = {c.__name__: lambda c=c: c(device) for c in CHECKS}
    parts["bench_1b"] = lambda: bench(folder, "llama-1b", 480, "--prompts", "4")
    parts["bench_7b"] = lambda: bench(folder, "llama-2-7b", 600, "--no_optimizer", "--workloads", "e-SNLI", "HH")
    parts["recipes"] = lambda: recipes(folder)
    report = {"device": name, "torch": torch.__version__, "parts": {}}
    for part in args.parts or parts:
        began = time.perf_counter()
        try:
            result = parts[part]()
        except Exception as e:  # the next part may hold
            result = {"passed": False, "error": f"{type(e).__name__}: {str(e)[-1500:]}"}
        gc.collect()
        torch.cuda.empty_cache()
        report["parts"][part] = result | {"seconds": round(time.perf_counter() - began)}
        print(part, "passed" if result["passed"] else "FAILED", json.dumps(result)[:400], flush=True)
        write_atomically(folder / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_atomically(folder / "gpu.md", page(report))


def page(report):
    """The report as Markdown: a line a part, then each part's figures."""
    lines = [f"# {report['device']}, torch {report['torch']}: `make gpu`", "", "| part | | seconds |", "|---|---|---|"]
    for name, result in report["parts"].items():
        lines.append(f"| {name} | {'passed' if result['passed'] else 'FAILED'} | {result['seconds']} |")
    for name, result in report["parts"].items():
        figures = {k: v for k, v in result.items() if k not in ("passed", "seconds", "table")}
        lines += ["", f"## {name}", ""] + [f"- {k}: {v}" for k, v in figures.items()] + [result.get("table", "")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    runtime.run_cli(main)
