"""Collect candidate responses: JSONL in, JSONL out, one verb a step.

    prepare   a data set as it was downloaded -> records with prompt, label, and the human (or reference) response
    sample    + responses sampled from a local model, with their log-probability and token count
    teacher   + responses of another model, behind an OpenAI-compatible server
    flip      + the human response turned into its opposite, and labelled anew (RESCUE Sec. 5.1)
    anchor    + multi-document QA: responses generated from one passage alone (RESCUE Sec. 5.2)
    rank      + annotations: label and correctness, similarity, reward, a stronger model's ranking
    hindsight ranked records -> one response that names the better and the worse answer (PRO's baseline CoH)
    export    ranked records -> the files that TRL's trainers read (RLHF, DPO, CPO)

A verb writes finished prompts, whole lines, to OUTPUT.part<rank>, and at the end joins them in the input's order into
OUTPUT.
Killed and run again with the same arguments it keeps what is there and does the rest; OUTPUT.args.json holds the
arguments.

    python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv
    torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf
    --num_samples 4
    python collect_candidates.py teacher --task esnli --base_url https://api.openai.com/v1 --model gpt-4o-mini
    python collect_candidates.py flip --task esnli --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B
    python collect_candidates.py rank --task esnli --by label

    python collect_candidates.py prepare --task multidoc_qa --input nq-open-10_total_documents_gold_at_0.jsonl.gz
    torchrun --nproc_per_node 4 collect_candidates.py anchor --model meta-llama/Llama-2-7b-hf
    python collect_candidates.py rank --task multidoc_qa --by label --input data/multidoc_qa/anchored.jsonl
"""

import argparse
import asyncio
import contextlib
import email.utils
import fcntl
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import statistics
import string
import time
import urllib.parse
import zlib
from collections import Counter

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import common
from common import UserError, in_range, say

# ----------------------------------------------------------------------------------------------------------------------
# Files that survive a kill


class Journal:
    """Appends finished records, one whole line each, and joins them in the input's order at the end.

    path: the output. ids: the input's ids in order. settings: what must not change between two runs on one output.
    `done` holds the ids already there. A torn last line is cut off; two runs on one output refuse each other (flock
    on PATH.args.json).
    """

    def __init__(self, path, ids, settings, rank=0, world=1):
        self.path, self.ids, self.rank = pathlib.Path(path), list(ids), rank
        if world > 1:
            common.on_rank0(lambda: self._claim(settings))
        else:
            self._claim(settings)
        wanted = set(self.ids)
        if len(wanted) < len(self.ids):
            raise UserError(f"id {Counter(self.ids).most_common(1)[0][0]!r} occurs twice in the input")
        self.done = set()
        for file in self._files():
            ids = [record["id"] for _, record in self._lines(file)]
            if strangers := sorted(set(ids) - wanted):
                raise UserError(f"{file}: id {strangers[0]!r} is not in the input: name another --output")
            if len(ids) > len(set(ids)):
                raise UserError(
                    f"{file}: id {Counter(ids).most_common(1)[0][0]!r} occurs twice: delete one of the lines"
                )
            self.done |= set(ids)
        if world > 1:
            torch.distributed.barrier()  # nobody writes while another still reads
        self._part = open(f"{self.path}.part{rank}", "ab")  # noqa: SIM115

    def _claim(self, settings):
        args_file = pathlib.Path(f"{self.path}.args.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(args_file, "a+")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {self.path}: another run is writing there") from None
        except OSError as e:
            raise UserError(f"--output {self.path}: cannot be written ({e.strerror})") from e
        self._lock.seek(0)
        before = common.read_json(self._lock.read())
        if self._files():
            if before is None:
                raise UserError(f"--output {self.path} exists and was not written by this script: name another file")
            changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
            if changed:
                raise UserError(
                    f"--output {self.path} was begun with other arguments ({', '.join(changed)}): "
                    "name another file, or delete it"
                )
            for file in self._files():
                self._cut_torn_line(file)
            return
        self._lock.truncate(0)
        json.dump(settings, self._lock, indent=1)
        self._lock.flush()

    def _files(self):
        parts = sorted(self.path.parent.glob(self.path.name + ".part*"))
        return [p for p in [self.path, *parts] if p.exists()]

    def _cut_torn_line(self, file):
        with open(file, "r+b") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - common.MAX_LINE))
            end = f.tell() + f.read().rfind(b"\n") + 1
            if end < size:
                say(f"{file}: cut off a torn last line of {size - end} bytes")
                f.truncate(end)

    def _lines(self, file):
        with open(file, "rb") as f:
            offset = 0
            for line in f:
                record = common.read_json(line)
                if not isinstance(record, dict) or "id" not in record:
                    raise UserError(f"{file}: the line at byte {offset} is no record: delete the file to begin anew")
                yield offset, record
                offset += len(line)

    def write(self, records):
        """Append records, then flush and sync: from here on they survive a kill."""
        for record in records:
            self._part.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._part.flush()
        os.fsync(self._part.fileno())

    def finish(self):
        """Join everything in the input's order into PATH -> number of records there, on rank 0; parts stay where some
        are missing."""
        self._part.close()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.rank != 0:
            return None
        where = {}
        for file in self._files():
            where |= {record["id"]: (file, offset) for offset, record in self._lines(file)}
        missing = len(self.ids) - len(where)
        if missing:
            say(f"{len(where)} of {len(self.ids)} done, {missing} missing: run the same command again")
            return len(where)
        whole = self.path.with_name(self.path.name + ".whole")
        with contextlib.ExitStack() as stack, open(whole, "wb") as out:
            files = {file: stack.enter_context(open(file, "rb")) for file in self._files()}
            for i in self.ids:
                file, offset = where[i]
                files[file].seek(offset)
                out.write(files[file].readline())
            out.flush()
            os.fsync(out.fileno())
        os.replace(whole, self.path)
        for file in self._files():
            if file != self.path:
                file.unlink()
        say(f"{len(where)} records in {self.path}")
        return len(where)


def settings_of(args):
    """What a second run on the same output must share: the arguments and the content of the input files."""
    free = {"output", "verb", "run", "batch_size"}
    free |= {
        "base_url",
        "label_base_url",
        "concurrency",
        "max_requests",
        "retries",
        "timeout",
    }  # how a server is asked, not what
    inputs = args.input if isinstance(args.input, list) else [args.input]
    digests = {f"sha256 of {p}": common.file_digest(p) for p in inputs if p and pathlib.Path(p).is_file()}
    return {f"--{k}": v for k, v in vars(args).items() if k not in free} | digests


def read_records(path):
    """Yield records (id and prompt checked, candidates optional) from JSONL; duplicate ids are errors."""
    seen = {}
    for where, record in common.read_rows(path):
        none_yet = record.get("candidates", []) == []
        common.check_record(record | {"candidates": [{"text": "-", "source": "-"}]} if none_yet else record, where)
        if record["id"] in seen:
            raise UserError(f"{where}: id {record['id']!r} was already on {seen[record['id']]}")
        seen[record["id"]] = where
        yield record
    if not seen:
        raise UserError(f"{path}: holds no records")


# ----------------------------------------------------------------------------------------------------------------------
# prepare

NLI_TEMPLATE = """Does the premise make the hypothesis true (entailment), false (contradiction), or neither (neutral)?
Explain in one sentence, then write #### and the label.

Premise: {premise}
Hypothesis: {hypothesis}
Answer:
"""
NLI_LABELS = ("entailment", "neutral", "contradiction")
ESNLI_FIELDS = {
    "Sentence1": "premise",
    "Sentence2": "hypothesis",
    "gold_label": "label",
    "pairID": "id",
    "Explanation_1": "explanation",
    "explanation_1": "explanation",
}


def fill(template, fields, where):
    """Put fields into a template's {names}, once: text that holds braces itself is left alone."""
    names = set(re.findall(r"{(\w+)}", template))
    if names - fields.keys():
        raise UserError(f"{where}: the template asks for {sorted(names - fields.keys())}; there are {sorted(fields)}")
    return re.sub(r"{(\w+)}", lambda m: fields[m[1]], template)


def read_template(args, default):
    """The text of --prompt_file, or the built-in template."""
    if not args.prompt_file:
        return default
    try:
        return pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt_file {args.prompt_file}: cannot be read ({e})") from e


def text_field(row, name, where, optional=False):
    value = row.get(name, "" if optional else None)
    if not isinstance(value, str) or not (optional or value.strip()):
        raise UserError(f"{where}: field {name!r} must be a non-empty string")
    return value.strip()


def prepare_esnli(row, where, index, template):
    """A row of e-SNLI (the CSVs' columns, or premise, hypothesis, label, explanation) -> record; the first
    explanation is the human response."""
    row = row | {new: row[old] for old, new in ESNLI_FIELDS.items() if old in row}
    fields = {k: text_field(row, k, where) for k in ("premise", "hypothesis", "label", "explanation")}
    if fields["label"] not in NLI_LABELS:
        raise UserError(f"{where}: field 'label' is {fields['label']!r}, not one of {', '.join(NLI_LABELS)}")
    human = {"text": f"{fields['explanation']} #### {fields['label'].capitalize()}", "source": "human"}
    return {
        "id": str(row.get("id", f"esnli-{index}")),
        "task": "esnli",
        "prompt": fill(template, fields, where),
        "label": fields["label"],
        "answers": None,
        "candidates": [human],
    }


ALPACA_TEMPLATE = """Carry out the task below, with the input that follows it. Write the response and nothing else.

Task:
{instruction}

Input:
{input}

Response:
---
Carry out the task below. Write the response and nothing else.

Task:
{instruction}

Response:
"""


def alpaca_prompt(template, fields, where):
    """Fill the template's part before a line --- where there is an input, else the part after it."""
    with_input, mark, without_input = template.partition("\n---\n")
    part = with_input if fields["input"] or not mark else without_input
    return fill(part.strip() + "\n", fields, where)


def prepare_alpaca(row, where, index, template):
    """A row of Alpaca (instruction, input, output) -> record with the output as reference; None where it is empty."""
    fields = {"instruction": text_field(row, "instruction", where)}
    fields |= {k: text_field(row, k, where, optional=True) for k in ("input", "output")}
    if not fields["output"]:
        return None
    return {
        "id": str(row.get("id", f"alpaca-{index}")),
        "task": "alpaca",
        "prompt": alpaca_prompt(template, fields, where),
        "instruction": "\n\n".join(filter(None, (fields["instruction"], fields["input"]))),
        "label": None,
        "answers": None,
        "candidates": [{"text": fields["output"], "source": "reference"}],
    }


