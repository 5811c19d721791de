"""The verb hh: BLEU and reward of answers to HH-RLHF's dialogues (PRO, Table 2)."""

import warnings

import torch

from collecting import generation, reward_models
from collecting.files import load_candidates
from collecting.flags import generation_flags, group
from common import HUMAN, UserError, in_range
from evaluating.intervals import student
from evaluating.shared import (
    by_subset,
    draw_per_subset,
    generate_answers,
    length_figures,
    mean,
    model_flags,
    num_words,
    predict,
    write_metrics,
)

EVALUATION_REWARD_MODEL = "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"  # PRO's; its training data's is the 1.4B


# fmt: off
def hh_flags(add):
    model_flags(add, "hh", "records of `prepare --task hh`, JSONL", required=False)
    add("--source", help="no --model: the records' own responses of this source (chosen: PRO's Golden; a teacher's)")
    add("--cue", default="", help="ends the prompt, for the model alone (chain of hindsight: ' A good answer:')")
    add("--limit", type=in_range(int, 1), help="so many records of each subset, drawn by --seed")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="which records --limit draws")
    generation_flags(add, 128)

    add = group(add, "the reward model")
    add("--reward_model", default=EVALUATION_REWARD_MODEL, help="hub id or folder, not that of the training; or none")
    add("--allow_pickle", action="store_true", help="load the reward model's .bin weights too: they can run code")
# fmt: on


def hh(args):
    """Answer dialogues greedily; BLEU against the chosen response and the mean reward (PRO, Table 2).

    128 new tokens as printed (Sec. 4.3); prompts cut to their last 384, answers where a new turn begins: as released.
    """
    if bool(args.model) == bool(args.source):
        raise UserError("hh needs --model, or --source for responses that are there already")
    args.max_prompt_length, args.stop = args.max_prompt_length or 384, args.stop or list(generation.TURNS)
    records = draw_per_subset(load_candidates(args.input), args.limit, args.seed)

    def compute(records, device):
        if args.source:
            answers = [own_response(r, args) for r in records]
        else:
            answers = generate_answers(args, [r | {"prompt": r["prompt"] + args.cue} for r in records], device)
        rows = []
        for r, a in zip(records, answers):
            rows.append({"subset": r.get("subset"), "question": r["prompt"], "reference": reference(r)} | a)
        if args.reward_model != "none":
            pairs = list(zip(records, answers))
            logits = reward_models.reward_logits(args.reward_model, device, pairs, allow_pickle=args.allow_pickle)
            rewards = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
            rows = [r | {"reward_logit": x, "reward": y} for r, x, y in zip(rows, logits, rewards)]
        return rows

    if rows := predict(args, "hh", records, compute):
        for row in rows:
            row["char_bleu"] = char_bleu(row["text"], row["reference"])
        items = {"words": {r["id"]: num_words(r) for r in rows}}
        for figure in ("char_bleu", "reward"):
            items[figure] = {r["id"]: 100 * r[figure] for r in rows if figure in r}
        write_metrics(args, "hh", by_subset(rows, hh_metrics), items)


def reference(record):
    """The response that people chose, else wrote, else the best ranked."""
    candidates = record["candidates"]
    preferred = [c for source in ("chosen", *HUMAN) for c in candidates if c["source"] == source]
    return (preferred or sorted(candidates, key=lambda c: c.get("rank") or 0))[0]["text"]


def own_response(record, args):
    """-> {text, finished} of the record's first candidate of --source; UserError where it has none."""
    for c in record["candidates"]:
        if c["source"] == args.source:
            return {"text": c["text"], "finished": c.get("finished", True)}
    raise UserError(f"{args.input}: record {record['id']!r} has no response of {args.source!r}")


def hh_metrics(rows):
    """-> all from 0 to 100 as in Table 2: sacreBLEU's corpus BLEU, over several subsets that of all their samples; the
    means over samples of the authors' char_bleu and of the sigmoid reward, with the latter's 95% interval."""
    import sacrebleu

    texts, references = [r["text"] for r in rows], [r["reference"] for r in rows]
    metrics = {"bleu": sacrebleu.corpus_bleu(texts, [references]).score}
    metrics["char_bleu"] = 100 * mean(r["char_bleu"] for r in rows)
    if rewards := [100 * r["reward"] for r in rows if "reward" in r]:
        reward, half = mean(rewards), student(rewards)[0]
        metrics |= {"reward": reward, "reward 95% low": reward - half, "reward 95% high": reward + half}
    return metrics | length_figures(rows)


def char_bleu(text, reference):
    """What PRO's code calls BLEU: NLTK's sentence BLEU of two raw strings, so over characters; up to 4-grams,
    unsmoothed."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "0 counts of 4-gram overlaps": NLTK then gives some 1e-78, here 0
        return round(sentence_bleu([reference.strip()], text.strip()), 12)
