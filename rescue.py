"""RESCUE: train a language model to rank partially ordered human and model responses (Wang et al., ACL SRW 2024).

Equations, sections and figures are numbered as in arXiv 2311.09136v3.

    torchrun --nproc_per_node 4 rescue.py --ordering label                            # the paper's main experiment
    torchrun --nproc_per_node 4 rescue.py --ordering none                             # its SFT baseline
    python rescue.py --ordering label --data d.jsonl --model demo/model --output runs/x   # one process, GPU or CPU

A prompt x has one human response and several model responses y. The model scores a response by its own
length-normalised log-likelihood (Sec. 3) and learns to score better responses higher:

    s(y)    = log pi(y | x) / |y| ** lambda            lambda = 1.0 for human, 0.85 for model responses (Sec. 7)
    Eq. 1   L_SFT    = -log pi(y* | x) / |y*|           y* the human response
    Eq. 2   L_Rank   = sum over pairs (better, worse) of max(0, s(worse) - s(better))
    Eq. 3   L_RESCUE = L_SFT + alpha L_Rank             alpha best between 0.01 and 0.1 (Sec. 7, Fig. 4)

An ordering (Sec. 4) says which pairs there are. A partial ordering (PO) does not compare all responses; a full one
(FO) does.

    human       PO: the human response before every model response
    label       PO: responses with the right label or answer before the others
    hybrid      PO: human, then right, then wrong. Multi-document QA (Sec. 5.2): right and anchored in the gold
                passage, then the other right ones, then wrong
    similarity  FO: by embedding similarity to the human response
    gpt         FO: the human response, then a stronger model's ranking of the others
    none        no pairs: supervised fine-tuning on the human response (Sec. 6.1)
    reward      FO: by a reward model's score; y* is the best-rewarded. It is RRHF if --alpha and both lambdas are 1

Where the print, the released code and this script differ:
 1. Eq. 2 as printed, -E max{0, log pi(y_b) - log pi(y_1-b)}, widens pairs that are already in order and ignores the
    others. The code has RRHF's hinge on violated pairs. Default: the code's. It is summed over the pairs of a prompt
    and averaged over prompts.
 2. Eq. 1 as printed is not divided by |y*|. In the code it is. Default: the code's.
 3. In the code, y* is the response with the best score in the data, and that is always the human one. Default: the
    human response, else the best correct one. A prompt with neither has no SFT term. With `reward`: the code's.
 4. In the code, the first response of a list has lambda 1.0. Default: the responses whose `source` is human have it.
    On multi-document QA the code has 1.0 for all: --length_scaling 1. (Sec. 7 is about NLI only.)
 5. The batch size is 64 in print and 8 in the code's script. alpha is not printed for the tables and 0.1 in the
    script. Default: 64 and 0.1.
 6. Multi-document QA has no human response and no SFT term, in print and code: --no_sft. Then alpha scales the whole
    loss. Adam's update does not depend on that scale; gradient clipping does.
 7. Ours: a prompt without a pair and without y* is left out of the batches (in the code its loss is 0). Of the other
    prompts, only y* and the candidates in a pair are computed.

The log: rank_loss and sft_loss are Eq. 2 and 1 per prompt. pair_accuracy is the share of ordered pairs with s(better) >
s(worse), and gap their mean difference. best_score is the mean score of the best candidates: if it falls, the model
gains in ranking by making all candidates unlikely. grad_norm is the norm before clipping, seconds the time of the step.
An evaluation's figures begin with eval_; `best` says whether its model was saved in OUTPUT/best.
"""

import math
import random
import time
from collections import Counter

import torch
from tqdm import tqdm

import common
from common import UserError, candidate_logprobs, in_range, pair_statistics, say


def ranking_loss(scores, levels, margin=0.0, weights=1.0):
    """Eq. 2 in the released form: the sum over pairs with levels[i] > levels[j] of max(0, scores[j] - scores[i]).

    scores [n] fp32; levels [n] preferences, larger better -> scalar. Ties are not compared; no pairs give 0. Ours: a
    margin inside the hinge, and weights [n, n] of the pairs.
    """
    better = levels[:, None] > levels[None, :]  # [n, n]
    violation = (scores[None, :] - scores[:, None] + margin).clamp(min=0)  # [n, n], s_worse - s_better where `better`
    return (violation * better * weights).sum()