QA_TEMPLATE = """Answer the question from the documents below. Some of them are irrelevant.

{documents}

Question: {question}
Answer:"""


def choose_documents(rows, chosen, args):
    """Yield (index, (where, row)) for every `chosen` question and --gold_position, row["documents"] in their order.

    rows: all (where, row), whose passages are the pool of distractors where a row brings too few of its own (those
    come first, in the file's order): the most similar passages by shared words, rare ones weighing more (inverse
    document frequency). A passage that holds an answer of the question is no distractor.
    """
    pool = {}
    for where, row in rows:
        for c in check_passages(row, where):
            pool.setdefault((c["title"], c["text"]), None)
    pool = list(pool)
    words = [set(normalize_answer(" ".join(passage)).split()) for passage in pool]
    holders = {}
    for i, passage in enumerate(words):
        for word in passage:
            holders.setdefault(word, []).append(i)
    for index, (where, row) in chosen:
        gold = next((c for c in row["ctxs"] if c.get("isgold")), None)
        if gold is None:
            raise UserError(f"{where}: no passage has isgold true")
        likeness = Counter()
        for word in set(normalize_answer(f"{row['question']} {gold['text']}").split()) & holders.keys():
            for i in holders[word]:
                likeness[i] += math.log(len(pool) / len(holders[word]))
        own = [(c["title"], c["text"]) for c in row["ctxs"] if c is not gold]
        others = dict.fromkeys(own + [pool[i] for i, _ in likeness.most_common()] + pool)
        others = (p for p in others if p[1] != gold["text"] and not has_answer(" ".join(p), row["answers"]))
        others = list(itertools.islice(others, args.num_documents - 1))
        if len(others) < args.num_documents - 1:
            raise UserError(f"{where}: only {len(others)} passages without the answer for --num_documents")
        for position in args.gold_position or [None]:
            if position and position > args.num_documents:
                raise UserError(f"--gold_position {position} is above --num_documents {args.num_documents}")
            place = position or random.Random(f"{args.seed}-{index}").randint(1, args.num_documents)
            documents = [{"title": title, "text": text, "gold": False} for title, text in others]
            documents.insert(place - 1, {"title": gold["title"], "text": gold["text"], "gold": True})
            name = f"nq-{index}" + (f"-gold{position}" if position else "")
            yield index, (where, row | {"documents": documents, "gold_position": place, "id": name})


def check_passages(row, where):
    """-> the row's passages; raises UserError unless it has the form of the lost-in-the-middle files."""
    passages, answers = row.get("ctxs"), row.get("answers")
    good = isinstance(passages, list) and passages and all(isinstance(c, dict) for c in passages)
    if not good or not all(isinstance(c.get(k), str) for c in passages for k in ("title", "text")):
        raise UserError(f"{where}: field 'ctxs' must be a list of passages with title and text")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers)):
        raise UserError(f"{where}: field 'answers' must be a list of non-empty strings")
    text_field(row, "question", where)
    return passages


def qa_prompt(template, question, documents, where):
    texts = [f"Document {i} ({d['title']}): {d['text']}" for i, d in enumerate(documents, 1)]
    return fill(template, {"documents": "\n".join(texts), "question": question}, where)


def prepare_multidoc_qa(row, where, index, template):
    """A question with its documents -> record without candidates: `anchor` adds them."""
    question = text_field(row, "question", where)
    keep = {k: row[k] for k in ("id", "answers", "gold_position", "documents")}
    prompt = qa_prompt(template, question, row["documents"], where)
    return keep | {"task": "multidoc_qa", "prompt": prompt, "label": None, "question": question, "candidates": []}


HH_TEMPLATE = "{dialogue}\n\nAssistant:"
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
HH_RAW = {  # training rows as published (PRO, Table 1)
    "harmless-base": 42537,
    "helpful-base": 43835,
    "helpful-online": 22007,
    "helpful-rejection-sampled": 52421,
}
TURNS = ("Human:", "Assistant:")  # a response to a dialogue ends before these


