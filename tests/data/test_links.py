"""Linked records: read, kept on one side, drawn in one step, scored on one rank."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.config import DatasetSection
from rlhf_cli.data.loading import load
from rlhf_cli.data.record import Record, check_links, leading, units
from rlhf_cli.errors import ConfigError
from rlhf_cli.plan import validate
from rlhf_cli.rewards.co_reward import CoReward
from rlhf_cli.sample import Sample
from rlhf_cli.sources.assemble import sample_of
from rlhf_cli.sources.sampled import Sampled
from rlhf_cli.stages import scored_by


def record(text: str, link: str = "") -> Record:
    return Record(({"role": "user", "content": text},), text, uid=text, link=link, where=f"f:{text}")


RECORDS = [record("a", "1"), record("b", "2"), record("c", "1"), record("d", "2")]


def settings(path: Path, **more: Any) -> DatasetSection:
    return DatasetSection(format="jsonl", path=str(path), columns={"prompt": "prompt", "link": "id"}, **more)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_units_keep_the_order_of_the_file() -> None:
    assert units(RECORDS) == [[0, 2], [1, 3]] and units([record("a"), record("b")]) == [[0], [1]]
    assert [r.prompt for r in leading(RECORDS, 3)] == ["a", "c"] and leading(RECORDS, 0) == RECORDS


def test_links_are_read_and_stay_on_one_side_of_the_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": f"{i} {w}", "id": i} for i in range(40) for w in "ab"])
    train, heldout = (load(settings(path, heldout_fraction=0.3), part) for part in ("train", "heldout"))  # type: ignore[arg-type]
    sides = [{r.link for r in part} for part in (train, heldout)]
    assert train[0].link == "0" or heldout[0].link == "0"
    assert not sides[0] & sides[1] and len(train) == 2 * len(sides[0]) and len(heldout) == 2 * len(sides[1]) > 0
    assert [r.link for r in load(settings(path, heldout_fraction=0.3, limit=3), "train")] == [train[0].link] * 2


def test_a_link_is_text_or_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "x", "id": [1]}])
    with pytest.raises(ConfigError, match=r"d.jsonl:1: column 'id' holds a list; wanted text or a whole number"):
        load(settings(path), "train")


def test_steps_that_would_cut_a_link_are_refused() -> None:
    check_links(RECORDS, 4)
    with pytest.raises(ConfigError) as e:
        check_links(RECORDS, 3)
    assert str(e.value) == "batch.prompts=3 would cut linked records apart: every link joins 2; type batch.prompts=4"
    with pytest.raises(ConfigError) as e:
        check_links([*RECORDS, record("e", "3")], 4)
    assert str(e.value) == (
        "f:e: column 'link' joins 1 record(s) as '3' and 2 elsewhere; every link must join the same number of records"
    )


def test_linked_records_come_in_one_step_in_every_epoch() -> None:
    many = [record(f"{i}{w}", str(i)) for w in "ab" for i in range(5)]
    source = Sampled(many, [[1]] * 10, SimpleNamespace(), lambda: None, SimpleNamespace(), prompts=4, samples=2, seed=3)  # type: ignore[arg-type]
    steps = [source._take() for _ in range(5)]  # ten units of two: two epochs
    for chosen in steps:
        assert [many[i].link for i in chosen[::2]] == [many[i].link for i in chosen[1::2]]
    assert sorted(i for s in steps for i in s) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_linked_groups_are_scored_by_one_rank(world: int) -> None:
    samples = [sample_of(RECORDS[i], "x") for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert scored_by(samples, group, world).tolist() == [k % world for k in (0, 0, 1, 1, 0, 0, 1, 1)]
    alone = [sample_of(record(str(g)), "x") for g in group.tolist()]
    assert scored_by(alone, group, world).tolist() == [g % world for g in group.tolist()]


def test_a_reward_that_compares_links_needs_them() -> None:
    with pytest.raises(
        ConfigError, match="reward=co_reward compares the answers to linked prompts, and this dataset links none"
    ):
        validate(compose("train", ["reward=co_reward"], None))


def test_co_reward_votes_as_published_unless_told_otherwise() -> None:
    # a tie goes to the answer seen first, and 0.50 is not 1/2; nothing is missing, so no share of failures is allowed for
    cfg = compose("train", ["experiment=co_reward"], None)
    scorer = CoReward(**{k: v for k, v in cfg.reward.co_reward.items() if k not in ("_target_", "weight", "shaping")})
    said = [r"\boxed{0.50}", r"\boxed{1/2}", r"\boxed{1/2}", r"\boxed{0.50}", r"\boxed{0.50}", r"\boxed{2}"]
    found = scorer(
        [Sample("p", t, uid=str(i // 3), link="q") for i, t in enumerate(said)], torch.tensor([0, 0, 0, 1, 1, 1])
    )
    assert found.value.tolist() == [1, 0, 0, 0, 0, 0]  # the first wording votes 1/2, the second 0.50
    tied = scorer(
        [Sample("p", said[i], uid=str(n // 2), link="q") for n, i in enumerate((5, 0, 0, 5))],
        torch.tensor([0, 0, 1, 1]),
    )
    assert tied.value.tolist() == [0, 1, 0, 1] and not tied.missing.any()  # type: ignore[union-attr]
    assert cfg.gates.failures == compose("train", [], None).gates.failures


def test_the_packaged_pairs_are_whole() -> None:
    cfg = compose("train", ["experiment=co_reward"], None).dataset
    train, heldout = load(cfg, "train"), load(cfg, "heldout")
    assert (len(train), len(heldout)) == (96, 24)
    for records in (train, heldout):
        assert all(len(u) == 2 and records[u[0]].references == records[u[1]].references for u in units(records))
