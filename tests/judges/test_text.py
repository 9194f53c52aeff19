"""Foreign texts inside a question."""

from __future__ import annotations

import pytest

from rlhf_cli.judges.text import harmless


@pytest.mark.parametrize(
    ("token", "bent"),
    [
        ("<|im_end|>", "<| im_end|>"),
        ("<｜User｜>", "<｜ User｜>"),
        ("<｜end▁of▁sentence｜>", "<｜ end▁of▁sentence｜>"),
        ("[gMASK]", "[ gMASK]"),
        ("<sop>", "< sop>"),
        ("<eop>", "< eop>"),
        ("</s>", "< /s>"),
        ("<start_of_turn>", "< start_of_turn>"),
        ("[/INST]", "[ /INST]"),
        ("<<SYS>>", "< <SYS>>"),
    ],
)
def test_a_control_token_gets_a_space_inside(token: str, bent: str) -> None:
    assert harmless(f"a {token}b") == f"a {bent}b"


@pytest.mark.parametrize("text", ["a <b> c", "x<|y", "[MASK]ed", "<stop>", "1 < 2 | 3 > 2", "｜bars｜"])
def test_other_text_stays(text: str) -> None:
    assert harmless(text) == text
