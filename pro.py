"""PRO: preference ranking optimization, one loss over a ranking of any length (arXiv 2306.17492).

A prompt x has responses y^1 > y^2 > ... > y^n, best first. The model's own mean token log-likelihood scores them, each
response is contrasted with all that follow it, and a reward model's gaps sharpen or soften every contrast:

    Eq. 6      s_k = log pi(y^k | x) / |y^k|
    Eq. 8      L_PRO = - sum over k < n of log( exp(s_k) / sum over i >= k of exp(s_i) )
    Eq. 9      the same with exp(s_k / T_k^k) and exp(s_i / T_k^i)
    Eq. 10-11  T_k^i = 1 / (r_k - r_i) for i > k,   T_k^k = min over i > k of T_k^i      r: the reward model's logits
    Eq. 7      L = L_PRO + beta (n - 1)^2 L_SFT,   L_SFT = -log pi(y^1 | x),  beta = 0.05 (Sec. 4.3)

Table 5's ablations are flags and combine: --no_sft, --no_temperature (Eq. 8), --first_only (the term k = 1 alone);
without L_PRO (--no_ranking) it is the baseline BoN, supervised fine-tuning on the best of n. The other baselines: RRHF
is rescue.py's, on this script's backbone and setting (Sec. 4.4): recipes/README.md has the command in full; CoH is
`collect_candidates.py hindsight`, then --no_ranking.

Algorithm 1, self-bootstrapping (--bootstrap_splits K --reward_model M): the prompts are split in K; before each split
the current model answers its prompts, M scores the answers, and they join the rankings (footnote 6: never in first
place, and the rewards are sorted anew so that they still descend). With --epochs 2 each split is trained twice on.

--eval_data FILE evaluates every --eval_every steps: loss and pair accuracy, with --reward_model also the reward of
greedy answers; the best step's model stays in OUTPUT/best, which is what the released code tests.

Where the print and the released code differ, or the print is silent:
 1. Temperatures multiply as reward gaps, 1/T = r_k - r_i, and each sum is a log-sum-exp in float32. The released code
    exponentiates and adds 1e-10 inside the logarithm: wrong from gaps of about 10 on, inf or NaN for negative ones.
 2. Equal rewards: the limit T -> infinity, so the term is exp(0) = 1; where all rewards from k on are equal, term k is
    the constant log(n - k + 1) without gradient. They are no pair of the pair accuracy. Rewards that ascend give NaN,
    which ends a run (the records are sorted on loading).
 3. BoN and SFT, with no other term, are the usual token mean of Eq. 1; as released, L_SFT beside L_PRO is the sum that
    Eq. 1 prints: --sft_reduction.
 4. beta is multiplied with (n - 1)^2 of each prompt's own n, which is the ranking length where all have the same.
 5. Print is silent on the schedule (released: constant), weight decay (released: torch's default 0.01; here 0, as in
    the other scripts), the choice of the checkpoint (released: the best of 280 test samples by reward, every 600
    steps), and prompts (released: their last 384 tokens; a response has what is left of 512).
 6. A whole response ends with EOS. In the released code the padding scores as EOS, so it ends where its row of the
    batch is shorter than the longest, and a cut one never.
 7. Silent on K and on how y is sampled in Algorithm 1, line 6: K is a flag, temperature 1, 128 new tokens.

    torchrun --nproc_per_node 4 pro.py                                                 # data/hh/ranked.jsonl
    torchrun --nproc_per_node 4 pro.py --no_ranking                                    # BoN
    torchrun --nproc_per_node 4 pro.py --eval_data VALIDATION --reward_model RM   # VALIDATION: after `rank`
    torchrun --nproc_per_node 4 pro.py --bootstrap_splits 4 --reward_model RM          # Algorithm 1
    python pro.py --data d.jsonl --model demo/model --output runs/x                    # one process, GPU or CPU
"""

import random

import torch

import common
import runtime
from common import UserError, candidate_logprobs, in_range, pair_statistics
from files import GIVEN, load_candidates
from run import Run, shuffled_batches, with_held_out
from runtime import say