def split_dialogue(text):
    """HH's transcript -> messages; turns of one speaker that follow each other are one, as in PRO's code."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = []
    for role, content in zip(map(HH_ROLES.get, parts[::2]), map(str.strip, parts[1::2])):
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages if not before.strip() else []


def prepare_hh(row, where, index, template):
    """A row of HH-RLHF (chosen, rejected) -> record with both as candidates; None where the two have not the same
    context and number of turns (PRO's filter)."""
    *context, chosen = split_dialogue(text_field(row, "chosen", where)) or [None]
    *other, rejected = split_dialogue(text_field(row, "rejected", where)) or [None]
    if not context or context != other or not chosen["role"] == rejected["role"] == "assistant":
        return None
    names = {v: k for k, v in HH_ROLES.items()}
    dialogue = "\n\n".join(f"{names[m['role']]}: {m['content']}" for m in context)
    return {
        "id": f"{row['subset']}-{index}",
        "task": "hh",
        "subset": row["subset"],
        "prompt": fill(template, {"dialogue": dialogue}, where),
        "messages": context,
        "label": None,
        "answers": None,
        "candidates": [
            {"text": message["content"], "source": source, "rank": place}
            for place, (source, message) in enumerate((("chosen", chosen), ("rejected", rejected)))
        ],
    }


def hub_rows(name, split, subset=None):
    """Yield (where, row) of a data set on the hub."""
    import datasets

    try:
        rows = datasets.load_dataset(name, data_dir=subset, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{name} cannot be read from the hub ({e}); give its files by --input") from e
    yield from ((f"{name}/{subset or ''}{split}:{i}", row) for i, row in enumerate(rows, 1))


def hh_rows(args):
    """Yield (where, row with its subset) from --input, a file a subset, or from the hub."""
    if args.input and len(args.input) != len(args.subset):
        raise UserError(f"--input names {len(args.input)} files, --subset {len(args.subset)}: name a file a subset")
    for subset, file in zip(args.subset, args.input or itertools.repeat(None)):
        rows = common.read_rows(file) if file else hub_rows("Anthropic/hh-rlhf", args.split, subset)
        yield from ((where, row | {"subset": subset}) for where, row in rows)


TASKS = {
    "esnli": (prepare_esnli, NLI_TEMPLATE),
    "multidoc_qa": (prepare_multidoc_qa, QA_TEMPLATE),
    "hh": (prepare_hh, HH_TEMPLATE),
    "alpaca": (prepare_alpaca, ALPACA_TEMPLATE),
}


def prepare_flags(add):
    add("--task", required=True, choices=sorted(TASKS), help="which data set; default output data/TASK/train.jsonl")
    add(
        "--input",
        nargs="+",
        help="the files as downloaded, .csv, .json, .jsonl, plain or .gz, in this order (hh, alpaca: else the hub)",
    )
    add("--subset", nargs="+", choices=HH_RAW, default=["harmless-base"], help="hh: a subset for each file of --input")
    add("--split", choices=["train", "test"], default="train", help="of the hub's data set")
    add("--validation", type=in_range(int, 0), default=0, help="hold out so many in validation.jsonl (PRO: 280)")
    add("--output", help="default: data/TASK/train.jsonl")
    add("--prompt_file", help="a template of your own, {names} as in the built-in one")
    add("--skip", type=in_range(int, 0), default=0, help="leave out the first rows")
    add("--limit", type=in_range(int, 1), help="then take this many rows")
    add("--num_documents", type=in_range(int, 2), default=10, help="multidoc_qa: documents a prompt (paper: 5 and 10)")
    add("--gold_position", type=in_range(int, 1), nargs="+", help="multidoc_qa: 1 is first; several: a record for each")
    add("--seed", type=int, default=0, help="multidoc_qa: where the gold passage stands without --gold_position")


def prepare(args):
    convert, template = TASKS[args.task]
    template = read_template(args, template)
    if args.task == "hh":
        rows = hh_rows(args)
    elif args.input:
        rows = itertools.chain.from_iterable(map(common.read_rows, args.input))
    elif args.task == "alpaca":
        rows = hub_rows("tatsu-lab/alpaca", args.split)
    else:
        raise UserError(f"--task {args.task} needs --input, the files as downloaded")
    whole = list(rows) if args.task == "multidoc_qa" else None
    rows = itertools.islice(enumerate(whole or rows), args.skip, args.limit and args.skip + args.limit)
    rows = rows if whole is None else choose_documents(whole, rows, args)
    records, left_out = {}, 0
    for index, (where, row) in tqdm(rows, desc="prepare", leave=False):
        record = convert(row, where, index, template)
        if record is None:
            left_out += 1
            continue
        if record["id"] in records:
            raise UserError(f"{where}: id {record['id']!r} occurs twice")
        if record["candidates"] or args.task != "multidoc_qa":
            common.check_record(record, where)
        records[record["id"]] = record
    if len(records) <= args.validation:
        raise UserError(
            f"--input {' '.join(args.input or ['(hub)'])}: {len(records)} records after --skip {args.skip}, "
            f"of which --validation wants {args.validation}"
        )
    output = pathlib.Path(args.output or f"data/{args.task}/train.jsonl")
    held_out = set(random.Random(0).sample(sorted(records), args.validation))
    for path, ids in ((output, records.keys() - held_out), (output.with_name("validation.jsonl"), held_out)):
        if ids:
            journal = Journal(path, [i for i in records if i in ids], settings_of(args))
            journal.write(records[i] for i in records if i in ids and i not in journal.done)
            journal.finish()
    say(f"left out: {left_out} rows", "of two different contexts" if args.task == "hh" else "without a response")
    for field in ("label", "subset"):
        if count := Counter(r[field] for r in records.values() if r.get(field)):
            say(f"{field}:", ", ".join(f"{k} {n}" for k, n in count.items()))
    if args.task == "hh":
        say("training rows as published (PRO, Table 1):", ", ".join(f"{k} {HH_RAW[k]}" for k in args.subset))


# ----------------------------------------------------------------------------------------------------------------------
# sample


@functools.cache
def load_generator(name, device, flag="--model", auto_class=AutoModelForCausalLM):
    """-> (model, tokenizer) for inference on `device`, bf16 on CUDA, fp32 on CPU. Loaded at the first call: what is
    all done loads none."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = common.load_pretrained(auto_class, name, flag, dtype=dtype)
    return model.to(device).eval(), common.load_tokenizer(name, flag)


class ChosenLogprobs:
    """A logits processor that changes nothing: it keeps each chosen token's log-probability, before temperature and
    top_p, instead of all logits."""

    def __init__(self):
        self.last, self.chosen = None, []

    def __call__(self, input_ids, logits):
        """input_ids [B, L + t], logits [B, V] of the next token."""
        self._keep(input_ids)
        self.last = logits.float().log_softmax(-1)
        return logits

    def _keep(self, input_ids):
        if self.last is not None:
            self.chosen.append(self.last.gather(1, input_ids[:, -1:]))

    def all(self, sequences):
        """sequences [B, L + T], all that was generated -> [B, T]."""
        self._keep(sequences)
        return torch.cat(self.chosen, 1)


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    num_samples=1,
    temperature=0.0,
    top_p=1.0,
    num_beams=1,
    max_prompt_length=None,
    stop=(),
):
    """Generate `num_samples` responses to each prompt text -> a list per prompt of {text, logprob, num_tokens,
    finished}.

    temperature 0 is greedy (or beam search). The prompt is read once: its cache is repeated for the samples. logprob
    is the sum of the
    model's own log-probabilities, before temperature and top_p, of the num_tokens tokens, EOS included where it came;
    finished: it ended by
    itself within max_new_tokens. The text ends before the first of the `stop` strings.
    """
    ids = [common.cut_left(tokenizer, common.prompt_ids(tokenizer, p), max_prompt_length or 2**30) for p in prompts]
    L = max(map(len, ids))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (L - len(x)) + x for x in ids], device=model.device)
    mask = torch.tensor([[0] * (L - len(x)) + [1] * len(x) for x in ids], device=model.device)
    chosen, cache = ChosenLogprobs(), None
    if num_samples > 1 and L > 1 and num_beams == 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        inputs = {"input_ids": input_ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions}
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(num_samples)
        input_ids, mask = input_ids.repeat_interleave(num_samples, 0), mask.repeat_interleave(num_samples, 0)
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=pad,
        num_return_sequences=1 if cache is not None else num_samples,
        repetition_penalty=1.0,  # a model's generation_config may ask for one: candidates come from the model itself
        logits_processor=[chosen] * (num_beams == 1),
        synced_gpus=False,  # under FSDP the weights are gathered (common.gathered): ranks do not wait for each other
        stop_strings=list(stop) or None,
        tokenizer=tokenizer,
    )
    tokens = out[:, L:].tolist()
    if num_beams == 1:
        logprobs = chosen.all(out).tolist()
    responses = []
    for row, sequence in enumerate(tokens):
        end = sequence.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in sequence else len(sequence)
        text = tokenizer.decode(sequence[:end], skip_special_tokens=True)
        cut = min((text.index(s) for s in stop if s in text), default=None)
        num_tokens = (
            end if cut is not None else min(end + 1, len(sequence))
        )  # after a stop string EOS is padding, not the model's
        response = {
            "text": text[:cut].strip(),
            "num_tokens": num_tokens,
            "finished": cut is not None or end < len(sequence),
        }
        if num_beams == 1:
            response["logprob"] = sum(logprobs[row][:num_tokens])
        responses.append(response)
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


def generation_flags(add, max_new_tokens):
    add("--max_new_tokens", type=in_range(int, 1), default=max_new_tokens, help="tokens of a response")
    add("--max_prompt_length", type=in_range(int, 1), help="cut longer prompts from the left")
    add(
        "--stop",
        nargs="*",
        default=[],
        help="a response ends before any of these strings, which newline is written \\n",
    )
    add("--batch_size", type=in_range(int, 1), default=16, help="prompts at once")


def sample_flags(add):
    add("--task", default="esnli", help="for the default paths: data/TASK/train.jsonl, data/TASK/sampled.jsonl")
    add("--input", help="records, JSONL")
    add("--output", help="records with the new candidates, JSONL")
    add("--model", required=True, help="hub id or folder")
    add("--source", help="the candidates' source (default: the model's name)")
    add("--num_samples", type=in_range(int, 1), default=4, help="responses a prompt (RESCUE Sec. 5, Tuna Sec. 2.3)")
    add("--temperature", type=in_range(float, 0), default=0.8, help="0: greedy")
    add("--top_p", type=in_range(float, 0, 1), default=1.0)
    add("--seed", type=int, default=0)
    add("--max_rouge_l", type=in_range(float, 0, 1), help="resample responses more similar than this (Tuna: tau 0.8)")
    add("--temperature_step", type=in_range(float, 0), default=0.1, help="added for every resampling (Tuna: 0.1)")
    add("--max_trials", type=in_range(int, 0), default=3, help="then keep the least similar (Tuna: 3)")
    generation_flags(add, 128)


def max_similarity(text, others):
    """The largest ROUGE-L F1 between a text and others, 0 where there are none; the same text is 1 in any script."""
    score = rouge_scorer().score
    return max((1.0 if text == other else score(other, text)["rougeL"].fmeasure for other in others), default=0.0)


@functools.cache
def rouge_scorer(use_stemmer=False):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=use_stemmer)


def keep_diverse(responses, draw, args, count):
    """Tuna's diversity rule (Sec. 2.3) for a batch of prompts: responses, a list of n per prompt -> the same shape.

    A response whose ROUGE-L with one before it is above --max_rouge_l is dropped and drawn again at a temperature
    raised by --temperature_step, --max_trials times; then the least similar of those dropped fill the places left.
    draw(prompt numbers, n, temperature) -> n responses for each; `count` gains how often each branch ran.
    """
    n = len(responses[0])
    kept, dropped = [[] for _ in responses], [[] for _ in responses]

    def texts(i):
        return [r["text"] for r in kept[i]]

    def take(i, response, how):
        similar = max_similarity(response["text"], texts(i)) > args.max_rouge_l
        (dropped if similar else kept)[i].append(response)
        count.update(["too similar" if similar else how])

    for i, first in enumerate(responses):
        count["similar pairs before"] += similar_pairs(first, args.max_rouge_l)
        for response in first:
            take(i, response, "kept at once")
    for trial in range(1, args.max_trials + 1):
        short = [i for i in range(len(kept)) if len(kept[i]) < n]
        if not short:
            break
        temperature = round(args.temperature + trial * args.temperature_step, 6)
        for i, more in zip(short, draw(short, n - min(len(kept[i]) for i in short), temperature)):
            for response in more[: n - len(kept[i])]:
                take(i, response | {"temperature": temperature}, f"kept at trial {trial}")
    for i in range(len(kept)):
        while len(kept[i]) < n:
            least = min(dropped[i], key=lambda r: max_similarity(r["text"], texts(i)))
            kept[i].append(dropped[i].pop(dropped[i].index(least)))
            count["least similar kept"] += 1
        count["pairs"] += n * (n - 1) // 2
        count["similar pairs after"] += similar_pairs(kept[i], args.max_rouge_l)
    return kept


def similar_pairs(responses, limit):
    texts = [r["text"] for r in responses]
    return sum(max_similarity(a, [b]) > limit for a, b in itertools.combinations(texts, 2))


def batches_by_length(records, batch_size):
    """Indices in batches of similar prompt length, longest first, so that too little memory shows at once."""
    order = sorted(range(len(records)), key=lambda i: -len(records[i]["prompt"]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def sample(args):
    rank, world, device = common.init_distributed()
    args.input = args.input or f"data/{args.task}/train.jsonl"
    records = list(read_records(args.input))
    args.source = args.source or pathlib.Path(args.model).name
    journal = Journal(
        args.output or f"data/{args.task}/sampled.jsonl", [r["id"] for r in records], settings_of(args), rank, world
    )
    options = {
        k: getattr(args, k) for k in ("max_new_tokens", "num_samples", "temperature", "top_p", "max_prompt_length")
    }
    options["stop"] = unescape(args.stop)
    count, diversity = Counter(), Counter()
    # batches are planned over all prompts and seeded by their own content: a restart, or another number of ranks,
    # samples the same
    for batch in tqdm(batches_by_length(records, args.batch_size)[rank::world], desc="sample", disable=rank != 0):
        batch = [records[i] for i in batch]
        if all(r["id"] in journal.done for r in batch):
            continue
        model, tokenizer = load_generator(args.model, device)
        torch.manual_seed(zlib.crc32(f"{args.seed} {batch[0]['id']}".encode()))
        drawn = generate(model, tokenizer, [r["prompt"] for r in batch], **options)
        if args.max_rouge_l is not None:

            def draw(numbers, n, temperature):
                again = options | {"num_samples": n, "temperature": temperature}
                return generate(model, tokenizer, [batch[i]["prompt"] for i in numbers], **again)

            drawn = keep_diverse(drawn, draw, args, diversity)
        for record, responses in zip(batch, drawn):
            record["candidates"] = record.get("candidates", []) + [r | {"source": args.source} for r in responses]
            count.update(
                {
                    "responses": len(responses),
                    "unfinished": sum(not r["finished"] for r in responses),
                    "empty": sum(not r["text"] for r in responses),
                }
            )
        journal.write(r for r in batch if r["id"] not in journal.done)
    journal.finish()
    totals = common.all_sum([count[k] for k in ("responses", "unfinished", "empty")])
    say("sampled {:.0f} responses; {:.0f} reached --max_new_tokens, {:.0f} are empty (all kept)".format(*totals))
    if args.max_rouge_l is not None:
        trials = [f"kept at trial {i}" for i in range(1, args.max_trials + 1)]
        kinds = ["kept at once", "too similar", *trials, "least similar kept"]
        kinds += ["pairs", "similar pairs before", "similar pairs after"]
        totals = common.all_sum([diversity[k] for k in kinds])
        say("diversity:", ", ".join(f"{kind} {n:.0f}" for kind, n in zip(kinds, totals)))


def unescape(strings):
    return tuple(s.replace("\\n", "\n") for s in strings)


# ----------------------------------------------------------------------------------------------------------------------
# A model that answers instructions: behind an OpenAI-compatible server, or on this machine

MAX_REPLY = 8 * 2**20  # bytes of one reply
LONGEST_WAIT = 600  # seconds that a server may ask us to wait
FAILURES_IN_A_ROW = 20  # then the server or the request is at fault, not a prompt
RE_ASKS = 2  # after an answer that could not be used
BUDGET_SPENT = "--max_requests is reached"


def api_flags(add, max_new_tokens, required=True):
    add(
        "--model",
        required=required,
        help="a model's name at --base_url; without --base_url: hub id or folder, run here",
    )
    add("--base_url", help="OpenAI-compatible server, e.g. https://api.openai.com/v1; its key: OPENAI_API_KEY")
    add("--concurrency", type=in_range(int, 1), default=8, help="requests under way at once")
    add("--max_requests", type=in_range(int, 1), help="stop after this many requests, repeated ones counted")
    add("--retries", type=in_range(int, 0), default=5, help="repeat a failed request this often, with growing pauses")
    add("--timeout", type=in_range(float, above=0), default=120.0, help="seconds a request may take in all")
    add("--seed", type=int, default=0, help="of a local model's samples")
    generation_flags(add, max_new_tokens)


def complete(
    args,
    prompts,
    *,
    temperature=0.0,
    top_p=1.0,
    num_samples=1,
    logprobs=False,
    completions=False,
    follow_up=None,
    count=None,
):
    """Ask the model of `api_flags` each prompt -> yields (index, responses, error) as they finish, each index once.

    prompts: texts, sent as one user message each (locally: through the chat template where there is one), or, with
    completions=True, continued as they stand. responses:
    num_samples of {text, finished, num_tokens and logprob where known} (logprobs=True asks a server for them), or None
    with `error`, a sentence: such prompts failed and may be asked again another time. follow_up(index, text) -> None,
    or the message to re-ask with when `text` is no use: RE_ASKS times, the dialogue so far before it.
    What concerns all prompts (a refused key, an unknown model, no server) is a UserError. count: a Counter that several
    calls share, so that --max_requests bounds them together.
    """
    options = {"temperature": temperature, "top_p": top_p, "num_samples": num_samples, "completions": completions}
    ask = functools.partial(_ask_server, logprobs=logprobs) if args.base_url else _ask_local
    dialogues = {i: [{"role": "user", "content": prompt}] for i, prompt in enumerate(prompts)}
    count = Counter() if count is None else count
    with tqdm(total=len(prompts), desc=f"asking {args.model}", leave=False) as bar:
        for turn in range(1 + RE_ASKS):
            again = {}
            for i, responses, error in ask(args, dialogues, count, **options):
                bar.set_postfix(count)
                more = follow_up(i, responses[0]["text"]) if follow_up and responses and turn < RE_ASKS else None
                if more is None:
                    bar.update()
                    yield i, responses, error
                else:
                    answer = {"role": "assistant", "content": responses[0]["text"]}
                    again[i] = [*dialogues[i], answer, {"role": "user", "content": more}]
            dialogues = again
            if not again:
                break


def _ask_local(args, dialogues, count, *, completions, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_generator(args.model, device)
    prompts = {
        i: dialogue[0]["content"]
        if completions
        else tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else "\n\n".join(message["content"] for message in dialogue) + "\n"
        for i, dialogue in dialogues.items()
    }
    options |= {k: getattr(args, k) for k in ("max_new_tokens", "max_prompt_length")} | {"stop": unescape(args.stop)}
    order = sorted(prompts, key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), args.batch_size):
        batch = order[start : start + args.batch_size]
        torch.manual_seed(zlib.crc32(f"{args.seed} {prompts[batch[0]]}".encode()))
        responses = generate(model, tokenizer, [prompts[i] for i in batch], **options)
        for i, samples in zip(batch, responses):
            count["tokens"] += sum(r["num_tokens"] for r in samples)
            yield i, samples, None


def _ask_server(args, dialogues, count, **options):
    """`complete` through the server: at most --concurrency requests under way, results as they come."""
    import openai

    key = check_server(args.base_url)
    loop, waiting, running, failures = asyncio.new_event_loop(), iter(dialogues.items()), set(), 0
    client = openai.AsyncOpenAI(
        base_url=args.base_url,
        api_key=key or "none",  # servers of one's own often want none
        max_retries=0,  # ours below: they also repeat what is no JSON, and count
        timeout=args.timeout,
        default_headers={"Accept-Encoding": "identity"},  # so that MAX_REPLY bounds what arrives
        http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [bound_reply]}),
    )
    try:
        while True:
            for i, dialogue in itertools.islice(waiting, args.concurrency - len(running)):
                running.add(loop.create_task(_request(client, args, i, dialogue, count, **options)))
            if not running:
                return
            done, running = loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in sorted(done, key=lambda task: task.exception() is None):  # errors first: all are fetched
                i, responses, error = task.result()
                failures = 0 if responses or count["requests"] == args.max_requests else failures + 1
                if failures == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"--base_url {args.base_url}: {failures} prompts in a row failed; the last: {error}"
                    )
                count["failed"] += responses is None
                yield i, responses, error
    finally:
        for task in running:
            task.cancel()
        loop.run_until_complete(asyncio.wait([*running, loop.create_task(client.close())]))
        _ = [task.cancelled() or task.exception() for task in running]  # fetched, or asyncio prints them
        loop.close()


async def _request(client, args, i, dialogue, count, *, num_samples, logprobs, completions, temperature, top_p):
    """One prompt's samples -> (i, responses, None) or (i, None, error). A server that gives fewer is asked again."""
    import openai

    responses, failed = [], 0
    endpoint = client.completions if completions else client.chat.completions
    body = {"prompt": dialogue[0]["content"]} if completions else {"messages": dialogue}
    body |= {"model": args.model, "temperature": temperature, "top_p": top_p}
    body |= {"stop": list(unescape(args.stop))} if args.stop else {}
    body |= {"logprobs": 1 if completions else True} if logprobs else {}  # the older endpoint takes a number
    while len(responses) < num_samples:
        if count["requests"] == args.max_requests:
            return i, None, BUDGET_SPENT
        count["requests"] += 1
        missing = num_samples - len(responses)
        body["n"] = missing if missing > 1 else openai.omit
        limit = "max_completion_tokens" if count["new names"] else "max_tokens"
        pause = min(60, 2**failed / 2) * random.uniform(0.75, 1)
        try:
            request = endpoint.with_raw_response.create(**body, **{limit: args.max_new_tokens})
            reply = await asyncio.wait_for(request, args.timeout)
            responses += read_reply(reply.text, count)[:missing]
            continue
        except openai.APIStatusError as e:
            if e.status_code == 400 and "max_completion_tokens" in e.message and limit == "max_tokens":
                count["new names"] = 1  # OpenAI's newer models know only this name, many servers only the old one
                continue
            error, wait = status_error(e, args)
            if wait is None:
                return i, None, error
            pause = max(wait, pause)
        except (openai.OpenAIError, asyncio.TimeoutError, ValueError, OverflowError) as e:
            reason = str(e.__cause__ or e) if isinstance(e, openai.APIConnectionError) else str(e)
            error = f"{type(e).__name__} {hide_key(reason)}".strip()
        count["errors"] += 1
        failed += 1
        if failed > args.retries:
            return i, None, error
        await asyncio.sleep(pause)
    return i, responses, None


def check_server(url):
    """Raise UserError unless `url` and OPENAI_API_KEY can be used -> the key, empty where there is none."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url must be http(s)://host/path, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--base_url must hold no user, password, or query: a key belongs in OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its complaint
        raise UserError("OPENAI_API_KEY holds characters that no key has")
    return key


async def bound_reply(response):
    """A hook on every response, errors too: reading stops at MAX_REPLY bytes."""
    read = response.aiter_raw

    async def bounded(*args, **kwargs):
        size = 0
        async for chunk in read(*args, **kwargs):
            size += len(chunk)
            if size > MAX_REPLY:
                raise OverflowError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
            yield chunk

    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the reply is compressed, which was not asked for")
    response.aiter_raw = bounded


def read_reply(text, count):
    """A completion's JSON, chat or text -> its responses; counts its tokens. ValueError on anything else."""
    try:
        reply = json.loads(text)
        tokens = (reply.get("usage") or {}).get("completion_tokens")
        responses = []
        for choice in reply["choices"]:
            content = choice["message"]["content"] if "message" in choice else choice["text"]
            responses.append({"text": (content or "").strip(), "finished": choice.get("finish_reason") == "stop"})
            responses[-1]["text"].encode()  # a lone surrogate cannot be written to a file
            logprobs = choice.get("logprobs") or {}
            values = logprobs.get("token_logprobs") or [token["logprob"] for token in logprobs.get("content") or ()]
            if values:
                responses[-1] |= {"logprob": math.fsum(values), "num_tokens": len(values)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f"the reply is no completion ({type(e).__name__})") from e
    if not responses or not all(common.is_number(r.get("logprob", 0)) for r in responses):
        raise ValueError("the reply holds no choices, or a log-probability that is no number")
    if len(responses) == 1 and common.is_number(tokens) and tokens > 0:
        responses[0].setdefault("num_tokens", tokens)
    count["tokens"] += tokens if common.is_number(tokens) else 0
    return responses


def status_error(e, args):
    """An HTTP status other than 200 -> (error, seconds to wait before asking again, or None: asking again is useless).

    Raises UserError where no prompt can succeed. The server's own words are quoted short, and never the key.
    """
    code = e.status_code
    said = hide_key(" ".join(str(e.message).split())[:200])
    if code in (401, 403):
        raise UserError(f"--base_url {args.base_url}: the key in OPENAI_API_KEY is missing or refused (HTTP {code})")
    if code == 404 or 300 <= code < 400 or getattr(e, "code", None) == "insufficient_quota":
        hint = "redirects are not followed" if code < 400 else said
        raise UserError(f"--base_url {args.base_url}, --model {args.model}: HTTP {code} ({hint})")
    if code not in (408, 409, 425, 429) and code < 500:
        return f"HTTP {code} ({said})", None
    wait = retry_after(e.response.headers.get("retry-after", "0"))
    if wait > LONGEST_WAIT:
        return f"HTTP {code}, and the server asks to wait {wait:.0f} s", None
    return f"HTTP {code} ({said})", wait


def retry_after(header):
    """The header's seconds or HTTP date -> seconds from now, 0 for what is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if header.strip().replace(".", "", 1).isdigit():
            return float(header)
        date = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
    return 0.0


def hide_key(text):
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "***") if key else text


# ----------------------------------------------------------------------------------------------------------------------
# teacher, flip: candidates from other models (RESCUE Sec. 5.1)


def teacher_flags(add):
    collected_flags(add, "train", "teacher")
    add("--source", help="the candidates' source (default: the model's name)")
    add("--num_samples", type=in_range(int, 1), default=1, help="responses a prompt")
    add("--temperature", type=in_range(float, 0), default=0.8, help="0: greedy")
    add("--top_p", type=in_range(float, 0, 1), default=1.0)
    add("--logprobs", action="store_true", help="ask the server for logprob and num_tokens (Tuna's teacher score)")
    add("--completions", action="store_true", help="continue the prompt as it stands (/completions), not as a chat")
    api_flags(add, 256)


def collected_flags(add, before, after):
    add("--task", default="esnli", help=f"for the default paths: data/TASK/{before}.jsonl, data/TASK/{after}.jsonl")
    add("--input", help="records, JSONL")
    add("--output", help="the same records with more in them, JSONL")


def open_collected(args, before, after, read=read_records):
    """The records of --input and the journal of --output, both with their default paths -> (records, journal)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{args.verb} runs in one process: start it with python, not torchrun")
    args.input = args.input or f"data/{args.task}/{before}.jsonl"
    records = list(read(args.input))
    output = args.output or f"data/{args.task}/{after}.jsonl"
    return records, Journal(output, [r["id"] for r in records], settings_of(args))


def ask_each(args, records, journal, prompt, finish, **options):
    """Ask prompt(record) for every record not done; journal finish(record, responses) as they come; list failures."""
    todo, failed = [r for r in records if r["id"] not in journal.done], Counter()
    for i, responses, error in complete(args, [prompt(r) for r in todo], **options):
        if error:
            failed[error] += 1
            if error != BUDGET_SPENT:
                say(f"{todo[i]['id']} failed: {error}")
        else:
            journal.write([finish(todo[i], responses)])
    for error, number in failed.items():
        say(f"{number} prompts failed and are left for another run: {error}")
    journal.finish()


def teacher(args):
    """Add responses of a model behind an OpenAI-compatible server, or, without --base_url, of one run here."""
    args.source = args.source or pathlib.Path(args.model).name
    records, journal = open_collected(args, "train", "teacher")

    def finish(record, responses):
        if args.logprobs and not all("logprob" in r for r in responses):
            raise UserError(
                f"--base_url {args.base_url}: the server ignores `logprobs`, as transformers serve does: drop "
                "--logprobs and add them from a local model with rank --by logprob, or ask a server that gives them"
            )
        more = [r | {"source": args.source} for r in responses]
        return record | {"candidates": record.get("candidates", []) + more}

    options = {k: getattr(args, k) for k in ("num_samples", "temperature", "top_p", "logprobs", "completions")}
    ask_each(args, records, journal, lambda r: r["prompt"], finish, **options)


FLIP_TEMPLATE = """Rewrite the sentence so that it says the opposite. Answer with the rewritten sentence alone.

Sentence: {explanation}"""
LABEL_TEMPLATE = """{prompt}
{explanation} ####

Finish this answer with the label that its explanation leads to, one word: Entailment, Neutral or Contradiction."""
FLIP_AGAIN = "That is not what was asked for. Answer with one line: the sentence, rewritten to say the opposite."
LABEL_AGAIN = f"Answer with one word, the label that fits the explanation: {', '.join(NLI_LABELS)}."


def flip_flags(add):
    collected_flags(add, "train", "flipped")
    add("--prompt_file", help="a template of your own for the rewriting, with {explanation}")
    add("--label_model", help="the model that labels the rewritten explanation (default: --model)")
    add("--label_base_url", help="its server; none: it runs here (default with no --label_model: --base_url)")
    add("--temperature", type=in_range(float, 0), default=1.0, help="of the rewriting; labels are greedy")
    api_flags(add, 128)


def flip(args):
    """Add the opposite of each human response (Sec. 5.1): one model rewrites its explanation, another labels that.

    The second reads the explanation in its context, after the record's own prompt. A human response that has no
    "explanation #### label", or a rewriting or label that stays unusable after re-asking, adds no candidate.
    """
    args.label_base_url = args.label_base_url if args.label_model else args.base_url
    args.label_model = args.label_model or args.model
    records, journal = open_collected(args, "train", "flipped")
    template = read_template(args, FLIP_TEMPLATE)
    labeler = argparse.Namespace(**vars(args) | {"model": args.label_model, "base_url": args.label_base_url})
    provenance = {"explanation_by": pathlib.Path(args.model).name, "label_by": pathlib.Path(labeler.model).name}
    source = "flip-{explanation_by}-{label_by}".format(**provenance)
    count, outcome = Counter(), Counter()
    todo = [r for r in records if r["id"] not in journal.done]
    size = 16 * max(args.concurrency, args.batch_size)  # the rewritings of so many are lost where a run is killed
    for start in tqdm(range(0, len(todo), size), desc="flip"):
        chunk = todo[start : start + size]
        explanations = {r["id"]: human_explanation(r) for r in chunk}
        outcome["malformed human response"] += sum(e is None for e in explanations.values())
        journal.write(r for r in chunk if explanations[r["id"]] is None)
        jobs = [r for r in chunk if explanations[r["id"]] is not None]
        flipped, prompts = {}, [fill(template, {"explanation": explanations[r["id"]]}, "--prompt_file") for r in jobs]

        def unlike(i, text):
            return None if clean_sentence(text, explanations[jobs[i]["id"]]) else FLIP_AGAIN

        for i, responses, error in complete(args, prompts, temperature=args.temperature, follow_up=unlike, count=count):
            sentence = responses and clean_sentence(responses[0]["text"], explanations[jobs[i]["id"]])
            if sentence:
                flipped[jobs[i]["id"]] = sentence
            elif error:
                say(f"{jobs[i]['id']} failed: {error}")
            else:
                outcome["unusable rewriting"] += 1
                journal.write([jobs[i]])
        jobs = [r for r in jobs if r["id"] in flipped]
        contexts = [{"prompt": r["prompt"].rstrip(), "explanation": flipped[r["id"]]} for r in jobs]
        prompts = [fill(LABEL_TEMPLATE, context, "the template") for context in contexts]

        def labeled(i, text):
            return None if one_label(text) else LABEL_AGAIN

        for i, responses, error in complete(labeler, prompts, follow_up=labeled, count=count):
            label = responses and one_label(responses[0]["text"])
            outcome["unusable label" if responses and not label else "labelled" if label else "failed"] += 1
            if error:
                say(f"{jobs[i]['id']} failed: {error}")
                continue
            outcome["label differs from the human one"] += bool(label) and label != jobs[i]["label"]
            text = f"{flipped[jobs[i]['id']]} #### {(label or '').capitalize()}"
            more = [{"text": text, "source": source, "label": label} | provenance] if label else []
            journal.write([jobs[i] | {"candidates": jobs[i]["candidates"] + more}])
    journal.finish()
    say("flipped:", ", ".join(f"{n} {what}" for what, n in outcome.items()))


def human_explanation(record):
    """The explanation of a record's first human response, or None where that has no `explanation #### label`."""
    texts = [c["text"] for c in record.get("candidates", []) if c["source"] in common.HUMAN]
    explanation, mark, label = texts[0].partition("####") if texts else ("", "", "")
    return explanation.strip() if explanation.strip() and mark and one_label(label) else None


def clean_sentence(text, original):
    """A model's rewriting, its quotation marks off -> the sentence, or None: not one line, a mark in it, unchanged."""
    text = text.strip().strip("\"'`“” ")
    same = normalize_answer(text) in ("", normalize_answer(original))
    return None if same or "\n" in text or "####" in text else text


def one_label(text):
    """The one NLI label that occurs in a text, or None."""
    found = {label for label in NLI_LABELS if re.search(rf"\b{label}\b", text.lower())}
    return found.pop() if len(found) == 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# anchor: multi-document QA (RESCUE Sec. 5.2)


def anchor_flags(add):
    add("--task", default="multidoc_qa", help="for the default paths: data/TASK/train.jsonl, data/TASK/anchored.jsonl")
    add("--input", help="records of prepare --task multidoc_qa")
    add("--output", help="the same records with candidates")
    add("--model", required=True, help="hub id or folder")
    add("--source", help="the candidates' source (default: the model's name)")
    add("--num_distractors", type=in_range(int, 0), default=4, help="responses from distractors (Sec. 5.2: 4)")
    add("--prompt_file", help="a template of your own with {documents} and {question}")
    add("--temperature", type=in_range(float, 0), default=0.0, help="0: greedy, one response a passage")
    add("--seed", type=int, default=0, help="which distractors")
    generation_flags(add, 128)


def anchor(args):
    """Add candidates for multi-document QA: each generated from one passage alone, the gold one or a random other."""
    rank, world, device = common.init_distributed()
    args.input = args.input or f"data/{args.task}/train.jsonl"
    args.source = args.source or pathlib.Path(args.model).name
    records, template = list(read_records(args.input)), read_template(args, QA_TEMPLATE)
    for r in records:
        if not (isinstance(r.get("question"), str) and isinstance(r.get("documents"), list)):
            raise UserError(f"{args.input}: record {r['id']!r} has no documents; prepare --task multidoc_qa gives them")
    output = args.output or f"data/{args.task}/anchored.jsonl"
    journal = Journal(output, [r["id"] for r in records], settings_of(args), rank, world)
    options = {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "max_prompt_length")}
    batches = batches_by_length(records, max(1, args.batch_size // (1 + args.num_distractors)))
    for batch in tqdm(batches[rank::world], desc="anchor", disable=rank != 0):
        batch = [records[i] for i in batch]
        if all(r["id"] in journal.done for r in batch):
            continue
        jobs = [(r, number) for r in batch for number in anchors(r, args.num_distractors, args.seed)]
        prompts = [qa_prompt(template, r["question"], [r["documents"][n]], args.input) for r, n in jobs]
        model, tokenizer = load_generator(args.model, device)
        torch.manual_seed(zlib.crc32(f"{args.seed} {batch[0]['id']}".encode()))
        for (record, number), [response] in zip(
            jobs, generate(model, tokenizer, prompts, stop=unescape(args.stop), **options)
        ):
            kind = "gold" if record["documents"][number]["gold"] else "distractor"
            response |= {"source": args.source, "anchor": kind, "document": number + 1}
            record.setdefault("candidates", []).append(response)
        journal.write(r for r in batch if r["id"] not in journal.done)
    journal.finish()


def anchors(record, num_distractors, seed):
    """Which documents to answer from: the gold ones first, then a seeded draw of the others -> their indices."""
    gold = [i for i, d in enumerate(record["documents"]) if d["gold"]]
    others = [i for i, d in enumerate(record["documents"]) if not d["gold"]]
    draw = random.Random(f"{seed}-{record['id']}").sample(others, min(num_distractors, len(others)))
    return gold + draw


# ----------------------------------------------------------------------------------------------------------------------
# rank


def parse_nli(text):
    """An answer to an NLI prompt -> (label or None, well-formed). Well-formed: an explanation, ####, one label and
    nothing else.

    The label stands after the first ####; only an answer without one is searched whole, and then exactly one label
    must occur in it.
    """
    explanation, mark, tail = text.partition("####")
    label = one_label(tail if mark else text)
    return label, bool(mark and explanation.strip() and tail.strip(" .\n").lower() in NLI_LABELS)


def normalize_answer(text):
    """Lower case without punctuation, articles, and extra white space (SQuAD's normalisation)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rank_by_label(records, args):
    """Set every candidate's `label` and `correct`; what cannot be parsed is kept, with label null and correct false."""
    count = Counter()
    for record in records:
        if record.get("task") == "multidoc_qa":
            rank_by_answer(record, count, args.input)
            yield record
            continue
        if record.get("label") not in NLI_LABELS:
            raise UserError(f"{args.input}: record {record['id']!r} has no label of {', '.join(NLI_LABELS)}")
        for c in record["candidates"]:
            c["label"], well_formed = parse_nli(c["text"])
            c["correct"] = c["label"] == record["label"]
            count.update(
                [
                    (c["source"], "total"),
                    (c["source"], "well-formed" if well_formed else "malformed"),
                    (c["source"], "correct" if c["correct"] else "wrong" if c["label"] else "unparsed"),
                ]
            )
        yield record
    kinds = ("total", "well-formed", "malformed", "correct", "wrong", "unparsed")
    kinds = [k for k in kinds if any(count[s, k] for s, _ in list(count))]
    for source in sorted({s for s, _ in count}):
        say(f"{source}: " + ", ".join(f"{count[source, kind]} {kind}" for kind in kinds))


CONTEXTUAL_TEMPLATE = """Compare {count} responses to one task.

The task:
{task}

{responses}

Work in this order:
1. Decide whether the task is closed (one answer is right) or open (many answers can be good).
2. Write your own response to the task. It is response 0.
3. Find the responses that repeat an earlier one in the same or nearly the same words.
4. Rate response 0 and every response that repeats none with three whole numbers from 0 to 5:
   relevance, detail, accuracy.
5. Rank these responses, the best first. For a closed task accuracy decides; for an open one all three do.

Reply in exactly this form and with nothing else:
Type: open or closed
Reference: your own response
Duplicates: none, or groups such as 2=4
Ratings:
0: relevance detail accuracy
1: relevance detail accuracy
Ranking: 0 > 2 > 1
"""
CONTEXTUAL_REPLY = re.compile(
    r"^Type: *(?P<type>open|closed)[ .]*\n+Reference:(?P<reference>.*?)\n+Duplicates: *(?P<duplicates>[^\n]*?)[ .]*\n+"
    r"Ratings: *\n+(?P<ratings>(?: *\d+:[ \d]+\n+)+)Ranking: *(?P<ranking>\d+(?: *> *\d+)*)[ .]*$",
    re.MULTILINE | re.DOTALL,
)


def parse_contextual(reply, n):
    """A ranker's reply about responses 1..n -> {type, reference, repeated, ratings {number: [3]}, ranking [numbers]}.

    0 is the ranker's own response. Strict: ValueError with the reason unless every field stands there once and ratings
    and ranking hold exactly the numbers that repeat no earlier response. Text before and after the form is let pass.
    """
    for field in ("Type", "Reference", "Duplicates", "Ratings", "Ranking"):
        if (times := len(re.findall(rf"^{field}:", reply, re.MULTILINE))) != 1:
            raise ValueError(f"{field}: stands there {times} times")
    found = CONTEXTUAL_REPLY.search(reply)
    if not found:
        raise ValueError("not in the form asked for")
    groups = [] if found["duplicates"].lower() == "none" else found["duplicates"].split(",")
    if not all(re.fullmatch(r" *\d+(?: *= *\d+)+ *", group) for group in groups):
        raise ValueError("duplicates are no groups of numbers")
    groups = [sorted(map(int, group.split("="))) for group in groups]
    repeated = [i for group in groups for i in group[1:]]
    members = [i for group in groups for i in group]
    if len(set(members)) < len(members) or not set(members) <= set(range(1, n + 1)):
        raise ValueError("duplicates name a response twice, or one that is not there")
    rows = [line.replace(":", " ").split() for line in found["ratings"].splitlines() if line.strip()]
    ratings = {int(number): list(map(int, values)) for number, *values in rows}
    ranking = [int(i) for i in found["ranking"].split(">")]
    if len(ratings) < len(rows) or not all(len(v) == 3 and max(v) <= 5 for v in ratings.values()):
        raise ValueError("ratings are not three numbers from 0 to 5 for each response once")
    asked = sorted({*range(n + 1)} - {*repeated})
    if sorted(ranking) != asked or sorted(ratings.keys() - repeated) != asked:
        raise ValueError("ratings or ranking leave out, repeat, or invent a response")
    return {
        "type": found["type"],
        "reference": found["reference"].strip(),
        "repeated": repeated,
        "ratings": ratings,
        "ranking": ranking,
    }


def rank_by_contextual(records, args):
    """Set `rank` (and `ratings`) as a stronger model sees them, reading all responses at once (Tuna Sec. 2.3, Table 9).

    The original response is shown only with --rank_original; repetitions get rank null. A reply that cannot be parsed
    leaves every rank null and stays in the record as `unparsed_reply`; a request that failed is made again next time.
    """
    template, count, asked, prompts = read_template(args, CONTEXTUAL_TEMPLATE), Counter(), [], []
    for record in records:
        texts = {}  # text -> its first candidate
        for i, c in enumerate(record["candidates"]):
            if args.rank_original or c["source"] not in common.HUMAN:
                texts.setdefault(c["text"].strip(), i)
        shown = random.Random(f"{args.seed}-{record['id']}").sample(list(texts.values()), len(texts))
        if len(shown) < 2:
            count["all the same"] += 1
            yield record | {"candidates": contextual_candidates(record["candidates"], shown, None, args)}
            continue
        responses = [f"Response {k}:\n{record['candidates'][i]['text']}" for k, i in enumerate(shown, 1)]
        fields = {"count": str(len(shown)), "responses": "\n\n".join(responses)}
        fields["task"] = record.get("instruction") or record["prompt"]
        asked.append((record, shown))
        prompts.append(fill(template, fields, args.prompt_file or "the template"))
    for number, replies, error in complete(args, prompts):
        (record, shown), verdict = asked[number], None
        if replies is None:
            count["failed"] += 1
            say(f"record {record['id']!r}: {error}")
            continue
        try:
            verdict = parse_contextual(replies[0]["text"], len(shown))
            count.update(["parsed", verdict["type"]] + ["repeated"] * len(verdict["repeated"]))
        except ValueError as e:
            record = record | {"unparsed_reply": replies[0]["text"]}
            count.update(["unparsed", f"unparsed ({e})"])
        yield record | {"candidates": contextual_candidates(record["candidates"], shown, verdict, args)}
    say("replies:", ", ".join(f"{n} {kind}" for kind, n in sorted(count.items())) or "none asked for")


def contextual_candidates(candidates, shown, verdict, args):
    """The candidates with the verdict's ranks and ratings; response k + 1 of the verdict is candidate shown[k]."""
    candidates = [c | {"rank": None} for c in candidates]
    if verdict is None:
        return candidates
    ranking = [i for i in verdict["ranking"] if i > 0 or args.keep_reference]
    for place, i in enumerate(ranking):
        if i == 0:
            candidates.append({"text": verdict["reference"], "source": pathlib.Path(args.model).name})
        c = candidates[shown[i - 1] if i else -1]
        c |= {"rank": place, "ratings": verdict["ratings"][i]}
    return candidates


def log_likelihoods(records, args):
    """Yield (record, logprobs [n], token counts [n]) under --model, prompts in packed rows of --batch_size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_generator(args.model, device)
    records = iter(records)
    while batch := list(itertools.islice(records, args.batch_size)):
        encoded = [common.encode(tokenizer, r, args.max_length) for r in batch]
        with torch.inference_mode():
            logprobs, lengths = common.candidate_logprobs(model, common.pack(encoded).to(device))
        sizes = [len(e.responses) for e in encoded]
        yield from zip(batch, logprobs.split(sizes), lengths.split(sizes))


def rank_by_logprob(records, args):
    """Set every candidate's `logprob` and `num_tokens` under a local teacher, --model (Tuna Eq. 3 reads them)."""
    for record, logprobs, lengths in log_likelihoods(records, args):
        values = zip(record["candidates"], logprobs.tolist(), lengths.tolist())
        yield record | {"candidates": [c | {"logprob": logp, "num_tokens": int(n)} for c, logp, n in values]}


def rank_by_probabilistic(records, args):
    """Set `rank` by the teacher's likelihood, logprob / num_tokens ** --length_penalty (Tuna Eq. 3); null where it is
    not known. tuna.py --stage probabilistic does this by itself; here it is for Table 4 and for mixtures."""
    for record in records:
        known = [c for c in record["candidates"] if "logprob" in c and "num_tokens" in c]
        if not known:
            raise UserError(f"{args.input}: record {record['id']!r} has no logprob; add it with rank --by logprob")
        scores = {id(c): c["logprob"] / c["num_tokens"] ** args.length_penalty for c in known}
        ranks = {i: sum(other > score for other in scores.values()) for i, score in scores.items()}
        yield record | {"candidates": [c | {"rank": ranks.get(id(c))} for c in record["candidates"]]}


def rank_by_prm(records, args):
    """Rank by a model trained on ranked records, Tuna's proxy ranking model: a language model by log p / length, a
    reward model (reward_model.py's) by its logit.

    A record that carries ranks keeps them: there the two rankings are compared (Spearman, averaged over prompts).
    """
    agreement = []
    for record, scores in prm_scores(records, args):
        candidates = record["candidates"]
        ranked = [i for i, c in enumerate(candidates) if c.get("rank") is not None]
        if len(ranked) > 1:
            agreement.append(spearman([-candidates[i]["rank"] for i in ranked], [scores[i] for i in ranked]))
        if not ranked:
            ranks = [sum(other > score for other in scores) for score in scores]
            candidates = [c | {"rank": k} for c, k in zip(candidates, ranks)]
            record = record | {"candidates": candidates, "ranked_by": args.model}
        yield record
    if agreement:
        mean = sum(agreement) / len(agreement)
        say(f"agreement with the ranking of {len(agreement)} records: Spearman {mean:.3f}")


def prm_scores(records, args):
    """Yield (record, scores [n]) under --model."""
    architectures = common.load_pretrained(AutoConfig, args.model).architectures or []
    if not any("SequenceClassification" in name or name == "RewardModel" for name in architectures):
        yield from ((r, (logprobs / lengths).tolist()) for r, logprobs, lengths in log_likelihoods(records, args))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"max_length": args.max_length, "batch_size": args.batch_size, "allow_pickle": args.allow_pickle}
    for record in records:
        pairs = [(record, c["text"]) for c in record["candidates"]]
        yield record, reward_logits(args.model, device, pairs, flag="--model", form=args.dialogue, **options)


def spearman(a, b):
    """Spearman's rank correlation of two lists of n > 1 numbers, ties at their mean rank; 0 where one is constant."""
    places = [[sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (a, b)]
    with contextlib.suppress(statistics.StatisticsError):
        return statistics.correlation(*places)
    return 0.0


def has_answer(text, answers):
    """Whether any of the answers, normalised, is a substring of the text so normalised (Liu et al.'s best subspan)."""
    text = normalize_answer(text)
    return any(a and a in text for a in map(normalize_answer, answers))


def rank_by_answer(record, count, where):
    """Multi-document QA: a candidate is correct where it holds an answer; counts by the passage it came from."""
    if not isinstance(record.get("answers"), list) or not all(isinstance(a, str) for a in record["answers"]):
        raise UserError(f"{where}: record {record['id']!r} has no list of answers")
    for c in record["candidates"]:
        c["correct"] = has_answer(c["text"], record["answers"])
        group = f"{c['source']} from {c['anchor']}" if "anchor" in c else c["source"]
        count.update([(group, "total"), (group, "correct" if c["correct"] else "wrong")])


def rank_by_similarity(records, args):
    """Set every candidate's `similarity`: the cosine of its sentence embedding to that of the human response."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = common.load_pretrained(AutoModel, args.encoder, "--encoder").to(device).eval()
    tokenizer = common.load_pretrained(AutoTokenizer, args.encoder, "--encoder")
    records = iter(records)
    while batch := list(itertools.islice(records, args.batch_size)):
        for record in batch:
            if not any(c["source"] in common.HUMAN for c in record["candidates"]):
                raise UserError(f"{args.input}: record {record['id']!r} has no human response to compare with")
        texts = [c["text"] for r in batch for c in r["candidates"]]
        vectors = embed(model, tokenizer, texts).split([len(r["candidates"]) for r in batch])
        for record, vector in zip(batch, vectors):
            human = next(i for i, c in enumerate(record["candidates"]) if c["source"] in common.HUMAN)
            for c, cosine in zip(record["candidates"], (vector @ vector[human]).tolist()):
                c["similarity"] = round(cosine, 6)
            yield record


@torch.inference_mode()
def embed(model, tokenizer, texts, max_length=256):
    """texts -> [len(texts), d] unit vectors: the mean of the last hidden states over each text's tokens.

    256 tokens are what all-MiniLM-L6-v2 was trained with; longer texts are cut, as sentence-transformers does.
    """
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(
        model.device
    )
    hidden = model(**inputs).last_hidden_state  # [B, L, d]
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


GPT_TEMPLATE = """Below are a task and {n} responses to it. Rank the responses from best to worst: a good one is
correct, and its reasoning is sound and to the point. Answer with one line naming every response once, like: {example}

Task:
{prompt}

{responses}
"""


def rank_by_gpt(records, args):
    """Set every candidate's `rank` (0 the best) by a stronger model's ranking; null where it gave none after re-asking.

    The responses are shown in a seeded random order: models prefer some places.
    """
    records, template = list(records), read_template(args, GPT_TEMPLATE)
    orders, prompts, count = [], [], Counter()
    for r in records:
        n = len(r["candidates"])
        orders.append(random.Random(f"{args.seed}-{r['id']}").sample(range(n), n))
        shown = [f"Response {k}: {r['candidates'][i]['text']}" for k, i in enumerate(orders[-1], 1)]
        fields = {"n": str(n), "example": example_ranking(n), "prompt": r["prompt"], "responses": "\n\n".join(shown)}
        prompts.append(fill(template, fields, "--prompt_file"))

    def unranked(i, text):
        n = len(orders[i])
        return None if parse_ranking(text, n) else RANK_AGAIN.format(n=n, example=example_ranking(n))

    for i, responses, error in complete(args, prompts, follow_up=unranked):
        if error:
            count[error] += 1
            continue
        ranking = parse_ranking(responses[0]["text"], len(orders[i]))
        count["ranked" if ranking else "unranked"] += 1
        for c in records[i]["candidates"]:
            c["rank"] = None
        for place, number in enumerate(ranking or ()):
            records[i]["candidates"][orders[i][number - 1]]["rank"] = place
        yield records[i]
    say("by gpt:", ", ".join(f"{n} {what}" for what, n in count.items()))


RANK_AGAIN = "That could not be read. Answer with one line naming each of the {n} responses once, best first: {example}"


def example_ranking(n):
    return " > ".join(map(str, [*range(2, n + 1), 1]))


def parse_ranking(text, n):
    """The numbers 1..n, best first, from an answer such as `2 > 1 > 3` -> list, or None.

    Strict: the last line that is nothing but numbers joined by > or , (`Ranking:`, `Response` and brackets may stand
    around them) must name every response once. Ties (=), gaps, doubles, and rankings inside a sentence are refused.
    """
    lines = [re.sub(r"(?i)ranking\s*:|response|[\[\]()*`.]", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if re.fullmatch(r"\d+(\s*[>,]\s*\d+)*", line)]
    numbers = [int(x) for x in re.findall(r"\d+", lines[-1])] if lines else []
    return numbers if sorted(numbers) == list(range(1, n + 1)) else None


# -- by a reward model


class RewardModelConfig(GPTNeoXConfig):
    """`gpt_neox_reward_model`: OpenAssistant's reward models, the two of PRO. pooling: "last" or "mean"."""

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"


class RewardModel(GPTNeoXPreTrainedModel):
    """GPT-NeoX with a linear layer on the last token's state, or on the mean of the states."""

    config_class = RewardModelConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        states = self.gpt_neox(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, L, H]
        weights = attention_mask.to(states.dtype)  # padded right
        if self.config.pooling == "last":
            weights = F.one_hot(attention_mask.sum(-1) - 1, attention_mask.shape[1]).to(states.dtype)
        pooled = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.out_proj(pooled))  # [B, 1]


AutoConfig.register(RewardModelConfig.model_type, RewardModelConfig)
AutoModelForSequenceClassification.register(RewardModelConfig, RewardModel)
TRAIN_REWARD_MODEL = "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5"  # of PRO's training data; evaluation: the 6.9B
EXPANSIONS = ("alpacas", "chatgpt", "ascending", "descending", "random")
EXPAND_SOURCES = ["text-curie-001", "alpaca-7b", "gpt-3.5-turbo"]
DIALOGUE_FORMS = ("plain", "oasst", "chat_template")


@functools.cache
def load_reward_model(name, device, flag, allow_pickle):
    """-> (model, tokenizer, the form of dialogue it expects). A sequence classifier with one output, on `device`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, info = common.load_pretrained(
        AutoModelForSequenceClassification, name, flag, allow_pickle, dtype=dtype, output_loading_info=True
    )
    if getattr(model.config, "num_labels", 1) != 1 and not isinstance(model, RewardModel) or info["missing_keys"]:
        raise UserError(f"{flag} {name}: not a reward model (a sequence classifier with one output is wanted)")
    tokenizer = common.load_tokenizer(name, flag)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    form = "oasst" if isinstance(model, RewardModel) else "chat_template" if tokenizer.chat_template else "plain"
    return model.to(device).eval(), tokenizer, getattr(model.config, "dialogue_form", form)


def dialogue_ids(tokenizer, record, response, form):
    """A dialogue and a response as the reward model was trained to read them -> token ids. Records without `messages`
    are one user's turn, the prompt."""
    if form == "plain":  # as the training scripts encode: prompt, response, EOS
        response = tokenizer(response, add_special_tokens=False).input_ids
        return [*common.prompt_ids(tokenizer, record["prompt"]), *response, tokenizer.eos_token_id]
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    messages = [*messages, {"role": "assistant", "content": response}]
    if form == "chat_template":
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        marks = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}
        text = "".join(marks[m["role"]] + m["content"] + tokenizer.eos_token for m in messages)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.inference_mode()
def reward_logits(
    name, device, pairs, *, flag="--reward_model", form="auto", max_length=1024, batch_size=16, allow_pickle=False
):
    """Raw logits of the reward model `name` for pairs (record, response text) -> floats. Longer dialogues lose their
    beginning."""
    model, tokenizer, own_form = load_reward_model(name, device, flag, allow_pickle)
    form = own_form if form == "auto" else form
    ids = [common.cut_left(tokenizer, dialogue_ids(tokenizer, r, text, form), max_length) for r, text in pairs]
    rewards = [0.0] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        L, pad = len(ids[batch[0]]), model.config.pad_token_id
        input_ids = torch.tensor([ids[i] + [pad] * (L - len(ids[i])) for i in batch], device=device)
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (L - len(ids[i])) for i in batch], device=device)
        for i, logit in zip(batch, model(input_ids=input_ids, attention_mask=mask).logits[:, 0].tolist()):
            rewards[i] = logit
    if not all(map(math.isfinite, rewards)):
        record = pairs[next(i for i, r in enumerate(rewards) if not math.isfinite(r))][0]
        raise UserError(f"{flag} {name}: its reward of a response to record {record.get('id')!r} is not finite")
    return rewards


