"""PRO: preference ranking optimization, one loss over a ranking of any length (Song et al., AAAI 2024).

Equations, sections and tables are numbered as in arXiv 2306.17492v1.

    torchrun --nproc_per_node 4 pro.py                                                 # data/hh/ranked.jsonl
    torchrun --nproc_per_node 4 pro.py --no_ranking                                    # the baseline BoN
    torchrun --nproc_per_node 4 pro.py --eval_data VALIDATION --reward_model RM        # VALIDATION: after `rank`
    torchrun --nproc_per_node 4 pro.py --bootstrap_splits 4 --reward_model RM          # Algorithm 1
    python pro.py --data d.jsonl --model demo/model --output runs/x                    # one process, GPU or CPU

A prompt x has responses y^1 > y^2 > ... > y^n, best first. The model scores a response by its own mean token
log-likelihood. The loss contrasts each response with all that follow it. The gaps between the rewards of a reward model
make each contrast sharper or softer:

    Eq. 6      s_k = log pi(y^k | x) / |y^k|
    Eq. 8      L_PRO = - sum over k < n of log( exp(s_k) / sum over i >= k of exp(s_i) )
    Eq. 9      the same with exp(s_k / T_k^k) and exp(s_i / T_k^i)
    Eq. 10-11  T_k^i = 1 / (r_k - r_i) for i > k,   T_k^k = min over i > k of T_k^i      r: the reward model's logits
    Eq. 7      L = L_PRO + beta L_SFT,   L_SFT = -log pi(y^1 | x),   beta = 0.05 (n - 1)^2 (Sec. 4.3)

Table 5's ablations are flags, and they combine: --no_sft, --no_temperature (Eq. 8), --first_only (only the term k = 1).
Without L_PRO (--no_ranking) it is the baseline BoN: supervised fine-tuning on the best of n. rescue.py trains the
baseline RRHF; recipes/README.md has the command for this setting (Sec. 4.4). The baseline CoH is --no_ranking on the
data that `collect_candidates.py hindsight` makes.

Algorithm 1, self-bootstrapping: the prompts are divided into K splits. Before each split the current model answers its
prompts, a reward model scores the answers, and they join the rankings. An answer never takes the first place. The
rewards are then sorted again, so that they descend (footnote 6). With --epochs 2 each split is trained on twice.

With --eval_data the model is evaluated every --eval_every steps. With --reward_model the evaluation also logs the mean
reward of greedy answers. That reward then decides which model is the best, as in the released code.

Where the print and the released code differ, or the print is silent:
 1. Temperatures multiply as reward gaps, 1/T = r_k - r_i, and each sum is a log-sum-exp in float32. The released code
    exponentiates and adds 1e-10 inside the logarithm: wrong from gaps of about 6 on, inf or NaN for negative gaps.
 2. Equal rewards make T infinite, so exp(s / T) is 1. If all rewards from k on are equal, term k is the constant
    log(n - k + 1), without gradient. Two equal rewards do not count as a pair in pair_accuracy.
 3. L_SFT beside L_PRO is the sum over tokens, as Eq. 1 prints it and as released. Alone (BoN, SFT) it is the usual
    mean over tokens. --sft_reduction chooses.
 4. n in beta is the number of responses of each prompt. The paper's l is the same for all prompts.
 5. The print is silent on the schedule (released: constant), weight decay (released: torch's default 0.01; here 0, as
    in the other scripts), the choice of the checkpoint (released: every 600 steps by the reward on 280 test samples,
    the best is kept), and on lengths (released: a prompt's last 384 tokens; a response has what is left of 512).
 6. A whole response ends with EOS. In the released code a response gets its EOS from the padding, so the longest
    response of a batch has none.
 7. The print is silent on K and on how Algorithm 1, line 6, samples y. Here K is a flag, the temperature is 1, and an
    answer has up to 128 tokens.

The log: pro_loss and sft_loss are L_PRO and L_SFT per prompt. pair_accuracy is the share of ordered pairs with
s(better) > s(worse), and gap their mean difference. best_score is the mean score of the best candidates: if it falls,
the model gains in ranking by making all candidates unlikely. grad_norm is the norm before clipping, seconds the time of
the step. An evaluation's figures begin with eval_; `best` says whether its model was saved in OUTPUT/best.
"""

