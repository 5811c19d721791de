"""The verb prepare: the rows of a data set as it was downloaded -> records.

prepare_TASK makes the record of a row, or None of a row that has no response to learn from. where: "file:line". index:
the row's number in the input, for ids. template: the prompt's, with {names} of fields.
"""

import functools
import itertools
import math
import pathlib
import random
import re
from collections import Counter

from tqdm import tqdm

from collecting import prompts
from collecting.answers import NLI_LABELS, has_answer, normalize_answer
from collecting.files import check_record, read_source, row_id, text_field
from collecting.flags import TEMPLATE_HELP, group
from collecting.hh import HH_PUBLISHED, hh_rows, prepare_hh, prepare_hh_release, say_counts
from collecting.journal import write_all
from collecting.pairs import prepare_pair
from collecting.prompts import alpaca_prompt, fill, qa_prompt, read_template
from common import UserError, in_range, say

ESNLI_FIELDS = {"Sentence1": "premise", "Sentence2": "hypothesis", "gold_label": "label", "pairID": "id"}
ESNLI_FIELDS |= {"Explanation_1": "explanation", "explanation_1": "explanation"}


def prepare_esnli(row, where, index, template, args):
    """A row of e-SNLI: the CSVs' columns, or premise, hypothesis, label, explanation. The first explanation is the
    human response. Premise and hypothesis stay for the prompts of sample, teacher and evaluate."""
    row = row | {new: row[old] for old, new in ESNLI_FIELDS.items() if old in row}
    fields = {k: text_field(row, k, where) for k in ("premise", "hypothesis", "label", "explanation")}
    if fields["label"] not in NLI_LABELS:
        raise UserError(f"{where}: field 'label' is {fields['label']!r}, not one of {', '.join(NLI_LABELS)}")
    record = {"id": row_id(row, f"esnli-{index}"), "task": "esnli", "prompt": fill(template, fields, where)}
    human = f"{fields.pop('explanation')} #### {fields['label'].capitalize()}"
    return record | fields | {"answers": None, "candidates": [{"text": human, "source": "human"}]}


# -------------------- Alpaca


def strip_lines(text):
    """The text without white space at its ends; a first line that is indented, by more than a space, stays so."""
    return re.sub(r"\A(\s*\n)?( (?=\S))?", "", text.rstrip())


def prepare_alpaca(row, where, index, template, args):
    """A row of Alpaca (instruction, input, output), of Dolly (instruction, context, response), or of LIMA
    (conversations: a question, an expert's answer, sometimes more turns). The answer is the reference."""
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) > 1:
        row = row | {"instruction": turns[0], "output": turns[1]}
    row = {"input": row.get("context"), "output": row.get("response")} | row
    fields = {"instruction": text_field(row, "instruction", where)}
    fields["input"], output = (text_field(row, k, where, True, strip_lines) for k in ("input", "output"))
    if not output:
        return None
    record = {"id": row_id(row, f"alpaca-{index}"), "task": "alpaca", "prompt": alpaca_prompt(template, fields, where)}
    candidates = [{"text": output, "source": "reference"}]
    return record | fields | {"label": None, "answers": None, "candidates": candidates}


def prepare_alpaca_release(row, where, index, template, args):
    """A row of the Tuna authors' files. Three kinds are known by their fields:

    orig, text, logprob, length      probabilistic ranking: text-davinci-003's responses, and Alpaca's as reference
    generation, ranks (or rank)      contextual ranking of Tuna_p's responses, without the original one; the number
                                     after theirs is GPT-4's own response
    instruction, output, score       their training files, the original response among the others, which one is not
                                     said: as the released code trains, --mle_on all --pair_reduction mean_by_distance
    The last two bring prompts in the released template. --references gives them the original response, and the prompt
    in `template`; a row that is not there is left out. Whether the released log-probabilities count EOS is not said.
    """
    record = {"id": f"release-{index}", "task": "alpaca", "label": None, "answers": None}
    if "orig" in row:
        by = {"source": "text-davinci-003", "teacher": "text-davinci-003"}
        scored = zip(row["text"], row["logprob"], row["length"], strict=True)
        more = [{"text": strip_lines(t), "logprob": p, "num_tokens": n} | by for t, p, n in scored]
        original = prepare_alpaca(row["orig"], where, index, template, args)
        return original and record | original | {"candidates": original["candidates"] + more, "id": record["id"]}
    if "generation" in row:
        prompt, texts, source, by = "instruct", row["generation"], "tuna-probabilistic", "gpt-4"
        order = [k for k in dict.fromkeys(row.get("ranks", row.get("rank"))) if k in range(len(texts))]
        ranks = [order.index(k) if k in order else None for k in range(len(texts))]
    else:
        prompt, texts, source, by = "instruction", row["output"], "model", "score"
        ranks = [sum(other > score for other in row["score"]) for score in row["score"]]
    ranked = zip(texts, ranks, strict=True)
    candidates = [{"text": strip_lines(t), "source": source, "rank": k} for t, k in ranked]
    record |= {"prompt": text_field(row, prompt, where), "candidates": candidates, "ranked_by": by}
    return with_reference(record, where, template, args) if args.references else record


