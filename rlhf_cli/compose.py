"""From command line overrides to one strict configuration, through Hydra; every user mistake becomes one line.

Hydra composes. Where it refuses, the overrides are tried again one at a time against the composed choices, so that the
message names the key that is wrong and the nearest that exists.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from rlhf_cli import catalog, chosen, standins
from rlhf_cli.config import FrozenSection, LearnerSection, nearest
from rlhf_cli.errors import ConfigError

NAMED: dict[str, type] = {"learners": LearnerSection, "frozen": FrozenSection}  # sections by names of the user's
FAULTS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
OPEN = (
    "dataset.columns.",
    "hardware.deepspeed.",
    "rollout.vllm.engine.",
    "combine.thresholds.",
    "launcher.sbatch.",
    "debug.",
    "judge.extra.",
)  # sections whose keys the schema leaves open


def compose(config_name: str, overrides: list[str], config_dir: str | None) -> DictConfig:
    """The configuration of a verb: schema, chosen options, overrides; holds known keys and resolvable values only."""
    asked = check_overrides(config_name, overrides, config_dir)
    try:
        cfg, choices = chosen.compose(config_name, _lines(asked), config_dir)
    except FAULTS as e:
        raise ConfigError(_explain(e, config_name, asked, config_dir)) from e
    return finish(cfg, choices, catalog.defaults(config_name))


def finish(cfg: DictConfig, choices: Mapping[str, Any], groups: Iterable[str]) -> DictConfig:
    """Check a composed configuration and note the chosen option of each group in `names`."""
    _check_known(cfg)
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as e:
        raise ConfigError(f"{e.full_key}: must be given; type {e.full_key}=VALUE") from e
    except OmegaConfBaseException as e:
        raise ConfigError(_unresolved(e)) from e
    order = [*groups, *(g for g in choices if "@" in g and not g.startswith("hydra/"))]
    # Hydra reports no choice for a list of options; its nodes are keyed by option.
    several = {g: "+".join(map(str, cfg[g])) for g in groups if g not in choices and isinstance(cfg.get(g), DictConfig)}
    if choices.get("reward") == "none" and cfg.get("reward"):  # rewards under names of their own
        choices = {**choices, "reward": "+".join(map(str, cfg.reward))}
    cfg.names = {g: str(name) for g in order if (name := choices.get(g) or several.get(g))}
    standins.fill(cfg)
    return cfg


def multirun(config_name: str, overrides: list[str], config_dir: str | None, point: Callable[[DictConfig], int]) -> int:
    """Run `point` once for each combination of the comma-separated values, through Hydra's sweeper and launcher."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    asked = check_overrides(config_name, overrides, config_dir, sweep=True)
    chosen.store_schema()
    codes: list[int] = []
    home = os.getpid()

    def task(cfg: DictConfig) -> float:
        """Returns what a sweeper improves; NaN of a point that failed."""
        from rlhf_cli.launch import step
        from rlhf_cli.report.numbers import metric_of

        runtime = HydraConfig.get()
        print(f"rlhf: sweep point {runtime.job.num + 1}: {runtime.job.override_dirname}", flush=True)
        code = point(finish(cfg, runtime.runtime.choices, catalog.defaults(config_name)))
        codes.append(code)
        if code and os.getpid() != home:  # in a job of its own: only an error tells this process
            task = step.here()
            where = os.environ.get("SUBMITIT_FOLDER", "its job's folder").replace("%j", task.job if task else "%j")
            raise ConfigError(f"sweep point {runtime.job.num + 1} ended with {code}; its log lies in {where}")
        return math.nan if code else metric_of(Path(cfg.run.dir) / cfg.run.name, cfg.sweep.metric)

    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.sweep.subdir=."]
    where = "hydra.sweep.dir=${run.dir}/sweeps/${now:%Y-%m-%d_%H-%M-%S}"
    folder = ["--config-dir", str(Path(config_dir).resolve())] if config_dir else []
    saved, sys.argv = sys.argv, ["rlhf", *folder, "-m", *quiet, where, *_lines(asked)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to the one place that prints them
    os.environ.setdefault("SLURM_KILL_BAD_EXIT", "1")  # sbatch hands it to srun: a killed rank ends its job
    try:
        hydra.main(version_base=chosen.VERSION, config_path="pkg://rlhf_cli.conf", config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException, YAMLError) as e:
        raise ConfigError(_explain(e, config_name, _each_value(asked), config_dir)) from e
    finally:
        sys.argv = saved
    if not codes:  # each in a job of its own
        print("rlhf: every point has ended; rlhf runs lists them, rlhf compare compares them", flush=True)
    return max(codes, default=0)


def _each_value(asked: list[Override]) -> list[Override]:
    """The overrides with each choice of a sweep on its own."""
    single = [o for o in asked if not o.is_sweep_override()]
    return single + [
        parse_override(f"{o.get_key_element()}={text}")
        for o in asked
        if o.is_choice_sweep()
        for text in o.sweep_string_iterator()
    ]


# ---- overrides, before Hydra sees them ----


def check_overrides(
    config_name: str, overrides: list[str], config_dir: str | None, *, sweep: bool = False
) -> list[Override]:
    """Parse the overrides, check the groups and options they name, and drop `group=null` where the group is empty."""
    asked = [parse_override(text) for text in overrides]
    known, default = catalog.groups(config_dir), catalog.defaults(config_name)
    kept: list[Override] = []
    places = [(o.key_or_group, o.package) for o in asked]  # reduce@one.place and reduce@another are two choices
    twice = [o for i, o in enumerate(asked) if o.key_or_group in known and places[i] in places[:i]]
    if twice and not sweep:
        group = twice[0].key_or_group
        both = ",".join(p.input_line.partition("=")[2] for p in asked if p.key_or_group == group and p.input_line)
        raise ConfigError(f"{group} is given twice; type {group}=[{both}] for both")
    for o in asked:
        if o.is_sweep_override() and not sweep:
            raise ConfigError(
                f"{o.input_line}: several values; add -m to run each of them, or type {o.key_or_group}=[a,b] for a list"
            )
        if o.key_or_group in {*known, *default} and not o.is_delete() and not isinstance(o.value(), dict):
            if o.value() is None and o.key_or_group in default and default[o.key_or_group] is None:
                continue
            _check_group(o, config_name, known, default)
        check_learner(o)
        kept.append(o)
    return kept


def check_learner(o: Override) -> None:
    parts = o.key_or_group.split(".")
    if parts[0] in NAMED and len(parts) == 3 and catalog.field_of(o.key_or_group) is None:
        names = [f.name for f in dataclasses.fields(NAMED[parts[0]])]
        raise ConfigError(f"{o.key_or_group}: unknown key{nearest(parts[2], names) or '; it has ' + ', '.join(names)}")


def _lines(asked: list[Override]) -> list[str]:
    """The overrides as Hydra takes them: it wants `++` before a key that no option has, and users must not need it."""
    added = tuple(f"{o.package}." for o in asked if o.is_add() and o.package)
    terms = tuple(p.removesuffix("objective.").removesuffix("reduce.") for p in added)
    return [_line(o, terms) for o in asked]


def _line(o: Override, terms: tuple[str, ...] = ()) -> str:
    """One override as Hydra takes it; `terms` are the terms that other overrides add to `updates`."""
    text, key = o.input_line or "", o.key_or_group
    if o.package or o.is_add() or o.is_force_add() or o.is_delete():
        return text
    value = text.partition("=")[2]
    parts = key.split(".")
    if parts[0] in NAMED and len(parts) > 2 and not o.is_sweep_override():
        # a typed section under a name of the user's, which only a merge from above can create
        return f"++{parts[0]}={{{': {'.join(parts[1:])}: {value or repr('')}{'}' * (len(parts) - 1)}"
    column = key.removeprefix("dataset.columns.")
    if column != key and "." in column and not o.is_sweep_override():
        return f"++dataset.columns={{{column}: {value or repr('')}}}"
    whole_term = key.startswith("updates.") and key.count(".") == 2 and isinstance(o.value(), dict)
    parts = key.startswith("reward.") and ".parts" in key  # of a reward, which no option lists
    return f"++{text}" if key.startswith((*OPEN, *terms)) or whole_term or parts else text


def parse_override(text: str) -> Override:
    key = text.lstrip("-").partition("=")[0]
    if text.startswith("-"):
        raise ConfigError(f"{text}: no such option; settings are typed key=value, e.g. {key}=VALUE")
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text}: not a setting; type key=value, e.g. algo=grpo")
    try:
        made = OverridesParser.create().parse_override(text)
    except HydraException as e:
        raise ConfigError(
            f"{text}: cannot be read; type key=value, and quote special characters: '{key}=\"a, b\"'"
        ) from e
    if not made.key_or_group:
        raise ConfigError(f"{text}: no key before '='; type key=value, e.g. algo=grpo")
    return made


