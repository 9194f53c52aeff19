"""Credit rules: from scores, rewards and values to the advantage of each token."""

from rlhf_cli.credit.difficulty import difficulty_scaled
from rlhf_cli.credit.gae import gae, gae_biased, gae_scaled_reward
from rlhf_cli.credit.group import (
    batch_leave_one_out,
    batch_mean,
    greedy_baseline,
    group_norm,
    group_norm_at_token,
    group_norm_to_go,
    group_whitened,
    identity,
    leave_one_out,
)
from rlhf_cli.credit.running import RunningMean
from rlhf_cli.credit.to_go import reward_to_go, reward_to_go_filtered

__all__ = [
    "RunningMean",
    "batch_leave_one_out",
    "batch_mean",
    "difficulty_scaled",
    "gae",
    "gae_biased",
    "gae_scaled_reward",
    "greedy_baseline",
    "group_norm",
    "group_norm_at_token",
    "group_norm_to_go",
    "group_whitened",
    "identity",
    "leave_one_out",
    "reward_to_go",
    "reward_to_go_filtered",
]