import random
import time

import torch
from tqdm import tqdm

import common
from common import UserError, candidate_logprobs, in_range, pair_statistics, say


def pro_loss(scores, rewards=None, first_only=False, score_scale=1.0, target_margin=0.0):
    """Eq. 8, or with rewards Eq. 9-11. scores [n] fp32, best first; rewards [n], descending -> scalar.

    first_only keeps only the term k = 1 (Table 5). Fewer than two scores give 0. Rewards that ascend give NaN, and
    common.means then ends the run: to raise an error here, each prompt would have to wait for the GPU.
    Ours: score_scale multiplies the scores, and target_margin is added to every s_i with i > k. For n = 2 without
    rewards that is SimPO (arXiv 2405.14734, Eq. 6) with beta = score_scale and gamma = target_margin.
    """
    loss = scores.sum() * 0.0
    for k in range(min(1, len(scores) - 1) if first_only else len(scores) - 1):
        z = scores[k:]  # [n - k]
        if rewards is not None:
            gaps = rewards[k] - rewards[k + 1 :]  # [n - k - 1], 1 / T_k^i, Eq. 10
            own = gaps.max(0, keepdim=True).values  # 1 / T_k^k, Eq. 11: the smallest temperature is the largest gap
            z = z * torch.cat([own, gaps])  # Eq. 9
        z = score_scale * (z - z[0])
        z = torch.cat([z[:1], z[1:] + target_margin])
        loss = loss + torch.logsumexp(z, 0)  # -log of exp(z_k) / sum over i >= k of exp(z_i)
    return loss if rewards is None else torch.where((rewards.diff() > 0).any(), torch.nan, loss)


def sft_loss(logprobs, lengths, reduction):
    """L_SFT of Eq. 7: the NLL of the best candidate, which is the first. logprobs, lengths [n] -> scalar. `reduction`
    over its tokens is "sum" or "mean"."""
    return -logprobs[0] / (lengths[0] if reduction == "mean" else 1.0)


def insert_candidate(candidates, new):
    """Put `new` into a ranking (best first) by its reward, but never first (footnote 6) -> the longer ranking."""
    rest = sorted([*candidates[1:], new], key=lambda c: -c["reward"])  # stable: among equals the new one comes last
    return [c | {"rank": place} for place, c in enumerate([candidates[0], *rest])]


