"""RESCUE: train a language model to rank partially ordered human and model responses (arXiv 2311.09136).

A prompt x has one human response and several model responses y_b. The model's own length-normalised log-likelihood
scores them,

    Eq. 3   s(y) = log pi(y | x) / |y| ** lambda        lambda = 1.0 for human, 0.85 for model responses (Sec. 4)
    Eq. 2   L_rank = sum over pairs (better, worse) of max(0, s(worse) - s(better))
    Eq. 1   L_sft  = -log pi(y* | x) / |y*|              y* the best response
            L = L_sft + alpha L_rank                     alpha "optimal between 0.01 and 0.1" (Sec. 7)

and the pairs come from an ordering, partial where that is all one knows (Sec. 3):

    human       the human response before every model response
    label       responses with the right label (or answer) before the others; equals are not compared
    hybrid      human, then right, then wrong (multi-document QA: right and anchored in the gold passage, then right,
                then wrong)
    similarity  full: by embedding similarity to the human response       gpt      full: by a stronger model's ranking
    reward      full: by a reward model's score (with it and --length_scaling 1 this is RRHF)
    none        supervised fine-tuning on the human response alone

Where the print and the released code (RRHF's) differ, the default is what gave the paper's results:
 1. Eq. 2 as printed, -E max{0, log pi(y_b) - log pi(y_1-b)}, rewards pairs that are already in order. Used: the hinge
    on violated pairs, summed over a prompt's pairs, then averaged over prompts.
 2. Eq. 1 as printed is not normalised. Used: the mean token NLL of the best response, the first one among ties (so
    the human one).
 3. lambda goes by each candidate's `source`, not by its place in the list.
 4. Batch 64 as printed (the released script runs 8); alpha 0.1 as released.
 5. Multi-document QA has no human response and no SFT term: --no_sft.

    torchrun --nproc_per_node 4 rescue.py --ordering label                            # the paper's main experiment
    torchrun --nproc_per_node 4 rescue.py --ordering none                             # its SFT baseline
    python rescue.py --ordering label --data d.jsonl --model demo/model --output runs/x   # one process, GPU or CPU
"""

import random
import time

import torch
from tqdm import trange

import common
import runtime
from common import UserError, candidate_logprobs, in_range, length_normalized
from runtime import say

RANK_BY = "python collect_candidates.py rank --by {} --input {} --output NEW.jsonl"
NEEDS = {"label": "correct", "hybrid": "correct", "similarity": "similarity", "gpt": "rank", "reward": "reward"}

COLLECT = """  python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv
  torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf --num_samples 4
  python collect_candidates.py rank --task esnli --by {}"""


def preference(record, ordering):
    """A record's candidates -> [n] preference levels, larger better; equal levels are not compared (Sec. 3 and 5)."""
    candidates = record["candidates"]
    human = [c["source"] in common.HUMAN for c in candidates]
    if ordering in ("human", "none"):
        return [float(h) for h in human]
    if ordering in ("label", "hybrid"):
        # the human response carries the annotated label, so it is right unless it was marked otherwise
        right = [c.get("correct", h) for c, h in zip(candidates, human)]
        top = [h or c.get("anchor") == "gold" for c, h in zip(candidates, human)]
        return [float(r) + (ordering == "hybrid" and r and t) for r, t in zip(right, top)]
    if ordering == "gpt":  # annotated rank: 0 is the best; unranked records (null) have no pairs
        return [-float(c["rank"]) if c["rank"] is not None else 0.0 for c in candidates]
    if ordering == "similarity":  # the human response is what similarity is measured to
        return [float("inf") if h else c["similarity"] for c, h in zip(candidates, human)]
    return [c["reward"] for c in candidates]


def select_candidates(record, num_candidates, seed, human_only=False):
    """At most `num_candidates` of a record's candidates: the human ones always, a seeded draw of the others, in the
    file's order (Fig. 4)."""
    candidates = record["candidates"]
    human = [i for i, c in enumerate(candidates) if c["source"] in common.HUMAN]
    others = [i for i in range(len(candidates)) if i not in human]
    room = 0 if human_only else max(0, num_candidates - len(human))
    drawn = random.Random(f"{seed}-{record['id']}").sample(others, min(room, len(others)))
    return record | {"candidates": [candidates[i] for i in sorted(human[:num_candidates] + drawn)]}


