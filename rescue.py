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

import torch

import common
import runtime
from common import UserError, candidate_logprobs, in_range, pair_statistics
from runtime import say


def ranking_loss(scores, levels):
    """Eq. 2 in the released form: the sum over pairs with levels[i] > levels[j] of max(0, scores[j] - scores[i]).

    scores [n] fp32, levels [n] preferences, larger better -> scalar. Ties are not compared; no pairs give 0.
    """
    better = levels[:, None] > levels[None, :]  # [n, n]
    violation = (scores[None, :] - scores[:, None]).clamp(min=0)  # [n, n], s_worse - s_better where `better` holds
    return (violation * better).sum()


def sft_loss(logprobs, lengths, levels):
    """Eq. 1, normalised: mean token NLL of the best candidate, the first among ties. All [n] -> scalar."""
    best = levels.argmax()
    return -logprobs[best] / lengths[best]


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


def parse_args():
    parser = common.Parser(description=__doc__)
    orderings = ["human", "label", "hybrid", "similarity", "gpt", "reward", "none"]
    # fmt: off
    add = parser.add_argument_group("RESCUE").add_argument
    add("--ordering", required=True, choices=orderings, help="Sec. 3; see above")
    add("--alpha", type=in_range(float, 0), default=0.1, help="weight of the ranking loss; best 0.01-0.1, Sec. 7")
    add("--length_scaling", type=in_range(float, 0), default=0.85, help="lambda of model responses, Eq. 3, Sec. 4")
    add("--human_length_scaling", type=in_range(float, 0), default=1.0, help="lambda of human responses, Eq. 3, Sec. 4")
    add("--num_candidates", type=in_range(int, 1), default=5, help="a prompt's, the human one among them; Fig. 4")
    add("--no_sft", action="store_true", help="drop Eq. 1, as multi-document QA does")
    # fmt: on
    defaults = {"lr": 2e-5, "schedule": "cosine", "warmup": 0.03, "epochs": 1, "batch_size": 64}
    common.add_training_flags(parser, model="meta-llama/Llama-2-7b-hf", **defaults)
    args = parser.parse_args()
    args.data = args.data or "data/esnli/ranked.jsonl"
    args.output = args.output or f"runs/rescue-{args.ordering}"
    if args.no_sft and args.ordering == "none":
        parser.error("--no_sft with --ordering none leaves no loss")
    return args


NEEDS = {"label": "correct", "hybrid": "correct", "similarity": "similarity", "gpt": "rank", "reward": "reward"}
RANK_BY = "python collect_candidates.py rank --by {} --input {} --output NEW.jsonl"
COLLECT = """  python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv
  torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf --num_samples 4
  python collect_candidates.py rank --task esnli --by {}"""


def load_data(args):
    """-> (records with their selected candidates, their levels, tensors [n]); prints what can be compared."""
    by = args.ordering if args.ordering in ("similarity", "gpt", "reward") else "label"
    runtime.require_data(args.data, COLLECT.format(by))
    field = NEEDS.get(args.ordering)
    records = common.load_candidates(args.data, limit=args.max_train_samples)
    for record in records:
        where = f"{args.data}: record {record['id']!r}"
        human = [c["source"] in common.HUMAN for c in record["candidates"]]
        if not any(human) and args.ordering in ("human", "none", "similarity"):
            raise UserError(f"{where} has no human response, which --ordering {args.ordering} needs")
        for i, (c, h) in enumerate(zip(record["candidates"], human)):
            if field and field not in c and not (h and field in ("correct", "similarity")):
                hint = RANK_BY.format(by, args.data)
                raise UserError(f"{where}: candidates[{i}] has no {field!r}; add it with: {hint}")
    records = [select_candidates(r, args.num_candidates, args.seed, args.ordering == "none") for r in records]
    levels = [torch.tensor(preference(r, args.ordering)) for r in records]
    pairs = [int((x[:, None] > x[None, :]).sum()) for x in levels]
    if args.no_sft and not sum(pairs):
        raise UserError(f"{args.data}: --ordering {args.ordering} finds no two candidates of different preference")
    without = f"{pairs.count(0)} prompts without any (they train {'nothing' if args.no_sft else 'the SFT term alone'})"
    say(f"{len(records)} prompts, {sum(pairs)} ordered pairs, {without}")
    if args.no_sft:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch the evaluation")
    return records, levels


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    records, levels = load_data(args)
    human = [torch.tensor([c["source"] in common.HUMAN for c in r["candidates"]]) for r in records]
    lambdas = [torch.where(h, args.human_length_scaling, args.length_scaling) for h in human]
    run = runtime.Run(args, device)
    if run.finished:
        return
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    run.begin(model, optimizer, tokenizer, encoded)
    for _, prompts in run.steps(runtime.shuffled_batches(len(records), args)):
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, lam, preferences in run.rows(prompts, lambdas, levels):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = logprobs / lengths**lam  # [N], Eq. 3
            row_loss = 0.0
            by_prompt = zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, preferences)))
            for s, logp, length, level in by_prompt:  # [n] each: pairs never cross prompts
                rank_term, sft_term = ranking_loss(s, level), sft_loss(logp, length, level)
                loss = args.alpha * rank_term + (0 if args.no_sft else sft_term)
                row_loss = row_loss + loss
                run.count(weight, pair_statistics(s, level), loss=loss, rank_loss=rank_term, sft_loss=sft_term)
            # FSDP averages over processes: the sum over the global batch / its prompts
            (weight * row_loss * world / len(prompts)).backward()
        grad_norm = runtime.clip_grad_norm(model, args.max_grad_norm)
        run.check_finite(grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.log(grad_norm)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    runtime.run_cli(main)
