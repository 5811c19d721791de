"""The verb prepare: the rows of a data set as it was downloaded -> records.

prepare_TASK makes the records of a row: none of one that has no response to learn from, several of a question for
multi-document QA. where: "file:line". index: the row's number in the input, for ids. template: the prompt's, with
{names} of fields.
"""

import functools
import itertools
import math
import pathlib
import random
import re
from collections import Counter

from tqdm import tqdm

from collecting.answers import NLI_LABELS, has_answer, normalize_answer
from collecting.files import check_record, read_source, row_id, text_field
from collecting.flags import TEMPLATE_HELP, group
from collecting.hh import SUBSETS, hh_rows, prepare_hh, prepare_pros
from collecting.journal import write_all
from collecting.pairs import prepare_pair
from collecting.prompts import TEMPLATES, alpaca_prompt, fill, qa_prompt, read_template
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
    return [record | fields | {"answers": None, "candidates": [{"text": human, "source": "human"}]}]


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
        return []
    record = {"id": row_id(row, f"alpaca-{index}"), "task": "alpaca", "prompt": alpaca_prompt(template, fields, where)}
    candidates = [{"text": output, "source": "reference"}]
    return [record | fields | {"label": None, "answers": None, "candidates": candidates}]


def prepare_tunas(row, where, index, template, args):
    """A row of the Tuna authors' files, --from_release. Three kinds are known by their fields:

    orig, text, logprob, length              text-davinci-003's responses, and Alpaca's as reference. Whether EOS counts
                                             in the log-probabilities is not said
    instruct, generation, ranks (or rank)    GPT-4's ranking of Tuna_p's responses; the number after theirs is its own
                                             response. They lack the original response: --references gives it
    instruction, output, score               their training files. The original response is among the others, which one
                                             is not said: --references does, else the prompt is the file's, and the
                                             released code trains them all (--mle_on all)

    With --references the prompt is in `template`, and a row that is not there is left out.
    """
    more, training = {"id": f"release-{index}"}, "score" in row
    if "orig" in row:
        original, by = row["orig"], {"source": "text-davinci-003", "teacher": "text-davinci-003"}
        scored = zip(row["text"], row["logprob"], row["length"], strict=True)
        candidates = [{"text": strip_lines(t), "logprob": p, "num_tokens": n} | by for t, p, n in scored]
    else:
        if training:
            prompt, texts, source, by = text_field(row, "instruction", where), row["output"], "model", "score"
            ranks = [sum(other > score for other in row["score"]) for score in row["score"]]
        else:
            prompt, texts, source, by = row["instruct"], row["generation"], "tuna-probabilistic", "gpt-4"
            order = [k for k in dict.fromkeys(row.get("ranks", row.get("rank"))) if k in range(len(texts))]
            ranks = [order.index(k) if k in order else None for k in range(len(texts))]
        ranked = zip(texts, ranks, strict=True)
        candidates = [{"text": strip_lines(t), "source": source, "rank": rank} for t, rank in ranked]
        more |= {"ranked_by": by}
        if training and not args.references:
            record = {"task": "alpaca", "prompt": prompt, "label": None, "answers": None, "candidates": candidates}
            return [record | more]
        parts = re.fullmatch(r"(?s).*?### Instruction:(.*?)(?:### Input:(.*))?### Response:\s*", prompt)
        if not parts or not args.references:
            raise ValueError("--references are found by the ### Instruction: and ### Response: of the prompt")
        original = read_references(*args.references).get((parts[1].strip(), (parts[2] or "").strip()))
    found = prepare_alpaca(original, where, index, template, args) if original else []
    for record in found:
        same = [c for c in candidates if training and c["text"] == record["candidates"][0]["text"]]
        if same:  # it keeps its rank
            same[0]["source"] = "reference"
        record |= more | {"candidates": candidates if same else record["candidates"] + candidates}
    return found


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


def words_of(*texts):
    return set(normalize_answer(" ".join(texts)).split())


