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
OUTPUT. Killed and run again with the same arguments it keeps what is there and does the rest; OUTPUT.args.json holds
the arguments. How text is generated and asked for is in generation.py, what `rank` adds in rankers.py.

    python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv
    torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf \\
        --num_samples 4
    python collect_candidates.py teacher --task esnli --base_url https://api.openai.com/v1 --model gpt-4o-mini
    python collect_candidates.py flip --task esnli --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B
    python collect_candidates.py rank --task esnli --by label

    python collect_candidates.py prepare --task multidoc_qa --input nq-open-10_total_documents_gold_at_0.jsonl.gz
    torchrun --nproc_per_node 4 collect_candidates.py anchor --model meta-llama/Llama-2-7b-hf
    python collect_candidates.py rank --task multidoc_qa --by label --input data/multidoc_qa/anchored.jsonl
"""

import argparse
import functools
import itertools
import math
import pathlib
import random
import re
import zlib
from collections import Counter

import torch
from tqdm import tqdm

import common
import generation
import rankers
import runtime
from common import UserError, in_range
from runtime import say

# ----------------------------------------------------------------------------------------------------------------------
# prepare

NLI_TEMPLATE = """Does the premise make the hypothesis true (entailment), false (contradiction), or neither (neutral)?
Explain in one sentence, then write #### and the label.

