"""Tuna: instruction tuning with a stronger model's rankings (arXiv 2310.13385).

An instruction i has its original response r and several others r_k; a teacher ranks them and the student learns the
ranking. Three stages, each a run of this script, in the paper's order:

    sft             Eq. 2     L_MLE = -log p(r | i) / |r|, on the original response (--all_candidates: on all,
                              "Alpaca-Mul")
    probabilistic   Sec. 2.2  ranks by the teacher's own likelihood,
                    Eq. 3     s(i, r_k) = log p(r_k | i) / |r_k| ** beta              beta = 1.3
    contextual      Sec. 2.3  ranks by a stronger model that reads all responses (`rank`; 0 is the best)

With the candidates sorted best first and the student's score v_k = log p(r_k | i) / |r_k|, the two ranking stages
minimise

    Eq. 4   L_rank = sum over pairs j < k of L_rank^{j,k}
    Eq. 5   L_rank^{j,k} = max(0, v_k - v_j + m (k - j))        margin m = 0.1
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

import torch

import common
import runtime
from common import UserError, candidate_logprobs, in_range, pair_statistics
from runtime import say

PAPER_LR = {"sft": 2e-5, "probabilistic": 1e-5, "contextual": 1e-5}  # Table 7; 1e-6 for contextual after probabilistic


def teacher_score(logprob, num_tokens, beta):
    """Eq. 3: the teacher's log p(r | i) / |r| ** beta. Numbers (or tensors of one shape) -> the same, larger better."""
    return logprob / num_tokens**beta


def teacher_levels(candidates, stage, beta):
    """One prompt's candidates -> [n] levels: 0, 1, ... from the worst, equals equal, -1 where unranked."""
    worth, seen = {}, set()
    for i, c in enumerate(candidates):
        if c["text"].strip() in seen:
            continue  # a repeated text can be neither better nor worse than itself
        if stage == "probabilistic" and "logprob" in c:
            worth[i] = teacher_score(c["logprob"], c["num_tokens"], beta)
        elif stage == "contextual" and c.get("rank") is not None:
            worth[i] = -c["rank"]
        if i in worth:
            seen.add(c["text"].strip())
    worst_first = sorted(set(worth.values()))
    return [worst_first.index(worth[i]) if i in worth else -1 for i in range(len(candidates))]


def ranking_loss(scores, margin, levels=None, pair_reduction="sum"):
    """Eq. 4 and 5: sum over pairs j < k of max(0, v_k - v_j + m (k - j)), candidates sorted best first -> scalar.

    scores [n]: the student's v, fp32. levels [n] says so where candidates are unsorted or tied: consecutive integers,
    larger better, so that k - j is a difference of levels; equals are not compared. pair_reduction "mean_by_distance"
    is the released code's form: the mean over the pairs at each distance, summed.
    """
    v, m = scores, margin
    levels = -torch.arange(len(v), device=v.device) if levels is None else levels
    distances = levels[:, None] - levels[None, :]  # [n, n], k - j: j is the row, the better one where it is positive
    weights = (distances > 0).float()
    if pair_reduction == "mean_by_distance":
        d = distances.clamp(min=0)
        weights = weights / d.flatten().bincount()[d]
    hinge = (v[None, :] - v[:, None] + m * distances).clamp(min=0)  # [n, n], Eq. 5
    return (weights * hinge).sum()  # Eq. 4


def mle_loss(logprobs, lengths):
    """Eq. 2, and L_MLE of Eq. 6: mean token NLL over these candidates' tokens. logprobs, lengths [n] -> scalar."""
    return -logprobs.sum() / lengths.sum()


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("Tuna").add_argument
    add("--stage", required=True, choices=list(PAPER_LR), help="see above; --lr is 2e-5 for sft, else 1e-5 (Table 7)")
    add("--all_candidates", action="store_true", help="with --stage sft: learn every candidate, Alpaca-Mul")
    add("--length_penalty", type=in_range(float, 0), default=1.3, help="beta, the teacher's score, Eq. 3")
    add("--margin", type=in_range(float, 0), default=0.1, help="m, Eq. 5")
    add("--pair_reduction", choices=["sum", "mean_by_distance"], default="sum", help="Eq. 4 as printed, or as released")
    add("--mle_weight", type=in_range(float, 0), default=1.0, help="lambda, Eq. 6")
    add("--mle_on", choices=["original", "all"], default="original", help="L_MLE: as printed, or over all candidates")
    # fmt: on
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


def load_data(args, path, limit):
    """-> (records with the candidates that take part, their levels [n], whether L_MLE has them [n]), lists in step."""
    runtime.require_data(path, COLLECT[args.stage])
    learn_all = args.all_candidates if args.stage == "sft" else args.mle_on == "all"
    records, levels, in_mle = [], [], []
    for record in common.load_candidates(path, limit=limit):
        candidates, where = record["candidates"], f"{path}: record {record['id']!r}"
        original = next((i for i, c in enumerate(candidates) if c["source"] in common.HUMAN), None)
        for i, c in enumerate(candidates):
            absent = [field for field in NEEDS[args.stage] if field not in c]
            if absent and i != original:
                hint = ANNOTATE[args.stage].format(path)
                raise UserError(f"{where}: candidates[{i}] has no {absent[0]!r}; add it with: {hint}")
        if original is None and not learn_all and (args.mle_weight or args.stage == "sft"):
            raise UserError(f"{where} has no reference response, which the MLE term needs")
        level = teacher_levels(candidates, args.stage, args.length_penalty)
        mle = [(learn_all and bool(c["text"].strip())) or i == original for i, c in enumerate(candidates)]
        used = [i for i in range(len(candidates)) if level[i] >= 0 or mle[i]]
        if not used:
            raise UserError(f"{where} has no candidate to learn from")
        records.append(record | {"candidates": [candidates[i] for i in used]})
        levels.append(torch.tensor([level[i] for i in used]))
        in_mle.append(torch.tensor([mle[i] for i in used]))
    ranked = [int((x >= 0).sum()) for x in levels]
    say(f"{len(records)} prompts, {sum(ranked)} ranked candidates, {sum(n < 2 for n in ranked)} prompts without a pair")
    if args.mle_weight == 0 and args.stage != "sft":
        say("--mle_weight 0: length-normalised ranking alone can degenerate, so watch the evaluation")
    return records, levels, in_mle


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    (records, levels, in_mle), train, held_out = runtime.with_held_out(load_data, args)
    run = runtime.Run(args, device)
    if run.finished:
        return
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    mle_weight = 1.0 if args.stage == "sft" else args.mle_weight

    run.begin(model, optimizer, tokenizer, encoded)
    for _, prompts in run.steps(runtime.shuffled_batches(len(train), args), held_out):
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, *columns in run.rows(prompts, levels, in_mle):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = logprobs / lengths  # [N], v of Eq. 5
            row_loss = 0.0
            by_prompt = zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, *columns)))
            for v, logp, length, level, mle in by_prompt:  # [n] each: pairs never cross prompts
                v, level = v[level >= 0], level[level >= 0]
                rank_term = ranking_loss(v, args.margin, level, args.pair_reduction)  # 0 in the sft stage: none ranked
                mle_term = mle_loss(logp[mle], length[mle]) if mle.any() else v.new_zeros(())
                loss = rank_term + mle_weight * mle_term  # Eq. 6
                row_loss = row_loss + loss
                run.count(weight, pair_statistics(v, level), loss=loss, rank_loss=rank_term, mle_loss=mle_term)
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
