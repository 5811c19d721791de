"""RESCUE: train a language model to rank partially ordered human and model responses (arXiv 2311.09136).

A prompt x has one human response and several model responses y_b. The model's own length-normalised log-likelihood
scores them (Sec. 3, where the fraction has no number),

    s(y)    = log pi(y | x) / |y| ** lambda            lambda = 1.0 for human, 0.85 for model responses (Sec. 7)
    Eq. 1   L_SFT    = -log pi(y* | x) / |y*|           y* the human response
    Eq. 2   L_Rank   = sum over pairs (better, worse) of max(0, s(worse) - s(better))
    Eq. 3   L_RESCUE = L_SFT + alpha L_Rank             alpha best between 0.01 and 0.1 (Sec. 7, Fig. 4)

and the pairs come from an ordering (Sec. 4), partial (PO) where that is all one knows, or full (FO):

    human       PO: the human response before every model response
    label       PO: responses with the right label (or answer) before the others; equals are not compared
    hybrid      PO: human, then right, then wrong (multi-document QA, Sec. 5.2: right and anchored in the gold passage,
                then right, then wrong)
    similarity  FO: by embedding similarity to the human response
    gpt         FO: the human response, then a stronger model's ranking of the others
    none        supervised fine-tuning on the human response alone: Sec. 6.1's SFT
    reward      FO: by a reward model's score, y* the best-rewarded: RRHF (--alpha 1 and both lambdas 1)

Where print and released code differ, the default is what gave the paper's results:
 1. Eq. 2 as printed, -E max{0, log pi(y_b) - log pi(y_1-b)}, rewards pairs that are already in order. Used: the
    code's hinge (RRHF's) on violated pairs, summed over a prompt's pairs, then averaged over prompts.
 2. Eq. 1 as printed is not divided by |y*|; the code's is.
 3. y*: the code takes the best-scored response, in its data the human one. Used, except with `reward`: the human
    response, else the best correct one, else the prompt has no SFT term.
 4. lambda: the code gives 1.0 to the first response of a list; here `source` decides. On multi-document QA the code has
    1.0 for all: --length_scaling 1. Sec. 7 speaks of NLI alone.
 5. Batch 64 in print; the alpha of its tables is not said. The code's script has 8 and 0.1. Here 64 and 0.1.
 6. Multi-document QA has no human response and no SFT term, in print and code alike: --no_sft. alpha is then a factor
    on the whole loss, which Adam does not see; only clipping does.
 7. Ours: a prompt without a pair and without y* is left out of the batches (the code computes its zeros), and of the
    others only what is y* or in a pair is computed.

    torchrun --nproc_per_node 4 rescue.py --ordering label                            # the paper's main experiment
    torchrun --nproc_per_node 4 rescue.py --ordering none                             # its SFT baseline
    python rescue.py --ordering label --data d.jsonl --model demo/model --output runs/x   # one process, GPU or CPU
"""

import math
import random
from collections import Counter

import torch

import common
import runtime
from common import UserError, candidate_logprobs, in_range, pair_statistics
from files import load_candidates
from run import Run, shuffled_batches, with_held_out
from runtime import say


def ranking_loss(scores, levels):
    """Eq. 2 in the released form: the sum over pairs with levels[i] > levels[j] of max(0, scores[j] - scores[i]).

    scores [n] fp32, levels [n] preferences, larger better -> scalar. Ties are not compared; no pairs give 0.
    """
    better = levels[:, None] > levels[None, :]  # [n, n]
    violation = (scores[None, :] - scores[:, None]).clamp(min=0)  # [n, n], s_worse - s_better where `better` holds
    return (violation * better).sum()


def sft_loss(logprobs, lengths, target):
    """Eq. 1, divided by the length: the mean token NLL of y*, or 0 where there is none.

    logprobs, lengths [n]; target [n] bool, true at y* alone -> scalar.
    """
    return torch.where(target, -logprobs / lengths, 0.0).sum()