def ranking_loss(scores, ranks):
    """Eq. 2 in the released form: the sum over pairs with ranks[i] > ranks[j] of max(0, scores[j] - scores[i]).

    scores [n] fp32, ranks [n] preference levels, larger better -> scalar. Ties are not compared; no pairs give 0.
    """
    better = ranks[:, None] > ranks[None, :]  # [n, n]
    violation = (scores[None, :] - scores[:, None]).clamp(min=0)  # [n, n], s_worse - s_better where `better` holds
    return (violation * better).sum()


def sft_loss(logprobs, lengths, ranks):
    """Eq. 1, normalised: mean token NLL of the best candidate, the first among ties. logprobs, lengths, ranks [n] ->
    scalar."""
    best = ranks.argmax()
    return (
        -logprobs[best] / lengths[best]
    )  # <- the length normalisation of the SFT term; Eq. 3's is common.length_normalized


def pair_statistics(scores, ranks):
    """-> (ordered pairs scored in order, ordered pairs, sum of s_better - s_worse over them), scalars."""
    better = ranks[:, None] > ranks[None, :]
    gap = scores[:, None] - scores[None, :]
    return ((gap > 0) & better).sum(), better.sum(), (gap * better).sum()


def parse_args():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--ordering",
        required=True,
        choices=["human", "label", "hybrid", "similarity", "gpt", "reward", "none"],
        help="Sec. 3; see above",
    )
    add(
        "--alpha", type=in_range(float, 0), default=0.1, help="weight of the ranking loss, Eq. 3; best 0.01-0.1, Sec. 7"
    )
    add("--length_scaling", type=in_range(float, 0), default=0.85, help="lambda of model responses (paper: 0.85)")
    add("--human_length_scaling", type=in_range(float, 0), default=1.0, help="lambda of human responses (paper: 1.0)")
    add(
        "--num_candidates",
        type=in_range(int, 1),
        default=5,
        help="candidates a prompt, the human one always among them (paper: 5; Fig. 4)",
    )
    add("--no_sft", action="store_true", help="drop Eq. 1, as multi-document QA does")
    defaults = {"lr": 2e-5, "schedule": "cosine", "warmup": 0.03, "epochs": 1, "batch_size": 64}
    common.add_training_flags(parser, model="meta-llama/Llama-2-7b-hf", **defaults)
    args = parser.parse_args()
    args.data = args.data or "data/esnli/ranked.jsonl"
    args.output = args.output or f"runs/rescue-{args.ordering}"
    if args.no_sft and args.ordering == "none":
        parser.error("--no_sft with --ordering none leaves no loss")
    return args


def load_data(args):
    """-> (records with their selected candidates, their preference levels as tensors [n]); prints what can be
    compared."""
    by = args.ordering if args.ordering in ("similarity", "gpt", "reward") else "label"
    runtime.require_data(args.data, COLLECT.format(by))
    need = {NEEDS[args.ordering]} if args.ordering in NEEDS else set()
    records = common.load_candidates(args.data, limit=args.max_train_samples)
    for record in records:
        human = any(c["source"] in common.HUMAN for c in record["candidates"])
        if not human and args.ordering in ("human", "none", "similarity"):
            raise UserError(
                f"{args.data}: record {record['id']!r} has no human response, which --ordering {args.ordering} needs"
            )
        for i, c in enumerate(record["candidates"]):
            for field in need - c.keys():
                if not (c["source"] in common.HUMAN and field in ("correct", "similarity")):
                    raise UserError(
                        f"{args.data}: record {record['id']!r}: candidates[{i}] has no {field!r}; "
                        f"add it with: {RANK_BY.format(by, args.data)}"
                    )
    records = [select_candidates(r, args.num_candidates, args.seed, args.ordering == "none") for r in records]
    ranks = [torch.tensor(preference(r, args.ordering)) for r in records]
    pairs = [int((r[:, None] > r[None, :]).sum()) for r in ranks]
    if args.no_sft and not sum(pairs):
        raise UserError(f"{args.data}: --ordering {args.ordering} finds no two candidates of different preference")
    say(
        f"{len(records)} prompts, {sum(pairs)} ordered pairs, "
        f"{pairs.count(0)} prompts without any (they train {'nothing' if args.no_sft else 'the SFT term alone'})"
    )
    return records, ranks


