"""Models and tokenizers from a name: a Hugging Face folder, a run, a Hub id, the packaged weights, or a random model.

Weights are read from safetensors only, and no code of a model repository runs unless `model.trust_remote_code` says so.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_cli import standins
from rlhf_cli.config import ModelSection
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.smollm2 import quiet, smollm2
from rlhf_cli.models.tiny import NAME, tiny_causal, tiny_config, tiny_scalar, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

# Tried, in order, where a tokenizer names no padding.
PADS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>")
ADAPTER = "adapter_config.json"


def resolve(cfg_model: ModelSection) -> Path | str:
    """Where the model lies: a folder, a Hub id, or `tiny_random`. `model.path` wins over `model.source`."""
    if standins.seed_of(cfg_model.path) is not None:
        return NAME
    if cfg_model.path:
        return _folder(cfg_model.path)
    if cfg_model.source == "smollm2":
        return smollm2()
    if cfg_model.source == "tiny":
        return NAME
    if cfg_model.source != "auto":
        raise ConfigError(f"model.source: {cfg_model.source!r} is not allowed; choose one of auto, smollm2, tiny")
    raise ConfigError("model.path is empty; type model.path= a Hugging Face folder, a run or a Hub id")


def load_tokenizer(cfg_model: ModelSection) -> Any:
    """The tokenizer, with `model.chat_template` in place, and a padding token (not the EOS where there is another)."""
    where = resolve(cfg_model)
    if where == NAME:
        tokenizer = tiny_tokenizer()
    else:
        from transformers import AutoTokenizer

        with _reported(where, cfg_model):
            tokenizer = AutoTokenizer.from_pretrained(where, **_options(cfg_model, where))
    if cfg_model.chat_template:
        tokenizer.chat_template = _template(cfg_model.chat_template)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: its tokenizer names no EOS, so no response could end; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in PADS if t in known and t != tokenizer.eos_token), tokenizer.eos_token)
    return tokenizer


def load_causal(cfg_model: ModelSection, *, dtype: torch.dtype, seed: int) -> Any:
    """The language model in evaluation mode. `seed` makes the weights of a random model; others do not need it."""
    where = resolve(cfg_model)
    if where == NAME:
        return _ready(tiny_causal(_seed(cfg_model, seed), dtype))
    from transformers import AutoModelForCausalLM

    if _is_adapter(where):
        return _ready(_merged(where, cfg_model, dtype))
    model, info = _read(AutoModelForCausalLM, where, cfg_model, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # they would be drawn at random without a word
        absent = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"{where} lacks weights of a language model ({absent}); a reward model goes into reward.model.path"
        )
    return _ready(model)


def load_scalar(cfg_model: ModelSection, *, dtype: torch.dtype, seed: int) -> Any:
    """A sequence-classification model with one label, in evaluation mode.

    A folder that holds a trained one keeps its head; otherwise `score` is drawn by `seed` from a normal of mean 0 and
    variance 1 / (hidden + 1), without bias.
    Stiennon et al., Learning to summarize from human feedback, arXiv 2009.01325.
    """
    where = resolve(cfg_model)
    if where == NAME:
        return tiny_reward_model(_seed(cfg_model, seed), dtype)
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        model = _read(AutoModelForSequenceClassification, where, cfg_model, dtype=dtype, num_labels=1)
    return _ready(model if _is_scalar(where, cfg_model) else _fresh_head(model, seed))


def tiny_reward_model(seed: int, dtype: torch.dtype) -> Any:
    """The random sequence classifier of a seed."""
    return _ready(_fresh_head(tiny_scalar(seed, dtype), seed))


def _seed(cfg_model: ModelSection, seed: int) -> int:
    """That of a path `tiny:SEED`, or the run's."""
    own = standins.seed_of(cfg_model.path)
    return seed if own is None else own


