"""Tuna: instruction tuning with a stronger model's rankings (arXiv 2310.13385).

An instruction x has its original response r and several others r_k; a teacher ranks them and the student learns the
ranking. Three stages, each a run of this script:

    sft             Eq. 1-2   L = -log p(r | x), on the original response (--all_candidates: on all, "Alpaca-Mul")
    probabilistic   Eq. 3     ranks by the teacher's own likelihood, log p_teacher(r_k | x) / |r_k| ** beta, beta 1.3
    contextual      Sec. 2.3  ranks by a stronger model that reads all responses (`rank`; 0 is the best)

With the candidates sorted best first, the two ranking stages minimise

    Eq. 5   v_k = log p(r_k | x) / |r_k|                        the student's score: mean token log-likelihood
    Eq. 4   L_rank = sum over pairs j < k of max(0, v_k - v_j + m (k - j))       margin m = 0.1
    Eq. 6   L = L_rank + lambda L_MLE                           L_MLE on the original response, lambda = 1

Where the print and the released code differ, or the print is silent:
 1. Eq. 4 sums over pairs; the code takes the mean over the pairs at each distance k - j and sums over distances.
    Default: the sum. --pair_reduction mean_by_distance: the code's.
 2. Eq. 6 has the cross entropy of the original response (its minus sign is missing in print); the code takes it over
    all candidates. Default: the original's. --mle_on all: the code's.
 3. The original response (`source` reference or human) is ranked among the others where it carries the annotation,
    as in the released data, and is used for L_MLE alone where it does not.
 4. beta belongs to the teacher's score alone: the student's exponent is 1, in print and in code.
 5. Cross entropy is the mean over response tokens; losses are averaged over prompts, and pairs never cross prompts.
 6. Candidates with equal teacher scores are not compared; a repeated text, or one with rank null, is not ranked.

    torchrun --nproc_per_node 4 tuna.py --stage sft                                   # Alpaca-7B
    torchrun --nproc_per_node 4 tuna.py --stage probabilistic                         # Tuna_p, from runs/tuna-sft
    torchrun --nproc_per_node 4 tuna.py --stage contextual                            # Tuna_c, from runs/tuna-sft
    torchrun --nproc_per_node 4 tuna.py --stage contextual --lr 1e-6 --output runs/tuna \\
        --model runs/tuna-probabilistic/model                                         # Tuna: p, then c
"""

import time

import torch
from tqdm import trange

import common
import runtime
from common import UserError, candidate_logprobs, in_range, length_normalized
from runtime import say

PAPER_LR = {"sft": 2e-5, "probabilistic": 1e-5, "contextual": 1e-5}  # Table 7; 1e-6 for contextual after probabilistic
DATA = {"sft": "train", "probabilistic": "teacher", "contextual": "ranked"}  # data/alpaca/NAME.jsonl
NEEDS = {"sft": (), "probabilistic": ("logprob", "num_tokens"), "contextual": ("rank",)}
ANNOTATE = {
    "probabilistic": "python collect_candidates.py rank --by logprob --model TEACHER --input {} --output NEW.jsonl",
    "contextual": "python collect_candidates.py rank --by contextual --model RANKER --input {} --output NEW.jsonl",
}
COLLECT = {
    "sft": "  python collect_candidates.py prepare --task alpaca --input alpaca_data.json",
    "probabilistic": """  python collect_candidates.py prepare --task alpaca --input alpaca_data.json
  python collect_candidates.py teacher --task alpaca --model TEACHER --num_samples 4 --temperature 1 --logprobs""",
    "contextual": """  python collect_candidates.py prepare --task alpaca --input alpaca_data.json
  python collect_candidates.py sample --task alpaca --model runs/tuna-sft/model --temperature 1 --max_rouge_l 0.8
  python collect_candidates.py rank --task alpaca --by contextual --model RANKER""",
}


def teacher_score(logprob, num_tokens, length_penalty):
    """Eq. 3: the teacher's log p(r | x) / |r| ** beta. Numbers (or tensors of one shape) -> the same, larger better."""
    return length_normalized(logprob, num_tokens, length_penalty)