def ranking_levels(candidates):
    """Preference levels [n] of a ranking (best first): its rewards if it has them, else its negative ranks. Rewards are
    sorted again, because an inserted answer may have a larger one than the first (footnote 6)."""
    if all("reward" in c for c in candidates):
        return torch.tensor(sorted((float(c["reward"]) for c in candidates), reverse=True))
    return torch.tensor([-float(c.get("rank") or 0) for c in candidates])


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("PRO").add_argument
    add("--beta", type=in_range(float, 0), default=0.05, help="the factor 0.05 in Eq. 7's beta, Sec. 4.3")
    add("--sft_reduction", choices=["sum", "mean"], help="over tokens (default: sum as released; BoN: mean)")
    add("--ranking_length", type=in_range(int, 2), help="candidates a prompt, l in the paper (default: all; Fig. 3)")
    add("--no_temperature", action="store_true", help="Eq. 8 instead of Eq. 9-11 (Table 5: -T)")
    add("--no_sft", action="store_true", help="drop L_SFT (Table 5)")
    add("--first_only", action="store_true", help="only the best against the rest (Table 5: -L_PRO^{k>1})")
    add("--no_ranking", action="store_true", help="drop L_PRO: supervised fine-tuning on the best, BoN (Sec. 4.4)")
    add("--score_scale", type=in_range(float, above=0), default=1.0, help="ours: factor of the scores, SimPO's beta")
    add("--target_margin", type=in_range(float, 0), default=0.0, help="ours: wanted gap of the scores, SimPO's gamma")
    add = parser.add_argument_group("Algorithm 1").add_argument
    add("--bootstrap_splits", type=in_range(int, 1), help="K: sample, score, insert before each split")
    add("--sampling_temperature", type=in_range(float, above=0), default=1.0, help="of the sampled responses")
    add = parser.add_argument_group("answers, of Algorithm 1 and of --eval_data").add_argument
    add("--reward_model", help="scores them: hub id or folder, the one that scored the data (RM_train, Sec. 4.3)")
    add("--max_new_tokens", type=in_range(int, 1, 10**6), default=128, help="of an answer, Sec. 4.3")
    # fmt: on
    defaults = {"lr": 5e-6, "schedule": "constant", "warmup": 0, "epochs": 2, "batch_size": 112}
    common.add_training_flags(parser, model="huggyllama/llama-7b", **defaults)
    parser.set_defaults(max_prompt_length=384, eval_every=600)  # as released
    args = parser.parse_args()
    if args.no_ranking and (args.no_sft or args.no_temperature or args.first_only or args.bootstrap_splits):
        parser.error("--no_ranking drops L_PRO: with --no_sft no loss is left, and the other flags of L_PRO do nothing")
    if (args.score_scale, args.target_margin) != (1, 0) and not args.no_temperature:
        parser.error("--score_scale and --target_margin belong to Eq. 8: add --no_temperature")
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


def draw_candidates(record, ranking_length, seed):
    """At most `ranking_length` of a record's candidates, in the file's order: those that the data came with, then a
    seeded draw of the others."""
    candidates = record["candidates"]
    given = [i for i, c in enumerate(candidates) if c["source"] in common.GIVEN]
    others = [i for i in range(len(candidates)) if i not in given]
    drawn = random.Random(f"{seed}-{record['id']}").sample(others, len(others))
    return record | {"candidates": [candidates[i] for i in sorted([*given, *drawn][:ranking_length])]}


def sort_candidates(record, needs_reward, path):
    """The record with its candidates best first: by `reward`, or by `rank` if the loss needs no reward. Raises
    UserError if a candidate lacks the annotation."""
    candidates = record["candidates"]
    if all("reward" in c for c in candidates):
        return record | {"candidates": sorted(candidates, key=lambda c: -c["reward"])}
    for i, c in enumerate(candidates):
        if "reward" not in c and (needs_reward or c.get("rank") is None) and (needs_reward or len(candidates) > 1):
            lacks = "no 'reward'" if needs_reward else "neither 'reward' nor 'rank'"
            ranked = all(c.get("rank") is not None for c in candidates)
            more = " (or train on ranks only: --no_temperature)" if needs_reward and ranked else ""
            where = f"{path}: record {record['id']!r}: candidates[{i}]"
            raise UserError(f"{where} has {lacks}; add it with: {RANK_BY.format(path)}{more}")
    return record | {"candidates": sorted(candidates, key=lambda c: c.get("rank") or 0)}


