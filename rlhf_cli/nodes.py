"""From a node of the configuration with `_target_` to a callable with its settings bound."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, make_dataclass
from functools import lru_cache, partial
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.signature import PACKAGE, REQUIRED, Param, Signature, signature


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a likely typo, or an empty string."""
    match = difflib.get_close_matches(word, [str(a) for a in allowed], n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_node(
    node: Mapping[str, Any], key: str, *, allow: Iterable[str] = (), reserved: Iterable[str] = ()
) -> tuple[Signature, dict[str, Any]]:
    """Check a node's target, names and types without importing the target. Returns its signature and converted settings.

    `key` is the node's place in the config, for messages; `reserved` keys belong to the caller and are left out.
    """
    settings = {str(k): v for k, v in node.items()}
    target = settings.pop("_target_", None)
    if not isinstance(target, str):
        raise ConfigError(f"{key}: has no _target_; pick an option of that group instead (rlhf list)")
    module = target.rpartition(".")[0]
    if not any(module == a or module.startswith(a + ".") for a in (PACKAGE, *allow)):
        raise ConfigError(
            f"{key}._target_: {target} is outside {PACKAGE}; allow its module with allow_targets=[{module}]"
        )
    if module.partition(".")[0] != PACKAGE and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's module lies where the command is typed
    sig = signature(target)
    for name in reserved:
        settings.pop(name, None)
    for name in settings:
        if name not in sig.params:
            allowed = ", ".join(sig.params) or "no settings"
            raise ConfigError(
                f"{key}.{name}: unknown; {target.rpartition('.')[2]} takes {allowed}{nearest(name, sig.params)}"
            )
    absent = [p.name for p in sig.params.values() if p.default is REQUIRED and p.name not in settings]
    if absent:
        raise ConfigError(f"{key}.{absent[0]}: missing; type {key}.{absent[0]}=VALUE ({sig.params[absent[0]].type})")
    return sig, _convert(settings, sig.params, key)


def build(
    node: Mapping[str, Any], key: str, *, allow: Iterable[str] = (), reserved: Iterable[str] = ()
) -> Callable[..., Any]:
    """The node's target with its settings bound: `functools.partial` of a function, or an instance of a class."""
    sig, settings = check_node(node, key, allow=allow, reserved=reserved)
    module, _, name = sig.target.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    return made(**settings) if isinstance(made, type) else partial(made, **settings)


_SCALARS: dict[str, type] = {"float": float, "int": int, "bool": bool, "str": str}


def _convert(settings: dict[str, Any], params: Mapping[str, Param], key: str) -> dict[str, Any]:
    """Convert settings to their annotated types by OmegaConf's rules (1 is a float, 'abc' is not)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    done: dict[str, Any] = {}
    for name, value in settings.items():
        p = params[name]
        if p.choices and value not in p.choices:
            allowed = ", ".join(map(str, p.choices))
            raise ConfigError(
                f"{key}.{name}: {value!r} is not allowed; choose one of {allowed}{nearest(str(value), map(str, p.choices))}"
            )
        if type(value) is not str and type(value) is _SCALARS.get(p.type.removesuffix(" | None")):
            done[name] = value  # nothing to convert
            continue
        try:
            made = OmegaConf.merge(_typed(p.type), {"value": value})
            done[name] = OmegaConf.to_container(made, resolve=True)["value"]  # type: ignore[index,call-overload]
        except OmegaConfBaseException as e:
            raise ConfigError(f"{key}.{name}: {str(e).splitlines()[0]} (wanted: {p.type})") from None
        if value is None and "None" not in p.type and p.type in _SCALARS:
            raise ConfigError(f"{key}.{name}: must not be empty (wanted: {p.type})")
    return done


@lru_cache(maxsize=64)
def _typed(text: str) -> Any:
    """A section with one `value` of the type that a parameter is annotated with; shared, so merge into a copy."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(make_dataclass("Node", [("value", _type(text), field(default=None))]))  # type: ignore[arg-type]


def _type(text: str) -> Any:
    base = (
        text.replace(" | None", "").replace("Optional[", "").rstrip("]")
        if "[" not in text
        else text.replace(" | None", "")
    )
    if base in _SCALARS:
        return _SCALARS[base] | None
    return Any