def rank_by_reward(records, args):
    """Set every candidate's `reward`, the raw logit, and sort the candidates, best first (PRO Sec. 4.1)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"form": args.dialogue, "max_length": args.max_length, "allow_pickle": args.allow_pickle}
    agree, pairs, records = 0, 0, iter(records)
    while batch := list(itertools.islice(records, args.batch_size)):
        dialogues = [(r, c["text"]) for r in batch for c in r["candidates"]]
        rewards = iter(reward_logits(args.reward_model, device, dialogues, batch_size=args.batch_size, **options))
        for record in batch:
            candidates = [c | {"reward": next(rewards)} for c in record["candidates"]]
            own = {c["source"]: c["reward"] for c in candidates if c["source"] in ("chosen", "rejected")}
            pairs += len(own) == 2
            agree += len(own) == 2 and own["chosen"] > own["rejected"]
            candidates.sort(key=lambda c: -c["reward"])
            candidates = [c | {"rank": sum(x["reward"] > c["reward"] for x in candidates)} for c in candidates]
            yield record | {"candidates": candidates, "reward_model": args.reward_model}
    if pairs:
        say(f"{args.reward_model} prefers the chosen response to the rejected one in {agree} of {pairs} pairs")


def expand_ranking(record, args):
    """The ranking that the data came with, lengthened to --ranking_length by sampled responses (PRO Fig. 3)."""
    candidates = record["candidates"]
    ranking = [c for c in candidates if c["source"] in ("chosen", "rejected", *common.HUMAN)]
    sources = list(args.expand_sources)  # the weakest first
    if args.expand == "descending":
        sources.reverse()
    elif args.expand == "random":
        random.Random(f"{args.seed}-{record['id']}").shuffle(sources)
    pools = [[c for c in candidates if c["source"] == s] for s in sources]
    if args.expand in ("alpacas", "chatgpt"):  # several of one source: the last but one, or the strongest
        ranking += pools[-1] if args.expand == "chatgpt" else pools[-2:][0]
    else:
        ranking += [pool[0] for pool in pools if pool]
    if len(ranking) < args.ranking_length:
        raise UserError(
            f"{args.input}: record {record['id']!r} has {len(ranking)} candidates for --expand {args.expand}, fewer "
            f"than --ranking_length {args.ranking_length}; sources asked for: {', '.join(sources)}"
        )
    return record | {"candidates": ranking[: args.ranking_length]}


RANKERS = {
    "label": rank_by_label,
    "reward": rank_by_reward,
    "similarity": rank_by_similarity,
    "gpt": rank_by_gpt,
    "contextual": rank_by_contextual,
    "logprob": rank_by_logprob,
    "probabilistic": rank_by_probabilistic,
    "prm": rank_by_prm,
}


def rank_flags(add):
    add("--by", required=True, choices=sorted(RANKERS), help="which annotation to add")
    add("--task", default="esnli", help="for the default paths: data/TASK/sampled.jsonl, data/TASK/ranked.jsonl")
    add("--input", help="records with candidates, JSONL")
    add("--output", help="the same records, annotated")
    add("--prompt_file", help="gpt, contextual: a template of your own, {names} as in the built-in one")
    add("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="similarity: hub id or folder")
    add("--length_penalty", type=in_range(float, 0), default=1.3, help="probabilistic: beta of Tuna's Eq. 3")
    add("--rank_original", action="store_true", help="contextual: show the original (human, reference) response too")
    add("--keep_reference", action="store_true", help="contextual: the ranker's own response becomes a candidate")
    add(
        "--max_length", type=in_range(int, 8), default=512, help="logprob, prm, reward: tokens of prompt + one response"
    )
    add("--reward_model", default=TRAIN_REWARD_MODEL, help="reward: hub id or folder; not the one of evaluation")
    add("--dialogue", choices=["auto", *DIALOGUE_FORMS], default="auto", help="reward: how the model reads dialogues")
    add("--allow_pickle", action="store_true", help="reward: load .bin weights too: they can run code")
    add("--expand", choices=EXPANSIONS, help="first lengthen the data's own rankings with sampled ones (PRO Fig. 3)")
    add("--expand_sources", nargs="+", default=EXPAND_SOURCES, help="for --expand: sources, the weakest first")
    add("--ranking_length", type=in_range(int, 2), default=3, help="for --expand: candidates a prompt (PRO: 3-5)")
    api_flags(add, 1024, required=False)


def rank(args):
    """Annotate every candidate; see --by."""
    if args.by not in ("label", "similarity", "probabilistic", "reward") and not args.model:
        raise UserError(f"--by {args.by} needs --model")
    records, journal = open_collected(args, "sampled", "ranked", common.load_candidates)
    todo = [expand_ranking(r, args) if args.expand else r for r in records if r["id"] not in journal.done]
    for record in RANKERS[args.by](tqdm(todo, desc=f"rank by {args.by}", leave=False), args):
        journal.write([record])
    if journal.finish() == len(records):
        print_length_by_rank(common.load_candidates(journal.path), args.by)


def print_length_by_rank(records, by):
    """Mean response length in words by rank (Tuna, Table 4), where ranks are known."""
    lengths = {}
    for record in records:
        for c in record["candidates"]:
            key = c.get("rank") if by != "label" else {True: "correct", False: "incorrect"}[c["correct"]]
            key = "unranked" if key is None else key
            lengths.setdefault(key, []).append(len(c["text"].split()))
    if lengths.keys() == {"unranked"}:
        return
    say(
        "mean words:",
        ", ".join(
            f"{key}: {sum(n) / len(n):.1f}"
            for key, n in sorted(lengths.items(), key=lambda x: (isinstance(x[0], str), x[0]))
        ),
    )


# ----------------------------------------------------------------------------------------------------------------------
# hindsight, export: PRO's baselines

HINDSIGHT_TEMPLATE = """A good answer: {better} A bad answer: {worse}
---
A bad answer: {worse} A good answer: {better}"""


def best_first(record, path):
    """The record's candidates, best first, by `reward`, else by `rank`. UserError where they carry neither."""
    for field, sign in (("reward", -1), ("rank", 1)):
        if all(c.get(field) is not None for c in record["candidates"]):
            return sorted(record["candidates"], key=lambda c: sign * c[field])
    raise UserError(
        f"{path}: record {record['id']!r} has neither 'reward' nor 'rank' on all candidates: run rank first"
    )


