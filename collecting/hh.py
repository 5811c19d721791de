"""HH-RLHF's dialogues as records (PRO Sec. 4.1)."""

import re

from collecting.files import read_source, text_field
from collecting.prompts import fill
from common import UserError

ROLES = {"Human": "user", "Assistant": "assistant"}
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
    names = {v: k for k, v in ROLES.items()}
    dialogue = "\n\n".join(f"{names[m['role']]}: {m['content']}" for m in context)
    ranked = {"chosen": chosen, "rejected": rejected}.items()
    candidates = [{"text": m["content"], "source": s, "rank": k} for k, (s, m) in enumerate(ranked)]
    record = {"id": f"{row['subset']}-{index}", "task": "hh", "subset": row["subset"]}
    record |= {"prompt": fill(template, {"dialogue": dialogue}, where), "messages": context}
    return [record | {"label": None, "answers": None, "candidates": candidates}]
