"""A trained reward model: one of our runs, or any sequence classifier with one output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli import standins
from rlhf_cli.data.text import render, response_ids
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.loading import tiny_reward_model
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.pulse import alive
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.types import Sample, Scores


class Model:
    """The score of a sequence classifier, read at the last real token of prompt, response and end of text.

    Unbounded, and defined only up to a constant per prompt. The whole turns of `meta["messages"]` are used where a
    sample has them. Long prompts lose their beginning, never the response its end; a response that alone exceeds
    max_tokens is missing. Weights are read from safetensors only, and code shipped with a model never runs.
    See Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155, sec. 3.5.
    """

    path_is = "RUN"
    loads_model = True
    outputs = 1

    def __init__(
        self,
        *,
        path: str,
        render: Literal["turn", "template"],
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: a reward-model run, a Hugging Face folder or a Hub id
        render: turn (prompt, response, end token: as our runs train) or template (the chat template writes the whole
            conversation: as most published models expect)
        batch_size: responses per forward
        max_tokens: longest input, tokens
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        if batch_size < 1 or max_tokens < 2:
            raise ConfigError(f"batch_size={batch_size}, max_tokens={max_tokens} are not allowed; type larger numbers")
        self.folder = resolve(path)
        self.render, self.batch_size, self.max_tokens = render, batch_size, max_tokens
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.model: Any = None
        self.tokenizer: Any = None

    def load(self) -> None:
        """Read weights and tokenizer, unless they are here already; the first call does it by itself."""
        if self.model is None:
            self.model, self.tokenizer = load_classifier(self.folder, self.dtype, self.outputs)
            self.model.to(self.device)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        rows = self.values(samples, group)
        return scored(Row(v[0] if v else None, reason="" if v else too_long(self.max_tokens)) for v in rows)

    @torch.no_grad()
    def values(self, samples: Sequence[Sample], group: Tensor) -> list[list[float] | None]:
        """The outputs for each sample; None where the response alone is too long.

        A forward never mixes groups: its last bits follow from its shape, which must not depend on who scores which group.
        """
        self.load()
        ids = [self._ids(s) for s in samples]
        values: list[list[float] | None] = [None] * len(samples)
        for members in groups_of(group.tolist()):
            usable = sorted((i for i in members if ids[i]), key=lambda i: len(ids[i]))  # by length: little padding
            for start in range(0, len(usable), self.batch_size):
                alive()
                rows = usable[start : start + self.batch_size]
                for i, value in zip(rows, self._forward([ids[i] for i in rows]), strict=True):
                    values[i] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[list[float]]:
        lengths = torch.tensor([len(r) for r in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)  # [N, T], padded right
        attention = torch.arange(ids.shape[1]) < lengths[:, None]
        inputs = {"input_ids": ids.to(self.device), "attention_mask": attention.long().to(self.device)}
        if not hasattr(self.model, "score"):  # an encoder, which pools its first token
            return self.model(**inputs).logits.float().tolist()
        # The library looks for the last token that is not the pad token: one early where pad is also the end token.
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # [N, T, H]
        last = hidden[torch.arange(len(rows), device=hidden.device), (lengths - 1).to(hidden.device)]
        return self.model.score(last).float().tolist()

    def _ids(self, sample: Sample) -> list[int]:
        """The tokens to score; none where the response alone is too long."""
        turns = sample.meta.get("messages") or [{"role": "user", "content": sample.prompt}]
        head, tail = self._template(turns, sample.response) if self.render == "template" else self._turn(turns, sample)
        room = self.max_tokens - len(tail)
        if room < 0:
            return []
        kept = head[len(head) - room :] if len(head) > room else head
        if kept and len(kept) < len(head) and head[0] == self.tokenizer.bos_token_id:
            kept = [head[0], *kept[1:]]
        return kept + tail

    def _turn(self, turns: Sequence[Mapping[str, str]], sample: Sample) -> tuple[list[int], list[int]]:
        """The ids that reward-model training makes of the same row."""
        return render(turns, self.tokenizer, True), response_ids(sample.response, self.tokenizer)

    def _template(self, turns: Sequence[Mapping[str, str]], response: str) -> tuple[list[int], list[int]]:
        tok = self.tokenizer
        if tok.chat_template is None:
            raise ConfigError(f"render=template: {self.folder} has no chat template; take render=turn")
        whole = tok.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
        ids = tok(whole, add_special_tokens=False)["input_ids"]
        keep = len(tok(response, add_special_tokens=False)["input_ids"]) + 1
        return ids[:-keep], ids[-keep:]


def resolve(path: str) -> str:
    """The folder, or Hub id, that holds the model's weights; a run stands for its export."""
    if not path:
        raise ConfigError(
            "the path of a reward model is empty; give it a run of algo=reward_model, a Hugging Face folder or a Hub id"
        )
    if standins.seed_of(path) is not None:
        return path
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "~", "/")) or path.count(os.sep) != 1:
            raise ConfigError(
                f"path={path}: no such folder in {Path.cwd()}; give a run, a Hugging Face folder or a Hub id"
            )
        return path
    folder = folder / "export" if (folder / "export").is_dir() else folder
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"path={folder}: it holds only a LoRA adapter; export it with model.lora.merge_export=true")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"path={folder}: it has neither config.json nor export/; give a finished run of algo=reward_model"
        )
    kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if not any(k.endswith("ForSequenceClassification") for k in kinds):
        raise ConfigError(
            f"path={folder}: it is a {', '.join(kinds) or 'model of unknown kind'}, "
            "not a ...ForSequenceClassification; train one with algo=reward_model"
        )
    return str(folder)


def too_long(limit: int) -> str:
    """Why a response has no score."""
    return f"it is longer than {limit} tokens"


def load_classifier(folder: str, dtype: torch.dtype, outputs: int = 1) -> tuple[Any, Any]:
    """Model and tokenizer, checked: the number of outputs, a trained head, an end token."""
    seed = standins.seed_of(folder)
    if seed is not None:
        return tiny_reward_model(seed, dtype, outputs).requires_grad_(False), tiny_tokenizer()
    model, tokenizer = read(folder, dtype)
    if model.config.num_labels != outputs:
        wanted = "a reward model has one" if outputs == 1 else f"heads names {outputs}"
        raise ConfigError(f"path={folder}: it has {model.config.num_labels} outputs; {wanted}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"path={folder}: its tokenizer has no end token; set eos_token in its tokenizer_config.json")
    return model, tokenizer


def read(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A frozen classifier with a trained head, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as e:
        raise ConfigError(f"path={folder}: it cannot be loaded: {' '.join(str(e).split())[:200]}") from e
    if info["missing_keys"]:
        absent = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"path={folder}: it lacks the weights {absent}; a random head would score at random")
    return model.eval().requires_grad_(False), tokenizer
