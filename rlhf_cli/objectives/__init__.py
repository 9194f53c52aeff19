"""Unreduced objectives: [N, T], [N] or [M] from learner outputs and columns."""

from rlhf_cli.objectives.contrastive import copg, copg_labels, p3o, p3o_joint, trpa
from rlhf_cli.objectives.policy import (
    cispo,
    entropy_bonus,
    gspo_token,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_corrected,
    kl_k3_straight,
    kl_old,
    ppo_clip,
    ppo_clip_whitened,
    pre_clip,
    reinforce,
    sequence_ratio_clip,
    two_sided_clip,
)
from rlhf_cli.objectives.preference import dpo, hinge, ipo
from rlhf_cli.objectives.reward_model import bradley_terry, bradley_terry_margin, centering, squared_error
from rlhf_cli.objectives.supervised import nll
from rlhf_cli.objectives.value import clipped_value

__all__ = [
    "bradley_terry",
    "bradley_terry_margin",
    "centering",
    "cispo",
    "clipped_value",
    "copg",
    "copg_labels",
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
    "kl_old",
    "nll",
    "p3o",
    "p3o_joint",
    "ppo_clip",
    "ppo_clip_whitened",
    "pre_clip",
    "reinforce",
    "sequence_ratio_clip",
    "squared_error",
    "trpa",
    "two_sided_clip",
]
