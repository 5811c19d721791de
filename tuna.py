"""Tuna: instruction tuning with a stronger model's rankings (Li et al., Findings of EMNLP 2023).

Equations, sections and tables are numbered as in arXiv 2310.13385v1.

    torchrun --nproc_per_node 4 tuna.py --stage sft --epochs 3 --batch_size 512               # Alpaca: runs/tuna-sft
    torchrun --nproc_per_node 4 tuna.py --stage probabilistic                                 # Tuna_p, from Alpaca
    torchrun --nproc_per_node 4 tuna.py --stage contextual                                    # Tuna_c, from Alpaca
    torchrun --nproc_per_node 4 tuna.py --stage contextual --model runs/tuna-probabilistic/model       # Tuna: runs/tuna
    torchrun --nproc_per_node 4 tuna.py --stage probabilistic --model runs/tuna-contextual/model       # Tuna_cp

An instruction i has its original response r and N = 4 others r_k (Sec. 3.1). A teacher ranks them, and the student
learns the ranking. There are three stages, each a run of this script:

    sft             Eq. 2     L_MLE = -log p(r | i) / |r|, on the original response
                    Sec. 3.4  --all_candidates, "Alpaca-Mul": the same, with every response as its own example
    probabilistic   Sec. 2.2  ranks by the teacher's own likelihood,
                    Eq. 3     s(i, r_k) = log p(r_k | i) / |r_k| ** beta              beta = 1.3
    contextual      Sec. 2.3  ranks by a stronger model that reads all responses (`rank`; 0 is the best)

The candidates are sorted best first. v_k = log p(r_k | i) / |r_k| is the student's score. The two ranking stages
minimise

    Eq. 4   L_rank = sum over pairs j < k of L_rank^{j,k}
    Eq. 5   L_rank^{j,k} = max(0, v_k - v_j + m (k - j))        margin m = 0.1
    Eq. 6   L = L_rank + lambda L_MLE                           L_MLE on the original response, lambda = 1

Where the print and the released code differ, or the print is silent:
 1. Eq. 4 sums over pairs. The code takes the mean over the pairs at each distance k - j and sums over distances.
    Default: the sum. --pair_reduction mean_by_distance: the code's.
 2. Eq. 6 has the cross entropy of the original response (its minus sign is missing in print). The code takes it over
    all candidates, as the token mean of a micro-batch. Default: the original's. --mle_on all: over all, as the token
    mean of a prompt.
 3. The original response (`source` reference or human) is ranked with the others if it carries the annotation, as in
    the released data. If not, it is used only for L_MLE.
 4. beta is for the teacher's score only. The student's exponent is 1, in print and code. The code sorts by a `score`
    field of its data. Here the score is computed from `logprob` and `num_tokens`, which never include EOS.
 5. Losses are averaged over prompts, and pairs never cross prompts.
 6. Candidates with equal teacher scores are not compared. A repeated text, or one with rank null, is not ranked.
 7. Learning rate, epoch, batch and two warm-up steps are from Table 7 (ranking stages) and Sec. 3.1 (sft: 2e-5). The
    epochs and batch size of sft are not printed; the recipe that Sec. 3.1 cites has 3 epochs and 64 prompts on each of
    8 GPUs. The cosine schedule is from the code; the print names none.
 8. The print is silent on lengths. The code samples up to 512 new tokens and then cuts prompt + response at 512, so
    v and L_MLE miss the end of a long response. Default: --max_length 1024, which holds both.
 9. The print is silent on precision. The code trains in fp16 and passes fp16 weights from stage to stage. Here the
    compute is bf16, and the weights are fp32, also in OUTPUT/model. In bf16 the second stage's updates of about 1e-6
    would be rounded away.

The run that made --model decides the learning rate and the output folder (RUNS below). Tuna learns from contextual
rankings of Tuna_p's answers, so sample and rank again (Sec. 2.4). A stage refuses rankings that come from the student's
own log-probabilities, unless --own_logprobs is given.

The log: rank_loss and mle_loss are Eq. 4 and L_MLE per prompt. pair_accuracy is the share of ordered pairs with
v_better > v_worse, and gap their mean difference. best_score is the mean score of the best candidates: if it falls,
the model gains in ranking by making all candidates unlikely. grad_norm is the norm before clipping, seconds the time of
the step. An evaluation's figures begin with eval_; `best` says whether its model was saved in OUTPUT/best.
"""

import math
import time

import torch
from tqdm import tqdm

import common
from common import UserError, candidate_logprobs, in_range, pair_statistics, say