def with_reference(record, where, template, args):
    """A released record, its prompt in `template`, with the original response of --references as source reference: the
    candidate that says the same, which keeps its rank, else one more, unranked. None where it is not there."""
    parts = re.fullmatch(r"(?s).*?### Instruction:(.*?)(?:### Input:(.*))?### Response:\s*", record["prompt"])
    if not parts:
        raise ValueError("the prompt lacks ### Instruction: or ### Response:, by which --references are found")
    row = read_references(*args.references).get((parts[1].strip(), (parts[2] or "").strip()))
    original = row and prepare_alpaca(row, where, 0, template, args)
    if not original:
        return None
    [reference], candidates = original["candidates"], record["candidates"]
    same = next((c for c in candidates if c["text"] == reference["text"]), None)
    if same and record["ranked_by"] == "score":
        same["source"] = "reference"
    else:
        candidates = [reference, *candidates]
    return record | original | {"id": record["id"], "candidates": candidates}


@functools.cache
def read_references(*files):
    """Alpaca's own rows -> {(instruction, input): row}, the first of each."""
    references = {}
    for where, row in itertools.chain.from_iterable(map(read_source, files)):
        key = text_field(row, "instruction", where), text_field(row, "input", where, optional=True)
        references.setdefault(key, row)
    return references


# -------------------- multi-document QA


def is_passage(c):
    return isinstance(c, dict) and isinstance(c.get("title"), str) and isinstance(c.get("text"), str)


def read_questions(args):
    """Yield (where, row) of the lost-in-the-middle files; with --max_words only where no passage has more words."""
    for where, row in read_input(args):
        text_field(row, "question", where)
        answers, passages = row.get("answers"), row.get("ctxs")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{where}: field 'answers' must be a list of non-empty strings")
        if not isinstance(passages, list) or not all(map(is_passage, passages)):
            raise UserError(f"{where}: field 'ctxs' must be a list of passages with title and text")
        if not args.max_words or all(len(c["text"].split()) <= args.max_words for c in passages):
            yield where, row


def words_of(*texts):
    return set(normalize_answer(" ".join(texts)).split())


def most_similar(words, pool, holders):
    """Yield the passages of the pool, {passage: its words}, the most similar first: by shared words, rare ones weighing
    more (inverse document frequency). holders: {word: number of passages that hold it}."""

    def likeness(passage):
        return math.fsum(math.log(len(pool) / holders[word]) for word in words & pool[passage])

    yield from sorted(pool, key=likeness, reverse=True)


def choose_documents(rows, args):
    """Yield (index, (where, row)) for every question and --gold_position, row["documents"] in their order.

    Distractors are the row's own passages, in the file's order, and then the most similar ones of all of --input. A
    passage that holds an answer of the question is no distractor.
    """
    pool = {}
    for _, row in read_questions(args):
        pool |= {(c["title"], c["text"]): words_of(c["title"], c["text"]) for c in row["ctxs"]}
    holders = Counter(itertools.chain.from_iterable(pool.values()))
    for index, (where, row) in rows:
        gold = next((c for c in row["ctxs"] if c.get("isgold")), None)
        if gold is None:
            raise UserError(f"{where}: no passage has isgold true")
        own = [(c["title"], c["text"]) for c in row["ctxs"] if c is not gold]
        similar = most_similar(words_of(row["question"], gold["text"]), pool, holders)
        others = itertools.chain(own, (p for p in similar if p not in own))
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


def prepare_multidoc_qa(row, where, index, template, args):
    """A question with its documents -> record without candidates: `anchor` adds them. With --gold_prompt, as in the
    released code's training, the prompt shows the gold document alone."""
    question = text_field(row, "question", where)
    record = {k: row[k] for k in ("id", "answers", "gold_position", "documents")} | {"task": "multidoc_qa"}
    shown = [d for d in row["documents"] if d["gold"] or not args.gold_prompt]
    record["prompt"] = qa_prompt(template, question, shown, where)
    return record | {"label": None, "question": question, "candidates": []}


