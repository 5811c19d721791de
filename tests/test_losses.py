"""Every loss: numbers worked out by hand, and values and gradients of the printed equation written as a loop."""

import math

import pytest
import torch

import common
import pro
import rescue
import reward_model
import tuna


def pairs(levels):
    """(i, j) of every ordered pair, i the better one."""
    return [(i, j) for i in range(len(levels)) for j in range(len(levels)) if levels[i] > levels[j]]


def naive_rescue(scores, levels, margin=0.0, weight=lambda i, j: 1.0):
    """Eq. 2 in the released form; with a margin, and LiPO's weights of pairs (2402.01878)."""
    return sum(weight(i, j) * max(scores[j] - scores[i] + margin, 0 * scores[i]) for i, j in pairs(levels))


def naive_lambda(scores, levels):
    def weight(i, j):
        gain = [2 ** len({x for x in levels if x < levels[k]}) for k in (i, j)]
        rank = [1 + sum(bool(s > scores[k]) for s in scores) for k in (i, j)]
        return abs(gain[0] - gain[1]) * abs(1 / math.log(1 + rank[0]) - 1 / math.log(1 + rank[1]))

    return naive_rescue(scores, levels, 0.3, weight)


def naive_pro(scores, rewards=None, first_only=False, scale=1.0, margin=0.0):
    """Eq. 8, or Eq. 9-11 with T = 1 / gap, as printed: exponentials and no log-sum-exp. Rewards are distinct."""
    n, loss = len(scores), 0.0
    for k in range(min(n - 1, 1) if first_only else n - 1):
        temperature = [1.0] * n
        if rewards is not None:
            temperature[k + 1 :] = [1 / (rewards[k] - rewards[i]) for i in range(k + 1, n)]  # Eq. 10
            temperature[k] = min(temperature[k + 1 :])  # Eq. 11
        powers = [scale * scores[i] / temperature[i] + margin * (i > k) for i in range(k, n)]
        terms = [torch.exp(torch.as_tensor(x, dtype=torch.double)) for x in powers]
        loss = loss - torch.log(terms[0] / sum(terms))
    return loss


def naive_tuna(scores, ranks, margin, mean_by_distance=False):
    by_distance = {}
    for j, i in pairs(ranks):  # i is the better one
        hinge = max(scores[j] - scores[i] + margin * (ranks[j] - ranks[i]), 0 * scores[i])
        by_distance.setdefault(ranks[j] - ranks[i], []).append(hinge)
    return sum(sum(v) / (len(v) if mean_by_distance else 1) for v in by_distance.values())


def naive_reward_model(rewards, levels):
    terms = [torch.log(1 + torch.exp(rewards[j] - rewards[i])) for i, j in pairs(levels)]
    return sum(terms) / max(1, len(terms))


LOSSES = {  # name: (ours, the loop, whether the levels descend without ties)
    "rescue": (rescue.ranking_loss, naive_rescue, False),
    "rescue, margin": (lambda s, r: rescue.ranking_loss(s, r, 2.0), lambda s, r: naive_rescue(s, r, 2.0), False),
    "rescue, lambda": (
        lambda s, r: rescue.ranking_loss(s, r, 0.3, rescue.lambda_weights(s.detach(), r)),
        naive_lambda,
        False,
    ),
    "pro": (pro.pro_loss, naive_pro, True),
    "pro, first_only": (lambda s, r: pro.pro_loss(s, r, True), lambda s, r: naive_pro(s, r, True), True),
    "pro, Eq. 8": (lambda s, r: pro.pro_loss(s), lambda s, r: naive_pro(s), True),
    "pro, scale and margin": (
        lambda s, r: pro.pro_loss(s, score_scale=2.0, target_margin=1.4),
        lambda s, r: naive_pro(s, scale=2.0, margin=1.4),
        True,
    ),
    "tuna": (lambda s, r: tuna.ranking_loss(s, 0.3, r), lambda s, r: naive_tuna(s, [-x for x in r], 0.3), False),
    "tuna, by distance": (
        lambda s, r: tuna.ranking_loss(s, 0.3, r, "mean_by_distance"),
        lambda s, r: naive_tuna(s, [-x for x in r], 0.3, mean_by_distance=True),
        False,
    ),
    "reward model": (reward_model.ranking_loss, naive_reward_model, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_against_loops(name):
    """1 to 6 candidates, with ties and unranked ones (NaN), which are compared with nothing."""
    (ours, naive, descend), generator = LOSSES[name], torch.Generator().manual_seed(0)
    for n in [1, 2, 3, 4, 5, 6] * 3:
        values = torch.randn(n, generator=generator, dtype=torch.double) - 2
        if descend:
            levels = torch.randn(n, generator=generator, dtype=torch.double).sort(descending=True).values
        else:
            levels = torch.randint(0, 3, (n,), generator=generator).double()
            if n > 4:
                levels[n - 5] = math.nan
        scores, same = values.clone().requires_grad_(), values.clone().requires_grad_()
        got, want = ours(scores, levels), naive([*same], levels.tolist()) + 0 * same.sum()
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x, s in ((got, scores), (want, same))))


def t(*values):
    return torch.tensor(values)


