"""Each objective against values worked out by hand, its limits, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.objectives import (
    ObjectiveConfig,
    accuracies,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    log_ratio_difference,
    preference_loss,
    rewards,
    robust_loss,
)
from trainer.schema import PairLogps, UserError


def pair(chosen: float, rejected: float, chosen_tokens: int = 2, rejected_tokens: int = 4) -> PairLogps:
    return PairLogps(
        torch.tensor([chosen]),
        torch.tensor([rejected]),
        torch.tensor([chosen_tokens]),
        torch.tensor([rejected_tokens]),
    )


POLICY, REFERENCE = pair(-10.0, -20.0), pair(-12.0, -16.0)


def test_log_ratio_difference_by_hand() -> None:
    # (-10 + 12) - (-20 + 16) = 2 + 4
    assert log_ratio_difference(POLICY, REFERENCE).item() == 6.0
    # 2 / 2 tokens + 4 / 4 tokens
    assert log_ratio_difference(POLICY, REFERENCE, average=True).item() == 2.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ObjectiveConfig(beta=0.5), math.log1p(math.exp(-3.0))),
        (
            ObjectiveConfig(beta=0.5, label_smoothing=0.1),
            0.9 * math.log1p(math.exp(-3.0)) + 0.1 * math.log1p(math.exp(3.0)),
        ),
        (
            ObjectiveConfig(loss="robust", beta=0.5, label_smoothing=0.1),
            (0.9 * math.log1p(math.exp(-3.0)) - 0.1 * math.log1p(math.exp(3.0))) / 0.8,
        ),
        (ObjectiveConfig(loss="ipo", beta=0.5), (6.0 - 1.0) ** 2),
        (ObjectiveConfig(loss="ipo", beta=0.5, average=True), (2.0 - 1.0) ** 2),
        (ObjectiveConfig(loss="hinge", beta=0.1), 0.4),
        (ObjectiveConfig(loss="hinge", beta=0.5), 0.0),
    ],
)
def test_losses_by_hand(config: ObjectiveConfig, expected: float) -> None:
    assert preference_loss(config, POLICY, REFERENCE).item() == pytest.approx(expected, rel=1e-6)


def test_fresh_policy_gives_ln_2_and_no_reward() -> None:
    loss = preference_loss(ObjectiveConfig(), REFERENCE, REFERENCE)
    assert loss.item() == pytest.approx(math.log(2))
    chosen, rejected = rewards(0.1, REFERENCE, REFERENCE)
    assert chosen.item() == rejected.item() == 0
    assert accuracies(chosen, rejected).item() == 0.5


def test_dpo_gradient_is_the_papers() -> None:
    # d loss / d h = -beta sigmoid(-beta h): arXiv:2305.18290, section 4.
    h = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    dpo_loss(h, 0.3).sum().backward()
    torch.testing.assert_close(h.grad, -0.3 * torch.sigmoid(-0.3 * h.detach()))


def test_robust_is_unbiased_under_flips() -> None:
    # The mean over kept (1 - e) and flipped (e) labels is the clean loss: arXiv:2403.00409, lemma 3.1.
    h, e = torch.linspace(-5, 5, 11), 0.2
    mean = (1 - e) * robust_loss(h, 0.7, e) + e * robust_loss(-h, 0.7, e)
    torch.testing.assert_close(mean, dpo_loss(h, 0.7))


@pytest.mark.parametrize("h", [1e4, -1e4])
def test_extremes_are_finite(h: float) -> None:
    value = torch.tensor([h], requires_grad=True)
    total = (
        dpo_loss(value, 1.0, 0.1)
        + robust_loss(value, 1.0, 0.1)
        + hinge_loss(value, 1.0)
        + ipo_loss(value, 1.0)
    )
    total.sum().backward()
    assert torch.isfinite(total).all()
    assert torch.isfinite(value.grad).all()


def test_rewards_carry_no_gradient() -> None:
    policy = pair(-1.0, -2.0)
    policy.chosen.requires_grad_()
    chosen, _ = rewards(0.1, policy, REFERENCE)
    assert not chosen.requires_grad


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"label_smoothing": 0.5, "loss": "robust"}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "no effect"),
        ({"label_smoothing": 0.1, "loss": "hinge"}, "no effect"),
        ({"loss": "robust"}, "robust"),
        ({"average": True}, "average"),
        ({"nll_weight": -1.0}, "nll_weight"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        ObjectiveConfig(**settings)
