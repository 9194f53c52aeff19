"""One token per row: the distribution that is sampled, and a draw from it by the inverse of its cumulative sum.

A draw takes one uniform number per row, so a row's tokens depend on its own numbers only. `logp` is the
log-probability under the distribution that was really sampled: after temperature, banned tokens, top-k and top-p,
renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens summed before the cumulative sum in float64; vocabularies are mostly multiples of it
NUCLEUS = 1024  # best tokens tried before a nucleus sorts the whole vocabulary


@dataclass(frozen=True)
class Decoding:
    """How a response is drawn.

    `rows` is the number of rows in every forward; 0 lets the sampler choose, but no more than `wave`, the responses that
    one step wants of all processes together (0: not known), of whose prompts the longest has `longest` tokens (0: not known).
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    rows: int = 0
    wave: int = 0
    longest: int = 0


def choose(logits: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Draw a token for every row.

    Args:
        logits: [N, V], any float type; -inf bans a token.
        uniform: [N] float64 in [0, 1).
        decoding: temperature, top-k and top-p. Temperature 0 takes the best token (the first of equals) and ignores
            top-k and top-p; its log-probability is then that of temperature 1.

    Returns:
        Token ids [N] int64 and their log-probabilities [N] float32, NaN for a row whose logits are not finite.
    """
    p = distribution(logits, decoding)
    if decoding.temperature == 0:
        token = logits.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0].log().float()
    token, total = draw(p, uniform)
    chosen = p.gather(-1, token[:, None])[:, 0]
    return token, (chosen.double() / total).log().float()


def distribution(logits: Tensor, decoding: Decoding) -> Tensor:
    """Unnormalised probabilities [N, V]: tokens outside top-k or the nucleus are 0. Ties at an edge are kept."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if decoding.temperature not in (0, 1):
        z = z / decoding.temperature
    p = torch.softmax(z, -1)
    if decoding.temperature == 0:
        return p
    if 0 < decoding.top_k < p.shape[-1]:
        edge = p.topk(decoding.top_k, -1).values[:, -1:]
        p = p.masked_fill_(p < edge, 0)
    if decoding.top_p < 1:
        p = p.masked_fill_(p < nucleus_edge(p, decoding.top_p), 0)
    return p


def nucleus_edge(p: Tensor, top_p: float) -> Tensor:
    """The smallest probability [N, 1] of the smallest set of best tokens that holds `top_p` of the mass of p [N, V]."""
    wanted = top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
    best = p.topk(min(NUCLEUS, p.shape[-1]), -1).values
    mass = best.cumsum(-1, dtype=torch.float64)
    if bool((mass[:, -1:] < wanted).any()):
        best = p.sort(-1, descending=True).values
        mass = best.cumsum(-1, dtype=torch.float64)
    before = (mass < wanted).sum(-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
    return best.gather(-1, before)


def draw(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sum of unnormalised p [N, V] at uniform [N]; returns tokens [N] and the mass [N] float64.

    Two levels, blocks and then tokens of one block, so that float64 sums touch V / BLOCK + BLOCK numbers and not V.
    A token of probability 0 is never drawn: the search finds the first sum *above* a point that is kept strictly below
    the whole. The clamps matter for NaN only.
    """
    rows, v = p.shape
    blocks = F.pad(p, (0, -v % BLOCK)).view(rows, -1, BLOCK) if v % BLOCK else p.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # [N, V / BLOCK]
    point = _below(uniform.to(sums)[:, None] * sums[:, -1:], sums[:, -1:])
    block = torch.searchsorted(sums, point, right=True).clamp_(max=sums.shape[-1] - 1)  # [N, 1]
    before = F.pad(sums, (1, 0)).gather(-1, block)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]  # [N, BLOCK]
    inside = chosen.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(inside, _below(point - before, inside[:, -1:]), right=True)
    return (block * BLOCK + token).clamp_(max=v - 1)[:, 0], sums[:, -1]


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """x, at most the largest number below `limit`."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
