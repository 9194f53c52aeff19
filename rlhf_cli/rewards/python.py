"""A user's own function as a reward."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.rewards.per_sample import Row, groups_of, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

COLUMNS: dict[str, Callable[[Sample], Any]] = {
    "prompts": lambda s: s.prompt,
    "responses": lambda s: s.response,
    "references": lambda s: list(s.references),
    "meta": lambda s: dict(s.meta),
    "samples": lambda s: s,
}
VALUE_KEYS = ("value", "reward")


class Python:
    """The numbers that a function of yours returns.

    The function gets lists, one entry per response, by the names of its parameters: any of prompts, responses,
    references, meta, samples. It returns a list of numbers, where None means "cannot be scored", or a dict of such
    lists: `value` (or `reward`) is the reward, every other key is logged beside it. Responses for which it raises, or
    returns NaN or infinity, are missing; a wrong count or type is an error. An object that is called like a function may have
    `state_dict` and `load_state_dict`, which travel with checkpoints where it runs in the run's own process.
    """

    path_is = "FILE:FUNCTION"
    stays_by = "type {key}.workers=false"

    def __init__(self, *, path: str, sees: Literal["group", "sample"], workers: bool) -> None:
        """Args:
        path: the function, as FILE.py:FUNCTION or MODULE:FUNCTION
        sees: group (a call gets all responses to one prompt) or sample (a call gets one response, so that a failure or
            time-out loses one response and not its group)
        workers: call it in worker processes, which a time-out can kill; off, in the run's own process, as for a
            function that holds a large model
        """
        if not path:
            raise ConfigError("reward.python.path is empty; type reward.python.path=FILE.py:FUNCTION")
        self.path, self.sees, self.pooled = path, sees, workers
        self.whole_groups = sees == "group"
        self.function, self.file = load_function(path)
        self.takes = _parameters(self.function, path)
        if hasattr(self.function, "state_dict") and hasattr(self.function, "load_state_dict"):
            self.state_dict, self.load_state_dict = self.function.state_dict, self.function.load_state_dict

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        rows: dict[int, Row] = {}
        for members in groups_of(group.tolist()):
            rows |= zip(members, self.rows([samples[i] for i in members]), strict=True)
        return scored(rows[i] for i in range(len(samples)))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order; `samples` are one whole group where the function sees groups."""
        for seen in [samples] if self.whole_groups else [[s] for s in samples]:
            yield from self._call(seen)

    def _call(self, samples: Sequence[Sample]) -> Iterable[Row]:
        columns = {name: [COLUMNS[name](s) for s in samples] for name in self.takes}
        try:
            returned = self.function(**columns)
        except Exception as e:  # the user's code may raise anything
            return [Row(None, reason=f"{self.path!r} raised {_where(e, self.file)}")] * len(samples)
        parts = returned if isinstance(returned, Mapping) else {"value": returned}
        main = next((k for k in VALUE_KEYS if k in parts), None)
        if main is None:
            raise GateError(f"reward {self.path!r} returned a dict with the keys {list(parts)}; one must be 'value'")
        lists = {str(k): self._numbers(v, str(k), samples) for k, v in parts.items()}
        values = lists.pop(main)
        return [self._row(v, {k: x[i] for k, x in lists.items()}) for i, v in enumerate(values)]

    def _row(self, value: float | None, parts: Mapping[str, float | None]) -> Row:
        usable = {k: x if x is not None and math.isfinite(x) else None for k, x in parts.items()}
        if value is None or not math.isfinite(value):
            return Row(None, usable, f"{self.path!r} returned {value}")
        return Row(value, usable)

    def _numbers(self, returned: Any, key: str, samples: Sequence[Sample]) -> list[float | None]:
        who = f"reward {self.path!r}" + ("" if key in VALUE_KEYS else f" ({key})")
        if not isinstance(returned, Iterable) or isinstance(returned, str):
            raise GateError(f"{who} returned {_show(returned)}; it must return a list with one number per response")
        values = list(returned)
        if len(values) != len(samples):
            raise GateError(f"{who} returned {len(values)} values for {len(samples)} samples")
        return [_number(v, who, s.uid) for v, s in zip(values, samples, strict=True)]


def load_function(path: str) -> tuple[Callable[..., Any], str]:
    """The function named FILE.py:NAME or MODULE:NAME, and the file that it is in."""
    source, colon, name = path.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise ConfigError(f"reward.python.path: {path!r} names no function; type reward.python.path=FILE.py:FUNCTION")
    module = _from_file(Path(source), path) if source.endswith(".py") else _from_module(source, path)
    function = getattr(module, name, None)
    if function is None:
        known = ", ".join(sorted(n for n, v in vars(module).items() if inspect.isfunction(v))) or "no functions"
        raise ConfigError(f"reward.python.path: {source} defines no {name!r}; it defines {known}")
    if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward.python.path: {path} is not a plain function; give a function defined with def")
    return function, str(getattr(module, "__file__", source))


def _from_file(file: Path, path: str) -> ModuleType:
    if not file.is_file():
        raise ConfigError(
            f"reward.python.path: no file {str(file)!r} in {Path.cwd()}; type reward.python.path=FILE.py:FUNCTION"
        )
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # so that the file may import its neighbours, as a script may
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{file.stem}", file.resolve())
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's code may raise anything
        raise ConfigError(f"reward.python.path: {path} cannot be imported: {_where(e, str(file.resolve()))}") from e
    return module


def _from_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as e:  # the user's code may raise anything
        raise ConfigError(f"reward.python.path: {path} cannot be imported: {type(e).__name__}: {_line(e)}") from e


def _parameters(function: Callable[..., Any], path: str) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [p.name for p in named if p.name not in COLUMNS and p.default is p.empty]
    positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]
    takes = tuple(p.name for p in named if p.name in COLUMNS)
    if unknown or positional or not takes:
        wrong = f"asks for {', '.join(unknown or positional)}" if unknown or positional else "takes none of the columns"
        raise ConfigError(f"reward.python.path: {path} {wrong}; name its parameters from {', '.join(COLUMNS)}")
    return takes


def _number(value: Any, who: str, uid: str) -> float | None:
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(value, int | float):
        raise GateError(f"{who} returned {_show(value)} for sample {uid!r}; a value must be a number or None")
    return float(value)


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]} ({type(value).__name__})"


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]


def _where(e: BaseException, file: str) -> str:
    """`FILE:LINE: Error: text`, with the deepest line of the user's own file."""
    if isinstance(e, SyntaxError) and e.filename:
        return f"{e.filename}:{e.lineno}: {type(e).__name__}: {e.msg}"
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if f.filename == file] or frames[-1:]
    place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{place}{type(e).__name__}: {_line(e)}"
