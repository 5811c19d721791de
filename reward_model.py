"""A reward model: any causal LM with a scalar head, trained on rankings (PRO Eq. 2).

    torchrun --nproc_per_node 4 reward_model.py --model huggyllama/llama-7b --eval_data data/hh/validation.jsonl
    python reward_model.py --model demo/model --data d.jsonl --output runs/rm

A response's reward r(x, y) is a linear function of the state at its last token, EOS. Of two responses the better one
should get the larger reward (Bradley-Terry). A ranking of k responses is all its pairs:

    PRO Sec. 2     L = -log sigmoid( r(x, y_better) - r(x, y_worse) )
    of k responses L = the mean of that over the prompt's ordered pairs, k (k - 1) / 2 without ties

RESCUE trains no reward model, but its Eq. 4 describes one with another loss: -log of the best response's share in the
softmax over all rewards. For two responses the losses are equal.

--ordering names the annotation that says which response is better: `rank` (HH's chosen and rejected, a stronger model's
ranking), `label` (right before wrong), or another model's `reward`. Equals are not compared. All candidates of a prompt
share one forward.

The print is silent on these choices:
 1. The head starts at zero, so all rewards are equal and the first loss is log 2. The head reads the states after the
    model's final norm.
 2. The learning rate is 1e-5, for one epoch: a second epoch overfits to the pairs. No dropout is added.

AutoModelForSequenceClassification loads OUTPUT/model, with one label. Its forward scores the rightmost token that is
not padding, so its padding token differs from EOS. `"dialogue_form": "plain"` in its config says that it reads prompt,
response and EOS as the training scripts do. `collect_candidates.py rank --by reward`, `pro.py --reward_model` and
`evaluate.py hh` use it. It is also Tuna's proxy ranking model.

The log: loss is per prompt. pair_accuracy is the share of ordered pairs with r(better) > r(worse), and gap their mean
difference. best_score is the mean reward of the best candidates. grad_norm is the norm before clipping, seconds the
time of the step. An evaluation's figures begin with eval_; `best` says whether its model was saved in OUTPUT/best.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

import common
from common import UserError, pair_statistics, say


def ranking_loss(rewards, levels):
    """-log of PRO Eq. 2: the mean of -log sigmoid(r_i - r_j) over pairs with levels[i] > levels[j].

    rewards [n] fp32; levels [n], larger better -> scalar. Ties are not compared; no pairs give 0.
    """
    better = levels[:, None] > levels[None, :]  # [n, n]
    losses = -F.logsigmoid(rewards[:, None] - rewards[None, :])  # [n, n]
    return (losses * better).sum() / better.sum().clamp(min=1)


def add_score_forward(model):
    """Give a sequence classifier a forward that returns the scores of `positions` instead of the last token's.

    It calls the base model inside the root's forward, because fully_shard gathers the root's weights only there.
    """

    def forward(input_ids, attention_mask, position_ids, positions):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs |= {} if position_ids is None else {"position_ids": position_ids}
        states = model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # [B * L, H]
        return model.score(states[positions])[:, 0].float()

    model.forward = forward


def candidate_rewards(model, batch):
    """-> rewards [N], fp32: the score at each candidate's last token."""
    return model(batch.input_ids, batch.attention_mask, batch.position_ids, batch.last_positions)


def check_packing(model, encoded):
    """common.check_packing on the normalised states that the head reads, because the head itself may still be zero."""
    head, model.score.forward = model.score.forward, lambda states: F.normalize(states.float(), dim=-1)[:, None]
    common.check_packing(model, encoded, lambda batch: candidate_rewards(model, batch))
    model.score.forward = head


LEVELS = {  # --ordering -> the annotation, and a candidate's preference level, larger better; None: not compared
    "rank": ("rank", lambda c: None if c.get("rank") is None else -c["rank"]),
    "label": ("correct", lambda c: c.get("correct", c["source"] in common.HUMAN)),  # as in rescue.py
    "reward": ("reward", lambda c: c.get("reward")),
}
COLLECT = "  python collect_candidates.py prepare --task hh --subset harmless-base --validation 280"


