"""Preference objectives: pure functions of the policy's and the reference's log-probabilities of a batch of pairs.

Each returns one loss for each pair, unreduced; the step's mean is taken by whoever knows the step. With

    h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)),

the paper's difference of implicit rewards over beta, all of them are functions of h alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.schema import PairLogps, UserError

PerPair = Float[Tensor, " pair"]
Loss = Literal["sigmoid", "robust", "ipo", "hinge"]


def log_ratio_difference(policy: PairLogps, reference: PairLogps, average: bool = False) -> PerPair:
    """h in nats: from sums over the completion, or with `average` from means for each completion token."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if average:
        chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
    return chosen - rejected


def dpo_loss(h: PerPair, beta: float, label_smoothing: float = 0.0) -> PerPair:
    """DPO: -log sigmoid(beta h). Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    `label_smoothing` is the assumed share of flipped labels: conservative DPO (cDPO), Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf), equation 3.

    With real answers chosen, and the reference being the opponent that generated the rejected ones, it is SPIN's
    objective with the logistic loss, beta its lambda. Chen et al. 2024 (arXiv:2401.01335), equation 4.7.
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_loss(h: PerPair, beta: float, label_smoothing: float) -> PerPair:
    """Robust DPO, unbiased under labels flipped with probability `label_smoothing` < 0.5.

    Chowdhury et al. 2024 (arXiv:2403.00409), equation 12.
    """
    kept = -(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)
    return kept / (1 - 2 * label_smoothing)


def ipo_loss(h: PerPair, beta: float) -> PerPair:
    """IPO: (h - 1 / (2 beta))^2, beta being the paper's tau. Azar et al. 2023 (arXiv:2310.12036), equation 17."""
    return (h - 1 / (2 * beta)).square()


def hinge_loss(h: PerPair, beta: float) -> PerPair:
    """Hinge on the normalised margin: max(0, 1 - beta h). Liu et al. 2023 (RSO, arXiv:2309.06657), equation 10.

    Against the opponent it is SPIN's objective with the hinge loss (arXiv:2401.01335, equation 4.7).
    """
    return F.relu(1 - beta * h)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        loss: `sigmoid` (DPO; cDPO with label smoothing), `robust`, `ipo` or `hinge`.
        beta: strength of the pull to the reference (IPO's tau).
        label_smoothing: assumed share of flipped labels, 0 to below 0.5; for `sigmoid` and `robust`.
        average: IPO on log-probs averaged over the completion's tokens (as TRL does) rather than summed (the paper).
        nll_weight: weight of the negative log-likelihood of the chosen, for each of the step's chosen tokens
            (Pang et al. 2024, arXiv:2404.19733, equation 1, normalised over the step's tokens).
    """

    loss: Loss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    average: bool = False
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta: {self.beta} is not above 0; 0.1 is usual")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"objective.label_smoothing: {self.label_smoothing} is not in [0, 0.5)")
        if not self.nll_weight >= 0:
            raise UserError(f"objective.nll_weight: {self.nll_weight} is below 0")
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise UserError(f"objective.label_smoothing: has no effect with loss {self.loss}; set it to 0")
        if self.loss == "robust" and not self.label_smoothing:
            raise UserError(
                "objective.loss: robust without label_smoothing is sigmoid; say sigmoid, or set label_smoothing"
            )
        if self.average and self.loss != "ipo":
            raise UserError(f"objective.average: has an effect with loss ipo only, not {self.loss}")


def preference_loss(config: ObjectiveConfig, policy: PairLogps, reference: PairLogps) -> PerPair:
    """The configured objective's loss for each pair, without the NLL term."""
    h = log_ratio_difference(policy, reference, config.average)
    match config.loss:
        case "sigmoid":
            return dpo_loss(h, config.beta, config.label_smoothing)
        case "robust":
            return robust_loss(h, config.beta, config.label_smoothing)
        case "ipo":
            return ipo_loss(h, config.beta)
        case "hinge":
            return hinge_loss(h, config.beta)


def rewards(beta: float, policy: PairLogps, reference: PairLogps) -> tuple[PerPair, PerPair]:
    """Implicit rewards beta (log pi - log ref) of chosen and rejected, detached (arXiv:2305.18290, section 5)."""
    chosen = beta * (policy.chosen - reference.chosen).detach()
    return chosen, beta * (policy.rejected - reference.rejected).detach()


def accuracies(chosen: PerPair, rejected: PerPair) -> PerPair:
    """1 where the chosen has the higher reward, 0 where the rejected has, one half for ties."""
    return (torch.sign(chosen - rejected) + 1) / 2
