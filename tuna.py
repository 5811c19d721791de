"""Tuna: instruction tuning with a stronger model's rankings (arXiv 2310.13385).

An instruction i has its original response r and N = 4 others r_k (Sec. 3.1); a teacher ranks them and the student
learns the ranking. Three stages, each a run of this script, in the paper's order:

    sft             Eq. 2     L_MLE = -log p(r | i) / |r|, on the original response
                    Sec. 3.4  --all_candidates, "Alpaca-Mul": the same on every response, each an example of its own
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
    all candidates, as the token mean of a micro-batch. Default: the original's. --mle_on all: over all, as the token
    mean of a prompt.
 3. The original response (`source` reference or human) is ranked among the others where it carries the annotation,
    as in the released data, and is used for L_MLE alone where it does not.
 4. beta belongs to the teacher's score alone: the student's exponent is 1, in print and in code. The code sorts by a
    `score` field of its data; here the score is computed from `logprob` and `num_tokens`, in which EOS never counts.
 5. Losses are averaged over prompts, and pairs never cross prompts.
 6. Candidates with equal teacher scores are not compared; a repeated text, or one with rank null, is not ranked.
 7. Learning rate, epoch, batch and two warm-up steps are Table 7's (the ranking stages) and Sec. 3.1's (sft: 2e-5);
    sft's epochs and batch are not printed (the recipe that Sec. 3.1 cites: 3 epochs, 64 prompts a GPU on 8), the
    cosine is the code's alone.
 8. The print says nothing of lengths. The code samples up to 512 new tokens and then cuts prompt + response at 512:
    a long response loses its end, which v and L_MLE then miss. Default: --max_length 1024, which holds both.
 9. The print is silent on precision; the code trains in fp16 and hands fp16 weights from stage to stage. Here bf16 with
    fp32 weights, which OUTPUT/model keeps: of bf16 ones a second stage's steps of 1e-6 would move hardly any.

The stage that --model itself came from says which model this is, hence lr and OUTPUT: Tuna learns from contextual
rankings of what Tuna_p (not Alpaca) answers, so sample and rank again (Sec. 2.4). A stage refuses rankings by the
log-probabilities of its own student, unless --own_logprobs.

    torchrun --nproc_per_node 4 tuna.py --stage sft --epochs 3 --batch_size 512               # Alpaca: runs/tuna-sft
    torchrun --nproc_per_node 4 tuna.py --stage probabilistic                                 # Tuna_p, from Alpaca
    torchrun --nproc_per_node 4 tuna.py --stage contextual                                    # Tuna_c, from Alpaca
    torchrun --nproc_per_node 4 tuna.py --stage contextual --model runs/tuna-probabilistic/model       # Tuna: runs/tuna
    torchrun --nproc_per_node 4 tuna.py --stage probabilistic --model runs/tuna-contextual/model       # Tuna_cp
"""

import math

import torch

import common
import runtime
from common import UserError, candidate_logprobs, in_range, pair_statistics
from files import load_candidates
from run import Run, shuffled_batches, with_held_out
from runtime import say

RUNS = {  # (stage, the stage of the run that --model came from) -> learning rate (Table 7; sft: Sec. 3.1), output
    ("sft", "sft"): (2e-5, "runs/tuna-sft"),
    ("probabilistic", "sft"): (1e-5, "runs/tuna-probabilistic"),  # Tuna_p
    ("contextual", "sft"): (1e-5, "runs/tuna-contextual"),  # Tuna_c
    ("contextual", "probabilistic"): (1e-6, "runs/tuna"),  # Tuna
    ("probabilistic", "contextual"): (1e-6, "runs/tuna-cp"),  # Tuna_cp
}
STAGES = ("sft", "probabilistic", "contextual")


def teacher_score(logprob, num_tokens, beta):
    """Eq. 3: the teacher's log p(r | i) / |r| ** beta. Numbers (or tensors of one shape) -> the same, larger better."""
    return logprob / num_tokens**beta


def teacher_levels(candidates, stage, beta):
    """One prompt's candidates -> [n] levels: 0, 1, ... from the worst, equals equal, NaN where unranked."""
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
    return [float(worst_first.index(worth[i])) if i in worth else math.nan for i in range(len(candidates))]