def pro_loss(scores, rewards=None, first_only=False):
    """Eq. 8, or with rewards Eq. 9-11. scores [n] fp32, best first; rewards [n], descending -> scalar.

    first_only keeps the term k = 1 (Table 5). Fewer than two scores give 0. Rewards that ascend give NaN: to raise an
    error would wait for the GPU at every prompt.
    """
    loss = scores.sum() * 0.0
    for k in range(min(1, len(scores) - 1) if first_only else len(scores) - 1):
        z = scores[k:]  # [n - k]
        if rewards is not None:
            gaps = rewards[k] - rewards[k + 1 :]  # [n - k - 1], 1 / T_k^i, Eq. 10
            own = gaps.max(0, keepdim=True).values  # 1 / T_k^k, Eq. 11: the smallest temperature is the largest gap
            z = z * torch.cat([own, gaps])  # Eq. 9
        loss = loss + torch.logsumexp(z - z[0], 0)  # -log of exp(z_k) / sum over i >= k of exp(z_i)
    return loss if rewards is None else torch.where((rewards.diff() > 0).any(), torch.nan, loss)


def sft_loss(logprobs, lengths, reduction):
    """L_SFT of Eq. 7: NLL of the best candidate, the first one. logprobs, lengths [n] -> scalar; reduction over its
    tokens: "sum" or "mean"."""
    return -logprobs[0] / (lengths[0] if reduction == "mean" else 1.0)


def insert_candidate(candidates, new):
    """Footnote 6: `new` in a ranking, best first, by its reward but never in the first place -> the longer ranking."""
    rest = sorted([*candidates[1:], new], key=lambda c: -c["reward"])  # stable: among equals the new one comes last
    return [c | {"rank": place} for place, c in enumerate([candidates[0], *rest])]


def ranking_levels(candidates):
    """Preference levels [n] of a ranking, best first: its rewards, where it has them (sorted anew, footnote 6: of
    answers that joined it one may be above the first), else the negative ranks."""
    if all("reward" in c for c in candidates):
        return torch.tensor(sorted((float(c["reward"]) for c in candidates), reverse=True))
    return torch.tensor([-float(c.get("rank") or 0) for c in candidates])


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("PRO").add_argument
    add("--beta", type=in_range(float, 0), default=0.05, help="the 0.05 of Eq. 7's weight, 0.05 (n-1)^2, Sec. 4.3")
    add("--sft_reduction", choices=["sum", "mean"], help="over tokens (default: sum as released; BoN: mean)")
    add("--ranking_length", type=in_range(int, 2), help="candidates a prompt, l in the paper (default: all; Fig. 3)")
    add("--no_temperature", action="store_true", help="Eq. 8 instead of Eq. 9-11 (Table 5: -T)")
    add("--no_sft", action="store_true", help="drop L_SFT (Table 5)")
    add("--first_only", action="store_true", help="the best against the rest alone (Table 5: -L_PRO^{k>1})")
    add("--no_ranking", action="store_true", help="drop L_PRO: supervised fine-tuning on the best, BoN (Sec. 4.4)")
    add = parser.add_argument_group("Algorithm 1").add_argument
    add("--bootstrap_splits", type=in_range(int, 1), help="K: sample, score, insert before each split")
    add("--sampling_temperature", type=in_range(float, above=0), default=1.0, help="of the sampled responses")
    add = parser.add_argument_group("answers, of Algorithm 1 and of --eval_data").add_argument
    add("--reward_model", help="scores them: hub id or folder, the one that scored the data (RM_train, Sec. 4.3)")
    add("--max_new_tokens", type=in_range(int, 1), default=128, help="of an answer, Sec. 4.3")
    # fmt: on
    defaults = {"lr": 5e-6, "schedule": "constant", "warmup": 0, "epochs": 2, "batch_size": 112}
    common.add_training_flags(parser, model="huggyllama/llama-7b", **defaults)
    parser.set_defaults(max_prompt_length=384, eval_every=600)  # as released
    args = parser.parse_args()
    if args.no_ranking and (args.no_sft or args.no_temperature or args.first_only or args.bootstrap_splits):
        parser.error("--no_ranking drops L_PRO: --no_sft would leave no loss, and no other flag of L_PRO has a meaning")
    if args.bootstrap_splits and not args.reward_model:
        parser.error("--bootstrap_splits needs --reward_model")
    if args.reward_model and not (args.bootstrap_splits or args.eval_data):
        parser.error("--reward_model needs --bootstrap_splits or --eval_data, whose answers it scores")
    args.sft_reduction = args.sft_reduction or ("mean" if args.no_ranking else "sum")
    names = ("no_temperature", "no_sft", "first_only", "no_ranking", "bootstrap_splits")
    what = "-".join(n.removesuffix("_splits") for n in names if getattr(args, n)) or "full"
    args.data = args.data or "data/hh/ranked.jsonl"
    args.output = args.output or f"runs/pro-{what}"
    return args