def _check_group(
    o: Override, config_name: str, known: Mapping[str, Mapping[str, Any]], default: Mapping[str, Any]
) -> None:
    group = o.key_or_group
    if o.is_add() and o.package is None and group in default:
        raise ConfigError(
            f"{o.input_line}: {group} has an option already; type {group}=OPTION, or {group}=[a,b] for several"
        )
    if group not in default and o.package is None and not o.is_add():
        raise ConfigError(
            f"{o.input_line}: rlhf {config_name} has no group {group!r}; its groups: {', '.join(default)}"
        )
    for name in _options(o):
        catalog.must(name, known.get(group, {}), f"{group}={name}: no such option", "options")


def _options(o: Override) -> list[str]:
    if o.is_choice_sweep() and not isinstance(o._value, Glob):  # a glob matches what there is
        return [n for text in o.sweep_string_iterator() for n in text.strip("[]").split(",")]
    if o.is_sweep_override():
        return []
    value = o.value()
    return [str(v) for v in value] if isinstance(value, list) else ["null" if value is None else str(value)]


# ---- overrides of a frozen configuration ----


# ---- explanations, after Hydra refused ----


def _explain(error: Exception, config_name: str, asked: list[Override], config_dir: str | None) -> str:
    """One line that names the wrong key: of an option's file when choosing alone fails, of an override otherwise."""
    groups = {*catalog.groups(config_dir), *catalog.defaults(config_name)}
    picked = [o for o in asked if o.key_or_group in groups and not isinstance(o.value(), dict)]
    try:
        base, _ = chosen.compose(config_name, _lines(picked), config_dir)
    except FAULTS as e:
        return _of_file(e, config_dir)
    for o in asked:
        if o in picked or o.is_hydra_override():  # Hydra's own keys are not in a composed configuration
            continue
        wrong = explain_override(o, base, groups, config_dir)
        if wrong:
            return wrong
    return _first_line(error)