def question_rows(args):
    """Yield (where, row) of the lost-in-the-middle files; with --max_words only where no passage has more words.

    row["pool"]: {passage of all rows: its words} and {word: number of passages that hold it}.
    """
    rows, pool = [], {}
    for where, row in source_rows(args):
        text_field(row, "question", where)
        answers, passages = row.get("answers"), row.get("ctxs")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{where}: field 'answers' must be a list of non-empty strings")
        if not isinstance(passages, list) or not all(map(is_passage, passages)):
            raise UserError(f"{where}: field 'ctxs' must be a list of passages with title and text")
        if not args.max_words or all(len(c["text"].split()) <= args.max_words for c in passages):
            rows.append((where, row))
            pool |= {(c["title"], c["text"]): words_of(c["title"], c["text"]) for c in passages}
    holders = Counter(itertools.chain.from_iterable(pool.values()))
    yield from ((where, row | {"pool": (pool, holders)}) for where, row in rows)


def most_similar(words, pool, holders):
    """Yield the passages of the pool, the most similar first: by shared words, rare ones weighing more (inverse
    document frequency)."""

    def likeness(passage):
        return math.fsum(math.log(len(pool) / holders[word]) for word in words & pool[passage])

    yield from sorted(pool, key=likeness, reverse=True)


def qa_record(name, row, documents, where, template, args):
    """The record of a question and its documents, without candidates. With --gold_prompt, as in the released code's
    training, the prompt shows the gold document alone."""
    question, places = text_field(row, "question", where), [i for i, d in enumerate(documents, 1) if d["gold"]]
    shown = [d for d in documents if d["gold"] or not args.gold_prompt]
    record = {"id": name, "answers": row["answers"], "gold_position": places[0] if places else None}
    record |= {"documents": documents, "task": "multidoc_qa", "prompt": qa_prompt(template, question, shown, where)}
    return record | {"label": None, "question": question, "candidates": []}


def prepare_multidoc_qa(row, where, index, template, args):
    """A question -> a record for each --gold_position, without candidates: `anchor` adds them.

    Distractors are the row's own passages, in the file's order, and then the most similar ones of all of --input. A
    passage that holds an answer of the question is no distractor.
    """
    gold = next((c for c in row["ctxs"] if c.get("isgold")), None)
    if gold is None:
        raise ValueError("no passage has isgold true")
    own, wanted = [(c["title"], c["text"]) for c in row["ctxs"] if c is not gold], args.num_documents - 1
    similar = most_similar(words_of(row["question"], gold["text"]), *row["pool"])
    others = itertools.chain(own, (p for p in similar if p not in own))
    others = (p for p in others if p[1] != gold["text"] and not has_answer(" ".join(p), row["answers"]))
    others = [{"title": t, "text": text, "gold": False} for t, text in itertools.islice(others, wanted)]
    if len(others) < wanted:
        raise ValueError(f"only {len(others)} passages without the answer for --num_documents")
    records = []
    for position in args.gold_position or [None]:
        if position and position > args.num_documents:
            raise UserError(f"--gold_position {position} is above --num_documents {args.num_documents}")
        place = position or random.Random(f"{args.seed}-{index}").randint(1, args.num_documents)
        found = {"title": gold["title"], "text": gold["text"], "gold": True}
        documents = [*others[: place - 1], found, *others[place - 1 :]]
        name = f"nq-{index}" + (f"-gold{position}" if position else "")
        records.append(qa_record(name, row, documents, where, template, args))
    return records


def prepare_rescues(row, where, index, template, args):
    """A row of the RESCUE authors' ranked files, --from_release: data_dict, responses, scores.

    The responses stay as they are, ``` around them included (their prompt has that too: --prompt_file). The first of
    an e-SNLI row is the human one. `scores` become `reward`: rescue.py --ordering reward compares and chooses y* as
    their trainer does, with --length_scaling 1 on multi-document QA.
    """
    data, name, sources = row["data_dict"], f"release-{index}", ["model"] * len(row["responses"])
    if "ctxs" in data:
        documents = [{"title": c["title"], "text": c["text"], "gold": c.get("isgold") is True} for c in data["ctxs"]]
        record = qa_record(name, data, documents, where, template, args)
    else:
        [record], sources[0] = prepare_esnli(data, where, index, template, args), "human"
    candidates = zip(row["responses"], sources, row["scores"], strict=True)
    return [record | {"id": name, "candidates": [{"text": t, "source": s, "reward": r} for t, s, r in candidates]}]