Premise: {premise}
Hypothesis: {hypothesis}
Answer:
"""
ESNLI_FIELDS = {
    "Sentence1": "premise",
    "Sentence2": "hypothesis",
    "gold_label": "label",
    "pairID": "id",
    "Explanation_1": "explanation",
    "explanation_1": "explanation",
}


def text_field(row, name, where, optional=False):
    value = row.get(name, "" if optional else None)
    if not isinstance(value, str) or not (optional or value.strip()):
        raise UserError(f"{where}: field {name!r} must be a non-empty string")
    return value.strip()


def prepare_esnli(row, where, index, template):
    """A row of e-SNLI (the CSVs' columns, or premise, hypothesis, label, explanation) -> record.

    The first explanation is the human response.
    """
    row = row | {new: row[old] for old, new in ESNLI_FIELDS.items() if old in row}
    fields = {k: text_field(row, k, where) for k in ("premise", "hypothesis", "label", "explanation")}
    if fields["label"] not in rankers.NLI_LABELS:
        raise UserError(f"{where}: field 'label' is {fields['label']!r}, not one of {', '.join(rankers.NLI_LABELS)}")
    human = {"text": f"{fields['explanation']} #### {fields['label'].capitalize()}", "source": "human"}
    return {
        "id": str(row.get("id", f"esnli-{index}")),
        "task": "esnli",
        "prompt": generation.fill(template, fields, where),
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
    return generation.fill(part.strip() + "\n", fields, where)


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
    words = [set(rankers.normalize_answer(" ".join(passage)).split()) for passage in pool]
    holders = {}
    for i, passage in enumerate(words):
        for word in passage:
            holders.setdefault(word, []).append(i)
    for index, (where, row) in chosen:
        gold = next((c for c in row["ctxs"] if c.get("isgold")), None)
        if gold is None:
            raise UserError(f"{where}: no passage has isgold true")
        likeness = Counter()
        for word in set(rankers.normalize_answer(f"{row['question']} {gold['text']}").split()) & holders.keys():
            for i in holders[word]:
                likeness[i] += math.log(len(pool) / len(holders[word]))
        own = [(c["title"], c["text"]) for c in row["ctxs"] if c is not gold]
        others = dict.fromkeys(own + [pool[i] for i, _ in likeness.most_common()] + pool)
        others = (p for p in others if p[1] != gold["text"] and not rankers.has_answer(" ".join(p), row["answers"]))
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
    return generation.fill(template, {"documents": "\n".join(texts), "question": question}, where)


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


def prepare_hh(row, where, index, template):
    """A row of HH-RLHF (chosen, rejected) -> record with both as candidates.

    None where the two have not the same context and number of turns (PRO's filter; its code compares the
    number alone).
    """
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
        "prompt": generation.fill(template, {"dialogue": dialogue}, where),
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
    template = generation.read_template(args, template)
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
            journal = generation.Journal(path, [i for i in records if i in ids], generation.settings_of(args))
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
    generation.generation_flags(add, 128)


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


def sample(args):
    rank, world, device = runtime.init_distributed()
    args.input = args.input or f"data/{args.task}/train.jsonl"
    records = list(generation.read_records(args.input))
    args.source = args.source or pathlib.Path(args.model).name
    output = args.output or f"data/{args.task}/sampled.jsonl"
    journal = generation.Journal(output, [r["id"] for r in records], generation.settings_of(args), rank, world)
    options = {
        k: getattr(args, k) for k in ("max_new_tokens", "num_samples", "temperature", "top_p", "max_prompt_length")
    }
    options["stop"] = generation.unescape(args.stop)
    count, diversity = Counter(), Counter()
    # batches are planned over all prompts and seeded by their own content: a restart, or another number of ranks,
    # samples the same
    batches = generation.batches_by_length(records, args.batch_size)
    for batch in tqdm(batches[rank::world], desc="sample", disable=rank != 0):
        batch = [records[i] for i in batch]
        if all(r["id"] in journal.done for r in batch):
            continue
        model, tokenizer = generation.load_generator(args.model, device)
        torch.manual_seed(zlib.crc32(f"{args.seed} {batch[0]['id']}".encode()))
        drawn = generation.generate(model, tokenizer, [r["prompt"] for r in batch], **options)
        if args.max_rouge_l is not None:

            def draw(numbers, n, temperature):
                again = options | {"num_samples": n, "temperature": temperature}
                return generation.generate(model, tokenizer, [batch[i]["prompt"] for i in numbers], **again)

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
    totals = runtime.all_sum([count[k] for k in ("responses", "unfinished", "empty")])
    say("sampled {:.0f} responses; {:.0f} reached --max_new_tokens, {:.0f} are empty (all kept)".format(*totals))
    if args.max_rouge_l is not None:
        trials = [f"kept at trial {i}" for i in range(1, args.max_trials + 1)]
        kinds = ["kept at once", "too similar", *trials, "least similar kept"]
        kinds += ["pairs", "similar pairs before", "similar pairs after"]
        totals = runtime.all_sum([diversity[k] for k in kinds])
        say("diversity:", ", ".join(f"{kind} {n:.0f}" for kind, n in zip(kinds, totals)))


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
    generation.api_flags(add, 256)


def collected_flags(add, before, after):
    add("--task", default="esnli", help=f"for the default paths: data/TASK/{before}.jsonl, data/TASK/{after}.jsonl")
    add("--input", help="records, JSONL")
    add("--output", help="the same records with more in them, JSONL")


def ask_each(args, records, journal, prompt, finish, **options):
    """Ask prompt(record) for every record not done; journal finish(record, responses) as they come; list failures."""
    todo, failed = [r for r in records if r["id"] not in journal.done], Counter()
    for i, responses, error in generation.complete(args, [prompt(r) for r in todo], **options):
        if error:
            failed[error] += 1
            if error != generation.BUDGET_SPENT:
                say(f"{todo[i]['id']} failed: {error}")
        else:
            journal.write([finish(todo[i], responses)])
    for error, number in failed.items():
        say(f"{number} prompts failed and are left for another run: {error}")
    journal.finish()


def teacher(args):
    """Add responses of a model behind an OpenAI-compatible server, or, without --base_url, of one run here."""
    args.source = args.source or pathlib.Path(args.model).name
    records, journal = generation.open_collected(args, "train", "teacher")

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
LABEL_AGAIN = f"Answer with one word, the label that fits the explanation: {', '.join(rankers.NLI_LABELS)}."


def flip_flags(add):
    collected_flags(add, "train", "flipped")
    add("--prompt_file", help="a template of your own for the rewriting, with {explanation}")
    add("--label_model", help="the model that labels the rewritten explanation (default: --model)")
    add("--label_base_url", help="its server; none: it runs here (default with no --label_model: --base_url)")
    add("--temperature", type=in_range(float, 0), default=1.0, help="of the rewriting; labels are greedy")
    generation.api_flags(add, 128)


def flip(args):
    """Add the opposite of each human response (Sec. 5.1): one model rewrites its explanation, another labels that.

    The second reads the explanation in its context, after the record's own prompt. A human response that has no
    "explanation #### label", or a rewriting or label that stays unusable after re-asking, adds no candidate.
    """
    args.label_base_url = args.label_base_url if args.label_model else args.base_url
    args.label_model = args.label_model or args.model
    records, journal = generation.open_collected(args, "train", "flipped")
    template = generation.read_template(args, FLIP_TEMPLATE)
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
        flipped = {}
        prompts = [generation.fill(template, {"explanation": explanations[r["id"]]}, "--prompt_file") for r in jobs]

        def unlike(i, text):
            return None if clean_sentence(text, explanations[jobs[i]["id"]]) else FLIP_AGAIN

        options = {"temperature": args.temperature, "follow_up": unlike, "count": count}
        for i, responses, error in generation.complete(args, prompts, **options):
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
        prompts = [generation.fill(LABEL_TEMPLATE, context, "the template") for context in contexts]

        def labeled(i, text):
            return None if rankers.one_label(text) else LABEL_AGAIN

        for i, responses, error in generation.complete(labeler, prompts, follow_up=labeled, count=count):
            label = responses and rankers.one_label(responses[0]["text"])
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
    return explanation.strip() if explanation.strip() and mark and rankers.one_label(label) else None


def clean_sentence(text, original):
    """A model's rewriting, its quotation marks off -> the sentence, or None: not one line, a mark in it, unchanged."""
    text = text.strip().strip("\"'`“” ")
    same = rankers.normalize_answer(text) in ("", rankers.normalize_answer(original))
    return None if same or "\n" in text or "####" in text else text


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
    generation.generation_flags(add, 128)


def anchor(args):
    """Add candidates for multi-document QA: each generated from one passage alone, the gold one or a random other."""
    rank, world, device = runtime.init_distributed()
    args.input = args.input or f"data/{args.task}/train.jsonl"
    args.source = args.source or pathlib.Path(args.model).name
    records, template = list(generation.read_records(args.input)), generation.read_template(args, QA_TEMPLATE)
    for r in records:
        if not (isinstance(r.get("question"), str) and isinstance(r.get("documents"), list)):
            raise UserError(f"{args.input}: record {r['id']!r} has no documents; prepare --task multidoc_qa gives them")
    output = args.output or f"data/{args.task}/anchored.jsonl"
    journal = generation.Journal(output, [r["id"] for r in records], generation.settings_of(args), rank, world)
    options = {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "max_prompt_length")}
    batches = generation.batches_by_length(records, max(1, args.batch_size // (1 + args.num_distractors)))
    for batch in tqdm(batches[rank::world], desc="anchor", disable=rank != 0):
        batch = [records[i] for i in batch]
        if all(r["id"] in journal.done for r in batch):
            continue
        jobs = [(r, number) for r in batch for number in anchors(r, args.num_distractors, args.seed)]
        prompts = [qa_prompt(template, r["question"], [r["documents"][n]], args.input) for r, n in jobs]
        model, tokenizer = generation.load_generator(args.model, device)
        torch.manual_seed(zlib.crc32(f"{args.seed} {batch[0]['id']}".encode()))
        responses = generation.generate(model, tokenizer, prompts, stop=generation.unescape(args.stop), **options)
        for (record, number), [response] in zip(jobs, responses):
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
    templates = generation.read_template(args, HINDSIGHT_TEMPLATE).strip().split("\n---\n")
    heads = [t.partition("{")[0].rstrip() for t in templates]
    journal = generation.Journal(args.output, [r["id"] for r in records], generation.settings_of(args))
    for number, record in enumerate(records):
        best, *_, worst = best_first(record, args.input) * 2  # a lone response is better and worse
        template, head = templates[number % len(templates)], heads[number % len(heads)]
        fields = {"better": best["text"], "worse": worst["text"]}
        text = generation.fill(template.removeprefix(head), fields, args.prompt_file or "the template").strip()
        if record["id"] not in journal.done:
            candidates = [{"text": text, "source": "hindsight", "rank": 0}]
            journal.write([record | {"prompt": f"{record['prompt']} {head}".rstrip(), "candidates": candidates}])
    journal.finish()


def trl_row(record, path):
    """-> {id, prompt, chosen, rejected}, the last two where there are two responses.

    TRL tokenises prompt and response as one text, so white space goes between them.
    """
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
        journal = generation.Journal(path, [r["id"] for r in content], generation.settings_of(args))
        journal.write(r for r in content if r["id"] not in journal.done)
        journal.finish()


# ----------------------------------------------------------------------------------------------------------------------
# The command

VERBS = {
    "prepare": (prepare_flags, prepare),
    "sample": (sample_flags, sample),
    "teacher": (teacher_flags, teacher),
    "flip": (flip_flags, flip),
    "anchor": (anchor_flags, anchor),
    "rank": (rankers.rank_flags, rankers.rank),
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
    runtime.run_cli(main)