def explain_override(o: Override, base: DictConfig, groups: set[str], config_dir: str | None) -> str:
    """What is wrong with one override, or an empty string."""
    key, sent = o.key_or_group, parse_override(_line(o))
    adds = sent.is_add() or sent.is_force_add()
    unknown = "" if adds else unknown_key(base, key, groups, config_dir)
    if unknown:
        return unknown
    try:
        OmegaConf.update(base, sent.key_or_group, sent.value(), merge=True, force_add=adds)
    except (OmegaConfBaseException, ValueError) as e:
        return _bad_value(key, o, e)
    return ""


def unknown_key(cfg: DictConfig, key: str, groups: set[str], config_dir: str | None) -> str:
    """The message for a dotted key that `cfg` lacks, or an empty string."""
    node: Any = cfg
    parts = key.split(".")
    for i, part in enumerate(parts):
        here = ".".join(parts[:i])
        if node is None:
            return f"{key}: {here} is empty; choose an option of it first (rlhf list {parts[0]})"
        if isinstance(node, ListConfig):
            return f"{key}: {here} is a list; type {here}=[a,b]"
        if not isinstance(node, DictConfig):
            return f"{key}: {here} is a value, not a section; type {here}=VALUE"
        if part not in node:
            return _absent(
                key, part, here, [str(k) for k in node if k not in ("hydra", "_target_")], groups, config_dir
            )
        node = node._get_node(part)
        node = (
            None
            if node is None or node._is_none()
            else node
            if isinstance(node, DictConfig | ListConfig)
            else node._value()
        )
    return ""


