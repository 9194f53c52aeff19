"""The distilled reward: hand numbers, arrival, loss of a judge, replay and resume."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.engine.comm import Comm
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.rewards.annotator import Annotator, Arrivals
from rlhf_cli.rewards.distil import FEATURES, Classifier, Ranker, Table, features, join, split
from rlhf_cli.rewards.oni import Oni, canonical, read_label, read_rank
from rlhf_cli.types import Sample

COMM = Comm(torch.device("cpu"))
TRAINING = {"updates": 40, "batch": 16, "lr": 0.01, "hidden": 16, "dropout": 0.1, "most_labels": 1000}


class Oracle:
    """Likes texts with the word good; `slow` seconds an answer, `fails` always."""

    def __init__(self, folder: Path | None = None, slow: float = 0.0, fails: bool = False) -> None:
        self.folder, self.slow, self.fails = folder, slow, fails
        self.asked: list[Ask] = []

    def ask(self, asks: Any) -> list[Reply]:
        self.asked += asks
        time.sleep(self.slow)
        if self.fails:
            return [Reply(error="no connection") for _ in asks]
        return [Reply(json.dumps({"label": "FOO" if "good" in a.user else "BAR"})) for a in asks]


def oni(judge: Any = None, kind: str = "retrieval", arrival: str = "sync", **changes: Any) -> Oni:
    delivery = {
        "arrival": arrival,
        "delay": changes.pop("delay", 1),
        "patience": changes.pop("patience", 5.0),
        "items": changes.pop("items", 100),
    }
    made = Oni(
        kind=kind, question="q", delivery=delivery, training=TRAINING, power=3.0, seed=0, replay=changes.pop("replay", ""),  # type: ignore[arg-type]
    )  # fmt: skip
    assert not changes
    made.connect(judge or Oracle())
    return made


def samples(*texts: str) -> tuple[list[Sample], torch.Tensor]:
    return [Sample("p", t, uid="u") for t in texts], torch.zeros(len(texts), dtype=torch.int64)


def play(scorer: Oni, *texts: str) -> list[float]:
    """A step: score, then show what was scored."""
    rows, group = samples(*texts)
    found = scorer(rows, group)
    scorer.observe(rows, found.value, COMM)
    return found.value.tolist()


def test_a_repeated_item_earns_less() -> None:
    scorer = oni()
    play(scorer, "good")
    assert play(scorer, "good", "Good ", "bad", " good") == [1.0, 1 / 8, 0.0, pytest.approx(1 / 27)]


def test_in_step_an_oracle_is_the_reward_after_one_pass() -> None:
    scorer = oni()
    assert play(scorer, "a good one", "a bad one") == [0.0, 0.0], "nobody has labelled them"
    assert play(scorer, "a good one", "a bad one", "new good") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_labels_count_so_many_steps_after_they_were_asked_for(delay: int) -> None:
    scorer = oni(arrival="delayed", delay=delay)
    assert [play(scorer, "good")[0] for _ in range(delay + 2)] == [0.0] * (delay + 1) + [1.0]


@pytest.mark.parametrize("delay", [1, 3])
def test_a_policy_improves_later_by_the_delay_and_not_less(delay: int) -> None:
    """One logit between a good and a bad response, moved by the exact policy gradient: the same way, `delay` steps later."""

    def way(scorer: Oni, steps: int) -> list[float]:
        x, found = -1.0, []
        for _ in range(steps):
            p = 1 / (1 + math.exp(-x))
            found.append(p)
            good, bad = play(scorer, "good", "bad")
            x += p * (1 - p) * (good - bad)
        return found

    now, late = way(oni(), 12), way(oni(arrival="delayed", delay=delay), 12 + delay)
    assert late[delay:] == now and late[: delay + 1] == [now[0]] * (delay + 1) and now[-1] > now[0] + 0.2


def state_of(scorer: Oni) -> list[float]:
    rows, group = samples("z")
    return [float(scorer(rows, group).components[k][0]) for k in ("labelled", "agreement", "staleness")]


def test_how_many_labels_how_well_foretold_and_how_old() -> None:
    scorer = oni()
    assert state_of(scorer) == [0, pytest.approx(math.nan, nan_ok=True), 0]
    play(scorer, "bad")  # nothing was known before these labels
    assert state_of(scorer) == [1, pytest.approx(math.nan, nan_ok=True), 0]
    play(scorer, "good", "bad a", "bad b", "bad c")  # an unknown text counts as 0, which three of these four are
    assert state_of(scorer) == [5, 0.75, 0]
    play(scorer, "good")
    play(scorer, "good")
    assert state_of(scorer) == [5, 0.75, 2], "no labels for two steps"
    net = oni(kind="classification")
    play(net, "good", "bad")
    rows, group = samples("good")
    assert 0 < float(net(rows, group).components["loss"][0]) < math.log(2), "better than a coin"


def test_a_ranker_foretells_the_order_of_pairs() -> None:
    net = Ranker(**settings())
    pairs = [(join(f"good {i}", f"bad {i}"), 1.0) for i in range(8)]
    assert net.agreement(pairs) is None
    net.learn(pairs, 0)
    assert net.agreement([*pairs[:3], (join("good x", "bad x"), 0.0), (join("a", "b"), 0.5)]) == 0.75
    assert net.agreement([(join("a", "b"), 0.5)]) is None


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_what_waits_too_long_is_let_go_and_may_come_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.rewards.oni.WAITING", 2)
    judge = Oracle()
    scorer = oni(judge, kind=kind, items=1)
    play(scorer, "a", "b", "c", "d", "e", "f", "g", "h")
    assert len(scorer.waiting) == 2 and len(scorer.seen) == (3 if kind == "retrieval" else 6)
    state = json.dumps({k: v for k, v in scorer.state_dict().items() if k != "model"})
    assert state.count('"') < 60, "digests and what waits, no text of the past"
    play(scorer, "a", "b")
    first = "a" if kind == "retrieval" else join("a", "b")
    assert first in scorer.waiting or any("\na\n" in x.user for x in judge.asked[1:])


def test_the_newest_items_are_asked_first() -> None:
    judge = Oracle()
    scorer = oni(judge, items=2)
    play(scorer, "one", "two", "three")
    play(scorer, "four")
    last_words = [a.user.split("\n")[1] for a in judge.asked]
    assert last_words == ["three", "two", "four", "one"]


def test_a_dead_judge_gives_nothing_and_holds_nobody_up() -> None:
    scorer = oni(Oracle(fails=True), arrival="delayed")
    assert [play(scorer, "good")[0] for _ in range(4)] == [0.0] * 4
    hung = threading.Event()

    class Hangs(Oracle):
        def ask(self, asks: Any) -> list[Reply]:
            hung.wait(30)
            return []

    scorer = oni(Hangs(), arrival="delayed", patience=0.05)
    began = time.monotonic()
    assert [play(scorer, "good", f"x{i}")[0] for i in range(6)] == [0.0] * 6
    assert time.monotonic() - began < 5, "a thread that hangs is waited for once"
    hung.set()

    class Dies(Oracle):
        def ask(self, asks: Any) -> list[Reply]:
            raise RuntimeError("gone")

    scorer = oni(Dies(), arrival="ready")
    assert [play(scorer, "good")[0] for _ in range(3)] == [0.0] * 3 and scorer.annotator.error == "RuntimeError: gone"


def test_ready_takes_labels_when_they_come() -> None:
    scorer = oni(Oracle(slow=0.1), arrival="ready")
    assert play(scorer, "good") == [0.0]
    time.sleep(0.4)
    play(scorer, "good")
    assert play(scorer, "good") == [1.0], "the policy never waited"


def test_a_run_is_replayed_from_its_record(tmp_path: Path) -> None:
    texts = [("good a", "bad a"), ("good b", "bad a"), ("good a", "good b"), ("good a", "bad c")]
    for kind in ("retrieval", "classification"):
        folder = tmp_path / kind
        first = oni(Oracle(folder), kind=kind, arrival="delayed")
        values = [play(first, *t) for t in texts]
        other = Oracle(fails=True)
        again = oni(other, kind=kind, arrival="ready", replay=str(folder / "annotations.jsonl"))
        assert [play(again, *t) for t in texts] == values and not other.asked


@pytest.mark.parametrize("kind", ["retrieval", "classification", "ranking"])
def test_it_goes_on_identically_from_its_state(kind: str, tmp_path: Path) -> None:
    texts = [("good a", "bad a", "x"), ("good b", "bad b"), ("good a", "y z"), ("good c", "bad c"), ("good a", "bad a")]
    whole = oni(Oracle(), kind=kind, arrival="delayed")
    values = [play(whole, *t) for t in texts]
    part = oni(Oracle(), kind=kind, arrival="delayed")
    for t in texts[:2]:
        play(part, *t)
    state = part.state_dict()
    model = state.pop("model")
    resumed = oni(Oracle(), kind=kind, arrival="delayed")
    resumed.load_state_dict(json.loads(json.dumps(state)) | {"model": model})
    assert [play(resumed, *t) for t in texts[2:]] == values[2:]


def test_steps_taken_again_get_the_labels_that_they_had(tmp_path: Path) -> None:
    first = oni(Oracle(tmp_path), arrival="ready")
    state = first.state_dict()
    values = [play(first, "good", f"good {i}") for i in range(5)]
    late = oni(Oracle(tmp_path, slow=1.0), arrival="ready")  # another speed, the same steps
    late.load_state_dict(state)
    assert [play(late, "good", f"good {i}") for i in range(5)] == values


# -- the small models --------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return {"updates": 60, "batch": 16, "lr": 0.01, "hidden": 16, "dropout": 0.0, "most": 100, "seed": 0} | changes


def test_features_are_unit_vectors_of_words() -> None:
    x = features(["good answer", "Good  answer", "", "bad"])
    assert x.shape == (4, FEATURES) and torch.equal(x[0], x[1]) and not x[2].any()
    assert torch.allclose(x.norm(dim=-1), torch.tensor([1.0, 1, 0, 1]))


def test_a_classifier_learns_the_word_that_decides() -> None:
    net = Classifier(**settings())
    assert net.reward(["good"]) == [0.0], "before any label"
    net.learn([(f"good {i}", 1.0) for i in range(8)] + [(f"bad {i}", 0.0) for i in range(8)], 0)
    assert net.reward(["good 9", "bad 9"]) == [1.0, 0.0]
    full = Classifier(**settings(most=2))
    full.learn([("a", 1.0), ("b", 0.0)], 0)
    assert full.reward(["a", "b"]) == Classifier(**settings(most=2)).reward(["a", "b"]) or full.learn([], 1) == {}


def test_a_tie_pulls_equal_scores_nowhere() -> None:
    net = Ranker(**settings())
    loss = net.loss([(join("same", "same"), 0.5)], torch.Generator())
    assert float(loss) == pytest.approx(0.693147, abs=1e-5)
    loss.backward()
    assert all(p.grad is None or not p.grad.abs().max() > 1e-6 for p in net.net.parameters())


def test_a_ranker_standardises_and_cuts_small_scores() -> None:
    net = Ranker(**settings())
    assert net.reward(["good"]) == [0.0]
    net.learn([(join(f"good {i}", f"bad {i}"), 1.0) for i in range(8)], 0)
    good, bad = net.reward(["good 3", "bad 3"])
    assert good > 0 and bad == 0.0, "the worse one lies below -0.5 and counts as nothing"
    assert split(join("a", "b")) == ("a", "b")


def test_a_table_knows_what_it_was_told() -> None:
    table = Table()
    table.learn([("a", 1.0)], 0)
    assert table.reward(["a", "b"]) == [1.0, 0.0]


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_the_lower_class_or_a_tie() -> None:
    assert [read_label(Reply(t)) for t in ('{"label": "FOO"}', '{"label": "BAR"}', "FOO", '{"label": "foo"}')] == [
        1,
        0,
        0,
        0,
    ]
    assert [read_rank(Reply(t)) for t in ('{"label": "1"}', '{"label": "2"}', '{"label": "tie"}', "?")] == [
        1,
        0,
        0.5,
        0.5,
    ]
    assert canonical("  A\n b ") == "a b"


def test_an_annotator_takes_one_batch_at_a_time() -> None:
    go = threading.Event()
    seen: list[list[str]] = []

    def label(some: Any) -> list[tuple[str, float]]:
        seen.append(list(some))
        go.wait(5)
        return [(x, 1.0) for x in some]

    annotator = Annotator(label)
    assert annotator.poll(0.0) is None
    annotator.ask(["a"])
    annotator.ask(["b"])
    assert annotator.poll(0.01) is None and seen == [["a"]]
    go.set()
    annotator.hung = False
    assert annotator.poll(5.0) == [("a", 1.0)]


def test_arrivals_lie_on_the_disk(tmp_path: Path) -> None:
    book = Arrivals(tmp_path / "run" / "annotations.jsonl")
    assert book.at(0) is None
    book.write(0, [("é\n", 1.0)])
    book.write(1, [])
    again = Arrivals(tmp_path / "run" / "annotations.jsonl")
    assert again.at(0) == [("é\n", 1.0)] and again.at(1) == [] and again.at(2) is None
    assert Arrivals(None, tmp_path / "run" / "annotations.jsonl").at(7) == [], "a replay has no more"
