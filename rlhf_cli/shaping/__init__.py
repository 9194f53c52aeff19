"""Shapers: an [N] result replaces the score, an [N, T] result is added to the token rewards."""

from rlhf_cli.shaping.adaptive_kl import AdaptiveFullKL, AdaptiveKL
from rlhf_cli.shaping.implicit import implicit_dpo
from rlhf_cli.shaping.inference import InfAlignOptimal, infalign_ctrl
from rlhf_cli.shaping.kl import sequence_kl, token_kl, token_kl_full
from rlhf_cli.shaping.reference import centered, lsc, lsc_canned, par, sgfc, squash
from rlhf_cli.shaping.running import MinMax, RunningClip, RunningNorm
from rlhf_cli.shaping.score import Whiten, ceil, clip, length_penalty, missing_eos, overlong, relative_length, scale
from rlhf_cli.shaping.turns import by_turn

__all__ = [
    "AdaptiveFullKL",
    "AdaptiveKL",
    "InfAlignOptimal",
    "MinMax",
    "RunningClip",
    "RunningNorm",
    "Whiten",
    "by_turn",
    "ceil",
    "centered",
    "clip",
    "implicit_dpo",
    "infalign_ctrl",
    "length_penalty",
    "lsc",
    "lsc_canned",
    "missing_eos",
    "overlong",
    "par",
    "relative_length",
    "scale",
    "sequence_kl",
    "sgfc",
    "squash",
    "token_kl",
    "token_kl_full",
]