def _absent(key: str, part: str, here: str, have: list[str], groups: set[str], config_dir: str | None) -> str:
    if not here:
        guess = nearest(part, [*groups, *have]) or "; rlhf list prints the groups, rlhf train --help the keys"
        return f"{key}: unknown key or group{guess}"
    if here in groups and part in catalog.groups(config_dir).get(here, {}):
        keyed = have and set(have) <= set(catalog.groups(config_dir)[here])  # several options lie side by side
        return f"{key}: {part} is not chosen; type {here}=" + (
            f"[{','.join([*have, part])}] to add it" if keyed else f"{part} first"
        )
    return f"{key}: unknown key{nearest(part, have) or f'; {here} has ' + (', '.join(have) or 'no keys')}"


def _bad_value(key: str, o: Override, error: Exception) -> str:
    field = catalog.field_of(key)
    if "is not a subclass of" in str(error) and o.is_add():
        return f"{o.input_line}: cannot be added here; put it into an option's file (--config-dir DIR)"
    if field is None or isinstance(o.value(), dict):
        return f"{o.input_line}: {_first_line(error)}"
    if not field.default:
        return f"{o.input_line}: {key} is a section; type {key}.KEY=VALUE"
    return f"{o.input_line}: wanted {field.type}, e.g. {key}={field.default}; it is: {field.doc}"


def _of_file(error: Exception, config_dir: str | None) -> str:
    """The message for a fault in an option's file."""
    if isinstance(error, YAMLError):
        return f"broken YAML: {' '.join(str(error).split())}"
    text = str(error)
    group, _, name = (text.split("'")[1] if text.startswith("In '") else "").rpartition("/")
    found = catalog.groups(config_dir).get(group, {}).get(name)
    file = f"{catalog.short(found.path)}: " if found else ""
    if "Could not find '" in text:  # Hydra blames the primary config for what a recipe chose, so no file is named
        return _no_option(*text.split("Could not find '")[1].split("'")[0].rpartition("/")[::2], config_dir)
    if "full_key: " in text:
        key = text.split("full_key: ")[1].splitlines()[0].strip()
        line = next(x for x in text.splitlines() if x and not x.startswith("In '"))
        guess = nearest(key.rpartition(".")[2], (k.rpartition(".")[2] for k in catalog.fields()))
        return f"{file}{key}: " + (
            f"unknown key{guess}" if line.startswith("Key '") else f"{line}; wanted {_wanted(key)}"
        )
    return f"{file}{_first_line(error)}"


def _no_option(group: str, name: str, config_dir: str | None) -> str:
    options = catalog.groups(config_dir).get(group, {})
    return f"{group}={name}: no such option{nearest(name, options) or ';'} options: {', '.join(options) or 'none yet'}"


def _wanted(key: str) -> str:
    field = catalog.field_of(key)
    return field.type if field else "another type"


def _first_line(error: Exception) -> str:
    """The first line that says what is wrong, without the place that Hydra puts before it."""
    lines = [re.sub(r"^In '[^']*': *", "", line.strip()) for line in str(error.__cause__ or error).splitlines()]
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def _unresolved(error: OmegaConfBaseException) -> str:
    kind = "cannot be resolved" if isinstance(error, InterpolationResolutionError) else "is wrong"
    return f"{error.full_key}: {kind}: {_first_line(error)}"


def _check_known(root: DictConfig) -> None:
    """Refuse keys that `+key=value` slipped past the schema."""
    for path, kind, node in _sections(root, ""):
        names = [f.name for f in dataclasses.fields(kind)]
        have = [str(k) for k in node.keys()]  # noqa: SIM118 - includes ???, which is its own error
        where, dot = path or "the root", path and f"{path}."
        for name in (n for n in have if n not in names):
            raise ConfigError(f"{dot}{name}: unknown key{nearest(name, names)}; keys cannot be added to {where}")
        for name in (n for n in names if n not in have):
            raise ConfigError(f"{dot}{name}: a key of the schema cannot be deleted; give it a value")


def _sections(node: DictConfig, key: str) -> Iterator[tuple[str, type, DictConfig]]:
    kind = OmegaConf.get_type(node)
    if kind is not None and dataclasses.is_dataclass(kind):
        yield key, kind, node
    for name in node:
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
            yield from _sections(inner, f"{key}.{name}".lstrip("."))
