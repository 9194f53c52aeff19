"""What Hydra makes of the chosen options, composed once in a process for each selection of them.

Finding and merging options takes ten times as long as everything else about a configuration, and the points of a sweep
share most selections; settings (key=value) change a copy, in the way that Hydra applies them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from rlhf_cli import catalog
from rlhf_cli.config import schema

VERSION = "1.3"  # Hydra's defaults are those of this release
SCHEMA = "run_schema"


def compose(config_name: str, lines: list[str], config_dir: str | None) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration of overrides as Hydra takes them, and group -> option; raises Hydra's errors."""
    groups = catalog.groups(config_dir)
    parsed = OverridesParser.create().parse_overrides(lines)
    settings = [o for o in parsed if _is_setting(o, groups)]
    selection = tuple(line for line, o in zip(lines, parsed, strict=True) if not _is_setting(o, groups))
    own = catalog.conf_dirs(config_dir)[1:]
    stamps = tuple((str(p), p.stat().st_mtime_ns) for root in own for p in sorted(root.rglob("*.yaml")))
    base, options = _selected(config_name, selection, tuple(map(str, own)), stamps)
    made = copy.deepcopy(base)
    ConfigLoaderImpl._apply_overrides_to_config(settings, made)
    return made, dict(options)


def store_schema() -> None:
    """Give Hydra the schema that `defaults` name; it copies what it loads, so that once is enough."""
    store = ConfigStore.instance()
    if f"{SCHEMA}.yaml" not in store.repo:
        store.store(name=SCHEMA, node=schema())


def _is_setting(o: Override, groups: Iterable[str]) -> bool:
    """Whether an override changes what was composed, rather than what is composed."""
    if o.is_sweep_override() or o.is_hydra_override() or o.package or "/" in o.key_or_group:
        return False
    return o.key_or_group not in groups or isinstance(o.value(), dict)


@lru_cache(maxsize=64)
def _selected(
    config_name: str, selection: tuple[str, ...], own: tuple[str, ...], stamps: tuple[tuple[str, int], ...]
) -> tuple[DictConfig, dict[str, Any]]:
    """The options alone; `own` holds the user's folder, if any, and `stamps` differ once a file of it has changed."""
    store_schema()
    more = [f"hydra.searchpath=['file://{folder}']" for folder in own]
    with initialize_config_module("rlhf_cli.conf", version_base=VERSION):
        cfg = hydra_compose(config_name, [*selection, *more], return_hydra_config=True)
    options = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, options
