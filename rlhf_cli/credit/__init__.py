"""Credit rules: from scores, rewards and values to the advantage of each token."""

from rlhf_cli.credit.gae import gae
from rlhf_cli.credit.group import batch_mean, group_norm, group_norm_to_go, group_whitened, leave_one_out
from rlhf_cli.credit.to_go import reward_to_go

__all__ = [
    "batch_mean",
    "gae",
    "group_norm",
    "group_norm_to_go",
    "group_whitened",
    "leave_one_out",
    "reward_to_go",
]
