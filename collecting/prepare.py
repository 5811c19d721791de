"""The verb prepare: the rows of a data set as it was downloaded -> records."""

import functools
import itertools
import math
import pathlib
import random
import re
from collections import Counter

from tqdm import tqdm

from collecting.answers import NLI_LABELS, has_answer, normalize_answer
from collecting.files import as_object, check_record, read_source, row_id, text_field
from collecting.flags import TEMPLATE_HELP, group
from collecting.hh import HH_PUBLISHED, hh_rows, prepare_hh, prepare_hh_release, say_counts
from collecting.journal import write_all
from collecting.pairs import pair_converter, prepare_pair
from collecting.prompts import (
    ALPACA_TEMPLATE,
    HH_TEMPLATE,
    NLI_TEMPLATE,
    QA_TEMPLATE,
    alpaca_prompt,
    fill,
    qa_prompt,
    read_template,
)
from common import UserError, in_range, say

ESNLI_FIELDS = {
    "Sentence1": "premise",
    "Sentence2": "hypothesis",
    "gold_label": "label",
    "pairID": "id",
    "Explanation_1": "explanation",
    "explanation_1": "explanation",
}


def strip_lines(text):
    """The text without white space at its ends; a first line that is indented, by more than a space, stays so."""
    return re.sub(r"\A(\s*\n)?( (?=\S))?", "", text.rstrip())


def prepare_esnli(row, where, index, template):
    """A row of e-SNLI (the CSVs' columns, or premise, hypothesis, label, explanation) -> record.

    The first explanation is the human response.
    """
    row = row | {new: row[old] for old, new in ESNLI_FIELDS.items() if old in row}
    fields = {k: text_field(row, k, where) for k in ("premise", "hypothesis", "label", "explanation")}
    if fields["label"] not in NLI_LABELS:
        raise UserError(f"{where}: field 'label' is {fields['label']!r}, not one of {', '.join(NLI_LABELS)}")
    human = {"text": f"{fields['explanation']} #### {fields['label'].capitalize()}", "source": "human"}
    return {
        "id": row_id(row, f"esnli-{index}"),
        "task": "esnli",
        "prompt": fill(template, fields, where),
        "premise": fields["premise"],  # for the prompts that collect and evaluate: sample, teacher, nli --shots
        "hypothesis": fields["hypothesis"],
        "label": fields["label"],
        "answers": None,
        "candidates": [human],
    }


def prepare_alpaca(row, where, index, template):
    """A row of Alpaca (instruction, input, output) -> record with the output as reference; None where it is empty.

    Also a row of Dolly (instruction, context, response), and of LIMA (conversations: a question, an expert's answer,
    sometimes more turns): its first turn and answer.
    """
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) > 1:
        row = row | {"instruction": turns[0], "output": turns[1]}
    row = {"input": row.get("context"), "output": row.get("response")} | row
    fields = {"instruction": text_field(row, "instruction", where)}
    fields |= {k: text_field(row, k, where, optional=True, strip=strip_lines) for k in ("input", "output")}
    if not fields["output"]:
        return None
    return {
        "id": row_id(row, f"alpaca-{index}"),
        "task": "alpaca",
        "prompt": alpaca_prompt(template, fields, where),
        "instruction": fields["instruction"],
        "input": fields["input"],
        "label": None,
        "answers": None,
        "candidates": [{"text": fields["output"], "source": "reference"}],
    }


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


def prepare_multidoc_qa(row, where, index, template):
    """A question with its documents -> record without candidates: `anchor` adds them.

    With --gold_prompt (the released code's training prompt) the prompt shows the gold document alone.
    """
    question = text_field(row, "question", where)
    keep = {k: row[k] for k in ("id", "answers", "gold_position", "documents")}
    shown = [d for d in row["documents"] if d["gold"] or not row.get("gold_prompt")]
    prompt = qa_prompt(template, question, shown, where)
    return keep | {"task": "multidoc_qa", "prompt": prompt, "label": None, "question": question, "candidates": []}