RANK_BY = "python collect_candidates.py rank --by reward --input {} --output NEW.jsonl"
COLLECT = """  python collect_candidates.py prepare --task hh --subset harmless-base
  torchrun --nproc_per_node 4 collect_candidates.py sample --task hh --model huggyllama/llama-7b --num_samples 1 \\
      --max_prompt_length 384 --stop Human: human: Assistant: assistant:
  python collect_candidates.py rank --task hh --by reward"""


def select_candidates(record, ranking_length, seed):
    """At most `ranking_length` of a record's candidates: those the data came with first, then a seeded draw of the
    others, in the file's order."""
    candidates = record["candidates"]
    given = [i for i, c in enumerate(candidates) if c["source"] in GIVEN]
    others = [i for i in range(len(candidates)) if i not in given]
    drawn = random.Random(f"{seed}-{record['id']}").sample(others, len(others))
    return record | {"candidates": [candidates[i] for i in sorted([*given, *drawn][:ranking_length])]}


def sort_candidates(record, needs_reward, path):
    """The record's candidates best first: by `reward`, or by `rank` where the loss needs no reward."""
    candidates = record["candidates"]
    if all("reward" in c for c in candidates):
        return record | {"candidates": sorted(candidates, key=lambda c: -c["reward"])}
    if needs_reward:
        missing = next(i for i, c in enumerate(candidates) if "reward" not in c)
        raise UserError(
            f"{path}: record {record['id']!r}: candidates[{missing}] has no 'reward'; "
            f"add it with: {RANK_BY.format(path)} (or train on ranks alone: --no_temperature)"
        )
    if len(candidates) > 1 and any(c.get("rank") is None for c in candidates):
        raise UserError(
            f"{path}: record {record['id']!r}: some candidate has neither 'reward' nor 'rank'; "
            f"add them with: {RANK_BY.format(path)}"
        )
    return record | {"candidates": sorted(candidates, key=lambda c: c.get("rank") or 0)}


def load_data(args, path, limit):
    """-> (records, each with its candidates best first, at most --ranking_length of them; their levels [n]). BoN trains
    on the first candidate alone."""
    runtime.require_data(path, COLLECT)
    needs_reward = bool(args.bootstrap_splits) or not (args.no_temperature or args.no_ranking)
    records = load_candidates(path, limit=limit)
    if args.ranking_length:
        records = [select_candidates(r, args.ranking_length, args.seed) for r in records]
    records = [sort_candidates(r, needs_reward, path) for r in records]
    if args.no_ranking and path == args.data:
        records = [r | {"candidates": r["candidates"][:1]} for r in records]
    single = next((r for r in records if len(r["candidates"]) < 2), None)
    if single and not args.no_ranking:
        raise UserError(f"{path}: record {single['id']!r} has one candidate: nothing to rank (BoN: --no_ranking)")
    lengths = sorted({len(r["candidates"]) for r in records})
    say(f"{path}: {len(records)} prompts, ranking lengths {', '.join(map(str, lengths))}")
    scored_by = {r["reward_model"] for r in records if "reward_model" in r} - {args.reward_model}
    if args.bootstrap_splits and scored_by:
        say(f"the data was scored by {', '.join(sorted(scored_by))}: its rewards and --reward_model's may not compare")
    if args.no_sft or args.beta == 0:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch the evaluation")
    return records, [ranking_levels(r["candidates"]) for r in records]