BY_HAND = [
    # human 2, right 1, wrong 0; violated: (0, 1): 0.5, (0, 2): 1.0, (1, 2): 0.5
    (rescue.ranking_loss(t(-2.0, -1.5, -1.0), t(2.0, 1.0, 0.0)), 2.0),
    (rescue.ranking_loss(t(-2.0, -1.0), t(math.inf, 0.3)), 1.0),  # similarity puts the human response at infinity
    (rescue.sft_loss(t(-6.0, -4.0, -9.0), t(3.0, 4.0, 3.0), t(False, False, True)), 3.0),
    (rescue.sft_loss(t(-6.0, -4.0), t(3.0, 4.0), t(False, False)), 0.0),
    # s(y): -8 / 4**0.85 and -8 / 4**1
    (common.length_normalized(t(-8.0, -8.0), t(4.0, 4.0), t(0.85, 1.0)), [-8 / 3.2490095854, -2.0]),
    # the score of the best level, pairs in order, pairs, the sum of the gaps
    (torch.stack(common.pair_statistics(t(-1.0, -2.0, -0.5), t(2.0, 1.0, 0.0))), [-1, 1, 3, 1.0 - 0.5 - 1.5]),
    (torch.stack(common.pair_statistics(t(5.0, -4.0, 0.0), t(1.0, 1.0, 0.0))), [0.5, 1, 2, 1.0]),
    # two responses are Bradley-Terry: -log sigmoid(2); a reward gap of 3 multiplies both scores
    (pro.pro_loss(t(-1.0, -3.0)), math.log1p(math.exp(-2))),
    (pro.pro_loss(t(-1.0, -3.0), t(1.0, -2.0)), math.log1p(math.exp(-6))),
    # Eq. 8: log(1 + e^-1 + e^-2) + log(1 + e^-1)
    (pro.pro_loss(t(-1.0, -2.0, -3.0)), 0.40761 + 0.31326),
    (pro.pro_loss(t(-1.0, -2.0, -3.0), first_only=True), 0.40761),
    # Eq. 9, k = 1: gaps 1 and 3, own multiplier 3: z = -3, -2, -9 -> log(e^-3 + e^-2 + e^-9) + 3 = 1.31393
    #        k = 2: gap 2, own multiplier 2: z = -4, -6 -> log(1 + e^-2) = 0.12693
    (pro.pro_loss(t(-1.0, -2.0, -3.0), t(3.0, 2.0, 0.0)), 1.31393 + 0.12693),
    (pro.pro_loss(t(-1.0, -7.0, -2.0), t(1.0, 1.0, 1.0)), math.log(3) + math.log(2)),  # the limit of equal rewards
    (pro.pro_loss(t(-3.0, -4.0, -5.0), t(3.0, 1.0, 2.0)), math.nan),  # ascending rewards
    *[(pro.pro_loss(t(-3.0, -4.0), t(gap, 0.0)), math.log1p(math.exp(-gap))) for gap in (0.0, 10.0, 60.0, 1e4)],
    *[(pro.pro_loss(t(-4.0, -3.0), t(gap, 0.0)), gap + math.log1p(math.exp(-gap))) for gap in (10.0, 60.0, 1e4)],
    (pro.sft_loss(t(-6.0, -1.0), t(3.0, 1.0), "sum"), 6.0),
    (pro.sft_loss(t(-6.0, -1.0), t(3.0, 1.0), "mean"), 2.0),
    # best first, m = 0.1: (0,1) 0.2 + 0.1 = 0.3; (1,2) -0.7 + 0.1 -> 0; (0,2) -0.5 + 0.2 -> 0
    (tuna.ranking_loss(t(-1.0, -0.8, -1.5), 0.1), 0.3),
    (tuna.ranking_loss(t(-1.0, -0.8, -1.5), 0.1, pair_reduction="mean_by_distance"), 0.15),
    (tuna.ranking_loss(t(-1.0, -0.8, -1.5), 1.0), 1.2 + 0.3 + 1.5),
    (tuna.ranking_loss(t(-1.0, -0.8, -1.5), 1.0, pair_reduction="mean_by_distance"), (1.2 + 0.3) / 2 + 1.5),
    (tuna.mle_loss(t(-6.0, -9.0, -2.0), t(3.0, 2.0, 1.0), t(True, False, True)), 2.0),
    (tuna.mle_loss(t(-6.0, -9.0), t(3.0, 2.0), t(False, False)), 0.0),
    (t(tuna.teacher_score(-20.0, 10, 1.3), tuna.teacher_score(-20.0, 10, 0.0)), [-20 / 19.9526, -20.0]),  # 10 ** 1.3
    # (2 log(1 + e^-1) + log(1 + e^-2)) / 3
    (reward_model.ranking_loss(t(2.0, 1.0, 0.0), t(2.0, 1.0, 0.0)), (2 * 0.313262 + 0.126928) / 3),
    (reward_model.ranking_loss(t(90.0, -10.0), t(0.0, 1.0)), 100.0),
]


@pytest.mark.parametrize("got, want", BY_HAND)
def test_by_hand(got, want):
    assert got.tolist() == pytest.approx(want, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("gap", [0.0, 10.0, 60.0, 1e4])
def test_pros_gradient_is_finite_whatever_the_gap(gap):
    scores = torch.tensor([-3.0, -4.0], requires_grad=True)
    pro.pro_loss(scores, t(gap, 0.0)).backward()
    assert scores.grad.isfinite().all()