def ranking_loss(scores, margin, levels=None, pair_reduction="sum"):
    """Eq. 4 and 5: sum over pairs j < k of max(0, v_k - v_j + m (k - j)), candidates sorted best first -> scalar.

    scores [n]: the student's v, fp32. levels [n] says so where candidates are unsorted or tied: consecutive integers,
    larger better, so that k - j is a difference of levels; equals are not compared, and NaN with nothing.
    pair_reduction "mean_by_distance" is the released code's form: the mean over the pairs at each distance, summed.
    """
    v, m = scores, margin
    levels = -torch.arange(len(v), device=v.device) if levels is None else levels
    distances = levels[:, None] - levels[None, :]  # [n, n], k - j: j is the row, the better one where it is positive
    hinge = (v[None, :] - v[:, None] + m * distances).clamp(min=0)  # [n, n], Eq. 5
    if pair_reduction == "mean_by_distance":
        hinge = hinge / (distances[:, :, None, None] == distances).sum((2, 3)).clamp(min=1)  # pairs at each distance
    return torch.where(distances > 0, hinge, 0.0).sum()  # Eq. 4


def mle_loss(logprobs, lengths, taken):
    """Eq. 2, and L_MLE of Eq. 6: -log p / |r| of one response; of several (--mle_on all) the mean over their tokens.
    logprobs, lengths [n]; taken [n] bool, which responses -> scalar, 0 for none."""
    return -(logprobs * taken).sum() / (lengths * taken).sum().clamp(min=1)


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("Tuna").add_argument
    add("--stage", required=True, choices=STAGES, help="its --lr: sft 2e-5; 1e-5; on the other ranking 1e-6")
    add("--all_candidates", action="store_true", help="with --stage sft: learn every candidate, Alpaca-Mul (Sec. 3.4)")
    add("--length_penalty", type=in_range(float, 0), default=1.3, help="beta, the teacher's score, Eq. 3")
    add("--margin", type=in_range(float, 0), default=0.1, help="m, Eq. 5")
    add("--pair_reduction", choices=["sum", "mean_by_distance"], default="sum", help="Eq. 4 as printed, or as released")
    add("--mle_weight", type=in_range(float, 0), default=1.0, help="lambda, Eq. 6")
    add("--mle_on", choices=["original", "all"], default="original", help="L_MLE: as printed, or over all candidates")
    add("--own_logprobs", action="store_true", help="let log-probabilities of the student itself rank its data")
    # fmt: on
    defaults = {"lr": 1e-5, "schedule": "cosine", "warmup": 2, "epochs": 1, "batch_size": 128}
    common.add_training_flags(parser, model="huggyllama/llama-7b", **defaults)
    parser.set_defaults(lr=None, model=None)  # both go by the stage
    parser.set_defaults(max_length=1024)  # responses of 512 tokens beside their prompt
    args = parser.parse_args()
    if args.all_candidates and args.stage != "sft":
        parser.error("--all_candidates belongs to --stage sft; with the others it is --mle_on all")
    args.model = args.model or ("huggyllama/llama-7b" if args.stage == "sft" else "runs/tuna-sft/model")
    before = runtime.run_settings(args.model)
    lr, output = RUNS.get((args.stage, before.get("stage"))) or RUNS[args.stage, "sft"]
    args.lr = args.lr or lr
    args.output = args.output or output + "-mul" * args.all_candidates
    student = f"-{runtime.run_name(args.model)}" if before else ""
    data = {"sft": "train", "probabilistic": "teacher", "contextual": f"ranked{student}"}
    args.data = args.data or f"data/alpaca/{'teacher' if args.all_candidates else data[args.stage]}.jsonl"
    return args


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
  python collect_candidates.py sample --task alpaca --model {model} --temperature 1 --max_rouge_l 0.8
  python collect_candidates.py rank --task alpaca --by contextual --model RANKER --input {sampled}""",
}


def refuse_own(record, where, args, students):
    """Raise UserError where the student itself, or a run it came from, made what the record's ranking rests on."""
    teachers = {c.get("teacher") for c in record["candidates"]} if args.stage == "probabilistic" else set()
    makers = (teachers if teachers else {record.get("ranked_by")}) & students
    if makers and args.stage != "sft" and not args.own_logprobs:
        hint = "rank by a teacher's (rank --by logprob --model TEACHER), or say --own_logprobs"
        raise UserError(f"{where}: the log-probabilities are the student's own ({makers.pop()}): {hint}")


