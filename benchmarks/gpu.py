"""One command for one GPU, under 40 minutes, without a hub: is the CUDA path right, how fast is it, do the recipes run?

    make gpu                                    # everything; without CUDA it says so and ends with exit code 0
    make gpu ARGS="--parts kernel recompiles"   # some of it: the page keeps the others' results
    python benchmarks/gpu.py --minutes 9        # with the packages that are there; only the recipes need more than
                                                # torch, transformers and tqdm

Each part is a process of its own: one that fails, hangs, or leaves the device unusable is recorded with its reason, its
memory is free, and the next begins. JSON and a Markdown page go to benchmarks/results/DEVICE/. tests/test_gpu.py runs
the checks under pytest, in small sizes where there is no GPU:

    kernel      FlexAttention over a packed row in bf16, output and gradients, beside fp32 dense SDPA, over head shapes
    packed      scores of packed rows as a run makes them, beside padded ones
    tolerance   check_packing passes on answers of 40, 3 and 1 tokens
    recompiles  compilations of FlexAttention over rows of many lengths
    head        heads of 152k and 256k tokens in chunks: scores and gradients, peak memory
    processes   two processes on this one device over gloo: scores and gradients of one process
    memory      the peak of a step of 8,192 tokens, with and without activation checkpointing, beside the arithmetic
                by which --activation_checkpointing auto decides
    resume      a run of rescue.py that was killed and resumed ends in the weights of one that was not
    bench_1b, bench_7b   benchmarks/bench.py at sizes that fit one card; what does not is recorded as out of memory
    rows_7b     the same with full rows, of 8,100 tokens, without the contenders that they are too large for: MFU
    tiny        a recipe of each paper at SCALE=tiny: seconds of computing, so what shows is whether its commands run
    recipes     those that know SCALE=135m, with demo/model, where HH, TRAIN_FILES or ALPACA name their data; they go on
                where the time ended them
"""

import contextlib
import gc
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.integrations.flex_attention import flex_attention_forward

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402
from collecting.files import read_json, write_atomically  # noqa: E402
from common import Encoded, UserError  # noqa: E402
from recipes.tiny import make_model, make_tokenizer  # noqa: E402

