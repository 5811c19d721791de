"""The verb sample: responses of a local model, and Tuna's diversity rule."""

import functools
import re
from collections import Counter

import common
from collecting import generation
from collecting.flags import collected_flags, generation_flags, group, prompt_flags, sampling_flags
from collecting.journal import LONGEST_WAIT, open_collected
from collecting.prompts import shown_prompts
from common import in_range, say


# fmt: off
def sample_flags(add):
    collected_flags(add, "train", "sampled[-RUN]")
    add("--model", required=True, help="hub id or folder")
    sampling_flags(add, 4)
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="of the samples")
    add("--min_new_tokens", type=in_range(int, 0), default=0, help="1: no response is empty")
    prompt_flags(add)
    generation_flags(add, 128, alpaca=512)

    add = group(add, "diversity (Tuna Sec. 2.3)")
    add("--max_rouge_l", type=in_range(float, 0, 1), help="resample responses more similar than this (Tuna: tau 0.8)")
    add("--temperature_step", type=in_range(float, 0), default=0.1, help="added for every resampling (Tuna: 0.1)")
    add("--max_trials", type=in_range(int, 0), default=3, help="then keep the least similar (Tuna: 3)")
# fmt: on


def sample(args):
    """Add responses of a model on this machine; under torchrun every process draws for its share of the prompts."""
    process, processes, device = common.init_distributed(LONGEST_WAIT)
    name = common.run_name(args.model)
    args.source = args.source or name
    args.max_new_tokens = generation.new_tokens(args, 128)
    of_run = f"-{name}" if common.run_settings(args.model) else ""  # the samples of two students never share a file
    records, journal = open_collected(args, "train", f"sampled{of_run}", process=process, processes=processes)
    options, count = generation.options_of(args), Counter()
    batches = generation.seeded_batches(args, records, journal, args.batch_size, process, processes, device)
    for batch, model, tokenizer in batches:
        prompts = shown_prompts(args, batch)

        def draw(numbers, n, temperature):
            again = options | {"num_samples": n, "temperature": temperature}
            return generation.generate(model, tokenizer, [prompts[i] for i in numbers], **again)

        drawn = draw(range(len(batch)), args.num_samples, args.temperature)
        if args.max_rouge_l is not None:
            drawn = keep_diverse(drawn, draw, args)
        for record, responses in zip(batch, drawn):
            more = [r | {"source": args.source, "teacher": name} for r in responses]
            record["candidates"] = record.get("candidates", []) + more
            count["drawn"] += len(responses)
            count["cut at --max_new_tokens"] += sum(not r["finished"] for r in responses)
            count["empty"] += sum(not r["text"] for r in responses)
        journal.write(batch)
    journal.finish()
    kinds = ["drawn", "cut at --max_new_tokens", "empty"]
    totals = common.all_sum([count[kind] for kind in kinds])
    say("responses:", ", ".join(f"{n:.0f} {kind}" for kind, n in zip(kinds, totals)))


def keep_diverse(responses, draw, args):
    """Tuna's diversity rule (Sec. 2.3, 3.1) for a batch of prompts: responses, n per prompt -> the same shape.

    A response whose ROUGE-L with one before it is above --max_rouge_l is dropped and drawn again at a temperature
    raised by --temperature_step, --max_trials times; then the least similar of those dropped fill the places left.
    draw(prompt numbers, n, temperature) -> n responses for each.
    """
    n = len(responses[0])
    kept, dropped = [[] for _ in responses], [[] for _ in responses]

    def similarity(i, response):
        return max_similarity(response["text"], [r["text"] for r in kept[i]])

    def take(i, some):
        for response in some:
            (dropped if similarity(i, response) > args.max_rouge_l else kept)[i].append(response)

    for i, first in enumerate(responses):
        take(i, first)
    for trial in range(1, args.max_trials + 1):
        short = [i for i in range(len(kept)) if len(kept[i]) < n]
        if not short:
            break
        temperature = round(args.temperature + trial * args.temperature_step, 6)
        for i, more in zip(short, draw(short, n - min(len(kept[i]) for i in short), temperature)):
            take(i, [response | {"temperature": temperature} for response in more[: n - len(kept[i])]])
    for i in range(len(kept)):
        while len(kept[i]) < n:
            least = min(dropped[i], key=lambda r: similarity(i, r))
            dropped[i].remove(least)
            kept[i].append(least)
    return kept


def max_similarity(text, others):
    """The largest ROUGE-L F1 between a text and others, 0 where there are none; the same text is 1 in any script."""
    score = rouge_scorer().score
    return max((1.0 if text == other else score(other, text)["rougeL"].fmeasure for other in others), default=0.0)


# Letters that are neither ASCII nor accented Latin. Scripts that are written without spaces: a character is a word.
OTHER = r"[^\W_\x00-\u024f\u1e00-\u1eff]"
UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
WORD = re.compile(rf"({UNSPACED}|(?:(?!{UNSPACED}){OTHER})+)")


@functools.cache
def rouge_scorer(use_stemmer=False):
    """rouge-score's ROUGE-L. Its tokens are a-z and 0-9 alone, so words in other scripts are added. A text without any
    token is split at white space."""
    from rouge_score import rouge_scorer, tokenizers

    class Words(tokenizers.DefaultTokenizer):
        def tokenize(self, text):
            plain = super().tokenize
            parts = [text] if text.isascii() else WORD.split(text.lower())  # every second one: a word in another script
            return [t for i, part in enumerate(parts) for t in ([part] if i % 2 else plain(part))] or text.split()

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words(use_stemmer))
