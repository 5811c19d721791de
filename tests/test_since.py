"""Flags that are not the papers' (PAPERS.md, "Since the papers"): each against a naive form, and neutral by default.
The model card of what was trained."""

import math

import pytest
import torch
from huggingface_hub import ModelCard

from pro import pro_loss
from rescue import lambda_weights, ranking_loss

SCORES = [-1.2, -0.4, -2.0, -0.4, -0.9]
LEVELS = [3.0, 1.0, 1.0, 0.0, math.nan]


def value_and_gradient(loss):
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    value = loss(scores)
    value.backward()
    return value.item(), scores.grad.tolist()


def assert_same(loss, naive):
    (got, got_gradient), (want, want_gradient) = value_and_gradient(loss), value_and_gradient(naive)
    assert got == pytest.approx(want, rel=1e-6) and got_gradient == pytest.approx(want_gradient, rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_rescue_hinge_with_margin_and_lambda_weights(margin, weighted):
    levels, ranks, gains = torch.tensor(LEVELS), [4, 1, 5, 1, 3], [3, 1, 1, 0, None]  # ranks by score, ties alike

    def naive(s):
        total = s.sum() * 0
        for i in range(5):
            for j in range(5):
                if LEVELS[i] > LEVELS[j]:
                    gain = 2 ** {3: 2, 1: 1, 0: 0}[gains[i]] - 2 ** {3: 2, 1: 1, 0: 0}[gains[j]]
                    w = abs(gain) * abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j])) if weighted else 1
                    total = total + w * max(s[j] - s[i] + margin, s.sum() * 0)
        return total

    weights = lambda s: lambda_weights(s.detach(), levels) if weighted else 1.0  # noqa: E731
    assert_same(lambda s: ranking_loss(s, levels, margin, weights(s)), naive)


@pytest.mark.parametrize("scale, margin", [(1.0, 0.0), (2.5, 0.0), (2.0, 1.4)])
def test_pro_with_scale_and_margin(scale, margin):
    def naive(s):
        total = s.sum() * 0
        for k in range(4):
            others = sum(torch.exp(scale * s[i] + margin) for i in range(k + 1, 5))
            total = total - torch.log(torch.exp(scale * s[k]) / (torch.exp(scale * s[k]) + others))
        return total

    assert_same(lambda s: pro_loss(s, score_scale=scale, target_margin=margin), naive)
    simpo = lambda s: -torch.nn.functional.logsigmoid(scale * (s[0] - s[1]) - margin)  # noqa: E731
    assert_same(lambda s: pro_loss(s[:2], score_scale=scale, target_margin=margin), simpo)


def test_a_trained_model_has_a_card(train, data, tmp_path):
    train("run", "--alpha", 0.2)
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None  # a folder is no hub id
    said = ["https://arxiv.org/abs/2311.09136", "rescue.py --ordering label", '"alpha": 0.2', f"content of {data}"]
    assert all(text in card.text for text in said)