HEADS = ((32, 32, 128), (32, 8, 128), (28, 4, 128), (14, 2, 64), (8, 4, 256), (32, 32, 80))  # query, key, head size
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def records(count, P=250, n=5, R=40, vocab=400, seed=0):
    """Random prompts of about P tokens with n responses of at most 2 R."""
    draw = random.Random(seed)
    ids = lambda length: [draw.randrange(3, vocab) for _ in range(max(1, length))]  # noqa: E731
    one = lambda: [ids(R + draw.randint(-R + 1, R)) for _ in range(n)]  # noqa: E731
    return [Encoded(str(i), ids(P + draw.randint(-P // 4, P // 4)), one(), 0, 0) for i in range(count)]


def build(device, attn=None, checkpointed=False, **more):
    """A random Llama as training has it: fp32 weights, on CUDA FSDP2 computing in bf16; alone on a CPU fp32."""
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "use_cache": False} | (LARGE if device.type == "cuda" else SMALL) | more
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.float32)
    model.set_attn_implementation(attn or ("flex_attention" if device.type == "cuda" else "blocks"))
    if checkpointed:
        common.checkpoint_layers(model, 1)
    return common.shard(model.train(), device)


def learn(model, encoded, device, **options):
    """-> (log-probabilities [N], the norm of each parameter's gradient) of a packed row."""
    batch = common.pack_for(model.config._attn_implementation, encoded, device)
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
    cuda, worst, failed = device.type == "cuda", {}, {}
    rows = (records(16), records(1, 60, 2, 8), records(5)) if cuda else (records(2, 100, 3, 20),)
    for heads in HEADS if cuda else ((4, 2, 16),):
        torch._dynamo.reset()  # past its limit of compilations FlexAttention would run uncompiled
        name = "{}/{} heads of {}".format(*heads)
        try:
            worst[name] = max(attention_errors(row, *heads, device) for row in rows)
        except Exception as e:  # the other shapes may compile
            failed[name] = f"{type(e).__name__}: {str(e)[:500]}"
    passed = not failed and max(worst.values()) < 0.02
    return {"passed": passed, "relative error": worst} | ({"failed": failed} if failed else {})


def attention_errors(row, H, K, D, device):
    """-> the largest relative error of FlexAttention's output, on CUDA also of its gradients, over random queries."""
    cuda = device.type == "cuda"  # FlexAttention has no backward on CPU
    flex, dense = common.pack_for("flex_attention", row, device), common.pack(row)
    T, L = dense.input_ids.shape[1], flex.input_ids.shape[1]
    tensors = [torch.randn(1, h, L, D, device=device, dtype=torch.bfloat16) for h in (H, K, K)]
    ours = [x.clone().requires_grad_(cuda) for x in tensors]
    plain = [x[:, :, :T].float().requires_grad_(cuda) for x in tensors]
    got, _ = flex_attention_forward(torch.nn.Module().train(cuda), *ours, flex.attention_mask, scaling=D**-0.5)
    mask = dense.attention_mask.to(device)
    want = F.scaled_dot_product_attention(*plain, attn_mask=mask, enable_gqa=H != K).transpose(1, 2)
    errors = [apart(got[:, :T], want)]
    if cuda:
        back = torch.randn_like(got)
        back[:, T:] = 0
        pairs = zip(torch.autograd.grad(got, ours, back), torch.autograd.grad(want, plain, back[:, :T].float()))
        errors += [apart(a[:, :, :T], b) for a, b in pairs]
    return max(errors)


def packed(device):
    model, rows = build(device).eval(), records(6)
    with torch.no_grad():
        batch = common.pack_for(model.config._attn_implementation, rows, device)
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
                pack_row = lambda row: common.pack_for(model.config._attn_implementation, row, device)  # noqa: E731
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
            batch = common.pack_for("flex_attention", row, device)
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
    model = build(device)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)  # the mean that FSDP2 asks for is nccl's
    torch.save(learn(model, records(2, seed=process), device), f"{folder}/{process}.pt")
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


def memory(device):
    cuda, figures, within = device.type == "cuda", {}, []
    for every in (0, 1):
        model = build(device, None, bool(every), **({"num_hidden_layers": 16, "vocab_size": 32000} if cuda else {}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        row = records(18 if cuda else 2)
        tokens = common.pack_for(model.config._attn_implementation, row, device).input_ids.shape[1]
        computed = common.training_bytes(model, tokens, 1)[every]
        for _ in range(2):  # Adam's moments are there from the second one on
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            logprobs, lengths = common.candidate_logprobs(
                model, common.pack_for(model.config._attn_implementation, row, device)
            )
            (logprobs / lengths).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated() if cuda else computed
        within.append(0.6 < peak / computed < 1.1)
        name = "checkpointed" if every else "as it is"
        figures[f"GB, {tokens} tokens, {name}"] = {"computed": round(computed / 1e9, 2), "peak": round(peak / 1e9, 2)}
        del model, optimizer, logprobs, lengths
        gc.collect()  # FSDP2's modules are cycles
        if cuda:
            torch.cuda.empty_cache()
    if cuda:
        figures["allocator"] = str(torch.cuda.memory._snapshot().get("allocator_settings", {}))
    return {"passed": all(within)} | figures


def resume(device):
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        make_model(num_attention_heads=2).save_pretrained(f"{folder}/tiny")  # FlexAttention wants heads of 16
        make_tokenizer().save_pretrained(f"{folder}/tiny")
        data = pathlib.Path(folder, "data.jsonl")
        texts = [("human", "yes it is"), ("m", "no it is not"), ("m", "who knows")]
        candidates = [{"text": t, "source": s, "correct": s == "human"} for s, t in texts]
        rows = [{"id": str(i), "prompt": f"question {i}?", "candidates": candidates} for i in range(8)]
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        base = [sys.executable, "rescue.py", "--ordering", "label", "--model", f"{folder}/tiny", "--data", str(data)]
        base += ["--batch_size", "2", "--epochs", "4", "--checkpoint_every", "1", "--lr", "1e-3", "--output"]
        run_command([*base, f"{folder}/whole"], 300)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        stopped = subprocess.Popen([*base, f"{folder}/parts"], cwd=ROOT, **quiet)
        log = pathlib.Path(folder, "parts/log.jsonl")
        while stopped.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
            time.sleep(0.01)
        stopped.kill()
        killed = stopped.wait() == -signal.SIGKILL
        said = re.search("resuming after step [0-9]+", run_command([*base, f"{folder}/parts", "--resume"], 300))
        a, b = (load_file(f"{folder}/{x}/model/model.safetensors") for x in ("parts", "whole"))
        error = max(apart(a[k], b[k]) for k in b)
        same = error < 1e-2 if device.type == "cuda" else error == 0
        return {"passed": bool(killed and said and same), "relative error of weights": error, "said": said and said[0]}


def tiny(device):
    import warm

    found, os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = {"passed": True}, "1"  # its processes are forked before CUDA
    with tempfile.TemporaryDirectory() as folder, warm.python(pathlib.Path(folder)) as env:
        for name in ("rescue_esnli", "pro_hh", "tuna"):
            run_recipe(name, 300, found, SCALE="tiny", OUT=f"{folder}/out", PATH=env["PATH"])
    return found


CHECKS = [kernel, packed, tolerance, recompiles, head, processes, memory, resume]

# ----------------------------------------------------------------------------------------------------------------------
# Each part in a process of its own


def run_command(command, limit, **env):
    """-> the end of what it printed; RuntimeError with it where it fails, or takes more than `limit` seconds: then
    nothing that it started goes on."""
    outermost = "--check" not in sys.argv  # a check's commands are in the check's session: they end with it
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"cwd": ROOT, "env": os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | env, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": outermost}
    with subprocess.Popen([*map(str, command)], **options) as process:

        def end():
            process.kill()  # nothing where it ended by itself
            if outermost:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

        try:
            printed, why = process.communicate(timeout=limit)[0], f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            end()
            printed, why = process.communicate()[0], f"stopped after {limit:.0f} s"
        finally:
            end()  # also where this program was interrupted
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:4]))} ...: {why}: {printed[-3000:]}")
    return printed[-6000:]