def teacher_ranks(candidates, stage, length_penalty):
    """One prompt's candidates -> [n] ranks, 0 the best, equal scores equal, -1 for what the teacher did not rank."""
    worth, seen = {}, set()
    for i, c in enumerate(candidates):
        if c["text"].strip() in seen:
            continue  # a repeated text can be neither better nor worse than itself
        if stage == "probabilistic" and "logprob" in c:
            worth[i] = teacher_score(c["logprob"], c["num_tokens"], length_penalty)
        elif stage == "contextual" and c.get("rank") is not None:
            worth[i] = -c["rank"]
        if i in worth:
            seen.add(c["text"].strip())
    best_first = sorted(set(worth.values()), reverse=True)
    return [best_first.index(worth[i]) if i in worth else -1 for i in range(len(candidates))]


def ranking_loss(scores, margin, ranks=None, pair_reduction="sum"):
    """Eq. 4: sum over pairs j < k of max(0, v_k - v_j + margin (k - j)), candidates sorted best first -> scalar.

    scores [n]: Eq. 5's v, fp32. ranks [n] replaces the positions 0..n-1 where candidates are unsorted or tied.
    pair_reduction "mean_by_distance" is the released code's form: the mean over the pairs at each distance, summed.
    """
    ranks = torch.arange(len(scores), device=scores.device) if ranks is None else ranks
    distances = ranks[None, :] - ranks[:, None]  # [n, n], k - j: the row is the better one
    weights = (distances > 0).float()  # equal ranks are not compared
    if pair_reduction == "mean_by_distance":
        d = distances.clamp(min=0)
        weights = weights / d.flatten().bincount()[d]
    return (weights * (scores[None, :] - scores[:, None] + margin * distances).clamp(min=0)).sum()


def mle_loss(logprobs, lengths):
    """Eq. 2, and L_MLE of Eq. 6: mean token NLL over these candidates' tokens. logprobs, lengths [n] -> scalar."""
    return -logprobs.sum() / lengths.sum()


def pair_statistics(scores, ranks):
    """-> (ranked pairs that the student scores in order, ranked pairs, sum of v_j - v_k over them), scalars."""
    better = ranks[:, None] < ranks[None, :]
    gap = scores[:, None] - scores[None, :]
    return ((gap > 0) & better).sum(), better.sum(), (gap * better).sum()


def parse_args():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--stage", required=True, choices=list(PAPER_LR), help="see above; --lr is 2e-5 for sft, else 1e-5 (Table 7)")
    add("--margin", type=in_range(float, 0), default=0.1, help="m, Eq. 4 (paper: 0.1)")
    add("--mle_weight", type=in_range(float, 0), default=1.0, help="lambda, Eq. 6 (paper: 1.0)")
    add("--mle_on", choices=["original", "all"], default="original", help="L_MLE: as printed, or over all candidates")
    add("--pair_reduction", choices=["sum", "mean_by_distance"], default="sum", help="Eq. 4 as printed, or as released")
    add("--length_penalty", type=in_range(float, 0), default=1.3, help="beta, the teacher's score, Eq. 3 (paper: 1.3)")
    add("--all_candidates", action="store_true", help="with --stage sft: learn every candidate, Alpaca-Mul")
    defaults = {"lr": 1e-5, "schedule": "cosine", "warmup": 2, "epochs": 1, "batch_size": 128}
    common.add_training_flags(parser, model="huggyllama/llama-7b", **defaults)
    parser.set_defaults(lr=None, model=None)  # both go by the stage
    args = parser.parse_args()
    if args.all_candidates and args.stage != "sft":
        parser.error("--all_candidates belongs to --stage sft; with the others it is --mle_on all")
    args.lr = args.lr or PAPER_LR[args.stage]
    args.model = args.model or ("huggyllama/llama-7b" if args.stage == "sft" else "runs/tuna-sft/model")
    args.data = args.data or f"data/alpaca/{DATA[args.stage]}.jsonl"
    args.output = args.output or f"runs/tuna-{args.stage}"
    return args