def load_data(args, path, limit=None):
    """-> records, each with at most --ranking_length candidates, best first. BoN trains on the first one only. Prints
    what was found."""
    needs_reward = bool(args.bootstrap_splits) or not (args.no_temperature or args.no_ranking)
    records = common.load_candidates(path, limit, how=COLLECT)
    if args.ranking_length:
        records = [draw_candidates(r, args.ranking_length, args.seed) for r in records]
    records = [sort_candidates(r, needs_reward, path) for r in records]
    if args.no_ranking and path == args.data:
        records = [r | {"candidates": r["candidates"][:1]} for r in records]
    single = next((r for r in records if len(r["candidates"]) < 2), None)
    if single and not args.no_ranking:
        raise UserError(f"{path}: record {single['id']!r} has one candidate: nothing to rank (BoN: --no_ranking)")
    lengths = sorted({len(r["candidates"]) for r in records})
    say(f"{path}: {len(records)} prompts, ranking lengths {', '.join(map(str, lengths))}")
    tied = sum(len(set(ranking_levels(r["candidates"]).tolist())) < len(r["candidates"]) for r in records)
    if tied and args.no_temperature and not args.first_only:
        say(f"{tied} prompts have equal candidates; Eq. 8 ranks them in the file's order (--first_only does not)")
    others = {r["reward_model"] for r in records if "reward_model" in r} - {args.reward_model}
    if args.bootstrap_splits and others:
        say(f"the data was scored by {', '.join(sorted(others))}: its rewards and --reward_model's may not compare")
    if args.no_sft or args.beta == 0:
        say("no SFT term: length-normalised ranking alone can degenerate, so watch best_score and the evaluation")
    return records


def encode(tokenizer, records, args):
    """-> (Encoded, levels [n]) for each record."""
    return list(zip(common.encode_all(tokenizer, records, args), [ranking_levels(r["candidates"]) for r in records]))


def plan_steps(num_prompts, args):
    """-> (splits, batches, split_of): the prompts of each split, the prompts of each step, and the split of each step.
    Without Algorithm 1 there is one split."""
    order = list(range(num_prompts))
    count = args.bootstrap_splits or 1
    if count > num_prompts:
        raise UserError(f"--bootstrap_splits {count} is more than the {num_prompts} prompts")
    if count > 1:
        random.Random(f"{args.seed}-splits").shuffle(order)
    splits = [order[k::count] for k in range(count)]
    planned = [(k, [s[i] for i in b]) for k, s in enumerate(splits) for b in common.shuffled_batches(len(s), args)]
    split_of, batches = zip(*planned)
    return splits, batches, split_of


def bootstrap(model, tokenizer, records, number, step, output, args):
    """Algorithm 1, lines 3 to 9, for the records of one split -> (Encoded, levels [n]) each, with one more answer.

    Finished records go to OUTPUT/bootstrap/split-K.jsonl, with the reward model's logits. So a killed run continues
    where it was. A run that resumes inside a split trains on the answers that were drawn when the split began.
    """
    from collecting import on_policy
    from collecting.journal import Journal

    path = output / "bootstrap" / f"split-{number + 1}.jsonl"
    journal = Journal(
        path, [d["id"] for d in records], {}, torch.distributed.get_rank(), torch.distributed.get_world_size()
    )
    own = {"what": f"split {number + 1}", "temperature": args.sampling_temperature, "done": journal.done}
    for batch, answers in on_policy.answers(model, tokenizer, records, args, step, **own):  # lines 3-6
        rewards = on_policy.rewards(batch, answers, args)  # line 8: score
        new = [y | {"reward": r} for y, r in zip(answers, rewards)]
        rankings = [d | {"candidates": insert_candidate(d["candidates"], y)} for d, y in zip(batch, new)]  # 7, 8
        journal.write(rankings)
    common.stop_if_asked()
    journal.finish()
    torch.distributed.barrier()
    return encode(tokenizer, common.load_candidates(path), args)


LOSSES = ("loss", "pro_loss", "sft_loss")