def prepare_release(row, where, index, template, args):
    """A row of the RESCUE authors' ranked files: data_dict, responses, scores.

    The responses stay as they are, ``` around them included (their prompt has that too: --prompt_file). The first of
    an e-SNLI row is the human one. `scores` become `reward`: rescue.py --ordering reward compares and chooses y* as
    their trainer does, with --length_scaling 1 on multi-document QA.
    """
    data, name = row["data_dict"], {"id": f"release-{index}"}
    sources = ["model"] * len(row["responses"])
    if "ctxs" in data:
        documents = [{"title": c["title"], "text": c["text"], "gold": c.get("isgold") is True} for c in data["ctxs"]]
        place = next((i for i, d in enumerate(documents, 1) if d["gold"]), None)
        question = data | name | {"documents": documents, "gold_position": place}
        record = prepare_multidoc_qa(question, where, index, template, args)
    else:
        record = prepare_esnli(data, where, index, template, args) | name
        sources[0] = "human"
    candidates = zip(row["responses"], sources, row["scores"], strict=True)
    return record | {"candidates": [{"text": t, "source": s, "reward": r} for t, s, r in candidates]}


TASKS = {
    "esnli": (prepare_esnli, prompts.NLI_TEMPLATE),
    "multidoc_qa": (prepare_multidoc_qa, prompts.QA_TEMPLATE),
    "hh": (prepare_hh, prompts.HH_TEMPLATE),
    "alpaca": (prepare_alpaca, prompts.ALPACA_TEMPLATE),
    "pairs": (prepare_pair, "{prompt}"),  # your own preferences
}
RELEASED = {"esnli": prepare_release, "multidoc_qa": prepare_release}  # for --from_release
RELEASED |= {"hh": prepare_hh_release, "alpaca": prepare_alpaca_release}

# -------------------- the verb


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


def read_input(args):
    """Yield (where, row) of the files of --input, or of the hub."""
    if args.task == "hh" and not args.from_release:
        yield from hh_rows(args)
        return
    names = args.input or ["tatsu-lab/alpaca"] * (args.task == "alpaca")
    if not names:
        raise UserError(f"--task {args.task} needs --input, the files as downloaded")
    for name in names:
        yield from read_source(name, args.split, args.config)


def prepare(args):
    convert, template = TASKS[args.task]
    template = read_template(args, template)
    if args.from_release:
        convert = RELEASED.get(args.task)
    if not convert:
        raise UserError("--from_release reads no --task pairs")
    if args.references and convert is not prepare_alpaca_release:
        raise UserError("--references belongs to --task alpaca --from_release")
    questions = convert is prepare_multidoc_qa
    rows = enumerate(read_questions(args) if questions else read_input(args))
    if args.shuffle is not None:
        rows = list(rows)
        random.Random(args.shuffle).shuffle(rows)
    rows = itertools.islice(rows, args.skip, args.limit and args.skip + args.limit)
    if questions:
        rows = choose_documents(rows, args)
    records, read = [], Counter()
    for index, (where, row) in tqdm(rows, desc="prepare", leave=False):
        read[row.get("subset")] += 1
        try:
            record = convert(row, where, index, template, args)
        except ValueError as e:
            raise UserError(f"{where}: {e}") from e
        except (KeyError, IndexError, TypeError, AttributeError) as e:  # not the fields, or the types, that are read
            kind = "released file" if args.from_release else "file"
            raise UserError(f"{where}: not a row of a {kind} of --task {args.task} ({e!r})") from e
        if record:
            if not questions:  # those get their candidates from anchor
                check_record(record, where)
            records.append(record)
    left_out = read.total() - len(records)
    if len(records) <= args.validation:
        found = f"{len(records)} records after --skip {args.skip}, {left_out} rows left out"
        raise UserError(f"{found}: more than --validation {args.validation} are needed, see --input")
    output = pathlib.Path(args.output or f"data/{args.task}/train.jsonl")
    held_out = set(random.Random(0).sample(sorted(r["id"] for r in records), args.validation))
    write_all(output, [r for r in records if args.keep_validation or r["id"] not in held_out], args)
    if held_out:
        write_all(output.with_name("validation.jsonl"), [r for r in records if r["id"] in held_out], args)
    if convert is prepare_hh:
        say_counts(read, Counter(r["subset"] for r in records), args.split)
    else:
        without = "two different responses" if args.task == "pairs" else "a response"
        say(f"left out: {left_out} rows without {without}" + " in --references" * bool(args.references))