def load_data(args):
    """-> (records with the candidates that take part, their ranks [n], whether L_MLE has them [n]), lists in step."""
    runtime.require_data(args.data, COLLECT[args.stage])
    records, ranks, in_mle = [], [], []
    for record in common.load_candidates(args.data, limit=args.max_train_samples):
        candidates = record["candidates"]
        original = next((i for i, c in enumerate(candidates) if c["source"] in common.HUMAN), None)
        for i, c in enumerate(candidates):
            absent = [field for field in NEEDS[args.stage] if field not in c]
            if absent and i != original:
                raise UserError(
                    f"{args.data}: record {record['id']!r}: candidates[{i}] has no {absent[0]!r}; "
                    f"add it with: {ANNOTATE[args.stage].format(args.data)}"
                )
        learn_all = args.all_candidates if args.stage == "sft" else args.mle_on == "all"
        if original is None and not learn_all and (args.mle_weight or args.stage == "sft"):
            raise UserError(f"{args.data}: record {record['id']!r} has no reference response, which the MLE term needs")
        rank = teacher_ranks(candidates, args.stage, args.length_penalty)
        mle = [(learn_all and bool(c["text"].strip())) or i == original for i, c in enumerate(candidates)]
        used = [i for i in range(len(candidates)) if rank[i] >= 0 or mle[i]]
        if not used:
            raise UserError(f"{args.data}: record {record['id']!r} has no candidate to learn from")
        records.append(record | {"candidates": [candidates[i] for i in used]})
        ranks.append(torch.tensor([rank[i] for i in used]))
        in_mle.append(torch.tensor([mle[i] for i in used]))
    ranked = [int((r >= 0).sum()) for r in ranks]
    say(f"{len(records)} prompts, {sum(ranked)} ranked candidates, {sum(n < 2 for n in ranked)} prompts without a pair")
    return records, ranks, in_mle


def main():
    args = parse_args()
    rank, world, device = runtime.init_distributed()
    if args.batch_size < world:
        raise UserError(f"--batch_size {args.batch_size} is below the {world} ranks")
    records, ranks, in_mle = load_data(args)
    run = runtime.Run(args, rank, world, device)
    if run.finished:
        return
    mle_weight = 1.0 if args.stage == "sft" else args.mle_weight
    if mle_weight == 0:
        say("--mle_weight 0: length-normalised ranking alone can degenerate, so watch the evaluation")
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    if not args.padded:
        runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
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
        sums = torch.zeros(5, device=device)  # rank loss, MLE loss, pairs in order, pairs, sum of margins
        losses = []
        for row, weight, batch in runtime.row_batches(plan, prompts, encoded, args, tokenizer, device):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = length_normalized(logprobs, lengths, 1.0)  # Eq. 5: the student's length normalisation
            loss = scores.new_zeros(())
            groups = zip(row, scores.split(batch.sizes), logprobs.split(batch.sizes), lengths.split(batch.sizes))
            for i, v, logp, length in groups:  # one prompt at a time: pairs never cross prompts
                order, mle = ranks[i].to(device), in_mle[i].to(device)
                v, order = v[order >= 0], order[order >= 0]
                rank_term = ranking_loss(v, args.margin, order, args.pair_reduction)  # 0 in the sft stage: none ranked
                mle_term = mle_loss(logp[mle], length[mle]) if mle.any() else v.new_zeros(())
                loss = loss + rank_term + mle_weight * mle_term  # Eq. 6
                sums += weight * torch.stack([rank_term, mle_term, *pair_statistics(v, order)]).detach()
            # FSDP averages over ranks: the sum over the global batch / its prompts
            (weight * loss * world / len(prompts)).backward()
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
            rank_sum, mle_sum, in_order, pairs, margin = runtime.all_sum(sums)
            tokens = sum(lengths_in_tokens[i] for i in prompts)
            run.log(
                step + 1,
                {
                    "loss": (rank_sum + mle_weight * mle_sum) / len(prompts),
                    "rank_loss": rank_sum / len(prompts),
                    "mle_loss": mle_sum / len(prompts),
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