def load_data(args, path, limit=None):
    """-> a list of (record, its candidates' levels [n]). Prints how many pairs there are."""
    field, level = LEVELS[args.ordering]
    hint = f"python collect_candidates.py rank --by {args.ordering} --input {path} --output NEW.jsonl"
    data = []
    for record in common.load_candidates(path, limit, COLLECT):
        for i, c in enumerate(record["candidates"]):
            if field not in c and c["source"] not in common.HUMAN:  # the original response may be unranked
                where = f"{path}: record {record['id']!r}"
                raise UserError(f"{where}: candidates[{i}] has no {field!r}; add it with: {hint}")
        ranked = [c for c in record["candidates"] if level(c) is not None]  # null: a repeated text, or the original
        if ranked:
            data.append((record | {"candidates": ranked}, torch.tensor([float(level(c)) for c in ranked])))
    pairs = sum(int((x[:, None] > x[None, :]).sum()) for _, x in data)
    if pairs == 0:
        raise UserError(f"{path}: no record has two candidates of different {field!r}: nothing to compare")
    say(f"{path}: {len(data)} prompts, {pairs} ordered pairs")
    return data


def parse_args():
    parser = common.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("reward model").add_argument
    add("--ordering", choices=sorted(LEVELS), default="rank", help="the annotation that says which response is better")
    # fmt: on
    defaults = {"lr": 1e-5, "schedule": "cosine", "warmup": 0.03, "epochs": 1, "batch_size": 64}
    common.add_training_flags(parser, model="huggyllama/llama-7b", **defaults)
    parser.set_defaults(max_length=1024)  # what `rank --by reward` reads
    args = parser.parse_args()
    args.data = args.data or "data/hh/train.jsonl"
    args.output = args.output or f"runs/reward-{args.ordering}"
    return args


def load_model(args, device):
    """-> (model, tokenizer): a sequence classifier with one output, whose new head starts at zero."""
    auto_class = AutoModelForSequenceClassification
    model, tokenizer = common.load_model(args, device, auto_class, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"--model {args.model}: {type(model).__name__} has no linear `score` head; use a causal LM")
    if not any("ForSequenceClassification" in name for name in model.config.architectures or ()):
        model.score.weight.data.zero_()
    eos = tokenizer.eos_token_id
    others = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    tokenizer.pad_token_id = next(i for i in others if i is not None and i != eos)
    model.config.pad_token_id = tokenizer.pad_token_id  # so EOS is the rightmost token that is not padding
    model.config.dialogue_form = "plain"
    add_score_forward(model)
    return model, tokenizer


def encode(tokenizer, data, args):
    """-> (Encoded, levels [n]) for each record."""
    return list(zip(common.encode_all(tokenizer, [record for record, _ in data], args), [levels for _, levels in data]))


LOSSES = ("loss",)


def row_losses(model, batch, levels):
    """Forward, rewards and loss of one row -> [P, 5]: for each of its P prompts the loss, then pair_statistics.

    The row has N candidates, and batch.sizes says how many of them belong to each prompt. levels [N].
    """
    rewards = candidate_rewards(model, batch)  # [N]
    prompts = zip(rewards.split(batch.sizes), levels.split(batch.sizes))  # [n] each
    return torch.stack([torch.stack([ranking_loss(r, level), *pair_statistics(r, level)]) for r, level in prompts])


@torch.no_grad()
def evaluate(model, tokenizer, prompts, args):
    """-> the figures of held-out prompts, for the log."""
    model.eval()
    rows = common.rows(prompts, model, tokenizer, args)
    terms = [(weight, batch, row_losses(model, batch, levels)) for weight, batch, levels in rows]
    model.train()
    return {f"eval_{k}": v for k, v in common.means(LOSSES, terms, len(prompts)).items()}


def main():
    args = parse_args()
    process, world, device = common.init_distributed()
    data = load_data(args, args.data, args.max_train_samples)
    held_out = load_data(args, args.eval_data) if args.eval_data else []
    output = common.open_run(args, __doc__)  # the program ends here if the run is finished

    model, tokenizer = load_model(args, device)  # fp32 weights, sharded; computes in bf16 on CUDA
    prompts, held_out = (encode(tokenizer, x, args) for x in (data, held_out))
    if not args.padded:
        check_packing(model, [encoded for encoded, _ in prompts + held_out])
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

        for weight, batch, levels in common.rows(batch_prompts, model, tokenizer, args):
            row = row_losses(model, batch, levels)  # [P, 5]
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
