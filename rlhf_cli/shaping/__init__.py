"""Shapers: an [N] result replaces the score, an [N, T] result is added to the token rewards."""

from rlhf_cli.shaping.adaptive_kl import AdaptiveKL
from rlhf_cli.shaping.implicit import implicit_dpo
from rlhf_cli.shaping.kl import sequence_kl, token_kl, token_kl_full
from rlhf_cli.shaping.score import clip, missing_eos, overlong, scale

__all__ = [
    "AdaptiveKL",
    "clip",
    "implicit_dpo",
    "missing_eos",
    "overlong",
    "scale",
    "sequence_kl",
    "token_kl",
    "token_kl_full",
]