ALPACA = "runs/tuna-sft/model"
RUNS = {  # (--stage, stage of the run that made --model): --lr (Table 7; sft: Sec. 3.1), --output
    ("sft", "sft"): (2e-5, "runs/tuna-sft"),  # Alpaca
    ("probabilistic", "sft"): (1e-5, "runs/tuna-probabilistic"),  # Tuna_p
    ("contextual", "sft"): (1e-5, "runs/tuna-contextual"),  # Tuna_c
    ("contextual", "probabilistic"): (1e-6, "runs/tuna"),  # Tuna
    ("probabilistic", "contextual"): (1e-6, "runs/tuna-cp"),  # Tuna_cp
}
STAGES = {  # --stage: --data, --model
    "sft": ("data/alpaca/train.jsonl", "huggyllama/llama-7b"),
    "probabilistic": ("data/alpaca/teacher.jsonl", ALPACA),
    "contextual": ("data/alpaca/ranked-STUDENT.jsonl", ALPACA),
}


def teacher_score(logprob, num_tokens, beta):
    """Eq. 3: the teacher's log p(r | i) / |r| ** beta. Numbers (or tensors of one shape) -> the same, larger better."""
    return logprob / num_tokens**beta


def teacher_levels(candidates, stage, beta):
    """One prompt's candidates -> [n] levels: 0, 1, ... from the worst, equal for equal scores. NaN: unranked."""
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

    scores [n]: the student's v, fp32. Candidates that are unsorted or tied need levels [n]: consecutive integers,
    larger better, so that k - j is a difference of levels. Equal levels are not compared, and NaN is not compared.
    pair_reduction "mean_by_distance" is the released code's form: the mean over the pairs at each distance, summed.
    """
    v, m = scores, margin
    levels = -torch.arange(len(v), device=v.device) if levels is None else levels
    distances = levels[:, None] - levels[None, :]  # [n, n], k - j; positive where the row's candidate is better
    hinge = (v[None, :] - v[:, None] + m * distances).clamp(min=0)  # [n, n], Eq. 5
    if pair_reduction == "mean_by_distance":
        hinge = hinge / (distances[:, :, None, None] == distances).sum((2, 3)).clamp(min=1)  # pairs at each distance
    return torch.where(distances > 0, hinge, 0.0).sum()  # Eq. 4


def mle_loss(logprobs, lengths, taken):
    """Eq. 2, and L_MLE of Eq. 6: -log p / |r| of one response, or (--mle_on all) the mean over the tokens of several.
    logprobs, lengths [n]; taken [n] bool: which responses -> scalar, 0 if none."""
    return -(logprobs * taken).sum() / (lengths * taken).sum().clamp(min=1)


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("Tuna").add_argument
    add("--stage", required=True, choices=STAGES, help="decides --data, --model, --lr and --output")
    add("--all_candidates", action="store_true", help="with --stage sft: learn every candidate, Alpaca-Mul (Sec. 3.4)")
    add("--length_penalty", type=in_range(float, 0), default=1.3, help="beta, the teacher's score, Eq. 3")
    add("--margin", type=in_range(float, 0), default=0.1, help="m, Eq. 5")
    add("--pair_reduction", choices=["sum", "mean_by_distance"], default="sum", help="Eq. 4 as printed, or as released")
    add("--mle_weight", type=in_range(float, 0), default=1.0, help="lambda, Eq. 6")
    add("--mle_on", choices=["original", "all"], default="original", help="L_MLE: as printed, or over all candidates")
    add("--own_logprobs", action="store_true", help="let log-probabilities of the student itself rank its data")
    # fmt: on
    defaults = {"schedule": "cosine", "warmup": 2, "epochs": 1, "batch_size": 128}
    common.add_training_flags(parser, model=None, lr=None, **defaults)
    parser.set_defaults(max_length=1024)  # responses of 512 tokens beside their prompt
    args = parser.parse_args()
    if args.all_candidates and args.stage != "sft":
        parser.error("--all_candidates belongs to --stage sft; with the others it is --mle_on all")
    data, model = STAGES["probabilistic" if args.all_candidates else args.stage][0], STAGES[args.stage][1]
    args.model = args.model or model
    before = common.run_settings(args.model)
    lr, output = RUNS.get((args.stage, before.get("stage")), RUNS[args.stage, "sft"])
    args.lr = args.lr or lr
    args.output = args.output or output + "-mul" * args.all_candidates
    args.data = args.data or data.replace("-STUDENT", f"-{common.run_name(args.model)}" if before else "")
    return args


NEEDS = {"sft": (), "probabilistic": ("logprob", "num_tokens"), "contextual": ("rank",)}
RANK_BY = "python collect_candidates.py rank --by {} --input {} --output NEW.jsonl"
ANNOTATE = {"probabilistic": "logprob --model TEACHER", "contextual": "contextual --model RANKER"}
COLLECT = {
    "sft": "  python collect_candidates.py prepare --task alpaca --input alpaca_data.json",
    "probabilistic": """  python collect_candidates.py prepare --task alpaca --input alpaca_data.json
  python collect_candidates.py teacher --task alpaca --model TEACHER --num_samples 4 --temperature 1 --logprobs""",
    "contextual": """  python collect_candidates.py prepare --task alpaca --input alpaca_data.json
  python collect_candidates.py sample --task alpaca --model {model} --temperature 1 --max_rouge_l 0.8
  python collect_candidates.py rank --task alpaca --by contextual --model RANKER --input {sampled}""",
}


def students_of(model):
    """The names in records of --model and of the runs that it was trained from."""
    names = {common.run_name(model)}
    while before := common.run_settings(model):
        names.add(common.run_name(model))
        model = before["model"]
    return names


def check_annotations(record, path, args, students):
    """Raise UserError, naming the record, if it lacks what its stage needs, or if its ranking comes from the student's
    own log-probabilities."""
    candidates, where = record["candidates"], f"{path}: record {record['id']!r}"
    for i, c in enumerate(candidates):
        absent = [field for field in NEEDS[args.stage] if field not in c]
        if absent and i != original(record):
            hint = RANK_BY.format(ANNOTATE[args.stage], path)
            raise UserError(f"{where}: candidates[{i}] has no {absent[0]!r}; add it with: {hint}")
    teachers = {c.get("teacher") for c in candidates} if args.stage == "probabilistic" else set()
    makers = (teachers or {record.get("ranked_by")}) & students
    if makers and args.stage != "sft" and not args.own_logprobs:
        hint = "rank by a teacher's (rank --by logprob --model TEACHER), or say --own_logprobs"
        raise UserError(f"{where}: the log-probabilities are the student's own ({makers.pop()}): {hint}")


def original(record):
    """The index of the original response, or None."""
    return next((i for i, c in enumerate(record["candidates"]) if c["source"] in common.HUMAN), None)


def select_candidates(record, path, args):
    """-> (record, levels [n], in_mle [n] bool). The record keeps the candidates to compute: ranked or in L_MLE."""
    candidates, where, of_original = record["candidates"], f"{path}: record {record['id']!r}", original(record)
    learn_all = args.all_candidates if args.stage == "sft" else args.mle_on == "all"
    if of_original is None and not learn_all and (args.mle_weight or args.stage == "sft"):
        hint = "a candidate with source reference or human (without one: --mle_on all, or --mle_weight 0)"
        raise UserError(f"{where} has no reference response, which the MLE term needs: {hint}")
    level = teacher_levels(candidates, args.stage, args.length_penalty)
    mle = [(learn_all and bool(c["text"].strip())) or i == of_original for i, c in enumerate(candidates)]
    used = [i for i in range(len(candidates)) if mle[i] or not math.isnan(level[i])]
    if len(used) < 1 + args.all_candidates:
        more = "one response: Alpaca-Mul needs more (`teacher` adds them)" if used else "no candidate to learn from"
        raise UserError(f"{where} has {more}")
    levels, in_mle = torch.tensor([level[i] for i in used]), torch.tensor([mle[i] for i in used])
    return record | {"candidates": [candidates[i] for i in used]}, levels, in_mle


def one_each(record, levels, in_mle):
    """Alpaca-Mul (Sec. 3.4): every response of a record becomes its own example."""
    for i, c in enumerate(record["candidates"]):
        yield record | {"id": f"{record['id']}/{i}", "candidates": [c]}, levels[i : i + 1], in_mle[i : i + 1]


def load_data(args, path, limit=None):
    """-> a list of (record, levels [n], in_mle [n]) as select_candidates gives them. Prints what was found."""
    how = COLLECT["probabilistic" if args.all_candidates else args.stage]
    how = how.format(model=args.model, sampled=path.replace("ranked", "sampled"))
    records, students = common.load_candidates(path, limit, how), students_of(args.model)
    for record in records:
        check_annotations(record, path, args, students)
    selected = [select_candidates(r, path, args) for r in records]
    if args.all_candidates:
        selected = [x for s in selected for x in one_each(*s)]
        say(f"Alpaca-Mul: {len(records)} prompts are {len(selected)} examples, one per response; batches hold examples")
    ranked = [int((~levels.isnan()).sum()) for _, levels, _ in selected]
    say(
        f"{len(selected)} prompts, {sum(ranked)} ranked candidates, {sum(n < 2 for n in ranked)} prompts without a pair"
    )
    if args.mle_weight == 0 and args.stage != "sft":
        say("no MLE term: length-normalised ranking alone can degenerate, so watch best_score and the evaluation")
    return selected


def encode(tokenizer, data, args):
    """-> (Encoded, levels [n], in_mle [n]) for each record. n: its candidates."""
    encoded = common.encode_all(tokenizer, [record for record, _, _ in data], args)
    return [(e, levels, in_mle) for e, (_, levels, in_mle) in zip(encoded, data)]


LOSSES = ("loss", "rank_loss", "mle_loss")


def row_losses(model, batch, levels, in_mle, args):
    """Forward, scores and losses of one row -> [P, 7]: for each of its P prompts the LOSSES, then pair_statistics.

    The row has N candidates, and batch.sizes says how many of them belong to each prompt. levels, in_mle [N].
    """
    logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
    scores = logprobs / lengths  # [N], v of Eq. 5
    mle_weight = 1.0 if args.stage == "sft" else args.mle_weight
    columns = (x.split(batch.sizes) for x in (scores, logprobs, lengths, levels, in_mle))
    prompts = []
    for v, logp, length, level, mle in zip(*columns):  # [n] each: pairs never cross prompts
        rank_term = ranking_loss(v, args.margin, level, args.pair_reduction)  # 0 in the sft stage: no ranked candidate
        mle_term = mle_loss(logp, length, mle)
        loss = rank_term + mle_weight * mle_term  # Eq. 6
        prompts.append(torch.stack([loss, rank_term, mle_term, *pair_statistics(v, level)]))
    return torch.stack(prompts)


@torch.no_grad()
def evaluate(model, tokenizer, prompts, args):
    """-> the figures of held-out prompts, for the log."""
    model.eval()
    rows = common.rows(prompts, model, tokenizer, args)
    terms = [(weight, batch, row_losses(model, batch, *columns, args)) for weight, batch, *columns in rows]
    model.train()
    return {f"eval_{k}": v for k, v in common.means(LOSSES, terms, len(prompts)).items()}


def main():
    args = parse_args()
    process, world, device = common.init_distributed()
    data = load_data(args, args.data, args.max_train_samples)
    held_out = load_data(args, args.eval_data) if args.eval_data else []
    output = common.open_run(args, __doc__)  # the program ends here if the run is finished

    model, tokenizer = common.load_model(args, device)  # fp32 weights, sharded; computes in bf16 on CUDA
    prompts, held_out = (encode(tokenizer, x, args) for x in (data, held_out))
    if not args.padded:
        common.check_packing(model, [encoded for encoded, *_ in prompts + held_out])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    batches = common.shuffled_batches(len(prompts), args)  # the prompts of every step
    start = common.load_checkpoint(output, model, optimizer)  # the steps taken: 0 in a new run
    evaluations, log = common.open_log(args, output, start)
    common.on_stop(lambda: common.save_checkpoint(output, step, model, optimizer))

    for step in tqdm(range(start, len(batches) + 1), initial=start, total=len(batches), disable=process != 0):
        last = step == len(batches)
        if held_out and step not in evaluations and (step % args.eval_every == 0 or last):  # `step` steps are taken
            evaluations[step] = line = {"step": step} | evaluate(model, tokenizer, held_out, args)
            line["best"] = common.is_best(evaluations, step)
            if line["best"]:
                common.save_model(model, tokenizer, output / "best")
            log(line)
        if last:
            break
        began, batch_prompts, terms = time.perf_counter(), [prompts[i] for i in batches[step]], []
        torch.manual_seed(args.seed * 1_000_003 + step * world + process)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)

        for weight, batch, *columns in common.rows(batch_prompts, model, tokenizer, args):
            row = row_losses(model, batch, *columns, args)  # [P, 7]
            # FSDP averages over processes. The loss is the mean over the prompts of the global batch.
            (weight * row[:, 0].sum() * world / len(batch_prompts)).backward()
            terms.append((weight, batch, row.detach()))

        figures = common.means(LOSSES, terms, len(batch_prompts))
        grad_norm = common.clip_grad_norm(model, args.max_grad_norm, [encoded.id for encoded, *_ in batch_prompts])
        optimizer.step()
        optimizer.zero_grad()
        timing = {"grad_norm": grad_norm, "lr": group["lr"], "seconds": time.perf_counter() - began}
        log({"step": step + 1} | figures | timing)
        if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0 or step + 1 == len(batches):
            common.save_checkpoint(output, step + 1, model, optimizer)

    common.save_model(model, tokenizer, output / "model")
    common.drop_checkpoints(output)
    say(f"model saved in {output / 'model'}")


if __name__ == "__main__":
    common.run_cli(main)
