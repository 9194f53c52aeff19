"""Models that are only read, as a plan sees them: which there are, what they give, how they follow the policy. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError

INITIAL = "initial"  # path of a model that starts as the policy does
SOUP = "soup"  # model.reference: the weight average of the model and model.soup.path
TAKEN = ("old", "ref", "behavior", "full")  # their NAME_logp are columns with another meaning
SUFFIX = "_logp"


def column(name: str) -> str:
    """The column that `frozen.NAME` gives: log-probs of the trained tokens, [N, T]."""
    return f"{name}{SUFFIX}"


def columns(cfg: Any) -> dict[str, str]:
    """Column -> the model of `frozen` that gives it."""
    return {column(name): name for name in cfg.frozen}


def check(cfg: Any) -> None:
    """Names, paths and refreshes. Raises ConfigError."""
    for name, section in cfg.frozen.items():
        taken = name in (*TAKEN, "policy", "reference", *cfg.updates, *cfg.learners)
        if not str(name).isidentifier() or taken:
            raise ConfigError(
                f"frozen.{name}: {'this name is taken' if taken else 'it must be a plain word'}; choose another"
            )
        if not section.path:
            raise ConfigError(
                f"frozen.{name}.path is empty; type frozen.{name}.path=RUN, or frozen.{name}.path={INITIAL} for the initial policy"
            )
    for key, section in _refreshes(cfg):
        if section.every < 0:
            raise ConfigError(f"{key}.every={section.every}: must be at least 0")
        if not 0 <= section.decay < 1:
            raise ConfigError(f"{key}.decay={section.decay:g}: must be at least 0 and below 1")
        if section.decay and not section.every:
            raise ConfigError(f"{key}.decay={section.decay:g} is not used while nothing refreshes; type {key}.every=1")
    _check_soup(cfg)
    _check_mask(cfg)


def _refreshes(cfg: Any) -> Iterator[tuple[str, Any]]:
    yield "model.refresh", cfg.model.refresh
    yield from ((f"frozen.{name}.refresh", section.refresh) for name, section in cfg.frozen.items())


def _check_soup(cfg: Any) -> None:
    soup, asked = cfg.model.soup, cfg.model.reference == SOUP
    if asked and not soup.path:
        raise ConfigError(
            "model.reference=soup averages the model with another one, and model.soup.path is empty; "
            "type model.soup.path=RUN, another fine-tune of the same base model"
        )
    if soup.path and not asked:
        raise ConfigError("model.soup.path is not used; type model.reference=soup")
    if not 0 <= soup.weight <= 1:
        raise ConfigError(f"model.soup.weight={soup.weight:g}: must be from 0 to 1")


def _check_mask(cfg: Any) -> None:
    mask = cfg.rollout.mask
    if not mask.model:
        return
    if mask.model not in cfg.frozen:
        known = ", ".join(cfg.frozen) or "none yet"
        raise ConfigError(
            f"rollout.mask.model={mask.model}: no such model in frozen ({known}); "
            f"type frozen.{mask.model}.path={INITIAL} frozen.{mask.model}.refresh.every=20{nearest(mask.model, cfg.frozen)}"
        )
    for wrong, message in (
        (not 0 < mask.top_p <= 1, f"rollout.mask.top_p={mask.top_p:g}: must be above 0 and at most 1"),
        (mask.min_tokens < 1, f"rollout.mask.min_tokens={mask.min_tokens}: must be at least 1"),
        (
            cfg.rollout.backend != "builtin",
            f"rollout.mask needs the log-probs of two models at every token, which rollout.backend={cfg.rollout.backend} "
            "does not give; type rollout=builtin",
        ),
        (
            bool(cfg.environment),
            "rollout.mask: a dialogue of several turns keeps no record of what its tokens were chosen from; type environment=none",
        ),
        (
            cfg.rollout.top_p < 1 or cfg.rollout.top_k > 0 or cfg.rollout.min_tokens > 0,
            "rollout.mask: the learner knows the mask's tokens only; set rollout.top_p=1 rollout.top_k=0 rollout.min_tokens=0",
        ),
    ):
        if wrong:
            raise ConfigError(message)


def refuse_idle(cfg: Any, wanted: Iterable[str], trained: bool) -> None:
    """A model that nothing reads would cost its memory for nothing; one that follows the policy needs a policy that is `trained`."""
    for key, section in _refreshes(cfg) if not trained else ():
        if section.every:
            raise ConfigError(
                f"{key}.every={section.every}: no policy is trained, so there is nothing to follow; type {key}.every=0"
            )
    for name in cfg.frozen:
        if column(name) not in wanted and cfg.rollout.mask.model != name:
            raise ConfigError(f"frozen.{name}: nothing reads {column(name)}; drop it with '~frozen.{name}'")


def described(cfg: Any, name: str) -> str:
    """What a model of `frozen` is, for the plan."""
    section = cfg.frozen[name]
    what = "a copy of the initial policy" if section.path == INITIAL else section.path
    does = "says which tokens may be drawn" if cfg.rollout.mask.model == name else f"gives {column(name)}"
    return f"{does}: {what}{follows(section.refresh)}"


def reference(cfg: Any) -> str:
    """What the reference is, for the plan."""
    m = cfg.model
    if m.reference == SOUP:
        what = f"{1 - m.soup.weight:g} x the model + {m.soup.weight:g} x {m.soup.path}"
    elif m.reference != "auto":
        what = m.reference
    elif m.lora.r and not m.refresh.every:
        what = "the disabled adapter"
    else:
        what = "a frozen copy of the initial policy" if not m.refresh.every else "a copy of the policy"
    return f"gives ref_logp: {what}{follows(m.refresh)}"


def follows(refresh: Any) -> str:
    """How a model follows the policy, or nothing."""
    if not refresh.every:
        return ""
    how = f", {refresh.decay:g} of itself kept" if refresh.decay else ""
    return (
        f"; takes the policy's weights every {refresh.every} steps{how}"
        if refresh.every > 1
        else f"; takes the policy's weights every step{how}"
    )


def absent(name: str) -> str:
    """Why a column NAME_logp that no stage makes is not there."""
    model = name.removesuffix(SUFFIX)
    return f"no model is called {model}: type frozen.{model}.path=RUN"
