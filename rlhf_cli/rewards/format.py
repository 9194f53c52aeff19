"""Format: reasoning and answer inside their tags, in order, once each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Format:
    """1 where the whole response is <a>...</a> <b>...</b> for tags a, b, in order, each tag exactly once; else 0.

    Only white space may stand around and between the blocks. With `after`, any text may follow the last block.
    Part `tags`: the share of the tags, openings and closings, that stand exactly once.
    See DeepSeek-AI, DeepSeek-R1, arXiv:2501.12948, sec. 2.2.2 (format rewards).
    """

    pooled = True
    of_format = True

    def __init__(self, *, tags: list[str], after: bool, opened: bool) -> None:
        """Args:
        tags: names of the blocks, in order
        after: text may follow the last block (tags=[think] after=true is the format of most reasoning models)
        opened: the chat template has already written the first opening tag, so the response starts inside it
        """
        if not tags or len(set(tags)) < len(tags) or not all(re.fullmatch(r"\w+", t) for t in tags):
            raise ConfigError(
                f"reward.format.tags: {list(tags)} is not allowed; give different words, e.g. reward.format.tags=[think,answer]"
            )
        self.marks = [mark for t in tags for mark in (f"<{t}>", f"</{t}>")][int(opened) :]
        blocks = [rf"<{t}>.*?</{t}>" for t in tags]
        if opened:
            blocks[0] = blocks[0].removeprefix(f"<{tags[0]}>")
        self.pattern = re.compile(r"\s*" + r"\s*".join(blocks) + (r".*" if after else r"\s*"), re.DOTALL)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        for s in samples:
            once = [s.response.count(mark) == 1 for mark in self.marks]
            fits = all(once) and self.pattern.fullmatch(s.response) is not None
            yield Row(float(fits), {"tags": sum(once) / len(once)})
