"""HH-RLHF's dialogues as records (PRO Sec. 4.1): from its own files, or from those that PRO's authors preprocessed."""

import itertools
import pathlib
import re

from collecting.files import read_source, text_field
from collecting.prompts import fill
from common import UserError, say

HH_ROLES = {"Human": "user", "Assistant": "assistant"}
HH_PUBLISHED = {  # PRO, Table 1: samples of the split as downloaded, and after its filter
    "harmless-base": {"train": (42537, 42536), "test": (2312, 2312)},
    "helpful-base": {"train": (43835, 43835), "test": (2354, 2354)},
    "helpful-online": {"train": (22007, 22002), "test": (1137, 1137)},
    "helpful-rejection-sampled": {"train": (52421, 52420), "test": (2749, 2749)},
}
MARKS = {"<|prompter|>": "user", "<|assistant|>": "assistant"}  # how the authors' files mark a turn


def split_dialogue(text):
    """HH's transcript -> messages; turns of one speaker that follow each other are one, as in PRO's code. That code
    keeps a turn's first paragraph alone: here the whole turn stays."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = []
    for role, content in zip(map(HH_ROLES.get, parts[::2]), map(str.strip, parts[1::2])):
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages if not before.strip() else []


def hh_record(row, index, context, candidates, template, where):
    """A record of a dialogue and its candidates, best first."""
    names = {v: k for k, v in HH_ROLES.items()}
    dialogue = "\n\n".join(f"{names[m['role']]}: {m['content']}" for m in context)
    record = {"id": f"{row['subset']}-{index}", "task": "hh", "subset": row["subset"]}
    record |= {"prompt": fill(template, {"dialogue": dialogue}, where), "messages": context}
    candidates = [c | {"rank": place} for place, c in enumerate(candidates)]
    return record | {"label": None, "answers": None, "candidates": candidates}


def prepare_hh(row, where, index, template):
    """A row of HH-RLHF (chosen, rejected) -> record with both as candidates.

    None where the two have not identical contexts but different responses (Sec. 4.1; the released code compares the
    number of turns alone).
    """
    *context, chosen = split_dialogue(text_field(row, "chosen", where)) or [None]
    *other, rejected = split_dialogue(text_field(row, "rejected", where)) or [None]
    if not context or context != other or not chosen["role"] == rejected["role"] == "assistant" or chosen == rejected:
        return None
    candidates = [{"text": chosen["content"], "source": "chosen"}, {"text": rejected["content"], "source": "rejected"}]
    return hh_record(row, index, context, candidates, template, where)


def prepare_hh_release(row, where, index, template):
    """A row of the authors' preprocessed files (prefix: a list of turns for each response, suffix, reward) -> record.

    Its candidates are in the file's order, which is their `rank`, with the file's rewards; which one people chose, a
    re-ranked file no longer says, so their source is "release".
    """
    prefixes, texts, rewards = (row.get(k) for k in ("prefix", "suffix", "reward"))
    good = all(isinstance(x, list) and x for x in (prefixes, texts, rewards)) and len(texts) == len(rewards)
    turns = prefixes[0] if good and isinstance(prefixes[0], list) else [None]
    marks = [next((m for m in MARKS if isinstance(t, str) and t.startswith(m)), None) for t in turns]
    if not good or None in marks or turns[-1] != "<|assistant|>" or any(p != turns for p in prefixes):
        raise UserError(f"{where}: not a row of PRO's preprocessed files (prefix, suffix, reward; one prefix a row)")
    context = [{"role": MARKS[m], "content": t.removeprefix(m).strip()} for m, t in zip(marks[:-1], turns)]
    candidates = [{"text": text, "source": "release", "reward": reward} for text, reward in zip(texts, rewards)]
    return hh_record(row, index, context, candidates, template, where)


def hh_rows(args):
    """Yield (where, row with its subset) from --input, a file a subset, or from the hub."""
    if args.from_release:
        for file in args.input:
            yield from ((where, row | {"subset": release_subset(row, file)}) for where, row in read_source(file))
        return
    if args.input and len(args.input) != len(args.subset):
        raise UserError(f"--input names {len(args.input)} files, --subset {len(args.subset)}: name a file a subset")
    for subset, file in zip(args.subset, args.input or itertools.repeat(None)):
        rows = read_source(file) if file else read_source("Anthropic/hh-rlhf", args.split, subset=subset)
        yield from ((where, row | {"subset": subset}) for where, row in rows)


def release_subset(row, file):
    """The subset that a row's `meta` says it comes from, else the file's name."""
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    name = pathlib.PurePath(str(meta.get("path") or file)).parts[-2 if meta.get("path") else -1]
    name = name.removesuffix(".json").replace("_", "-")
    return next((s for s in HH_PUBLISHED if s.startswith(name)), name)


def say_counts(read, kept, args):
    """Print Table 1's numbers beside ours. read, kept: {subset: rows}."""
    for subset, n in read.items():
        raw, filtered = HH_PUBLISHED.get(subset, {}).get(args.split, (None, None))
        beside = f" (PRO, Table 1, {args.split}: {raw} -> {filtered})" if raw and not args.from_release else ""
        say(f"{subset}: {n} samples read, {kept[subset]} with one context and different responses{beside}")
