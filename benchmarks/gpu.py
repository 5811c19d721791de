"""One GPU for eight minutes: is the CUDA path right, how fast is it, and where does the time go?

    make gpu                                          # without CUDA: the small form, which tries all but the card
    python benchmarks/gpu.py --parts steps_7b         # some parts: gpu.json keeps the others' results

The most important part comes first. Each part is a forked process with a limit of its own. What it found is written
while it runs, to gpu.json in the folder that $OUT names, else in benchmarks/results/DEVICE/; the steps' tables to files
that `bench.py --show --output FILE` shows and draws. So a run that is cut leaves what it had, and a part that fails,
hangs or leaves the device unusable does not stop the next one.

    attention   FlexAttention over tree rows, output and gradients, beside SDPA over the same sequences padded: head
                shapes, fp32 and bf16, windows, trees across prompts (on a CPU: common.attend_blocks)
    scores      candidate_logprobs and the gradients of whole models, packed beside padded, fp32 and bf16
    training    rescue.py, whose process group is NCCL's with one process: its losses beside a CPU's, a run that SIGTERM
                stopped and --resume continued beside one that ran through
    steps_1b    benchmarks/bench.py on a random Llama of 1.1B: fp32 weights under FSDP2, AdamW, computing in bf16
    steps_7b    the same on 7B: bf16 weights, no optimizer, so that one card holds weights and gradients
    profile     the ten longest kernels of one step of 7B, the share of attention's kernels, the share of waiting
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for CUDA must not start it: forked processes do
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import bench  # noqa: E402

import common  # noqa: E402
from recipes.tiny import make_model, make_tokenizer  # noqa: E402

FORK = multiprocessing.get_context("fork")
HEADS = [(32, 32, 128), (32, 8, 128), (8, 4, 256)]  # query heads, key heads, head size
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}
LARGE |= {"num_key_value_heads": 4}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "initializer_range": 0.2}
KINDS = {"llama": {}, "mistral": {"sliding_window": 100}}


def records(count, P=250, n=5, R=40, shared=0):
    """Random prompts of about P tokens, of which all begin with the same `shared`, with n responses of at most 2 R."""
    draw = random.Random(0)
    ids = lambda length: [draw.randrange(3, 400) for _ in range(max(1, length))]  # noqa: E731
    start, around = ids(shared)[:shared], lambda length: ids(length + draw.randint(-length // 4, length))  # noqa: E731
    return [common.Encoded(str(i), start + around(P), [around(R) for _ in range(n)], 0, 0) for i in range(count)]


def some_rows(device):
    """A tree across prompts, and prompts that share nothing."""
    cuda = device.type == "cuda"
    return [records(12, 80, 4, 30, shared=180), records(5)] if cuda else [records(3, 20, 3, 8, shared=110)]


def apart(a, b):
    """The relative distance of two tensors."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# -------------------- parts: save -> {"passed": bool, figure: value}; save(**figures) writes those so far


def attention(save):
    device = common.init_distributed()[2]
    worst, passed, bf16, fp32 = {}, True, torch.bfloat16, torch.float32
    heads = HEADS if device.type == "cuda" else [(4, 2, 16)]
    names = [(*heads[0], bf16), (*heads[0], fp32), *((*h, bf16) for h in heads[1:])]
    for H, K, D, dtype, kind in ((*name, kind) for name in names for kind in KINDS):
        torch._dynamo.reset()  # past its limit of compilations FlexAttention would run uncompiled
        name = f"{H}/{K} heads of {D}, {str(dtype)[6:]}, {kind}"
        try:
            worst[name] = attention_errors(some_rows(device)[0], H, K, D, dtype, kind, device)
            passed &= worst[name] < (0.02 if dtype is bf16 else 2e-3)
        except Exception as e:  # the other shapes may compile
            worst[name], passed = f"{type(e).__name__}: {str(e)[:300]}", False
        save(**{"relative error": worst})
    return {"passed": passed, "relative error": worst}