def check(name, limit):
    printed = run_command([sys.executable, __file__, "--check", name, "--debug"], limit)
    return json.loads(printed[printed.rindex("RESULT ") :].splitlines()[0].removeprefix("RESULT "))


def bench(folder, name, limit, *more):
    """benchmarks/bench.py -> its table: also of what it measured until it failed."""
    command = [sys.executable, "benchmarks/bench.py", "--output", folder / f"{name}.json", *more]
    result = {"passed": True}
    try:
        run_command([*command, "--repeats", "3"], limit)
    except RuntimeError as e:
        result = {"passed": False, "error": str(e)}
    if (folder / f"{name}.json").exists():
        shown = run_command([*command, "--show"], 120)
        result["table"] = "\n".join(x for x in shown.splitlines() if x.startswith("|"))
    return result


def run_recipe(name, limit, figures, **env):
    """Note in `figures` how long a recipe took, or why it failed."""
    began = time.monotonic()
    try:
        run_command(["bash", f"recipes/{name}.sh"], limit, **env)
        figures[name] = f"{time.monotonic() - began:.0f} s"
    except RuntimeError as e:
        figures |= {"passed": False, name: str(e)[-600:]}


def recipes(limit):
    """The recipes that know SCALE=135m, one after the other; those whose data is not named are not begun."""
    figures, end = {"passed": True}, time.monotonic() + limit
    for name, *data in RECIPES_135M:
        if any(os.environ.get(x) for x in data):
            run_recipe(name, max(1, end - time.monotonic()), figures, SCALE="135m", OUT=str(ROOT / "runs/gpu"))
        else:
            figures[name] = f"not run: set {' or '.join(data)}"
    return figures


