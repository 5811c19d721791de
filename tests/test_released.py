"""Ours against the authors' released losses, from logits to gradients.

The numbers were computed once with the released functions on the inputs of `inputs`: PRO's ProcessManager.compute_loss
(AlibabaResearch/DAMO-ConvAI, 483554e), Tuna's TunaTrainer.compute_loss (microsoft/LMOps, 4f2a9de), RESCUE's
RankTrainer.compute_loss (ekonwang/RRescue, a63c0ad), RRHF's RRHFTrainer.compute_loss (GanjinZero/RRHF, e1a2b61). Each
row: number of candidates, k of `inputs`, tokens of the prompt, tokens of the responses, rewards or levels, the released
loss, the norm of its gradient with respect to each candidate's logits. PAPERS.md has the largest differences over 3,000
random cases.
"""

import pytest
import torch
import torch.nn.functional as F

import pro
import rescue
import tuna

VOCABULARY = 7

PRO = [
    (2, 0, 2, [5, 5], [0.9, 0.2], 1.52714, [0.29671, 0.17242]),
    (3, 1, 3, [5, 5, 5], [1.5, 0.4, 0.1], 5.59023, [1.06632, 0.24119, 0.18821]),
    (4, 2, 4, [5, 5, 5, 5], [0.7, 0.7, -0.2, -1.1], 24.83657, [2.08457, 0.75012, 0.05341, 0.38709]),
    (5, 3, 3, [5, 5, 5, 5, 5], [2.0, 1.1, 1.0, 0.3, -0.4], 20.17832, [2.79363, 0.51238, 0.37994, 0.08894, 0.72098]),
]
TUNA = [
    (2, 4, 2, [3, 5], None, 6.344288, [0.915078, 0.152494]),
    (4, 5, 3, [5, 2, 4, 3], None, 3.84292, [0.571103, 0.141993, 0.115011, 0.127849]),
    (5, 6, 2, [1, 6, 3, 3, 2], None, 11.788918, [2.445691, 0.376746, 0.028169, 0.032484, 1.076548]),
]
RESCUE = [
    (3, 7, 2, [3, 5, 4], [2.0, 1.0, 0.0], 2.242605, [0.534795, 0.051723, 0.060294]),
    (4, 8, 3, [5, 2, 4, 3], [1.0, 2.0, 0.0, 3.0], 4.569211, [0.0, 0.0, 0.165998, 0.933797]),
    (5, 9, 2, [1, 6, 3, 3, 2], [3.0, 2.5, 1.0, 0.5, 2.0], 1.1661, [0.738852, 0.0, 0.073219, 0.077327, 0.187329]),
]
RRHF = [
    (3, 7, 2, [3, 5, 4], [2.0, 1.0, 0.0], 1.277037, [0.229198, 0.290208, 0.279851]),
    (4, 8, 3, [5, 2, 4, 3], [1.0, 2.0, 0.0, 3.0], 4.074954, [0.311134, 0.177938, 0.449442, 0.776012]),
    (5, 9, 2, [1, 6, 3, 3, 2], [3.0, 2.5, 1.0, 0.5, 2.0], 2.406384, [0.092357, 0.914977, 0.232857, 0.245919, 0.211038]),
]  # fmt: skip


def inputs(n, k, prompt, lengths):
    """-> logits [n, L, V], tokens [n, L]: the same on every machine, without a random generator."""
    length = prompt + max(lengths)
    i, j = torch.arange(n * length * VOCABULARY, dtype=torch.float64), torch.arange(n * length)
    logits = (2.5 * torch.sin(1.3 * i * i + 0.7 * i + k)).float().reshape(n, length, VOCABULARY)
    return logits, ((3 * j * j + 5 * j + k) % VOCABULARY).reshape(n, length)


def pro_loss(logprobs, lengths, rewards, padded):
    beta = 0.05 * (len(lengths) - 1) ** 2
    return pro.pro_loss(logprobs / lengths, rewards) + beta * pro.sft_loss(logprobs, lengths, "sum")


def tuna_loss(logprobs, lengths, values, padded):
    """With the released code's two choices, --pair_reduction mean_by_distance and --mle_on all."""
    ranking = tuna.ranking_loss(logprobs / lengths, 0.1, pair_reduction="mean_by_distance")
    return ranking + tuna.mle_loss(logprobs, lengths, torch.ones(len(lengths), dtype=torch.bool))


def rescue_loss(logprobs, lengths, levels, padded, lambdas=None, alpha=0.1):
    lambdas = torch.tensor([1.0] + [0.85] * (len(levels) - 1)) if lambdas is None else lambdas
    best = torch.arange(len(levels)) == levels.argmax()
    ranking = rescue.ranking_loss(logprobs / lengths**lambdas, levels)
    return rescue.sft_loss(logprobs, lengths, best) + alpha * ranking


def rrhf_loss(logprobs, lengths, rewards, padded):
    """The official code scores by the sum (lambda 0) and divides both terms by the row's padded length L. With lambda 0
    and alpha 1 / |y*| ours is that loss times L / |y*|."""
    target = lengths[rewards.argmax()]
    return rescue_loss(logprobs, lengths, rewards, padded, lambdas=0.0, alpha=1 / target) * target / padded


ALL = {pro_loss: PRO, tuna_loss: TUNA, rescue_loss: RESCUE, rrhf_loss: RRHF}


@pytest.mark.parametrize("loss, row", [(loss, row) for loss, rows in ALL.items() for row in rows])
def test_ours_is_the_released_loss(loss, row):
    """loss(log-probabilities [n], lengths [n], values, padded length): value and gradient."""
    n, k, prompt, lengths, values, released, gradients = row
    logits, tokens = inputs(n, k, prompt, lengths)
    logits.requires_grad_()
    place = torch.arange(logits.shape[1] - 1)  # the token after it is the response's
    mask = (place >= prompt - 1) & (place < prompt - 1 + torch.tensor(lengths)[:, None])  # [n, L - 1]
    logprobs = F.log_softmax(logits, -1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    value = loss((logprobs * mask).sum(1), torch.tensor(lengths), values and torch.tensor(values), logits.shape[1])
    value.backward()
    assert value.item() == pytest.approx(released, rel=2e-6, abs=1e-5)
    assert logits.grad.flatten(1).norm(dim=1).tolist() == pytest.approx(gradients, abs=1e-5)