def attention_errors(row, H, K, D, dtype, kind, device):
    """-> the largest relative error of the output and of the gradients of random queries, keys and values."""
    model = build(kind, device, SMALL)
    batch, tree = common.pack_for(model, row), common.pack(row, mask_of=lambda end, *_: end)
    end, L = tree.attention_mask, batch.input_ids.shape[1]
    position = torch.arange(len(end))
    paths = [position[(position <= last) & (last < end)] for last in tree.last_positions]  # a sequence's row positions
    paths = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True).to(device)  # [N, T]: padding is never looked at
    depth = torch.arange(paths.shape[1], device=device)
    seen = (depth[:, None] >= depth) & (depth[:, None] - depth < KINDS[kind].get("sliding_window", 2**31))
    tensors = [torch.randn(1, h, L, D, device=device).to(dtype) for h in (H, K, K)]
    ours = [x.clone().requires_grad_() for x in tensors]
    plain = [x.float().requires_grad_() for x in tensors]
    attend = AttentionInterface()[model.config._attn_implementation]
    module = torch.nn.Module().train()
    module.is_causal, module.num_key_value_groups = True, H // K
    got = attend(module, *ours, batch.attention_mask, scaling=D**-0.5)[0][0]  # [L, H, D]
    per_sequence = [x[0][:, paths].transpose(0, 1) for x in plain]  # [N, heads, T, D]
    want = F.scaled_dot_product_attention(*per_sequence, attn_mask=seen, scale=D**-0.5, enable_gqa=H != K)
    where = torch.zeros(len(end), dtype=torch.long)  # for each row position, one place [N * T] that computes it
    flat = paths.cpu().flatten()
    where[flat] = torch.arange(len(flat))
    where[0] = 0  # and not padding, which repeats position 0
    want = want.transpose(1, 2).flatten(0, 1)[where.to(device)]
    back = torch.randn_like(want)
    gradients = torch.autograd.grad(got[: len(end)], ours, back.to(dtype))
    pairs = zip(gradients, torch.autograd.grad(want, plain, back.to(dtype).float()))
    return max(apart(got[: len(end)], want), *(apart(a[:, :, : len(end)], b[:, :, : len(end)]) for a, b in pairs))