PRO, TUNA = ("HH", "TRAIN_FILES"), ("ALPACA",)  # what names their data
RECIPES_135M = [("pro_hh", *PRO), ("tuna", *TUNA), ("pro_ablations", *PRO), ("pro_rankings", *PRO)]
RECIPES_135M += [("tuna_sweeps", *TUNA), ("tuna_prm", *TUNA)]


def parts(folder):
    """{part: (seconds it may take, function of the seconds that it has)}"""
    found = {c.__name__: (300, lambda limit, c=c: check(c.__name__, limit)) for c in CHECKS}
    small = ["--model", "llama-2-7b", "--no_optimizer", "--prompts", "4", "--workloads", "e-SNLI", "HH"]
    full = ["--model", "llama-2-7b", "--no_optimizer", "--prompts", "18", "--workloads", "e-SNLI"]
    full += ["--contenders", "ours", "ours_compiled"]
    found["bench_1b"] = 480, lambda limit: bench(folder, "bench_1b", limit, "--model", "llama-1b", "--prompts", "4")
    found["bench_7b"] = 300, lambda limit: bench(folder, "bench_7b", limit, *small)
    found["rows_7b"] = 300, lambda limit: bench(folder, "rows_7b", limit, *full)
    found["tiny"] = 600, lambda limit: check("tiny", limit)
    found["recipes"] = 1200, recipes
    return found


def main():
    parser = common.Parser(description=__doc__)
    names, here = list(parts(None)), {c.__name__: c for c in [*CHECKS, tiny]}
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--minutes", type=common.in_range(float, above=0), default=40, help="for all of them")
    parser.add_argument("--check", choices=list(here), help="this one alone, in this process")
    args = parser.parse_args()
    if args.check:
        result = here[args.check](common.init_distributed()[2])
        print("RESULT", json.dumps(result), flush=True)
        return
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run (tests/test_gpu.py runs the checks that a CPU can)")
        return
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers_version}
    folder = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", report["device"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json((folder / "gpu.json").read_text()) if (folder / "gpu.json").exists() else None
    kept = before["parts"] if before and all(before.get(k) == v for k, v in report.items()) else {}
    report["parts"], end = kept, time.monotonic() + 60 * args.minutes
    for name in args.parts:
        limit, part = parts(folder)[name]
        began = time.monotonic()
        limit = min(limit, end - began)
        try:
            over = {"passed": False, "error": f"not begun: {args.minutes:g} minutes are over"}
            result = part(limit) if limit > 30 else over
        except Exception as e:  # the next part may hold
            result = {"passed": False, "error": str(e)}
        report["parts"][name] = result | {"seconds": round(time.monotonic() - began)}
        print(name, "passed" if result["passed"] else "FAILED", json.dumps(result)[:400], flush=True)
        write_atomically(folder / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_atomically(folder / "gpu.md", page(report))


def page(report):
    """The report as Markdown: a line a part, then each part's figures."""
    about = f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}"
    lines = [f"# {about}: `make gpu`", "", "| part | | seconds |", "|---|---|---|"]
    for name, result in report["parts"].items():
        lines.append(f"| {name} | {'passed' if result['passed'] else 'FAILED'} | {result['seconds']} |")
    for name, result in report["parts"].items():
        figures = {k: v for k, v in result.items() if k not in ("passed", "seconds", "table", "error")}
        lines += ["", f"## {name}", ""] + [f"- {k}: {v}" for k, v in figures.items()] + [result.get("table", "")]
        lines += ["```", result["error"], "```"] if "error" in result else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    common.run_cli(main)
