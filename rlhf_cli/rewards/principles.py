"""A reward model that reads the principles by which a response is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf_cli.data.text import render as rendered
from rlhf_cli.data.text import response_ids
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.text import conversation, harmless
from rlhf_cli.rewards.model import Model
from rlhf_cli.rewards.principle_list import Principle, drawn, principles_of
from rlhf_cli.types import Sample

HEAD = "Below are an output, the instruction that it answers, and the principles by which it is judged."
END = "The quality of the output is"


class Principles(Model):
    """The score of a principle-following reward model: principles are drawn for each response and written into its input.

    The response stands before the instruction, and the score is read at the last token of `The quality of the output is`, of a
    classifier as reward=model reads one. Which principles are drawn follows from prompt and response alone.
    See Sun et al., "SALMON: Self-Alignment with Instructable Reward Models", arXiv:2310.05910, section 3.3 and 3.4.
    """

    path_is = "RUN"
    loads_model = True

    def __init__(
        self,
        *,
        path: str,
        principles: str,
        draws: int,
        boost: float,
        by: str,
        per: Literal["row", "prompt"],
        render: Literal["text", "turn"],
        max_tokens: int,
    ) -> None:
        """Args:
        path: a reward-model run, a Hugging Face folder or a Hub id
        principles: packaged, or a file of JSON lines with name, text, negative, weight, kind, always
        draws: principles drawn for a response, without replacement
        boost: added to the weight of principles of the prompt's kind
        by: the record's meta key that holds the prompt's kind
        per: row (every response draws its own) or prompt (responses to one prompt share theirs)
        render: text (the score is read at the last token of the text) or turn (as our runs train: a user turn, the text, an end token)
        max_tokens: longest input, tokens; a longer one is missing
        """
        super().__init__(path=path, render="turn", batch_size=16, max_tokens=max_tokens, device="auto", dtype="fp32")
        self.principles = principles_of(principles)
        most = sum(not p.always for p in self.principles)
        if not 0 <= draws <= most or boost < 0:
            raise ConfigError(
                f"reward.principles: draws={draws}, boost={boost:g}: wanted 0 <= draws <= {most} (principles to draw from), boost >= 0"
            )
        self.draws, self.boost, self.by, self.per, self.form = draws, boost, by, per, render

    def shown(self, sample: Sample) -> list[Principle]:
        """The principles that judge this response."""
        own = [sample.response] if self.per == "row" else []
        where = (sample.uid, conversation(sample), *own)
        return drawn(self.principles, self.draws, str(sample.meta.get(self.by, "")), self.boost, *where)

    def _ids(self, sample: Sample) -> list[int]:
        text = body(sample, [p.text for p in self.shown(sample)])
        if self.form == "turn":
            ids = rendered([{"role": "user", "content": HEAD}], self.tokenizer, True) + response_ids(
                text, self.tokenizer
            )
        else:
            ids = rendered([{"role": "user", "content": f"{HEAD}\n\n{text}"}], self.tokenizer, False)
        return ids if len(ids) <= self.max_tokens else []


def body(sample: Sample, principles: Sequence[str]) -> str:
    """What the model reads: response, instruction, principles, and where the score is read."""
    rules = "\n".join(f"{i}. {p}" for i, p in enumerate(principles, 1))
    return (
        f"# Output\n{harmless(sample.response)}\n\n# Instruction\n{harmless(conversation(sample))}\n\n"
        f"# Principles\n{rules}\n\n{END}"
    )