def conversion_flags(add):
    add("--input", required=True, help="ranked records, JSONL")
    add("--output", required=True)


def hindsight_flags(add):
    conversion_flags(add)
    add("--prompt_file", help="templates of your own with {better} and {worse}, a line --- between them")


def hindsight(args):
    """Chain of hindsight: one response that names a better and a worse answer, for pro.py --no_ranking; the templates
    take turns. What stands before a template's first field ends the prompt: prompt such a model with it too."""
    records = common.load_candidates(args.input)
    templates = read_template(args, HINDSIGHT_TEMPLATE).strip().split("\n---\n")
    heads = [t.partition("{")[0].rstrip() for t in templates]
    journal = Journal(args.output, [r["id"] for r in records], settings_of(args))
    for number, record in enumerate(records):
        best, *_, worst = best_first(record, args.input) * 2  # a lone response is better and worse
        template, head = templates[number % len(templates)], heads[number % len(heads)]
        fields = {"better": best["text"], "worse": worst["text"]}
        text = fill(template.removeprefix(head), fields, args.prompt_file or "the template").strip()
        if record["id"] not in journal.done:
            candidates = [{"text": text, "source": "hindsight", "rank": 0}]
            journal.write([record | {"prompt": f"{record['prompt']} {head}".rstrip(), "candidates": candidates}])
    journal.finish()


