"""Rewards of a dialogue at the turns that earned them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.shaping.place import at_end


def by_turn(turn_reward: Tensor, mask: Tensor, *, weight: float) -> Tensor:
    """Move what the environment gave from a row's end to the last token of each turn, [N, T]; every row sums to 0.

    The score holds weight * sum_turns r and lands on the last trained token; this takes it from there and puts weight * r where it
    was earned, so that credit that reads token rewards (`gae`, `reward_to_go`) sees each turn's own.
    Rewards at turn ends: Zhao et al., "Teaching Language Models to Evolve with Users: Dynamic Profile Modeling for Personalized
    Alignment", arXiv:2505.15456, section 3.

    Args:
        turn_reward: what the environment gave for each turn, at that turn's last token, [N, T]
        mask: trained tokens, [N, T] bool
        weight: of reward=environment in the score
    """
    placed = torch.where(mask, turn_reward, 0.0)
    return weight * (placed - at_end(placed.sum(-1), mask))
