"""From lists of tokens to columns, and the order of records."""

import torch

from rlhf_cli.data.record import Record
from rlhf_cli.sources.assemble import Order, align, rows, sample_of
from rlhf_cli.types import Sample


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(7, seed=3)
    epochs = [order.take(7) for _ in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert Order(7, seed=4).take(7) != epochs[0]


def test_batches_run_over_the_end_of_an_epoch() -> None:
    whole, parts = Order(5, 0).take(20), Order(5, 0)
    assert [i for n in (3, 3, 1, 12, 1) for i in parts.take(n)] == whole
    assert all(sorted(whole[k : k + 5]) == list(range(5)) for k in (0, 5, 10, 15))


def test_an_order_goes_on_from_its_cursor() -> None:
    first = Order(5, 0)
    first.take(8)
    later = Order(5, 0)
    later.cursor = first.cursor
    assert later.take(9) == first.take(9)


def test_rows_are_padded_on_the_right_and_the_mask_covers_the_response() -> None:
    exp = rows([[1, 2], [3], [4, 5, 6]], [[7], [8, 9, 9], []], [Sample("a", "b")] * 3, torch.tensor([0, 1, 2]))
    assert exp.ids.tolist() == [[1, 2, 7, 0], [3, 8, 9, 9], [4, 5, 6, 0]]
    assert exp.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert exp.mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert align([[-1.0], [-2.0, -3.0, -4.0], []], exp).tolist() == [[0, 0, -1, 0], [0, -2, -3, -4], [0, 0, 0, 0]]


def test_a_sample_carries_the_conversation_and_its_place() -> None:
    record = Record(({"role": "user", "content": "hi"},), "hi", ("ho",), meta={"k": 1}, uid="u", where="f.jsonl:3")
    sample = sample_of(record, "text")
    assert (sample.prompt, sample.response, sample.references, sample.uid) == ("hi", "text", ("ho",), "u")
    assert sample.meta == {"k": 1, "messages": [{"role": "user", "content": "hi"}], "where": "f.jsonl:3"}
