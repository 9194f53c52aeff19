"""Objectives that train a score per response, unreduced: on (winner, loser) pairs, [M], or on recorded numbers, [N].

d = score(winner) - score(loser). Pairs couple rows, so none of these is rowwise; the regression is.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.inject import rowwise
from rlhf_cli.objectives.preference import gap, smoothed_logistic


def bradley_terry(score_new: Tensor, pairs: Tensor, *, label_smoothing: float) -> Tensor:
    """Bradley-Terry negative log-likelihood: -(1 - e) log sigmoid(d) - e log sigmoid(-d), [M].

    See Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 39, 1952; Ouyang et al., "Training
    language models to follow instructions with human feedback", arXiv:2203.02155, eq. 1.

    Args:
        score_new: scores of the model, [N]
        pairs: (winner, loser) rows, [M, 2] int64
        label_smoothing: probability e that a label is wrong, in [0, 0.5)
    """
    return smoothed_logistic(gap(score_new, pairs), label_smoothing)


def bradley_terry_margin(score_new: Tensor, pairs: Tensor, margin: Tensor, *, label_smoothing: float) -> Tensor:
    """Bradley-Terry with a margin per pair: the loss of `bradley_terry` at d - margin, [M].

    See Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv:2307.09288, eq. 2.

    Args:
        score_new: scores of the model, [N]
        pairs: (winner, loser) rows, [M, 2] int64
        margin: gap that each pair must exceed, [M], score units
        label_smoothing: probability e that a label is wrong, in [0, 0.5)
    """
    return smoothed_logistic(gap(score_new, pairs) - margin, label_smoothing)


def centering(score_new: Tensor, pairs: Tensor) -> Tensor:
    """Squared sum of a pair's scores, (score(winner) + score(loser))^2, [M]: fixes the constant that pairs leave free.

    See Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
    arXiv:2312.09244, section 2.

    Args:
        score_new: scores of the model, [N]
        pairs: (winner, loser) rows, [M, 2] int64
    """
    return score_new[pairs].sum(-1).square()


@rowwise
def squared_error(score_new: Tensor, label: Tensor) -> Tensor:
    """(score - label)^2, [N]: regression on a recorded number, such as one attribute of a response.

    See Li et al., "Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach", arXiv:2503.21819, whose
    reward model is the mean of this over rows and attributes.

    Args:
        score_new: scores of the model, [N]
        label: recorded number of each row, [N]
    """
    return (score_new - label).square()
