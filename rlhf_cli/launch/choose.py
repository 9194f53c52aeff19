"""Where the ranks of a run start: the protocol of a launcher, and the one that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rlhf_cli.config import build
from rlhf_cli.record.rundir import RunDir


class Launcher(Protocol):
    """A value of conf/launcher. `cfg.hardware` holds what `hardware` gave when it is called."""

    def hardware(self, cfg: Any, *, here: bool = True) -> dict[str, Any]:
        """The `auto` values of `hardware` that can be told now; with `here` off a run is planned on another machine than its own."""
        ...

    def __call__(self, cfg: Any, freeze: Callable[[], RunDir]) -> int:
        """Start the run. `freeze` claims its directory, new or old, and writes the configuration there. Returns the exit status."""
        ...

    def script(self, cfg: Any) -> str:
        """What would be handed to a queue; empty where there is none."""
        ...


def launcher_of(cfg: Any) -> Launcher:
    """The launcher that `cfg` names."""
    return build(cfg.launcher, "launcher", allow=cfg.allow_targets)  # type: ignore[return-value]
