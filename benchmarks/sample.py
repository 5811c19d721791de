"""Sampling n responses to a prompt: generation.generate, which reads the prompt once, beside plain generate.

Both draw the same number of tokens from the same model (EOS is switched off), in turns; ours also returns every
response's log-probability. The median of the ratios, turn by turn, goes into benchmarks/results/DEVICE-sample.json.

    python benchmarks/sample.py                              # the 135M model: 4 samples, a prompt of 500 tokens
    python benchmarks/sample.py --new_tokens 40 128 --repeats 5
"""

import json
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import clock  # noqa: E402

import common  # noqa: E402
import runtime  # noqa: E402
from collecting import generation  # noqa: E402
from common import in_range  # noqa: E402
from run import write_atomically  # noqa: E402
from runtime import say  # noqa: E402


def plain(model, tokenizer, text, samples, new_tokens):
    batch = tokenizer(text, return_tensors="pt").to(model.device)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": new_tokens}
    return model.generate(**batch, num_return_sequences=samples, pad_token_id=tokenizer.pad_token_id, **options)


def ours(model, tokenizer, text, samples, new_tokens):
    generation.generate(model, tokenizer, [text], num_samples=samples, temperature=0.8, max_new_tokens=new_tokens)


def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo/model"), help="folder or hub id")
    add("--prompt_tokens", type=in_range(int, 1), default=500)
    add("--num_samples", type=in_range(int, 1), default=4)
    add("--new_tokens", type=in_range(int, 1), nargs="+", default=[40, 128])
    add("--repeats", type=in_range(int, 1), default=5)
    args = parser.parse_args()
    _, _, device = runtime.init_distributed()
    model, tokenizer = generation.load_generator(args.model, device)
    model.generation_config.eos_token_id = None
    word = tokenizer(" the", add_special_tokens=False).input_ids[:1]
    text = tokenizer.decode(word * args.prompt_tokens)
    versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers")}
    report = {"device": str(device.type), "threads": torch.get_num_threads(), "versions": versions, "rows": []}
    for new_tokens in args.new_tokens:
        seconds = {"ours": [], "plain": []}
        for turn in range(1 + args.repeats):  # the first is warm-up
            for name, run in (("plain", plain), ("ours", ours)):
                began = clock(device)
                run(model, tokenizer, text, args.num_samples, new_tokens)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name] += [clock(device) - began] * (turn > 0)
        ratio = statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"]))
        sizes = {"prompt_tokens": len(tokenizer(text).input_ids), "num_samples": args.num_samples}
        report["rows"].append(sizes | {"new_tokens": new_tokens, "ratio": ratio} | seconds)
        say(sizes, "new tokens", new_tokens, {k: round(statistics.median(v), 2) for k, v in seconds.items()}, ratio)
    output = ROOT / f"benchmarks/results/{device.type}-sample.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    runtime.run_cli(main)
