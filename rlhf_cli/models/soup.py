"""The weight average of two models: a soup.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
arXiv:2203.05482. It means something only for fine-tunes of one base model, and what can be checked of that is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config import ModelSection
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import loading
from rlhf_cli.models.export import export

# Of a model's config, what does not change what its weights mean.
NEUTRAL = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "pad_token_id")
USAGE = "rlhf merge A B --output DIR [--weight 0.5] [--dtype fp32|bf16]"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def averaged(first: Any, other: Any, weight: float, *, dtype: torch.dtype, seed: int, scalar: bool = False) -> Any:
    """(1 - weight) x the model of section `first` + weight x that of `other`, averaged in fp32, then of `dtype`.

    Adapters are merged before: an average of A and B is not one of B A. `scalar`: sequence classifiers, not language models.
    Raises ConfigError where the two are not the same model by keys, shapes, ties, configuration and tokenizer.
    """
    same_tokens(first.path or first.source, other.path, *(loading.load_tokenizer(s) for s in (first, other)))
    load = loading.load_scalar if scalar else loading.load_causal
    a, b = (load(s, dtype=torch.float32, seed=seed) for s in (first, other))
    names = (first.path or first.source, other.path)
    same_model(names, a, b)
    average(names, a, b, weight)
    return a.to(dtype)


@torch.no_grad()
def average(names: tuple[str, str], a: Any, b: Any, weight: float) -> None:
    """Turn the weights and buffers of `a` into (1 - weight) a + weight b, each tied weight once; equal ones stay as they are."""
    mine, theirs = a.state_dict(keep_vars=False), b.state_dict(keep_vars=False)
    done: set[int] = set()
    for key, x in mine.items():
        if x.data_ptr() in done:
            continue
        done.add(x.data_ptr())
        y = theirs[key]
        if not x.is_floating_point():
            if not torch.equal(x, y):
                raise ConfigError(
                    f"{names[1]}: {key} holds other whole numbers than in {names[0]}, which have no average"
                )
            continue
        if not bool(y.isfinite().all()) or not bool(x.isfinite().all()):
            raise ConfigError(f"{key} holds numbers that are not finite in {names[0]} or {names[1]}")
        x.lerp_(y, weight)


def same_model(names: tuple[str, str], a: Any, b: Any) -> None:
    """Refuse two models that differ in more than their weights."""
    first, other = names
    if type(a) is not type(b):
        raise ConfigError(
            f"{other} is a {type(b).__name__} and {first} a {type(a).__name__}; only models of one kind average"
        )
    mine, theirs = a.state_dict(), b.state_dict()
    odd = sorted(mine.keys() ^ theirs.keys())
    if odd:
        raise ConfigError(
            f"{odd[0]} is in {first if odd[0] in mine else other} only; only models with the same weights average"
        )
    for key in mine:
        if mine[key].shape != theirs[key].shape:
            sizes = f"{list(mine[key].shape)} in {first} and {list(theirs[key].shape)} in {other}"
            raise ConfigError(
                f"{key} is {sizes}; an average needs fine-tunes of one base model, embeddings not resized"
            )
    if _ties(mine) != _ties(theirs):
        raise ConfigError(f"{first} and {other} tie other weights; set tie_word_embeddings alike in both config.json")
    one, two = (_meaning(m.config.to_dict()) for m in (a, b))
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise ConfigError(
                f"config.json: {key} is {one.get(key)} in {first} and {two.get(key)} in {other}; they do not average"
            )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in NEUTRAL}


def _ties(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of names that share a tensor."""
    shared: dict[int, list[str]] = {}
    for key, x in state.items():
        shared.setdefault(x.data_ptr(), []).append(key)
    return sorted(keys for keys in shared.values() if len(keys) > 1)


def same_tokens(first: str, other: str, a: Any, b: Any) -> None:
    """Refuse tokenizers that read a text as different ids."""
    one, two = a.get_vocab(), b.get_vocab()
    if one != two:
        token = min(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
        raise ConfigError(
            f"the tokenizers differ: {token!r} is {one.get(token)} in {first} and {two.get(token)} in {other}"
        )
    if _rules(a) != _rules(b) or a.eos_token_id != b.eos_token_id or a.bos_token_id != b.bos_token_id:
        raise ConfigError(
            f"the tokenizers of {first} and {other} have the same tokens and other rules; they do not average"
        )


def _rules(tokenizer: Any) -> dict[str, Any]:
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(core.to_str()) if core is not None else {}
    return {k: v for k, v in rules.items() if k not in ("truncation", "padding", "version")}


# -- rlhf merge --------------------------------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """`rlhf merge A B --weight 0.5 --output DIR`."""
    (first, other), weight, folder, dtype = _asked(words)
    sections = [ModelSection(path=path, source="auto") for path in (first, other)]
    scalar = [_is_scalar(s) for s in sections]
    if scalar[0] != scalar[1]:
        raise ConfigError(f"merge: one of {first} and {other} is a reward model and the other a language model")
    try:
        model = averaged(sections[0], sections[1], weight, dtype=torch.float32, seed=0, scalar=scalar[0])
    except ConfigError as e:
        raise ConfigError(f"merge: {str(e).removeprefix('model.path: ')}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(model, loading.load_tokenizer(sections[0]), folder, merge=False, dtype=DTYPES[dtype])
    print(
        f"{1 - weight:g} x {first} + {weight:g} x {other} is in {folder} ({dtype}); use it as model.reference={folder}"
    )
    return 0


def _is_scalar(section: ModelSection) -> bool:
    try:
        where = loading.resolve(section)
    except ConfigError as e:
        raise ConfigError(f"merge: {str(e).removeprefix('model.path: ')}") from None
    return isinstance(where, Path) and (where / "config.json").exists() and loading._is_scalar(where, section)


def _asked(words: Sequence[str]) -> tuple[tuple[str, str], float, Path, str]:
    """The two models, the weight, the folder and the precision."""
    models, settings = _split(words)
    if len(models) != 2:
        raise ConfigError(f"merge: takes two models, got {len(models)}; type {USAGE}")
    try:
        weight = float(settings["weight"])
    except ValueError:
        weight = -1.0
    for wrong, message in (
        (not 0 <= weight <= 1, f"--weight {settings['weight']}: B's share is a number from 0 to 1"),
        (settings["dtype"] not in DTYPES, f"--dtype {settings['dtype']}: choose one of {', '.join(DTYPES)}"),
        (not settings["output"], f"where to? type {USAGE}"),
    ):
        if wrong:
            raise ConfigError(f"merge: {message}")
    return (models[0], models[1]), weight, _empty(Path(settings["output"]).expanduser()), settings["dtype"]


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Models, and settings by name."""
    models, settings, queue = [], {"weight": "0.5", "output": "", "dtype": "fp32"}, list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            models.append(word)
        elif name not in settings:
            raise ConfigError(f"merge: {word}: no such option; type {USAGE}")
        elif not equals and not queue:
            raise ConfigError(f"merge: {word} needs a value; type {USAGE}")
        else:
            settings[name] = value if equals else queue.pop(0)
    return models, settings


def _empty(folder: Path) -> Path:
    """A folder that may be written: one that does not exist, or an empty one, which goes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"merge: --output {folder} exists and is not empty; choose another folder, or remove it")
    if folder.is_dir():
        folder.rmdir()
    return folder