def main():
    args = parse_args()
    rank, world, device = runtime.init_distributed()
    if args.batch_size < world:
        raise UserError(f"--batch_size {args.batch_size} is below the {world} ranks")
    records, ranks = load_data(args)
    run = runtime.Run(args, rank, world, device)
    if run.finished:
        return
    if args.no_sft:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch the evaluation")
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    if not args.padded:
        runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    exponents = [
        [args.human_length_scaling if c["source"] in common.HUMAN else args.length_scaling for c in r["candidates"]]
        for r in records
    ]
    lengths_in_tokens = [e.num_tokens for e in encoded]
    row_budget = runtime.row_budget(args, device)
    batches = [b for epoch in range(args.epochs) for b in runtime.epoch_batches(len(records), args, epoch)]
    first = [lengths_in_tokens[i] for i in batches[0]]
    rows = runtime.describe_plan(runtime.plan_rows(first, row_budget, world), first, row_budget)
    say(f"{len(batches)} steps of {args.batch_size} prompts on {world} ranks; the first accumulates {rows}")

    start = run.restore(model, optimizer)
    for step in trange(start, len(batches), initial=start, total=len(batches), desc="training", disable=rank != 0):
        began = time.perf_counter()
        prompts = batches[step]
        torch.manual_seed(args.seed * 1_000_003 + step * world + rank)  # dropout: resumable without saved RNG states
        plan = runtime.plan_rows([lengths_in_tokens[i] for i in prompts], row_budget, world)[rank]
        sums = torch.zeros(5, device=device)  # rank loss, SFT loss, pairs in order, pairs, sum of margins
        losses = []
        for row, weight, batch in runtime.row_batches(plan, prompts, encoded, args, tokenizer, device):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            lambdas = torch.tensor([x for i in row for x in exponents[i]], device=device)  # [N]
            scores = length_normalized(logprobs, lengths, lambdas)  # Eq. 3
            loss = scores.new_zeros(())
            groups = zip(row, scores.split(batch.sizes), logprobs.split(batch.sizes), lengths.split(batch.sizes))
            for i, s, logp, length in groups:  # one prompt at a time: pairs never cross prompts
                levels = ranks[i].to(device)
                rank_term, sft_term = ranking_loss(s, levels), sft_loss(logp, length, levels)
                loss = loss + args.alpha * rank_term + (0 if args.no_sft else sft_term)
                sums += weight * torch.stack([rank_term, sft_term, *pair_statistics(s, levels)]).detach()
            (
                weight * loss * world / len(prompts)
            ).backward()  # FSDP averages over ranks: the sum over the global batch / its prompts
            losses.append((loss.detach(), [records[i]["id"] for i in row]))
            if run.interrupted():
                run.stop(step, model, optimizer)
        grad_norm = runtime.clip_grad_norm(model, args.max_grad_norm)
        run.check_finite(step, losses, grad_norm)
        lr = runtime.learning_rate(step, len(batches), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.log_every == 0 or step + 1 == len(batches):
            rank_sum, sft_sum, in_order, pairs, margin = runtime.all_sum(sums)
            tokens = sum(lengths_in_tokens[i] for i in prompts)
            run.log(
                step + 1,
                {
                    "loss": (args.alpha * rank_sum + (0 if args.no_sft else sft_sum)) / len(prompts),
                    "rank_loss": rank_sum / len(prompts),
                    "sft_loss": sft_sum / len(prompts),
                    "pair_accuracy": in_order / max(pairs, 1),
                    "margin": margin / max(pairs, 1),
                    "grad_norm": grad_norm,
                    "lr": lr,
                    **runtime.speed(model, tokens, time.perf_counter() - began, device),
                },
            )
        if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0 and step + 1 < len(batches):
            run.save(step + 1, model, optimizer)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    runtime.run_cli(main)