def row_losses(model, batch, levels, args):
    """Forward, scores and losses of one row -> [P, 7]: for each of its P prompts the LOSSES, then pair_statistics.

    The row has N candidates, and batch.sizes says how many of them belong to each prompt. levels [N].
    """
    logprobs, lengths = candidate_logprobs(model, batch)  # [N], [N]
    scores = logprobs / lengths  # [N], Eq. 6
    prompts = []
    for s, logp, length, r in zip(*(x.split(batch.sizes) for x in (scores, logprobs, lengths, levels))):  # [n] each
        ranked = s[:1] if args.no_ranking else s  # best first; L_PRO of one response is 0
        rewards = None if args.no_temperature or args.no_ranking else r
        pro_term = pro_loss(ranked, rewards, args.first_only, args.score_scale, args.target_margin)
        sft_term = sft_loss(logp, length, args.sft_reduction)
        beta = 1.0 if args.no_ranking else 0.0 if args.no_sft else args.beta * (len(s) - 1) ** 2  # Sec. 4.3
        loss = pro_term + beta * sft_term  # Eq. 7
        prompts.append(torch.stack([loss, pro_term, sft_term, *pair_statistics(s, r)]))
    return torch.stack(prompts)


@torch.no_grad()
def evaluate(model, tokenizer, records, prompts, step, args):
    """-> the figures of held-out prompts, for the log. With --reward_model also the mean reward of greedy answers."""
    model.eval()
    rows = common.rows(prompts, model, tokenizer, args)
    terms = [(weight, batch, row_losses(model, batch, *columns, args)) for weight, batch, *columns in rows]
    model.train()
    figures = common.means(LOSSES, terms, len(prompts))
    if args.reward_model:
        from collecting import on_policy  # a copy of this script needs it only here and in bootstrap

        figures["reward"] = on_policy.mean_reward(model, tokenizer, records, args, step)
    return {f"eval_{k}": v for k, v in figures.items()}


def main():
    args = parse_args()
    process, world, device = common.init_distributed()
    data = load_data(args, args.data, args.max_train_samples)
    held_out = load_data(args, args.eval_data) if args.eval_data else []
    splits, batches, split_of = plan_steps(len(data), args)  # Algorithm 1, line 1
    output = common.open_run(args, __doc__)  # the program ends here if the run is finished

    model, tokenizer = common.load_model(args, device)  # fp32 weights, sharded; computes in bf16 on CUDA
    prompts, held_out_prompts = (encode(tokenizer, x, args) for x in (data, held_out))
    if not args.padded:
        common.check_packing(model, [encoded for encoded, _ in prompts + held_out_prompts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    start = common.load_checkpoint(output, model, optimizer)  # the steps taken: 0 in a new run
    evaluations, log = common.open_log(args, output, start)
    common.on_stop(lambda: common.save_checkpoint(output, step, model, optimizer))

    for step in tqdm(range(start, len(batches) + 1), initial=start, total=len(batches), disable=process != 0):
        last = step == len(batches)
        if held_out and step not in evaluations and (step % args.eval_every == 0 or last):  # `step` steps are taken
            line = {"step": step} | evaluate(model, tokenizer, held_out, held_out_prompts, step, args)
            evaluations[step] = line
            line["best"] = common.is_best(evaluations, step)
            if line["best"]:
                common.save_model(model, tokenizer, output / "best")
            log(line)
        if last:
            break
        if args.bootstrap_splits and (step == start or split_of[step] != split_of[step - 1]):
            common.save_checkpoint(output, step, model, optimizer)  # the model that answers
            split = splits[split_of[step]]
            records = [data[i] for i in split]
            for i, prompt in zip(split, bootstrap(model, tokenizer, records, split_of[step], step, output, args)):
                prompts[i] = prompt
        began, batch_prompts, terms = time.perf_counter(), [prompts[i] for i in batches[step]], []
        torch.manual_seed(args.seed * 1_000_003 + step * world + process)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)

        for weight, batch, levels in common.rows(batch_prompts, model, tokenizer, args):
            row = row_losses(model, batch, levels, args)  # [P, 7]
            # FSDP averages over processes. The loss is the mean over the prompts of the global batch.
            (weight * row[:, 0].sum() * world / len(batch_prompts)).backward()
            terms.append((weight, batch, row.detach()))

        figures = common.means(LOSSES, terms, len(batch_prompts))
        grad_norm = common.clip_grad_norm(model, args.max_grad_norm, [encoded.id for encoded, _ in batch_prompts])
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
