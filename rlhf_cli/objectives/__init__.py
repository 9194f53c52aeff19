"""Unreduced objectives: [N, T], [N] or [M] from learner outputs and columns."""

from rlhf_cli.objectives.policy import (
    cispo,
    entropy_bonus,
    gspo_token,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_corrected,
    kl_k3_straight,
    ppo_clip,
    reinforce,
    sequence_ratio_clip,
    two_sided_clip,
)
from rlhf_cli.objectives.preference import dpo, hinge, ipo
from rlhf_cli.objectives.reward_model import bradley_terry, bradley_terry_margin, centering
from rlhf_cli.objectives.supervised import nll
from rlhf_cli.objectives.value import clipped_value

__all__ = [
    "bradley_terry",
    "bradley_terry_margin",
    "centering",
    "cispo",
    "clipped_value",
    "dpo",
    "entropy_bonus",
    "gspo_token",
    "hinge",
    "ipo",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_corrected",
    "kl_k3_straight",
    "nll",
    "ppo_clip",
    "reinforce",
    "sequence_ratio_clip",
    "two_sided_clip",
]