def fingerprint(cfg_model: ModelSection) -> dict[str, Any]:
    """What was loaded: the name, the sha256 of each weights file, and that of the config."""
    where = resolve(cfg_model)
    if where == NAME:
        return {
            "path": cfg_model.path or NAME,
            "config": _digest(tiny_config().to_json_string().encode()),
            "weights": {},
        }
    if isinstance(where, str):
        from transformers.utils.hub import cached_file

        with _reported(where, cfg_model):
            config = cached_file(where, "config.json", revision=cfg_model.revision or None)
        folder = Path(str(config)).parent
        return {**_of_folder(folder), "path": where, "revision": folder.name}
    return _of_folder(where)


def _of_folder(folder: Path) -> dict[str, Any]:
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as f:
            weights[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    name = next(n for n in ("config.json", ADAPTER) if (folder / n).exists())
    return {"path": str(folder), "config": _digest((folder / name).read_bytes()), "weights": weights}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(path: str) -> Path | str:
    """A model folder, the export of a run, or the text itself when it can only be a Hub id."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return path
        raise ConfigError(f"model.path: no folder {path!r}, and it is no Hub id (OWNER/NAME); give an existing folder")
    for candidate in (folder, folder / "export"):
        if (candidate / "config.json").exists() or (candidate / ADAPTER).exists():
            return candidate
    if (folder / "status.json").exists():
        raise ConfigError(f"model.path: run {path} has no export/ yet; let it finish (rlhf resume {path})")
    raise ConfigError(f"model.path: {path} holds no config.json, so it is no Hugging Face model folder")


def _is_adapter(where: Path | str) -> bool:
    return isinstance(where, Path) and not (where / "config.json").exists()


def _is_scalar(where: Path | str, cfg_model: ModelSection) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, **_options(cfg_model, where))
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _options(cfg_model: ModelSection, where: Path | str) -> dict[str, Any]:
    hub = {"revision": cfg_model.revision} if cfg_model.revision and isinstance(where, str) else {}
    return {"trust_remote_code": cfg_model.trust_remote_code, **hub}


def _read(kind: Any, where: Path | str, cfg_model: ModelSection, **more: Any) -> Any:
    if _is_adapter(where):
        raise ConfigError(f"{where} holds a LoRA adapter only; export with model.lora.merge_export=true to use it here")
    with _reported(where, cfg_model), quiet():
        return kind.from_pretrained(where, use_safetensors=True, **_options(cfg_model, where), **more)


def _merged(where: Path | str, cfg_model: ModelSection, dtype: torch.dtype) -> Any:
    """The base model of an adapter folder with the adapter added to its weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((Path(where) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    if not base or base == NAME:
        raise ConfigError(f"{where}: this adapter names no base model; export with model.lora.merge_export=true")
    model = _read(AutoModelForCausalLM, _folder(base), cfg_model, dtype=dtype)
    return PeftModel.from_pretrained(model, str(where)).merge_and_unload()


def _fresh_head(model: Any, seed: int) -> Any:
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(weight.shape).normal_(std=(weight.shape[1] + 1) ** -0.5, generator=generator)
    weight.data.copy_(drawn)
    return model


def _ready(model: Any) -> Any:
    """Evaluation mode, and every embedding trainable: a padding index (often the EOS) would get no gradient."""
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def _template(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"model.chat_template: no file {path!r}; give a Jinja file, or leave it empty")
    return file.read_text(encoding="utf-8")


@contextmanager
def _reported(where: Path | str, cfg_model: ModelSection) -> Iterator[None]:
    """Turn what goes wrong while reading a model into one line."""
    try:
        yield
    except (OSError, ValueError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if "trust_remote_code" in str(e):
            raise ConfigError(f"{where} runs its own code; if you trust it: model.trust_remote_code=true") from None
        if isinstance(where, str):
            raise ConfigError(f"cannot download {where} ({first}); use model.path=DIR of a local folder") from None
        if not any(where.glob("*.safetensors")):
            raise ConfigError(f"{where} has no *.safetensors; pickled weights are refused, convert them") from None
        raise ConfigError(f"cannot read {where}: {first}") from None