def students_of(model):
    """The names under which --model and the runs that led to it occur in records; a model that is no run's: its own."""
    names = {runtime.run_name(model)}
    while before := runtime.run_settings(model):
        names.add(runtime.run_name(model))
        model = before["model"]
    return names


def one_each(records):
    """Alpaca-Mul (Sec. 3.4): every response of every record an example of its own."""
    return [r | {"id": f"{r['id']}/{i}", "candidates": [c]} for r in records for i, c in enumerate(r["candidates"])]


def load_data(args, path, limit):
    """-> (records with the candidates that take part, their levels [n], whether L_MLE has them [n]), lists in step."""
    paths = {"model": args.model, "sampled": path.replace("ranked", "sampled")}
    runtime.require_data(path, COLLECT["probabilistic" if args.all_candidates else args.stage].format(**paths))
    learn_all = args.all_candidates if args.stage == "sft" else args.mle_on == "all"
    records, levels, in_mle, students = [], [], [], students_of(args.model)
    for record in load_candidates(path, limit=limit):
        candidates, where = record["candidates"], f"{path}: record {record['id']!r}"
        refuse_own(record, where, args, students)
        original = next((i for i, c in enumerate(candidates) if c["source"] in common.HUMAN), None)
        for i, c in enumerate(candidates):
            absent = [field for field in NEEDS[args.stage] if field not in c]
            if absent and i != original:
                hint = ANNOTATE[args.stage].format(path)
                raise UserError(f"{where}: candidates[{i}] has no {absent[0]!r}; add it with: {hint}")
        if original is None and not learn_all and (args.mle_weight or args.stage == "sft"):
            hint = "a candidate with source reference or human (without one: --mle_on all, or --mle_weight 0)"
            raise UserError(f"{where} has no reference response, which the MLE term needs: {hint}")
        level = teacher_levels(candidates, args.stage, args.length_penalty)
        mle = [(learn_all and bool(c["text"].strip())) or i == original for i, c in enumerate(candidates)]
        used = [i for i in range(len(candidates)) if mle[i] or not math.isnan(level[i])]
        if len(used) < 1 + args.all_candidates:
            more = "one response: Alpaca-Mul needs more (`teacher` adds them)" if used else "no candidate to learn from"
            raise UserError(f"{where} has {more}")
        records.append(record | {"candidates": [candidates[i] for i in used]})
        levels.append(torch.tensor([level[i] for i in used]))
        in_mle.append(torch.tensor([mle[i] for i in used]))
    if args.all_candidates:
        prompts, records = len(records), one_each(records)
        levels, in_mle = ([x for column in columns for x in column.split(1)] for columns in (levels, in_mle))
        say(f"Alpaca-Mul: {prompts} prompts are {len(records)} examples, a response each, --batch_size of them a step")
    ranked = [int((~x.isnan()).sum()) for x in levels]
    say(f"{len(records)} prompts, {sum(ranked)} ranked candidates, {sum(n < 2 for n in ranked)} prompts without a pair")
    if args.mle_weight == 0 and args.stage != "sft":
        say("--mle_weight 0: length-normalised ranking alone can degenerate, so watch the evaluation")
    return records, levels, in_mle


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    (records, levels, in_mle), train, held_out = with_held_out(load_data, args)
    run = Run(args, device)
    if run.finished:
        return
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    mle_weight = 1.0 if args.stage == "sft" else args.mle_weight

    run.begin(model, optimizer, tokenizer, encoded)
    for _, prompts in run.steps(shuffled_batches(len(train), args), held_out):
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, *columns in run.rows(prompts, levels, in_mle):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = logprobs / lengths  # [N], v of Eq. 5
            row_loss = 0.0
            by_prompt = zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, *columns)))
            for v, logp, length, level, mle in by_prompt:  # [n] each: pairs never cross prompts
                rank_term = ranking_loss(v, args.margin, level, args.pair_reduction)  # 0 in the sft stage: none ranked
                mle_term = mle_loss(logp, length, mle)
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