def short_passages(rows, max_words):
    """The questions none of whose passages has more words: for a small machine."""
    for where, row in rows:
        if all(len(c["text"].split()) <= max_words for c in check_passages(row, where)):
            yield where, row


def prepare_release(row, where, index, template):
    """A row of the RESCUE authors' ranked files (data_dict, responses, scores) -> record.

    The responses stay as they are, ``` around them included (their prompt has that too: --prompt_file). The first of
    an e-SNLI row is the human one. `scores` become `reward`: rescue.py --ordering reward compares and chooses y* as
    their trainer does, with --length_scaling 1 on multi-document QA.
    """
    data, responses, scores = (row.get(k) for k in ("data_dict", "responses", "scores"))
    texts = isinstance(responses, list) and responses and all(isinstance(r, str) and r.strip() for r in responses)
    if not isinstance(data, dict) or not texts or not isinstance(scores, list) or len(scores) != len(responses):
        raise UserError(f"{where}: not a row of the released files: data_dict, responses, and as many scores")
    if "ctxs" in data:
        documents = check_passages(data, where)
        documents = [{k: c[k] for k in ("title", "text")} | {"gold": c.get("isgold") is True} for c in documents]
        place = next((i for i, d in enumerate(documents, 1) if d["gold"]), None)
        more = {"id": f"release-{index}", "documents": documents, "gold_position": place}
        record = prepare_multidoc_qa(data | more | {"gold_prompt": row.get("gold_prompt")}, where, index, template)
        sources = ["model"] * len(responses)
    else:
        record = prepare_esnli(data, where, index, template) | {"id": f"release-{index}"}
        sources = ["human"] + ["model"] * (len(responses) - 1)
    candidates = zip(responses, sources, scores)
    return record | {"candidates": [{"text": t, "source": s, "reward": r} for t, s, r in candidates]}


def prepare_alpaca_release(row, where, index, template, references=None):
    """A row of the Tuna authors' files -> record. Three kinds are known by their fields:

    orig, text, logprob, length      probabilistic ranking: text-davinci-003's responses, and Alpaca's as reference
    generation, ranks (or rank)      contextual ranking of Tuna_p's responses, without the original one
    instruction, output, score       their training files, the original response among the others, which one is not
                                     said: as the released code trains, --mle_on all --pair_reduction mean_by_distance
    The last two bring prompts in the released template. references (--references, from read_references) gives them
    the original response, and the prompt in `template`; a row that is not in it is left out. Whether the released
    log-probabilities count EOS is not said.
    """
    record = {"id": f"release-{index}", "task": "alpaca", "label": None, "answers": None}
    if "orig" in row:
        texts, logprobs, lengths = (released_list(row, k, where) for k in ("text", "logprob", "length"))
        by = {"source": "text-davinci-003", "teacher": "text-davinci-003"}
        more = [
            {"text": strip_lines(t), "logprob": p, "num_tokens": n} | by for t, p, n in zip(texts, logprobs, lengths)
        ]
        original = prepare_alpaca(as_object(row["orig"], where), where, index, template)
        return original and record | original | {"candidates": original["candidates"] + more, "id": record["id"]}
    if "generation" in row:
        texts, order = released_list(row, "generation", where), row.get("ranks", row.get("rank"))
        order = [k for k in dict.fromkeys(order or []) if k in range(len(texts))]  # the last number is GPT-4's own
        ranks = [order.index(k) if k in order else None for k in range(len(texts))]
        more = [{"text": strip_lines(t), "source": "tuna-probabilistic", "rank": k} for t, k in zip(texts, ranks)]
        record |= {"prompt": text_field(row, "instruct", where), "candidates": more, "ranked_by": "gpt-4"}
    else:
        texts, scores = (released_list(row, k, where) for k in ("output", "score"))
        ranks = [sum(other > score for other in scores) for score in scores]
        more = [{"text": strip_lines(t), "source": "model", "rank": k} for t, k in zip(texts, ranks)]
        record |= {"prompt": text_field(row, "instruction", where), "candidates": more, "ranked_by": "score"}
    return record if references is None else with_reference(record, references, template, where)


