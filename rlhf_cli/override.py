"""Changing a configuration that a run has frozen, and taking over parts of one."""

from __future__ import annotations

from collections.abc import Iterable

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from rlhf_cli import catalog
from rlhf_cli.compose import check_learner, explain_override, finish, parse_override
from rlhf_cli.config import ConfigError


def inherit(cfg: DictConfig, run: DictConfig, words: list[str], sections: Iterable[str]) -> DictConfig:
    """`cfg` with a run's own sections, except where `words` choose another option; single settings in `words` still win."""
    made = OmegaConf.create(cfg)
    for section in sections:
        if section in cfg.names and not any(w.startswith(f"{section}=") for w in words):
            OmegaConf.update(made, section, run[section], merge=False)
            made = override(made, [w for w in words if w.lstrip("+").startswith(f"{section}.")])
            made.names[section] = run.names.get(section, "")
    return made


def override(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """A copy of a run's configuration with `key=value` settings changed; its groups stay as they were chosen."""
    made = OmegaConf.create(cfg)
    OmegaConf.set_struct(made, True)
    groups = {*catalog.groups(None), *catalog.defaults("train")}
    for o in [parse_override(text) for text in overrides]:
        _check_plain(o, made, groups)
        wrong = explain_override(o, made, groups, None)
        if wrong:
            raise ConfigError(wrong)
    names = dict(made.names)
    made = finish(made, {}, [])
    made.names = names
    return made


def _check_plain(o: Override, cfg: DictConfig, groups: set[str]) -> None:
    """Refuse what is not the change of a setting."""
    key = o.key_or_group
    if o.package or (key in groups and (o.is_delete() or not isinstance(o.value(), dict))):
        was = cfg.names.get(key)
        raise ConfigError(
            f"{o.input_line}: a run keeps its {key}{f' ({was})' if was else ''}; for another, start a new run: "
            f"rlhf train {o.input_line}"
        )
    if o.is_sweep_override():
        raise ConfigError(f"{o.input_line}: several values; type one, or {key}=[a,b] for a list")
    if o.is_delete():
        raise ConfigError(f"{o.input_line}: nothing can be deleted from a run; give it another value")
    if key in ("run", "run.name", "run.dir", "names") or key.startswith("names."):
        raise ConfigError(f"{o.input_line}: a run keeps its name and place; move its folder instead")
    check_learner(o)
