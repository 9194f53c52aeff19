"""Shapers: an [N] result replaces the score, an [N, T] result is added to the token rewards."""

from rlhf_cli.shaping.adaptive_kl import AdaptiveKL
from rlhf_cli.shaping.kl import sequence_kl, token_kl
from rlhf_cli.shaping.score import clip, missing_eos, overlong, scale
from rlhf_cli.shaping.turns import by_turn

__all__ = [
    "AdaptiveKL",
    "by_turn",
    "clip",
    "missing_eos",
    "overlong",
    "scale",
    "sequence_kl",
    "token_kl",
]