def with_reference(record, references, template, where):
    """A released record, its prompt in `template`, with the original response of --references as source reference: the
    candidate that says the same, which keeps its rank, else one more, unranked. None where it is not there."""
    parts = re.fullmatch(r"(?s).*?### Instruction:(.*?)(?:### Input:(.*))?### Response:\s*", record["prompt"])
    if not parts:
        raise UserError(f"{where}: the prompt lacks ### Instruction: or ### Response:, by which --references are found")
    row = references.get((parts[1].strip(), (parts[2] or "").strip()))
    original = row and prepare_alpaca(row, where, 0, template)
    if not original:
        return None
    [reference], candidates = original["candidates"], record["candidates"]
    same = next((c for c in candidates if c["text"] == reference["text"]), None)
    if same and record["ranked_by"] == "score":
        same["source"] = "reference"
    else:
        candidates = [reference, *candidates]
    return record | original | {"id": record["id"], "candidates": candidates}


def read_references(files):
    """Alpaca's own rows -> {(instruction, input): row}, the first of each."""
    references = {}
    for where, row in itertools.chain.from_iterable(map(read_source, files)):
        key = text_field(row, "instruction", where), text_field(row, "input", where, optional=True)
        references.setdefault(key, row)
    return references


def released_list(row, name, where):
    """The list of a released row's field; UserError where it is none, or not as long as the row's responses."""
    value, texts = row.get(name), row.get("text", row.get("generation", row.get("output")))
    if not isinstance(value, list) or not isinstance(texts, list) or len(value) != len(texts):
        raise UserError(f"{where}: not a row of the released files: {name!r} must be a list, one entry a response")
    return value


TASKS = {
    "esnli": (prepare_esnli, NLI_TEMPLATE),
    "multidoc_qa": (prepare_multidoc_qa, QA_TEMPLATE),
    "hh": (prepare_hh, HH_TEMPLATE),
    "alpaca": (prepare_alpaca, ALPACA_TEMPLATE),
    "pairs": (prepare_pair, "{prompt}"),  # your own preferences
}
RELEASED = {  # for --from_release
    **{"esnli": prepare_release, "multidoc_qa": prepare_release},
    **{"hh": prepare_hh_release, "alpaca": prepare_alpaca_release},
}


