"""metrics.jsonl: exact floats, one axis, torn lines, rows moved aside on resume."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.metrics import Metrics, read


def write(path: Path, *steps: int, unique: bool = True) -> Metrics:
    m = Metrics(path, unique=unique)
    for s in steps:
        m.append({"x": s / 3, "step": s})
    return m


def test_floats_round_trip_bit_for_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)] + [
        5e-324,
        -0.0,
        0.1 + 0.2,
        1e22,
        2.0**53 + 2,
    ]
    row = {f"k{i}": v for i, v in enumerate(values) if v == v}
    write(tmp_path / "m.jsonl").append({"step": 1} | row)
    (back,) = read(tmp_path / "m.jsonl")
    assert {k: struct.pack("<d", v) for k, v in row.items()} == {k: struct.pack("<d", back[k]) for k in row}
    assert next(iter(back)) == "step"


def test_nan_and_infinity_are_null_and_named(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl").append({"a": float("nan"), "b": float("-inf"), "c": 1, "step": 3})
    line = (tmp_path / "m.jsonl").read_text()
    assert line == '{"step": 3, "a": null, "b": null, "c": 1, "nonfinite": {"a": "nan", "b": "-inf"}}\n'


def test_the_axis_is_monotone(tmp_path: Path) -> None:
    m = write(tmp_path / "m.jsonl", 1, 2)
    with pytest.raises(AssertionError, match="step 2 after step 2"):
        m.append({"step": 2})
    again = Metrics(tmp_path / "m.jsonl")
    with pytest.raises(AssertionError, match="step 1 after step 2"):
        again.append({"step": 1})
    write(tmp_path / "s.jsonl", 1, 1, 2, 2, unique=False)


def test_every_torn_last_line_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2)
    Metrics(path).append({"step": 3, "text": "é漢"})
    whole = path.read_bytes()
    first_two = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for cut in range(first_two, len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = 3 if cut >= len(whole) - 1 else 2
        assert [r["step"] for r in read(path)] == [1, 2, 3][:kept], cut
        Metrics(path).append({"step": 4})
        assert [r["step"] for r in read(path)] == [*[1, 2, 3][:kept], 4], cut


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"m.jsonl:2: not a row of metrics; remove the line or restore the file$"):
        read(path)


def test_truncate_moves_later_rows_aside_and_counts_resumes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3, 4, 5)
    with path.open("a") as f:
        f.write('{"step": 6, "x"')
    before = path.read_text().splitlines()[:3]
    m = Metrics(path)
    assert m.truncate_after(3) == 2
    assert path.read_text().splitlines() == before
    m.append({"step": 4, "x": 0})
    assert m.truncate_after(3) == 1
    assert m.truncate_after(3) == 0
    assert [(r["step"], r["resume"]) for r in read(m.discarded)] == [(4, 1), (5, 1), (4, 2)]
    assert read(m.discarded)[0]["x"] == 4 / 3


def test_a_crash_while_truncating_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    m = write(path, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_cli.record.metrics.os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.truncate_after(1)
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    Metrics(path).truncate_after(1)
    assert [r["step"] for r in read(path)] == [1]
    assert {r["step"] for r in read(m.discarded)} == {2, 3}


def test_texts_with_lone_surrogates_and_line_separators(tmp_path: Path) -> None:
    text = "a\ud800b\u2028c\nd"
    Metrics(tmp_path / "s.jsonl", unique=False).append({"step": 1, "response": text})
    assert read(tmp_path / "s.jsonl")[0]["response"] == text
    assert len((tmp_path / "s.jsonl").read_bytes().split(b"\n")) == 2


def test_numbers_of_tensors_are_numbers(tmp_path: Path) -> None:
    import torch

    Metrics(tmp_path / "m.jsonl").append({"step": 1, "x": torch.tensor(0.1), "bad": torch.tensor(float("inf"))})
    row = json.loads((tmp_path / "m.jsonl").read_text())
    assert row == {"step": 1, "x": 0.10000000149011612, "bad": None, "nonfinite": {"bad": "inf"}}