def plan_steps(num_prompts, args):
    """-> (splits: lists of prompts, one without Algorithm 1; each step's prompts; each step's split, its number)."""
    order = list(range(num_prompts))
    count = args.bootstrap_splits or 1
    if count > num_prompts:
        raise UserError(f"--bootstrap_splits {count} is more than the {num_prompts} prompts")
    if count > 1:
        random.Random(f"{args.seed}-splits").shuffle(order)
    splits = [order[k::count] for k in range(count)]
    planned = [(k, [s[i] for i in b]) for k, s in enumerate(splits) for b in shuffled_batches(len(s), args)]
    split_of, batches = zip(*planned)
    return splits, batches, split_of


def bootstrap(run, records, levels, split, number):
    """Algorithm 1, lines 3 to 9, before the PRO of line 10: the split's records, levels and encoded prompts are
    replaced in place. Leaves the run where it was told to stop.

    Finished prompts go to OUTPUT/bootstrap/split-K.jsonl with the reward model's own logits, so a killed run goes on
    where it was, and one that comes back into the middle of a split trains on the answers that the split began with.
    """
    from collecting import on_policy
    from collecting.journal import Journal

    if run.step > run.start:
        run.save(run.step, run.model, run.optimizer)
    path, data = run.output / "bootstrap" / f"split-{number + 1}.jsonl", [records[i] for i in split]
    journal = Journal(path, [d["id"] for d in data], {}, run.process, run.world)
    sampled = on_policy.answers(run, data, f"split {number + 1}", run.args.sampling_temperature, journal.done)
    for batch, answers in sampled:  # lines 3-6: d, x, {y^j}, and the answer to x
        rewards = on_policy.rewards(run, batch, answers)  # line 8: score
        new = [y | {"reward": r} for y, r in zip(answers, rewards)]
        rankings = [d | {"candidates": insert_candidate(d["candidates"], y)} for d, y in zip(batch, new)]  # 7, 8
        journal.write(d for d in rankings if d["id"] not in journal.done)
    if run.interrupted():
        run.stop()
    journal.finish()
    torch.distributed.barrier()
    data = load_candidates(path)
    for i, d, e in zip(split, data, runtime.encode_all(run.tokenizer, data, run.args)):
        records[i], levels[i], run.encoded[i] = d, ranking_levels(d["candidates"]), e


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    (records, levels), train, held_out = with_held_out(load_data, args)
    splits, batches, split_of = plan_steps(len(train), args)  # line 1
    run = Run(args, device)
    if run.finished:
        return
    model, tokenizer = runtime.load_for_training(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    runtime.check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    use_temperature = not (args.no_temperature or args.no_ranking)

    run.begin(model, optimizer, tokenizer, encoded)
    for step, prompts in run.steps(batches, held_out):
        if run.training and args.bootstrap_splits and (step == run.start or split_of[step] != split_of[step - 1]):
            bootstrap(run, records, levels, splits[split_of[step]], split_of[step])  # lines 2-9
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, row_levels in run.rows(prompts, levels):
            logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
            scores = logprobs / lengths  # [N], Eq. 6
            row_loss = 0.0
            for s, logp, length, r in zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, row_levels))):
                ranked = s[:1] if args.no_ranking else s  # [n], best first; of one response L_PRO is 0
                pro_term = pro_loss(ranked, r if use_temperature else None, args.first_only)
                sft_term = sft_loss(logp, length, args.sft_reduction)
                sft_weight = 1.0 if args.no_ranking else 0.0 if args.no_sft else args.beta * (len(s) - 1) ** 2
                loss = pro_term + sft_weight * sft_term  # Eq. 7
                row_loss = row_loss + loss
                run.count(weight, pair_statistics(s, r), loss=loss, pro_loss=pro_term, sft_loss=sft_term)
            if run.training:  # FSDP averages over processes: the sum over the global batch / its prompts
                (weight * row_loss * world / len(prompts)).backward()
        if run.training:
            grad_norm = runtime.clip_grad_norm(model, args.max_grad_norm)
            run.check_finite(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.log(grad_norm)
        elif args.reward_model:
            from collecting import on_policy  # as in Algorithm 1: without them this script needs no other room

            run.figures["reward"] = on_policy.mean_reward(run, [records[i] for i in prompts])
    run.finish()


if __name__ == "__main__":
    runtime.run_cli(main)