def preference(record, ordering):
    """A record's candidates -> [n] preference levels, larger better (Sec. 4 and 5.2). Equal levels are not compared,
    and NaN with nothing."""
    candidates = record["candidates"]
    human = [c["source"] in common.HUMAN for c in candidates]
    if ordering == "none":
        return [0.0] * len(candidates)
    if ordering == "human":
        return [float(h) for h in human]
    if ordering in ("label", "hybrid"):
        # the human response carries the annotated label, so it is right unless it was marked otherwise
        right = [float(c.get("correct", h)) for c, h in zip(candidates, human)]
        if ordering == "label":
            return right
        gold = [c.get("anchor") == "gold" for c in candidates]
        return [2.0 if h else r + (r and g) for r, h, g in zip(right, human, gold)]
    if ordering == "reward":
        return [c["reward"] for c in candidates]
    if ordering == "similarity":
        value = [c.get("similarity") for c in candidates]
    else:  # gpt: rank 0 is the best; null: the ranker gave none
        value = [None if c.get("rank") is None else -c["rank"] for c in candidates]
    return [math.inf if h else math.nan if v is None else v for v, h in zip(value, human)]


def sft_target(record, levels, ordering):
    """Where y* of Eq. 1 stands among the candidates: the human response, else the best correct one (the first among
    equals), else None; with `reward` the best-rewarded one, as in RRHF."""
    candidates = range(len(levels))
    if ordering == "reward":
        return max(candidates, key=lambda i: levels[i])
    human = [i for i in candidates if record["candidates"][i]["source"] in common.HUMAN]
    right = [i for i in candidates if record["candidates"][i].get("correct")]
    best = sorted(right, key=lambda i: -math.inf if math.isnan(levels[i]) else levels[i], reverse=True)
    return next(iter(human + best), None)


def select_candidates(record, num_candidates, seed):
    """At most `num_candidates` of a record's candidates: the human ones always, a seeded draw of the others, in the
    file's order (Fig. 4)."""
    candidates = record["candidates"]
    human = [i for i, c in enumerate(candidates) if c["source"] in common.HUMAN]
    others = [i for i in range(len(candidates)) if i not in human]
    room = max(0, num_candidates - len(human))
    drawn = random.Random(f"{seed}-{record['id']}").sample(others, min(room, len(others)))
    return record | {"candidates": [candidates[i] for i in sorted(human[:num_candidates] + drawn)]}


def parse_args():
    parser = common.Parser(description=__doc__)
    orderings = ["human", "label", "hybrid", "similarity", "gpt", "reward", "none"]
    # fmt: off
    add = parser.add_argument_group("RESCUE").add_argument
    add("--ordering", required=True, choices=orderings, help="Sec. 4; see above")
    add("--alpha", type=in_range(float, 0), default=0.1, help="weight of L_Rank, Eq. 3; best 0.01-0.1, Sec. 7")
    add("--length_scaling", type=in_range(float, 0), default=0.85, help="lambda of model responses, Sec. 7, Fig. 5")
    add("--human_length_scaling", type=in_range(float, 0), default=1.0, help="lambda of human responses, Sec. 7")
    add("--num_candidates", type=in_range(int, 1), default=5, help="a prompt's, the human one among them; Fig. 4")
    add("--no_sft", action="store_true", help="drop Eq. 1, as multi-document QA does, Sec. 6.3")
    # fmt: on
    defaults = {"lr": 2e-5, "schedule": "cosine", "warmup": 0.03, "epochs": 1, "batch_size": 64}
    common.add_training_flags(parser, model="meta-llama/Llama-2-7b-hf", **defaults)
    args = parser.parse_args()
    args.data = args.data or "data/esnli/ranked.jsonl"
    args.output = args.output or f"runs/rescue-{args.ordering}"
    if args.no_sft and args.ordering == "none":
        parser.error("--no_sft with --ordering none leaves no loss")
    return args


HUMAN = "a candidate with source human or reference (--ordering gpt, by rank, and reward need none)"
NEEDS = {"label": "correct", "hybrid": "correct", "similarity": "similarity", "gpt": "rank", "reward": "reward"}
RANK_BY = "python collect_candidates.py rank --by {} --input {} --output NEW.jsonl"
COLLECT = """  python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv \\
      --shuffle 0 --limit 20000
  torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf \\
      --num_samples 3 --shots 3 --stop "\\n\\n"
  python collect_candidates.py rank --task esnli --by {}"""


