"""What the recipes do beside the project's own commands.

need    look whether all that a recipe needs is there, and say at once what is missing; exit code 2 if anything is
keep    copy a system's figures, item by item too, and the settings of its training to where results are kept
"""

import argparse
import importlib.util
import os
import pathlib
import re
import shutil
import sys

SOURCES = {  # a pattern in a path: where such a file or clone comes from
    r"esnli_(train|test)": "OanaMariaCamburu/e-SNLI, dataset/",
    r"esnli_dev": "ESNLI=: the rows of esnli_dev.csv as JSONL",
    r"nq-open": "nelson-liu/lost-in-the-middle, qa_data/10_total_documents/",
    r"alpaca_data": "tatsu-lab/stanford_alpaca",
    r"alpaca-7b": "ALPACA=: a folder with Alpaca-7B's weights; BLOCKS='raw chatgpt3' does without",
    r"natural-instructions": "a clone of allenai/natural-instructions; SUPERNI= does without",
    r"lmentry": "a clone of aviaefrat/lmentry; LMENTRY= does without",
    r"question.jsonl": "lm-sys/FastChat, fastchat/llm_judge/data/vicuna_bench/; VICUNA= does without",
    r"lima": "GAIR/lima, train.jsonl; BETAS= does without",
    r"prm-3B-39K": "recipes/tuna_prm.sh makes it: run that first, or leave mix-104K out of SYSTEMS",
}
RULES = {"vader": "vaderSentiment", "afinn": "afinn"}  # rewards without a model: the package of each


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("need").add_argument
    add("--files", nargs="*", default=[], help="files and folders")
    add("--models", nargs="+", default=[], help="folders, hub ids, or rules")
    add("--packages", nargs="+", default=[])
    add("--urls", nargs="+", default=[], help="of servers: OpenAI's wants a key")
    add("--absent", action="append", default=[], help="what the recipe itself found missing: a sentence")
    add("--gpus", type=int, default=0)
    add("--gb", type=int, default=0, help="free in the folder --at")
    add("--at", default=".")
    add = verbs.add_parser("keep").add_argument
    add("figures", type=pathlib.Path, help="folder of *.metrics.json and *.items.json")
    add("kept", type=pathlib.Path)
    add("run", nargs="?", type=pathlib.Path, help="its args.json is kept too")
    return parser.parse_args()


def missing(args):
    """Yield a sentence for everything that is not there."""
    yield from args.absent
    for file in args.files:
        if not os.path.exists(file):
            source = next((source for name, source in SOURCES.items() if re.search(name, file)), "named by you")
            yield f"{file} ({source})"
    rules = [RULES[model] for model in args.models if model in RULES]
    for package in (*args.packages, *rules):
        if not importlib.util.find_spec(package):
            yield f"package {package} (pip install {package})"
    for model in args.models:
        if model not in RULES and not os.path.exists(f"{model}/config.json") and (reason := refused(model)):
            yield f"{model}: {reason} (a folder, or a hub id; a gated one: accept its terms there, then hf auth login)"
    if any("api.openai.com" in url for url in args.urls) and not os.environ.get("OPENAI_API_KEY"):
        yield "OPENAI_API_KEY (the key of api.openai.com)"
    if args.gpus:
        import torch  # of seconds: `keep` does without

        if (gpus := torch.cuda.device_count()) < args.gpus:
            yield f"{args.gpus} GPUs, of 80 GB each: here are {gpus} (GPUS=N takes fewer)"
    if (free := shutil.disk_usage(args.at).free >> 30) < args.gb:
        yield f"{args.gb} GB in {args.at}: {free} are free (OUT=FOLDER is for another disk)"


def refused(model):
    """Why the hub does not give a model's config.json, or "": it is fetched."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "config.json", etag_timeout=60)
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are such
        return f"the hub says {type(error).__name__}"
    return ""


def keep(figures, kept, run=None):
    """Copy what is kept to a folder that is whole or not there. An absolute path is of this machine: of each its last
    part is kept."""
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = [*figures.glob("*.metrics.json"), *figures.glob("*.items.json"), *(run.glob("args.json") if run else ())]
    for file in files:
        text = file.read_text()
        if not file.name.endswith(".items.json"):
            text = re.sub(r"([\"= ])/(?:[^\" ]*/)?([^/\" ]+)", r"\1\2", text)
        (part / file.name).write_text(text)
    shutil.rmtree(kept, ignore_errors=True)
    part.rename(kept)


if __name__ == "__main__":
    args = parse_args()
    if args.verb == "keep":
        keep(args.figures, args.kept, args.run)
    elif found := [*missing(args)]:
        print("missing:", *found, sep="\n  ", file=sys.stderr)
        sys.exit(2)
