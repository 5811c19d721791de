"""A reward model: any causal LM with a scalar head, trained on rankings (PRO Eq. 2).

A response's reward r(x, y) is a linear function of the state at its last token, EOS. Of two responses the better one
should get the larger reward (Bradley-Terry); a ranking of k responses is all its pairs:

    PRO Sec. 2     L = -log sigmoid( r(x, y_better) - r(x, y_worse) )
    of k responses L = the mean of that over the prompt's ordered pairs, k (k - 1) / 2 without ties

RESCUE's Eq. 4, by which it explains rewards (it trains none), is another form: -log of the softmax of the best
response's reward among all. For two responses it is the same.

Which response is better, --ordering says: the annotated `rank` (HH's chosen and rejected, a stronger model's ranking),
the right and the wrong `label`, another model's `reward`. Equals are not compared; a prompt's pairs share one forward,
in which its prompt is read once. --eval_data FILE: loss and pair accuracy on held-out rankings, in the log.

OUTPUT/model is a folder that AutoModelForSequenceClassification loads (one label). Its forward scores the rightmost
token that is not padding, so the padding token differs from EOS there; its `dialogue_form` plain says that it reads
prompt, response, and EOS as the training scripts do. Used by `collect_candidates.py rank --by reward`, by
`pro.py --bootstrap_splits`, by `evaluate.py hh`, and as Tuna's proxy ranking model.

Silent in print: the head starts at zero (all rewards equal, loss log 2), the last layer's norm precedes it; learning
rate 1e-5 and one epoch, since a second one overfits to pairs; no dropout is added.

    torchrun --nproc_per_node 4 reward_model.py --model huggyllama/llama-7b --eval_data data/hh/validation.jsonl
    python reward_model.py --model demo/model --data d.jsonl --output runs/rm
"""

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import common
import runtime
from common import UserError, pair_statistics
from files import load_candidates
from run import Run, shuffled_batches, with_held_out
from runtime import say


def ranking_loss(rewards, levels):
    """-log of PRO Eq. 2, for more than two the mean over pairs with levels[i] > levels[j] of -log sigmoid(r_i - r_j).

    rewards [n] fp32, levels [n], larger better -> scalar. Ties are not compared; no pairs give 0.
    """
    better = levels[:, None] > levels[None, :]  # [n, n]
    losses = -F.logsigmoid(rewards[:, None] - rewards[None, :])  # [n, n]
    return (losses * better).sum() / better.sum().clamp(min=1)


def add_score_forward(model):
    """Give a sequence classifier a forward that returns the scores of `positions` instead of the last token's.

    The base model is called inside the root's forward, so under fully_shard its weights are gathered when it runs.
    """

    def forward(input_ids, attention_mask, position_ids, positions):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs |= {} if position_ids is None else {"position_ids": position_ids}
        states = model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # [B * L, H]
        return model.score(states[positions])[:, 0].float()

    model.forward = forward


def candidate_rewards(model, batch):
    """-> rewards [N], fp32: the score at each candidate's last token. UserError as common.refuse_misread."""
    common.refuse_misread(model.config, batch)
    return model(batch.input_ids, batch.attention_mask, batch.position_ids, batch.last_positions)


def check_packing(model, encoded, args, tokenizer, device):
    """runtime.check_packing, of the directions of the states that the head reads: the head may still be zero."""
    head, model.score.forward = model.score.forward, lambda states: F.normalize(states.float(), dim=-1)[:, None]
    runtime.check_packing(model, encoded, args, tokenizer, device, lambda batch: candidate_rewards(model, batch))
    model.score.forward = head


LEVELS = {  # --ordering -> the annotation, and a candidate's preference level, larger better
    "rank": ("rank", lambda c: -c["rank"]),
    "label": ("correct", lambda c: c["correct"]),
    "reward": ("reward", lambda c: c["reward"]),
}
COLLECT = "  python collect_candidates.py prepare --task hh --subset harmless-base --validation 280"


def load_data(args, path, limit):
    """-> (records, their candidates' levels as tensors [n]); prints how many pairs can be compared."""
    runtime.require_data(path, COLLECT)
    field, level = LEVELS[args.ordering]
    hint = f"python collect_candidates.py rank --by {args.ordering} --input {path} --output NEW.jsonl"
    records = []
    for record in load_candidates(path, limit=limit):
        for i, c in enumerate(record["candidates"]):
            if field not in c and c["source"] not in common.HUMAN:  # the original response may be unranked
                where = f"{path}: record {record['id']!r}"
                raise UserError(f"{where}: candidates[{i}] has no {field!r}; add it with: {hint}")
        ranked = [c for c in record["candidates"] if c.get(field) is not None]  # null: a repetition, or the original
        records += [record | {"candidates": ranked}] if ranked else []
    levels = [torch.tensor([float(level(c)) for c in r["candidates"]]) for r in records]
    pairs = sum(int((x[:, None] > x[None, :]).sum()) for x in levels)
    if pairs == 0:
        raise UserError(f"{path}: no record has two candidates of different {field!r}: nothing to compare")
    say(f"{path}: {len(records)} prompts, {pairs} ordered pairs")
    return records, levels


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
    model, tokenizer = runtime.load_for_training(args, device, auto_class, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"--model {args.model}: {type(model).__name__} has no linear `score` head; use a causal LM")
    if not any("ForSequenceClassification" in name for name in model.config.architectures or ()):
        model.score.weight.data.zero_()
    eos = tokenizer.eos_token_id
    others = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    tokenizer.pad_token_id = next(i for i in others if i is not None and i != eos)
    model.config.pad_token_id = tokenizer.pad_token_id  # the saved model scores the rightmost other token: EOS
    model.config.dialogue_form = "plain"
    add_score_forward(model)
    return model, tokenizer


def main():
    args = parse_args()
    _, world, device = runtime.init_distributed()
    (records, levels), train, held_out = with_held_out(load_data, args)
    run = Run(args, device)
    if run.finished:
        return
    model, tokenizer = load_model(args, device)
    encoded = runtime.encode_all(tokenizer, records, args)
    check_packing(model, encoded, args, tokenizer, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    run.begin(model, optimizer, tokenizer, encoded)
    for _, prompts in run.steps(shuffled_batches(len(train), args), held_out):
        # A row holds some of the step's prompts; weight is 0 where it only keeps this process in step with the others;
        # batch.sizes says how many of the row's N candidates belong to each prompt.
        for _, weight, batch, preferences in run.rows(prompts, levels):
            rewards = candidate_rewards(model, batch)  # [N]
            row_loss = 0.0
            for r, level in zip(rewards.split(batch.sizes), preferences.split(batch.sizes)):  # [n] each
                loss = ranking_loss(r, level)
                row_loss = row_loss + loss
                run.count(weight, pair_statistics(r, level), loss=loss)
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
