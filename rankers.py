"""Annotations for candidates: the verb `rank` of collect_candidates.py, and a ranker for each --by.

A ranker takes (records, args) and yields the records, annotated; RANKERS names them all. evaluate.py reads answers with
the same functions (parse_nli, has_answer); it and PRO's bootstrapping take rewards from reward_logits.
"""

import contextlib
import functools
import itertools
import math
import pathlib
import random
import re
import statistics
import string
from collections import Counter

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import common
import generation
import runtime
from common import UserError, in_range
from runtime import say

# ----------------------------------------------------------------------------------------------------------------------
# By label: what an answer says, and whether that is right

NLI_LABELS = ("entailment", "neutral", "contradiction")


def one_label(text):
    """The one NLI label that occurs in a text, or None."""
    found = {label for label in NLI_LABELS if re.search(rf"\b{label}\b", text.lower())}
    return found.pop() if len(found) == 1 else None


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


def has_answer(text, answers):
    """Whether any of the answers, normalised, is a substring of the text so normalised (Liu et al.'s best subspan)."""
    text = normalize_answer(text)
    return any(a and a in text for a in map(normalize_answer, answers))


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


def rank_by_answer(record, count, where):
    """Multi-document QA: a candidate is correct where it holds an answer; counts by the passage it came from."""
    if not isinstance(record.get("answers"), list) or not all(isinstance(a, str) for a in record["answers"]):
        raise UserError(f"{where}: record {record['id']!r} has no list of answers")
    for c in record["candidates"]:
        c["correct"] = has_answer(c["text"], record["answers"])
        group = f"{c['source']} from {c['anchor']}" if "anchor" in c else c["source"]
        count.update([(group, "total"), (group, "correct" if c["correct"] else "wrong")])


# ----------------------------------------------------------------------------------------------------------------------
# By similarity to the human response


def rank_by_similarity(records, args):
    """Set every candidate's `similarity`: the cosine of its sentence embedding to that of the human response."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = runtime.load_pretrained(AutoModel, args.encoder, "--encoder").to(device).eval()
    tokenizer = runtime.load_pretrained(AutoTokenizer, args.encoder, "--encoder")
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


# ----------------------------------------------------------------------------------------------------------------------
# By a stronger model's ranking (RESCUE)

GPT_TEMPLATE = """Below are a task and {n} responses to it. Rank the responses from best to worst: a good one is
correct, and its reasoning is sound and to the point. Answer with one line naming every response once, like: {example}

Task:
{prompt}

{responses}
"""

RANK_AGAIN = "That could not be read. Answer with one line naming each of the {n} responses once, best first: {example}"


def rank_by_gpt(records, args):
    """Set every candidate's `rank` (0 the best) by a stronger model's ranking; null where it gave none after re-asking.

    The responses are shown in a seeded random order: models prefer some places.
    """
    records, template = list(records), generation.read_template(args, GPT_TEMPLATE)
    orders, prompts, count = [], [], Counter()
    for r in records:
        n = len(r["candidates"])
        orders.append(random.Random(f"{args.seed}-{r['id']}").sample(range(n), n))
        shown = [f"Response {k}: {r['candidates'][i]['text']}" for k, i in enumerate(orders[-1], 1)]
        fields = {"n": str(n), "example": example_ranking(n), "prompt": r["prompt"], "responses": "\n\n".join(shown)}
        prompts.append(generation.fill(template, fields, "--prompt_file"))

    def unranked(i, text):
        n = len(orders[i])
        return None if parse_ranking(text, n) else RANK_AGAIN.format(n=n, example=example_ranking(n))

    for i, responses, error in generation.complete(args, prompts, follow_up=unranked):
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


# ----------------------------------------------------------------------------------------------------------------------
# By a stronger model that compares all responses at once (Tuna)

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
    template, count, asked, prompts = generation.read_template(args, CONTEXTUAL_TEMPLATE), Counter(), [], []
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
        prompts.append(generation.fill(template, fields, args.prompt_file or "the template"))
    for number, replies, error in generation.complete(args, prompts):
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


# ----------------------------------------------------------------------------------------------------------------------
# By likelihood, and by a proxy ranking model (Tuna)


def log_likelihoods(records, args):
    """Yield (record, logprobs [n], token counts [n]) under --model, prompts in packed rows of --batch_size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = generation.load_generator(args.model, device)
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
    """Set `rank` by the teacher's likelihood, logprob / num_tokens ** --length_penalty (Tuna Eq. 3).

    It is null where the likelihood is not known. tuna.py --stage probabilistic does this by itself; here it is for
    Table 4 and for mixtures.
    """
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
    architectures = runtime.load_pretrained(AutoConfig, args.model).architectures or []
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


# ----------------------------------------------------------------------------------------------------------------------
# By a reward model (PRO)


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
DIALOGUE_FORMS = ("plain", "oasst", "chat_template")


@functools.cache
def load_reward_model(name, device, flag, allow_pickle):
    """-> (model, tokenizer, the form of dialogue it expects). A sequence classifier with one output, on `device`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, info = runtime.load_pretrained(
        AutoModelForSequenceClassification, name, flag, allow_pickle, dtype=dtype, output_loading_info=True
    )
    if getattr(model.config, "num_labels", 1) != 1 and not isinstance(model, RewardModel) or info["missing_keys"]:
        raise UserError(f"{flag} {name}: not a reward model (a sequence classifier with one output is wanted)")
    tokenizer = runtime.load_tokenizer(name, flag)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    form = "oasst" if isinstance(model, RewardModel) else "chat_template" if tokenizer.chat_template else "plain"
    return model.to(device).eval(), tokenizer, getattr(model.config, "dialogue_form", form)


def dialogue_ids(tokenizer, record, response, form):
    """A dialogue and a response as the reward model was trained to read them -> token ids.

    Records without `messages` are one user's turn, the prompt.
    """
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
    """Raw logits of the reward model `name` for pairs (record, response text) -> floats.

    Dialogues longer than max_length lose their beginning.
    """
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


# ----------------------------------------------------------------------------------------------------------------------
# The verb

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

EXPANSIONS = ("alpacas", "chatgpt", "ascending", "descending", "random")
EXPAND_SOURCES = ["text-curie-001", "alpaca-7b", "gpt-3.5-turbo"]


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
    generation.api_flags(add, 1024, required=False)


def rank(args):
    """Annotate every candidate; see --by."""
    if args.by not in ("label", "similarity", "probabilistic", "reward") and not args.model:
        raise UserError(f"--by {args.by} needs --model")
    records, journal = generation.open_collected(args, "sampled", "ranked", common.load_candidates)
    todo = [expand_ranking(r, args) if args.expand else r for r in records if r["id"] not in journal.done]
    for record in RANKERS[args.by](tqdm(todo, desc=f"rank by {args.by}", leave=False), args):
        journal.write([record])
    if journal.finish() == len(records):
        print_length_by_rank(common.load_candidates(journal.path), args.by)


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
