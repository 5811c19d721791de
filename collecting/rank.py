"""The verb rank: annotations by a ranker for each --by. A ranker takes (records, args) and yields the records,
annotated."""

import json
import pathlib
import random

from tqdm import tqdm

import common
from collecting import scoring
from collecting.files import load_candidates, write_atomically
from collecting.flags import api_flags, collected_flags, group
from collecting.journal import LONGEST_WAIT, open_collected
from collecting.rank_asked import rank_by_contextual, rank_by_gpt
from collecting.rank_given import drop_malformed, rank_by_label, rank_by_probabilistic
from collecting.rank_local import rank_by_logprob, rank_by_prm, rank_by_reward, rank_by_similarity
from collecting.reward_models import TRAIN_REWARD_MODEL
from common import UserError, in_range, say

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
ASKED = ("gpt", "contextual")  # their batches are formed over all records, so they learn which are done
SCORERS = ("reward", "similarity", "logprob", "prm")  # by a model on this machine, on every process under torchrun
EXPANSIONS = ("alpacas", "chatgpt", "ascending", "descending", "random")
EXPAND_SOURCES = ["text-curie-001", "alpaca-7b", "gpt-3.5-turbo"]


# fmt: off
def rank_flags(add):
    add("--by", required=True, choices=sorted(RANKERS), help="which annotation to add")
    collected_flags(add, "sampled", "ranked[-RUN]")
    add("--skip", type=in_range(int, 0), default=0, help="leave out the first records")
    add("--limit", type=in_range(int, 1), help="then take this many (Tuna: GPT-4 ranked the first 13K)")

    by = group(add, "what some rankers read")
    by("--drop_malformed", action="store_true", help="label: first drop NLI responses that are not well-formed")
    by("--min_candidates", type=in_range(int, 1), default=1, help="and prompts left with fewer (RESCUE's code: 5)")
    by("--per_source", type=in_range(int, 1), help="and of each model keep the first N (RESCUE's code: 3 of 6)")
    by("--mark_answers", action="store_true", help="label, multi-document QA: end texts with #### Correct, as released")
    by("--prompt_file", help="gpt, contextual: a template of your own, {names} as in the built-in one")
    by("--rank_original", action="store_true", help="contextual, prm: rank the original response too")
    by("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="similarity: hub id or folder")
    by("--length_penalty", type=in_range(float, 0), default=1.3, help="probabilistic: beta of Tuna's Eq. 3")
    by("--max_length", type=in_range(int, 8), default=1024, help="logprob, prm: tokens of prompt + one response")
    by("--reward_model", default=TRAIN_REWARD_MODEL, help="reward: hub id or folder; not the one of evaluation")
    by("--allow_pickle", action="store_true", help="reward: load .bin weights too: they can run code")

    expand = group(add, "longer rankings (PRO Fig. 3)")
    expand("--expand", choices=EXPANSIONS, help="first lengthen the data's own rankings with sampled responses")
    expand("--expand_sources", nargs="+", default=EXPAND_SOURCES, help="sources, the weakest first")
    expand("--ranking_length", type=in_range(int, 2), default=3, help="candidates a prompt (PRO: 3-5)")
    api_flags(add, 1024, required=False)
# fmt: on


def rank(args):
    """Annotate every candidate; see --by. Under torchrun a model on this machine scores on every process."""
    if args.by in ("gpt", "contextual", "logprob", "prm") and not args.model:
        raise UserError(f"--by {args.by} needs --model")
    student = pathlib.Path(args.input or "").name.removesuffix(".jsonl").partition("sampled-")[2]
    ranked = f"ranked-{student}" if student else "ranked"
    process, processes = common.init_distributed(LONGEST_WAIT)[:2] if args.by in SCORERS else (0, 1)
    records, journal = open_collected(args, "sampled", ranked, lambda path: taken(path, args), process, processes)
    records, more = [expand_ranking(r, args) if args.expand else r for r in records], {}
    if args.by in ASKED:
        more = {"journal": journal}
    elif args.by in SCORERS:  # whole chunks, as before a kill: what stands beside a sequence changes its last digits
        chunks = [c for c in scoring.chunks(records) if not all(r["id"] in journal.done for r in c)]
        records = [r for chunk in chunks[process::processes] for r in chunk]
    bar = tqdm(records, desc=f"rank by {args.by}", leave=False, disable=process != 0)
    for record in RANKERS[args.by](bar, args, **more):
        journal.write([record])
    if journal.finish() and (words := words_by_rank(load_candidates(journal.path), args.by)):
        say("mean words:", ", ".join(f"{key}: {mean}" for key, mean in words.items()))
        write_atomically(pathlib.Path(f"{journal.path}.lengths.json"), json.dumps(words) + "\n")


def taken(path, args):
    """The records of --input that --skip, --limit and --drop_malformed leave."""
    records = load_candidates(path)[args.skip :][: args.limit]
    if args.drop_malformed:
        records = list(drop_malformed(records, args.min_candidates, args.per_source))
    elif args.min_candidates > 1 or args.per_source:
        raise UserError("--min_candidates and --per_source count what --drop_malformed leaves: give it too")
    if not records:
        raise UserError(f"{path}: no record is left by --skip {args.skip}, --drop_malformed and --min_candidates")
    return records


def expand_ranking(record, args):
    """The ranking that the data came with, lengthened to --ranking_length by sampled responses (PRO Sec. 4.8.1)."""
    ranking, sources = [c for c in record["candidates"] if c["source"] in common.GIVEN], args.expand_sources
    missing, shuffled = max(0, args.ranking_length - len(ranking)), list(sources)
    random.Random(f"{args.seed}-{record['id']}").shuffle(shuffled)
    order = {"ascending": sources, "descending": sources[::-1], "random": shuffled}  # of the sources, weakest first
    order |= {"alpacas": sources[-2:][:1] * missing, "chatgpt": sources[-1:] * missing}  # several of one
    pools = {s: iter([c for c in record["candidates"] if c["source"] == s]) for s in sources}
    more = [next(pools[s], None) for s in order[args.expand][:missing]]
    if None in more or len(more) < missing:  # a source that is missing is not passed over
        few = f"too few responses of {', '.join(order[args.expand])} for --expand {args.expand}"
        hint = f"--ranking_length {args.ranking_length}: add them with sample, or name --expand_sources"
        raise UserError(f"{args.input}: record {record['id']!r} has {few} {hint}")
    return record | {"candidates": (ranking + more)[: args.ranking_length]}


def words_by_rank(records, by):
    """{rank: mean words of its responses} (Tuna, Table 4), of --by label {correct, incorrect}; {} without ranks."""
    words = {}
    for c in (c for record in records for c in record["candidates"]):
        key = c.get("rank") if by != "label" else "correct" if c["correct"] else "incorrect"
        words.setdefault("unranked" if key is None else key, []).append(len(c["text"].split()))
    ranks = sorted(words, key=lambda key: (isinstance(key, str), key))
    return {str(key): round(sum(words[key]) / len(words[key]), 1) for key in ranks} if ranks != ["unranked"] else {}
