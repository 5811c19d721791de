"""HH-RLHF's dialogues as records (PRO Sec. 4.1): from its own files, or from those that PRO's authors preprocessed."""

import pathlib
import re

from collecting.files import read_source, text_field
from collecting.prompts import fill
from common import UserError

ROLES = {"Human": "user", "Assistant": "assistant"}
MARKS = {"<|prompter": "user", "<|assistant": "assistant"}  # how a turn begins in the authors' files
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def hh_rows(args):
    """Yield (where, row with its subset) from --input, a file a subset, or from the hub."""
    if args.input and len(args.input) != len(args.subset):
        raise UserError(f"--input names {len(args.input)} files, --subset {len(args.subset)}: name a file a subset")
    for number, subset in enumerate(args.subset):
        source = (args.input[number], None) if args.input else ("Anthropic/hh-rlhf", subset)
        for where, row in read_source(source[0], args.split, args.config, source[1]):
            yield where, row | {"subset": subset}


def split_dialogue(text):
    """HH's transcript -> messages; turns of one speaker that follow each other are one, as in PRO's code. That code
    keeps a turn's first paragraph alone: here the whole turn stays."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = []
    for role, content in zip(map(ROLES.get, parts[::2]), map(str.strip, parts[1::2])):
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages if not before.strip() else []


def prepare_hh(row, where, index, template, args):
    """A row of HH-RLHF: chosen, rejected. Nothing where the two have not identical contexts but different responses
    (Sec. 4.1; the released code compares the number of turns alone)."""
    *context, chosen = split_dialogue(text_field(row, "chosen", where)) or [None]
    *other, rejected = split_dialogue(text_field(row, "rejected", where)) or [None]
    if not context or context != other or not chosen["role"] == rejected["role"] == "assistant" or chosen == rejected:
        return []
    candidates = [{"text": chosen["content"], "source": "chosen"}, {"text": rejected["content"], "source": "rejected"}]
    return [hh_record(row["subset"], index, context, candidates, template, where)]


def prepare_pros(row, where, index, template, args):
    """A row of the PRO authors' preprocessed files, --from_release: prefix (a list of turns for each response), suffix,
    reward, meta.

    Its candidates are in the file's order, which is their `rank`, with the file's rewards; which one people chose, a
    re-ranked file no longer says, so their source is "release".
    """
    turns = row["prefix"][0]
    if turns[-1] != "<|assistant|>" or any(other != turns for other in row["prefix"]):
        raise ValueError("a row must have one prefix, which ends in <|assistant|>")
    turns = [turn.partition("|>") for turn in turns[:-1]]
    context = [{"role": MARKS[mark], "content": text.strip()} for mark, _, text in turns]
    scored = zip(row["suffix"], row["reward"], strict=True)
    candidates = [{"text": text, "source": "release", "reward": reward} for text, reward in scored]
    folder = pathlib.PurePath(row["meta"]["path"]).parent.name  # helpful-rejection is the longest subset's name there
    subset = next((s for s in SUBSETS if s.startswith(folder)), folder)
    return [hh_record(subset, index, context, candidates, template, where)]


def hh_record(subset, index, context, candidates, template, where):
    """A record of a dialogue and its candidates, best first."""
    names = {v: k for k, v in ROLES.items()}
    dialogue = "\n\n".join(f"{names[m['role']]}: {m['content']}" for m in context)
    record = {"id": f"{subset}-{index}", "task": "hh", "subset": subset}
    record |= {"prompt": fill(template, {"dialogue": dialogue}, where), "messages": context}
    return record | {"label": None, "answers": None, "candidates": [c | {"rank": k} for k, c in enumerate(candidates)]}