def lambda_weights(scores, levels):
    """LiPO's lambda weights (arXiv 2402.01878) -> [n, n]: |G_i - G_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|.

    rank_i is the place of candidate i by score, 1 for the highest. G_i = 2 ** level_i - 1, levels numbered from 0.
    """
    rank = 1 + (scores[:, None] < scores[None, :]).sum(1)  # [n]
    gain = 2.0 ** levels.unique(return_inverse=True)[1] - 1  # [n]
    discount = 1 / torch.log(1.0 + rank)
    return (gain[:, None] - gain[None, :]).abs() * (discount[:, None] - discount[None, :]).abs()


def sft_loss(logprobs, lengths, target):
    """Eq. 1, divided by the length: the mean token NLL of y*, or 0 where there is none.

    logprobs, lengths [n]; target [n] bool, true only at y* -> scalar.
    """
    return torch.where(target, -logprobs / lengths, 0.0).sum()


def is_human(record):
    return [c["source"] in common.HUMAN for c in record["candidates"]]


def preference(record, ordering):
    """A record's candidates -> [n] preference levels, larger better (Sec. 4 and 5.2). Equal levels are not compared. A
    candidate of level NaN is not compared with any."""
    candidates, human = record["candidates"], is_human(record)
    if ordering == "none":
        return [0.0] * len(candidates)
    if ordering == "human":
        return [float(h) for h in human]
    if ordering in ("label", "hybrid"):
        # The human response carries the annotated label, so it is right unless it was marked otherwise.
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
    """The index of y* (Eq. 1) among the candidates, or None: the human response, else the best correct one (of equal
    ones the first). With `reward`: the best-rewarded one, as in RRHF."""
    candidates = range(len(levels))
    if ordering == "reward":
        return max(candidates, key=lambda i: levels[i])
    human = [i for i in candidates if is_human(record)[i]]
    right = [i for i in candidates if record["candidates"][i].get("correct")]
    best = sorted(right, key=lambda i: -math.inf if math.isnan(levels[i]) else levels[i], reverse=True)
    return next(iter(human + best), None)


def draw_candidates(record, num_candidates, seed):
    """At most `num_candidates` of a record's candidates (Fig. 4): the human ones, then a seeded draw of the others, in
    the file's order."""
    candidates = record["candidates"]
    human = [i for i, h in enumerate(is_human(record)) if h]
    others = [i for i in range(len(candidates)) if i not in human]
    room = max(0, num_candidates - len(human))
    drawn = random.Random(f"{seed}-{record['id']}").sample(others, min(room, len(others)))
    return record | {"candidates": [candidates[i] for i in sorted(human[:num_candidates] + drawn)]}


def select_candidates(record, args):
    """-> (record, levels [n], target [n] bool). The record keeps the candidates to compute: y* and those in a pair.
    target is true at y*."""
    record = draw_candidates(record, args.num_candidates, args.seed)
    levels = torch.tensor(preference(record, args.ordering))
    y = None if args.no_sft else sft_target(record, levels.tolist(), args.ordering)
    target = torch.tensor([i == y for i in range(len(levels))])
    better = levels[:, None] > levels[None, :]  # [n, n]
    used = (target | better.any(0) | better.any(1)).nonzero()[:, 0]
    return record | {"candidates": [record["candidates"][i] for i in used]}, levels[used], target[used]


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
    add("--margin", type=in_range(float, 0), default=0.0, help="ours: M in max(0, s(worse) - s(better) + M)")
    add("--pair_weights", choices=["none", "lambda"], default="none", help="ours: LiPO's weights of pairs, 2402.01878")
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
COLLECT = """  python collect_candidates.py prepare --task esnli --input esnli_train_1.csv esnli_train_2.csv \\
      --shuffle 0 --limit 20000
  torchrun --nproc_per_node 4 collect_candidates.py sample --task esnli --model meta-llama/Llama-2-7b-hf \\
      --num_samples 3 --shots 3 --stop "\\n\\n"
  python collect_candidates.py rank --task esnli --by {}"""