def trl_row(record, path):
    """-> {id, prompt, chosen, rejected}, the last two where there are two responses; TRL tokenises prompt and response
    as one text, so white space goes between them."""
    best, *_, worst = best_first(record, path) * 2
    space = "" if record["prompt"][-1].isspace() else " "
    texts = {"chosen": space + best["text"], "rejected": space + worst["text"]}
    return {"id": record["id"], "prompt": record["prompt"]} | (texts if best is not worst else {})


EXPORTS = {"trl": trl_row}


def export_flags(add):
    conversion_flags(add)
    add(
        "--format", choices=sorted(EXPORTS), required=True, help="trl: prompt, chosen, rejected, and NAME-prompts.jsonl"
    )


def export(args):
    """Write the best and the worst response of each prompt, and the prompts alone, as another project reads them."""
    output = pathlib.Path(args.output)
    rows = [EXPORTS[args.format](record, args.input) for record in common.load_candidates(args.input)]
    pairs = [r for r in rows if "chosen" in r]
    prompts = [{k: r[k] for k in ("id", "prompt")} for r in rows]
    for path, content in ((output, pairs), (output.with_name(f"{output.stem}-prompts.jsonl"), prompts)):
        journal = Journal(path, [r["id"] for r in content], settings_of(args))
        journal.write(r for r in content if r["id"] not in journal.done)
        journal.finish()


VERBS = {
    "prepare": (prepare_flags, prepare),
    "sample": (sample_flags, sample),
    "teacher": (teacher_flags, teacher),
    "flip": (flip_flags, flip),
    "anchor": (anchor_flags, anchor),
    "rank": (rank_flags, rank),
    "hindsight": (hindsight_flags, hindsight),
    "export": (export_flags, export),
}


def run_verb(verbs, description):
    """Parse `SCRIPT VERB --flags` against {verb: (its flags, its function)} and call the function."""
    parser = common.Parser(description=description)
    subparsers = parser.add_subparsers(dest="verb", required=True)
    for name, (flags, run) in verbs.items():
        verb = subparsers.add_parser(name, description=run.__doc__)
        flags(verb.add_argument)
        verb.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


def main():
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