TASKS = {  # "pairs": your own preferences
    "esnli": (prepare_esnli, TEMPLATES["nli"]),
    "multidoc_qa": (prepare_multidoc_qa, TEMPLATES["multidoc_qa"]),
    "hh": (prepare_hh, TEMPLATES["hh"]),
    "alpaca": (prepare_alpaca, TEMPLATES["alpaca"]),
    "pairs": (prepare_pair, "{prompt}"),
}
ROWS = {"hh": hh_rows, "multidoc_qa": question_rows}  # what is read otherwise than by source_rows
RELEASED = {"esnli": prepare_rescues, "multidoc_qa": prepare_rescues, "hh": prepare_pros, "alpaca": prepare_tunas}

# -------------------- the verb


# fmt: off
def prepare_flags(add):
    add("--task", required=True, choices=sorted(TASKS), help="which data set; pairs: your own preferences")
    add("--input", nargs="+", help="files as downloaded: CSV, JSON, JSONL, plain or .gz, Parquet; folders of them; hub "
        "ids (default of hh, alpaca: the hub)")
    add("--output", help="default: data/TASK/train.jsonl")
    add("--prompt_file", help="a template of your own, {names} as in collecting/templates/")
    add("--template", choices=["own", "alpaca"], help=f"alpaca's: {TEMPLATE_HELP} (default: own)")
    add("--shuffle", type=in_range(int, 0), metavar="SEED", help="shuffle first: --limit draws from all rows")
    add("--skip", type=in_range(int, 0), default=0, help="leave out the first rows")
    add("--limit", type=in_range(int, 1), help="then take this many rows")
    add("--validation", type=in_range(int, 0), default=0, help="move so many, drawn, to validation.jsonl")
    add("--keep_validation", action="store_true", help="copy them instead (PRO: 280 of the test data)")
    add("--from_release", action="store_true", help="the rows are what the paper's authors released, ranked")
    add("--references", nargs="+", help="alpaca --from_release: alpaca_data.json, which has the original responses")
    add("--split", default="train", help="of the folder or the hub's data set")
    add("--config", metavar="NAME", help="which part of it, where it has several")
    add("--subset", nargs="+", choices=SUBSETS, default=["harmless-base"], help="hh: one for each file of --input")

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


def source_rows(args):
    """Yield (where, row) of the files of --input."""
    names = args.input or ["tatsu-lab/alpaca"] * (args.task == "alpaca")
    if not names:
        raise UserError(f"--task {args.task} needs --input, the files as downloaded")
    for name in names:
        yield from read_source(name, args.split, args.config)


def prepare(args):
    convert, template = TASKS[args.task]
    template, read_rows = read_template(args, template), ROWS.get(args.task, source_rows)
    if args.from_release:
        convert, read_rows = RELEASED.get(args.task), source_rows
    if not convert:
        raise UserError("--from_release reads no --task pairs")
    if args.references and not (args.from_release and args.task == "alpaca"):
        raise UserError("--references belongs to --task alpaca --from_release")
    rows = enumerate(read_rows(args))
    if args.shuffle is not None:
        rows = list(rows)
        random.Random(args.shuffle).shuffle(rows)
    rows = itertools.islice(rows, args.skip, args.limit and args.skip + args.limit)
    records, read, kept = [], Counter(), Counter()  # kept: a row without a response, or two different ones, is left out
    for index, (where, row) in tqdm(rows, desc="prepare", leave=False):
        subset = row.get("subset") if args.task == "hh" else None  # others' may be anything
        read[subset] += 1
        try:
            made = convert(row, where, index, template, args)
        except ValueError as e:
            raise UserError(f"{where}: {e}") from e
        except (KeyError, IndexError, TypeError, AttributeError) as e:  # not the fields, or the types, that are read
            raise UserError(f"{where}: not a row of a file of --task {args.task} ({e!r})") from e
        for record in made:
            check_record(record, where, bare=True)
        records += made
        kept[subset] += len(made)
    if len(records) <= args.validation:
        found = f"{len(records)} records of {read.total()} rows after --skip {args.skip}"
        raise UserError(f"{found}: more than --validation {args.validation} are needed, see --input")
    output = pathlib.Path(args.output or f"data/{args.task}/train.jsonl")
    held_out = set(random.Random(0).sample(sorted(r["id"] for r in records), args.validation))
    write_all(output, [r for r in records if args.keep_validation or r["id"] not in held_out], args)
    if held_out:
        write_all(output.with_name("validation.jsonl"), [r for r in records if r["id"] in held_out], args)
    for subset, number in read.items():
        say(f"{subset or args.task}: {number} rows read, {kept[subset]} records")