def check_annotations(record, path, ordering):
    """Raise UserError if a candidate lacks the annotation that the ordering needs. The message names the record and
    the command that adds it."""
    where, human, field = f"{path}: record {record['id']!r}", is_human(record), NEEDS.get(ordering)
    if not any(human) and ordering in ("human", "none", "similarity"):
        raise UserError(
            f"{where} has no human response (source human or reference): --ordering gpt and reward do without"
        )
    for i, (c, h) in enumerate(zip(record["candidates"], human)):
        if field and field not in c and not (h and field in ("correct", "similarity", "rank")):
            by = "label" if field == "correct" else ordering
            hint = f"python collect_candidates.py rank --by {by} --input {path} --output NEW.jsonl"
            raise UserError(f"{where}: candidates[{i}] has no {field!r}; add it with: {hint}")


def load_data(args, path, limit=None):
    """-> a list of (record, levels [n], target [n]) as select_candidates gives them. Prints what was found."""
    by = args.ordering if args.ordering in ("similarity", "gpt", "reward") else "label --drop_malformed"
    records = common.load_candidates(path, limit, how=COLLECT.format(by))
    for record in records:
        check_annotations(record, path, args.ordering)
    selected = [select_candidates(r, args) for r in records]
    kept = [s for s in selected if len(s[1])]
    pairs = sum(int((levels[:, None] > levels[None, :]).sum()) for _, levels, _ in kept)
    if args.ordering != "none" and not pairs:
        hint = "nothing can be ranked. Check what `rank` printed, and --num_candidates"
        raise UserError(f"{path}: --ordering {args.ordering} finds no two candidates of different preference: {hint}")
    count = Counter(is_human(r)[int(y.int().argmax())] if y.any() else None for r, _, y in selected)
    chosen = "the best-rewarded" if args.ordering == "reward" else "the best correct response"
    found = f"the human response in {count[True]}, {chosen} in {count[False]}, none in {count[None]}"
    say(f"{len(records)} prompts, {pairs} ordered pairs; y* is", "not used: --no_sft" if args.no_sft else found)
    if len(records) > len(kept):
        say(f"{len(records) - len(kept)} prompts are left out: they have neither a pair nor an SFT term")
    if left := sum(max(0, len(r["candidates"]) - args.num_candidates) for r in records):
        say(f"--num_candidates {args.num_candidates} leaves out {left} model responses, drawn by --seed")
    if args.no_sft:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch best_score (and see --margin)")
    return kept


def encode(tokenizer, data, args):
    """-> (Encoded, lambdas [n], levels [n], target [n]) for each record. n: its candidates."""
    encoded = common.encode_all(tokenizer, [record for record, _, _ in data], args)
    human = [torch.tensor(is_human(record)) for record, _, _ in data]
    lambdas = [torch.where(h, args.human_length_scaling, args.length_scaling) for h in human]
    return [(e, lam, levels, target) for e, lam, (_, levels, target) in zip(encoded, lambdas, data)]


LOSSES = ("loss", "rank_loss", "sft_loss")


def row_losses(model, batch, lambdas, levels, target, args):
    """Forward, scores and losses of one row -> [P, 7]: for each of its P prompts the LOSSES, then pair_statistics.

    The row has N candidates, and batch.sizes says how many of them belong to each prompt. lambdas, levels, target [N].
    """
    logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
    scores = logprobs / lengths**lambdas  # [N], s(y)
    columns = (x.split(batch.sizes) for x in (scores, logprobs, lengths, levels, target))
    prompts = []
    for s, logp, length, level, y in zip(*columns):  # [n] each: pairs never cross prompts
        weights = lambda_weights(s.detach(), level) if args.pair_weights == "lambda" else 1.0
        rank_term, sft_term = ranking_loss(s, level, args.margin, weights), sft_loss(logp, length, y)
        loss = sft_term + args.alpha * rank_term  # Eq. 3
        prompts.append(torch.stack([loss, rank_term, sft_term, *pair_statistics(s, level)]))
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
