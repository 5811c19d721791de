"""The verb anchor: multi-document QA, responses from one passage alone (RESCUE Sec. 5.2)."""

import random

import common
from collecting import generation
from collecting.files import read_records
from collecting.flags import collected_flags, generation_flags
from collecting.journal import LONGEST_WAIT, open_collected
from collecting.prompts import TEMPLATES, qa_prompt, read_template
from common import UserError, in_range


def anchor_flags(add):
    collected_flags(add, "train", "anchored", "multidoc_qa")
    add("--model", required=True, help="hub id or folder")
    add("--source", help="the candidates' source (default: the model's name; of RUN/model: RUN)")
    add("--num_distractors", type=in_range(int, 0), default=4, help="responses from distractors (Sec. 5.2: 4)")
    add("--prompt_file", help="a template of your own with {documents} and {question}")
    add("--temperature", type=in_range(float, 0), default=0.0, help="0: greedy, one response a passage")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="which distractors")
    add("--min_new_tokens", type=in_range(int, 0), default=0, help="1: no response is empty")
    generation_flags(add, 128)


def anchor(args):
    """Add candidates for multi-document QA: each generated from one passage alone, the gold one or a random other."""
    process, processes, device = common.init_distributed(LONGEST_WAIT)
    args.source = args.source or common.run_name(args.model)
    template = read_template(args, TEMPLATES["multidoc_qa"])
    records, journal = open_collected(args, "train", "anchored", with_documents, process, processes)
    batch_size = max(1, args.batch_size // (1 + args.num_distractors))
    batches = generation.seeded_batches(args, records, journal, batch_size, process, processes, device)
    for batch, model, tokenizer in batches:
        jobs = [(r, number) for r in batch for number in anchors(r, args.num_distractors, args.seed)]
        prompts = [qa_prompt(template, r["question"], [r["documents"][n]], args.input) for r, n in jobs]
        responses = generation.generate(model, tokenizer, prompts, **generation.options_of(args))
        for (record, number), [response] in zip(jobs, responses):
            kind = "gold" if record["documents"][number]["gold"] else "distractor"
            response |= {"source": args.source, "anchor": kind, "document": number + 1}
            record.setdefault("candidates", []).append(response)
        journal.write(batch)
    journal.finish()


def with_documents(path):
    """The records of a file; UserError for one without documents."""
    records = list(read_records(path))
    if lacking := [r["id"] for r in records if not {"question", "documents"} <= r.keys()]:
        raise UserError(f"{path}: record {lacking[0]!r} has no documents; prepare --task multidoc_qa gives them")
    return records


def anchors(record, num_distractors, seed):
    """Which documents to answer from: the gold ones first, then a seeded draw of the others -> their indices."""
    gold = [i for i, d in enumerate(record["documents"]) if d["gold"]]
    others = [i for i, d in enumerate(record["documents"]) if not d["gold"]]
    draw = random.Random(f"{seed}-{record['id']}").sample(others, min(num_distractors, len(others)))
    return gold + draw