def load_data(args, path, limit):
    """-> (records with the candidates to compute, their levels, their y*: tensors [n], bool); says what was found."""
    by = args.ordering if args.ordering in ("similarity", "gpt", "reward") else "label"
    runtime.require_data(path, COLLECT.format(by + " --drop_malformed" * (by == "label")))
    field = NEEDS.get(args.ordering)
    read = load_candidates(path, limit=limit)
    records, levels, targets, count = [], [], [], Counter()
    for record in read:
        where = f"{path}: record {record['id']!r}"
        human = [c["source"] in common.HUMAN for c in record["candidates"]]
        if not any(human) and args.ordering in ("human", "none", "similarity"):
            raise UserError(f"{where} has no human response, which --ordering {args.ordering} needs: {HUMAN}")
        for i, (c, h) in enumerate(zip(record["candidates"], human)):
            if field and field not in c and not (h and field in ("correct", "similarity", "rank")):
                hint = RANK_BY.format(by, path)
                raise UserError(f"{where}: candidates[{i}] has no {field!r}; add it with: {hint}")
        drawn = select_candidates(record, args.num_candidates, args.seed)
        level = torch.tensor(preference(drawn, args.ordering))  # [n]
        y = sft_target(drawn, level.tolist(), args.ordering)
        target = torch.tensor([i == y and not args.no_sft for i in range(len(level))])  # [n]
        better = level[:, None] > level[None, :]  # [n, n]
        used = (target | better.any(0) | better.any(1)).nonzero()[:, 0]
        human = y is not None and drawn["candidates"][y]["source"] in common.HUMAN
        count["without y*" if y is None else "human" if human else "chosen"] += 1
        count["pairs"] += int(better.sum())
        count["not drawn"] += len(record["candidates"]) - len(drawn["candidates"])
        if len(used):
            records.append(drawn | {"candidates": [drawn["candidates"][i] for i in used]})
            levels.append(level[used])
            targets.append(target[used])
    if args.ordering != "none" and not count["pairs"]:
        hint = "nothing to rank. See what `rank` said of them, and --num_candidates"
        raise UserError(f"{path}: --ordering {args.ordering} finds no two candidates of different preference: {hint}")
    if limit and len(read) < limit:
        say(f"WARNING: {path} holds fewer prompts than --max_train_samples {limit}")
    chosen = "the best-rewarded" if args.ordering == "reward" else "the best correct response"
    found = f"the human response in {count['human']}, {chosen} in {count['chosen']}, none in {count['without y*']}"
    say(f"{len(read)} prompts, {count['pairs']} ordered pairs; y* is", "not used: --no_sft" if args.no_sft else found)
    if len(read) > len(records):
        say(f"{len(read) - len(records)} prompts are left out: they have neither a pair nor an SFT term")
    if count["not drawn"]:
        say(f"--num_candidates {args.num_candidates} leaves out {count['not drawn']} model responses, a seeded draw")
    if args.no_sft:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch the evaluation")
    return records, levels, targets


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    (records, levels, targets), train, held_out = with_held_out(load_data, args)
    human = [torch.tensor([c["source"] in common.HUMAN for c in r["candidates"]]) for r in records]
    lambdas = [torch.where(h, args.human_length_scaling, args.length_scaling) for h in human]
    run = Run(args, device)
    if run.finished:
        return
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    run.begin(model, optimizer, tokenizer, encoded)
    for _, prompts in run.steps(shuffled_batches(len(train), args), held_out):
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, lam, *columns in run.rows(prompts, lambdas, levels, targets):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = logprobs / lengths**lam  # [N], s(y)
            row_loss = 0.0
            by_prompt = zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, *columns)))
            for s, logp, length, level, target in by_prompt:  # [n] each: pairs never cross prompts
                rank_term, sft_term = ranking_loss(s, level), sft_loss(logp, length, target)
                loss = sft_term + args.alpha * rank_term  # Eq. 3
                row_loss = row_loss + loss
                run.count(weight, pair_statistics(s, level), loss=loss, rank_loss=rank_term, sft_loss=sft_term)
            if run.training:  # FSDP averages over processes: the sum over the global batch / its prompts
                (weight * row_loss * world / len(prompts)).backward()
        if run.training:  # not on --eval_data
            grad_norm = runtime.clip_grad_norm(model, args.max_grad_norm)
            run.check_finite(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.log(grad_norm)
    run.finish()


if __name__ == "__main__":
    runtime.run_cli(main)