# fmt: off
def prepare_flags(add):
    add("--task", required=True, choices=sorted(TASKS), help="which data set; pairs: your own preferences")
    add("--input", nargs="+", help="files as downloaded: CSV, JSON, JSONL, plain or .gz, Parquet; folders of them; hub "
        "ids (default of hh, alpaca: the hub)")
    add("--output", help="default: data/TASK/train.jsonl")
    add("--prompt_file", help="a template of your own, {names} as in the built-in one")
    add("--template", choices=["own", "alpaca"], help=f"alpaca's: {TEMPLATE_HELP} (default: own)")
    add("--shuffle", type=in_range(int, 0), metavar="SEED", help="shuffle first: --limit draws from all rows")
    add("--skip", type=in_range(int, 0), default=0, help="leave out the first rows")
    add("--limit", type=in_range(int, 1), help="then take this many rows")
    add("--validation", type=in_range(int, 0), default=0, help="move so many, drawn, to validation.jsonl")
    add("--keep_validation", action="store_true", help="copy them instead (PRO: 280 of the test data)")
    add("--from_release", action="store_true", help="the rows are what the paper's authors released, ranked")
    add("--references", nargs="+", help="alpaca --from_release: alpaca_data.json, which has the original responses")
    add("--split", default="train", help="of the folder or the hub's data set, or what --input is")
    add("--config", metavar="NAME", help="which part of it, where it has several")

    hh = group(add, "hh")
    hh("--subset", nargs="+", choices=HH_PUBLISHED, default=["harmless-base"], help="one for each file of --input")

    pairs = group(add, "pairs (README, section 'Your own data')")
    pairs("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="prompt=... chosen=...: your columns' names")
    pairs("--rejected_ordered", action="store_true", help="a list of rejected responses is best first (default: equal)")
    pairs("--chat_template", metavar="MODEL", help="render the prompts with this model's template")

    qa = group(add, "multidoc_qa")
    qa("--num_documents", type=in_range(int, 2), default=10, help="documents a prompt (paper: 5 and 10)")
    qa("--gold_position", type=in_range(int, 1), nargs="+", help="1 is first; several: a record for each")
    qa("--seed", type=in_range(int, 0, 2**32), default=0, help="where the gold passage stands without --gold_position")
    qa("--gold_prompt", action="store_true", help="the prompt shows the gold passage alone, as the released training")
    qa("--max_words", type=in_range(int, 1), help="only questions none of whose passages has more words")
# fmt: on


def prepare(args):
    convert, default = TASKS[args.task]
    template = read_template(args, default)
    if args.from_release and (args.task not in RELEASED or not args.input):
        raise UserError(f"--from_release reads --task {' or '.join(RELEASED)}, from --input")
    if args.references and not (args.from_release and args.task == "alpaca"):
        raise UserError("--references belongs to --task alpaca --from_release")
    if args.task == "hh":
        rows = hh_rows(args)
    elif args.input or args.task == "alpaca":
        names = args.input or ["tatsu-lab/alpaca"]
        rows = itertools.chain.from_iterable(read_source(name, args.split, args.config) for name in names)
    else:
        raise UserError(f"--task {args.task} needs --input, the files as downloaded")
    if args.task == "pairs":
        convert = pair_converter(args)
    if args.max_words:
        rows = short_passages(rows, args.max_words)
    pool = rows = list(rows) if args.task == "multidoc_qa" or args.shuffle is not None else rows
    rows = enumerate(rows)
    if args.shuffle is not None:
        rows = list(rows)
        random.Random(args.shuffle).shuffle(rows)
    rows = itertools.islice(rows, args.skip, args.limit and args.skip + args.limit)
    if args.from_release:
        convert = RELEASED[args.task]
        if args.references:
            convert = functools.partial(convert, references=read_references(args.references))
    elif args.task == "multidoc_qa":
        rows = choose_documents(pool, rows, args)
    if args.gold_prompt:
        rows = ((index, (where, row | {"gold_prompt": True})) for index, (where, row) in rows)
    records, left_out, read = {}, 0, Counter()
    for index, (where, row) in tqdm(rows, desc="prepare", leave=False):
        record = convert(row, where, index, template)
        read[row.get("subset")] += 1
        if record is None:
            left_out += 1
            continue
        if record["id"] in records:
            raise UserError(f"{where}: id {record['id']!r} occurs twice")
        if record["candidates"] or args.task != "multidoc_qa":
            check_record(record, where)
        records[record["id"]] = record
    if len(records) <= args.validation:
        found = f"{len(records)} records after --skip {args.skip} ({left_out} rows left out)"
        raise UserError(f"--input {' '.join(args.input or ['(hub)'])}: {found}; --validation wants {args.validation}")
    output = pathlib.Path(args.output or f"data/{args.task}/train.jsonl")
    held_out = set(random.Random(0).sample(sorted(records), args.validation))
    main = records.keys() if args.keep_validation else records.keys() - held_out
    for path, ids in ((output, main), (output.with_name("validation.jsonl"), held_out)):
        if ids:
            write_all(path, [r for i, r in records.items() if i in ids], args)
    if args.task == "hh":
        return say_counts(read, Counter(r["subset"] for r in records.values()), args)
    without = "two different responses" if args.task == "pairs" else "a response"
    say(f"left out: {left_out} rows without {without}" + " in --references" * bool(args.references))
    if count := Counter(r["label"] for r in records.values() if r.get("label")):
        say("label:", ", ".join(f"{k} {n}" for k, n in count.items()))
    return None