def build(kind, device, shape):
    """A random model, fp32, with the attention that training gives it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=400, use_cache=False, **(shape | KINDS[kind]))
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    common.set_attention(model, device)
    return model


def learn(model, batch):
    """-> (log-likelihoods per token [N], all gradients in one tensor)."""
    scores = torch.div(*common.candidate_logprobs(model, batch))
    (scores * torch.linspace(-1, 2, len(scores), device=scores.device)).mean().backward()
    whole = lambda g: (g.full_tensor() if hasattr(g, "full_tensor") else g).flatten()  # noqa: E731
    gradient = torch.cat([whole(p.grad) for p in model.parameters()])
    model.zero_grad()
    return scores.detach(), gradient


def scores(save):
    device = common.init_distributed()[2]
    figures, passed = {}, True
    for kind in KINDS:
        for row in some_rows(device):
            model = build(kind, device, LARGE if device.type == "cuda" else SMALL)
            attention, padded = model.config._attn_implementation, common.pack_padded(row).to(device)
            model.set_attn_implementation("sdpa")
            want = learn(model, padded)
            model.set_attn_implementation(attention)
            fp32 = [apart(*x) for x in zip(learn(model, common.pack_for(model, row)), want)]
            common.shard(model, device, bf16=True)
            bf16 = [apart(*x) for x in zip(learn(model, common.pack_for(model, row)), want)]
            model.set_attn_implementation("sdpa")
            yardstick = [apart(*x) for x in zip(learn(model, padded), want)]
            name = f"{kind}, {len(row)} prompts, {attention}: scores, gradients"
            figures[name] = {"packed, fp32": fp32, "packed, bf16": bf16, "padded, bf16": yardstick}
            passed &= max(fp32) < 1e-3 and all(a < max(0.01, 1.5 * b) for a, b in zip(bf16, yardstick))
            save(**figures)
    return {"passed": passed} | figures


def script(*argv, cpu=False):
    """rescue.py in a forked process -> the process, started."""

    def run():
        os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        sys.argv = [*map(str, argv)]
        os.chdir(ROOT)
        runpy.run_path("rescue.py", run_name="__main__")

    process = FORK.Process(target=run)
    process.start()
    return process


def training(save):
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(num_attention_heads=2).save_pretrained(folder / "tiny")  # FlexAttention wants heads of 16
        make_tokenizer().save_pretrained(folder / "tiny")
        texts = [("human", "yes it is"), ("m", "no it is not"), ("m", "who knows")]
        right = lambda i: [{"text": t, "source": s, "correct": (s == "human") == (i % 2 > 0)} for s, t in texts]  # noqa: E731
        rows = [{"id": str(i), "prompt": f"question {i}?", "candidates": right(i)} for i in range(8)]
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        base = ["rescue.py", "--ordering", "label", "--model", folder / "tiny", "--data", folder / "data.jsonl"]
        base += ["--bf16", "--batch_size", 2, "--epochs", 2, "--lr", "1e-3", "--output"]
        log = lambda run: [json.loads(x) for x in (folder / run / "log.jsonl").read_text().splitlines()]  # noqa: E731
        codes = {}
        for run in ("whole", "cpu"):
            process = script(*base, folder / run, cpu=run == "cpu")
            process.join()
            codes[run] = process.exitcode
        losses = [[x["loss"] for x in log(run)[:3]] for run in ("whole", "cpu")]
        save(codes=codes, **{"losses of 3 steps, here and on a CPU": losses})
        stopped = script(*base, folder / "parts")
        while stopped.is_alive() and not ((folder / "parts/log.jsonl").exists() and len(log("parts")) >= 2):
            time.sleep(0.01)
        os.kill(stopped.pid, signal.SIGTERM)
        stopped.join()
        steps, resumed = len(log("parts")), script(*base, folder / "parts", "--resume")
        resumed.join()
        codes |= {"stopped": stopped.exitcode, "resumed": resumed.exitcode}
        a, b, c = (load_file(folder / x / "model/model.safetensors") for x in ("parts", "whole", "cpu"))
        errors = [max(apart(x[k], b[k]) for k in b) for x in (a, c)]
    passed = not any(codes.values()) and 2 <= steps < 8 and errors[0] <= (1e-3 if torch.cuda.is_available() else 0)
    passed &= errors[1] < 0.02 and all(abs(x - y) < 0.02 * abs(y) for x, y in zip(*losses))
    names = ("stopped after step", "weights, resumed beside run through", "weights, here beside a CPU's")
    return {"passed": passed, "exit codes": codes} | dict(zip(names, (steps, *errors)))


def model_of(name, device):
    """steps_1b's and steps_7b's model, and its name in the small form."""
    cuda, large = device.type == "cuda", name == "llama-2-7b"
    name = name if cuda else "llama-6m"
    dtype = torch.bfloat16 if large else torch.float32
    model = bench.random_model(name, device, dtype, **({} if cuda else {"num_hidden_layers": 2, "hidden_size": 64}))
    return model if large else common.shard(model, device, bf16=True)


PEERS = [name for name, (_, _, package, _) in bench.CONTENDERS.items() if package and bench.installed(package)]
PEERS = ["padded", "list", *(name for name in PEERS if name != "cpo")]
OURS = ["ours+checkpoint", "ours+checkpoint+compile"]


def steps(name, save, contenders):
    """Full rows of ours first, then the peers beside it."""
    device = common.init_distributed()[2]
    cuda, large = device.type == "cuda", name == "llama-2-7b"
    dtypes = "bf16 weights, no optimizer" if large else "fp32 weights under FSDP2, AdamW, computing in bf16"
    report = bench.new_report(f"{name}: {dtypes}", device, rows=[])
    work = [("a full row", (250, 5, 40), 18, OURS), ("e-SNLI", (250, 5, 40), 8, contenders)]
    work += [("multi-document QA", (1500, 5, 40), 2, contenders)]
    if not cuda:
        work = [(workload, (20, 3, 5), 1, specs) for workload, _, _, specs in work[:2]]
        work = [(w, shape, n, [s for s in specs if "compile" not in s]) for w, shape, n, specs in work]
    for workload, shape, prompts, specs in work:
        row = bench.measure(lambda: model_of(name, device), specs, shape, prompts, 2, optimize=not large)
        report["rows"].append({"workload": workload} | row)
        save(report=report)
    failed = [spec for row in report["rows"] for spec, c in row["contenders"].items() if "failed" in c]
    return {"passed": not any(x.startswith("ours") for x in failed), "failed": failed}


def steps_1b(save):
    return steps("llama-1b", save, ["ours", "ours+compile", *OURS, *PEERS])


def steps_7b(save):
    return steps("llama-2-7b", save, ["ours", "ours+compile", *OURS, *(f"{x}+checkpoint" for x in PEERS)])


def profile(save):
    """A step of "a full row" of steps_7b."""
    device = common.init_distributed()[2]
    cuda, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    model, spec = model_of("llama-2-7b", device), OURS[0]
    encoded = bench.make_encoded((250, 5, 40) if cuda else (20, 3, 5), 18 if cuda else 1, model.config.vocab_size)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        seconds = bench.timed_step(spec, model, None, encoded)[0]
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        bench.timed_step(spec, model, None, encoded)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {e.key: getattr(e, key) / 1e6 for e in profiler.key_averages()}
    busy, longest = sum(times.values()), sorted(times, key=times.get, reverse=True)[:10]
    shares = {name[:100]: f"{times[name] / busy:.1%}" for name in longest}
    attention = sum(t for name, t in times.items() if re.search("flex|triton_tem|attention|attend", name))
    waiting = f"{max(0, 1 - busy / seconds):.1%}"  # of the step's time in which no kernel ran
    return {"passed": True, "seconds a step": seconds, "kernels": shares, "waiting": waiting} | {
        "attention": f"{attention / busy:.1%}"
    }


LIMITS = {attention: 70, scores: 40, training: 50, steps_1b: 85, steps_7b: 150, profile: 50}  # seconds
PARTS = {part.__name__: part for part in LIMITS}

# -------------------- each part in a process of its own


def about(save):
    device = common.init_distributed()[2]
    names = {"torch": torch.__version__, "transformers": transformers.__version__, "passed": True}
    if device.type == "cpu":
        return names | {"device": "cpu, small form"}
    memory = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"
    return names | {"device": torch.cuda.get_device_name(), "memory": memory}


def child(part, pipe):
    os.setpgrp()  # what it starts ends with it
    found = {}

    def save(**figures):
        found.update(figures)
        pipe.send(found)

    try:
        save(**part(save))
    except BaseException:
        save(passed=False, error=traceback.format_exc()[-3000:])
    os._exit(0)  # without waiting for threads, or for a device that hangs


def run_part(part, limit, write=lambda found: None):
    """Run a part in a forked process -> what it found, which goes to write() as it grows."""
    ours, its = FORK.Pipe(duplex=False)
    began, found = time.monotonic(), {}
    process = FORK.Process(target=child, args=(part, its))
    process.start()
    its.close()
    try:
        while ours.poll(max(0, began + limit - time.monotonic())):
            found = ours.recv()
            write(found)
        found |= {"passed": False, "error": f"stopped after {limit:.0f} s"}
    except EOFError:
        if "passed" not in found:
            found |= {"passed": False, "error": "its process died"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return found | {"seconds": round(time.monotonic() - began, 1)}


def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="default: all")
    parser.add_argument("--minutes", type=common.in_range(float, above=0), default=8, help="for all of them")
    args = parser.parse_args()
    end, device = time.monotonic() + 60 * args.minutes, run_part(about, 120)
    if not device.get("passed"):
        raise common.UserError(f"the device cannot be used: {device['error']}")
    slug = re.sub(r"\W+", "-", device["device"].lower())
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "benchmarks/results" / slug)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    report = {
        "about": device,
        "parts": before["parts"] if before.get("about", {}).get("device") == device["device"] else {},
    }

    def write(name, found):
        report["parts"][name] = {k: v for k, v in found.items() if k != "report"}
        file.with_suffix(".part").write_text(json.dumps(report, indent=1) + "\n")
        os.replace(file.with_suffix(".part"), file)
        if "report" in found:
            (folder / f"{name}.json").write_text(json.dumps(found["report"], indent=1) + "\n")

    for name in args.parts:
        limit = min(LIMITS[PARTS[name]] * (1 if "memory" in device else 5), end - time.monotonic())  # a busy CPU
        over = {"passed": False, "error": f"not begun: {args.minutes:g} minutes are over"}
        found = run_part(PARTS[name], limit, lambda found: write(name, found)) if limit > 5 else over  # noqa: B023
        write(name, found)
        print(f"{name}: {'passed' if found['passed'] else 'FAILED'}, {found.get('seconds', 0)} s", flush=True)
        if "report" in found and found["report"]["rows"]:
            print(bench.table(found.pop("report")))
        print("\n".join(f"  {k}: {v}" for k, v in found.items() if k not in ("passed", "seconds")), flush=True)


if __name__ == "__main__":
    common.run_cli(main)
