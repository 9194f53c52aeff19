"""The environments by themselves: no model, no tokens."""

import json
import math
from typing import Any

import pytest

from rlhf_cli.compose import compose
from rlhf_cli.data.record import Record
from rlhf_cli.environments.calculator import Calculator, evaluate
from rlhf_cli.environments.episode import steps
from rlhf_cli.environments.guess_number import GuessNumber
from rlhf_cli.environments.judged_user import CRITERIA, JudgedUser
from rlhf_cli.environments.profile import bare, f1, parse, points
from rlhf_cli.environments.simulated_user import SimulatedUser
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Reply, Sampling
from rlhf_cli.judges.cache import Cache
from rlhf_cli.judges.judge import Judge
from rlhf_cli.judges.rule import Rule
from rlhf_cli.plan import validate


def record(text: str = "Hello", **more: Any) -> Record:
    return Record(({"role": "user", "content": text},), text, uid="u", where="f:1", **more)


# -- calculator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", "14"), ("(2+3)*4", "20"), ("1,200 / 3", "400"), ("7/2", "3.5"), ("-3 - -5", "2"), ("0.1 + 0.2", "0.3"),
        ("1/0", None), ("2 ** 9", None), ("__import__('os')", None), ("a + 1", None), ("", None), ("(" * 300, None), ("True + 1", None),
        ("9" * 120, None),
    ],
)  # fmt: skip
def test_the_calculator_computes_arithmetic_and_nothing_else(text: str, value: str | None) -> None:
    assert evaluate(text) == value


def test_a_call_is_answered_and_an_answer_ends_the_dialogue() -> None:
    env = Calculator(cost=0.25, role="user", instruct=False)
    first = env.reset(record("What is 6 times 7?", references=("42",)), 0)
    asked = env.step(first, "Let me see <calc>6*7</calc>")
    assert (asked.reward, asked.done, asked.parts) == (-0.25, False, {"call": 1.0, "error": 0.0})
    assert asked.episode.messages[-1] == {"role": "user", "content": "= 42"}
    wrong, right = env.step(asked.episode, "41"), env.step(asked.episode, "It is 42.0.")
    assert (right.reward, right.done, wrong.reward) == (1.0, True, 0.0), "an episode can be continued in two ways"
    assert "error" in env.step(first, "<calc>x</calc>").episode.messages[-1]["content"]
    with pytest.raises(ConfigError, match="f:1: environment=calculator needs a reference with a number"):
        env.reset(record(), 0)


# -- guess a number ----------------------------------------------------------------------------------------------------


def test_halving_finds_the_number_and_earns_one_in_all() -> None:
    env = GuessNumber(highest=64)
    episode, low, high, earned, turns = env.reset(record(), 0), 1, 64, 0.0, 0
    while True:
        guess, turns = (low + high) // 2, turns + 1
        turn = env.step(episode, f"Is it {guess}?")
        assert turn.reward is not None
        earned, episode = earned + turn.reward, turn.episode
        if turn.done:
            break
        low, high = (guess + 1, high) if episode.messages[-1]["content"] == "Higher." else (low, guess - 1)
    assert math.isclose(earned, 1.0) and turns <= 7, "the gains telescope to log2(64 / 1) / log2(64)"


def test_a_guess_out_of_range_or_of_what_is_known_earns_nothing() -> None:
    env = GuessNumber(highest=10)
    first = env.reset(record(), 5)
    assert first == env.reset(record(), 9), "a group plays one game"
    secret = first.state["secret"]
    far = env.step(first, "1" if secret > 1 else "10")
    assert far.reward == pytest.approx(math.log2(10 / 9) / math.log2(10))
    again = env.step(far.episode, "1" if secret > 1 else "10")
    assert again.reward == 0.0 and not again.done
    assert env.step(first, "77").parts["valid"] == env.step(first, "no idea").parts["valid"] == 0.0


# -- the simulated user ------------------------------------------------------------------------------------------------


def test_profile_f1() -> None:
    assert f1(3, 4, 5) == pytest.approx(0.666667, abs=1e-6)  # P 3/4, R 3/5
    assert f1(2, 3, 4) == pytest.approx(0.571429, abs=1e-6)  # P 2/3, R 2/4
    assert f1(0, 4, 5) == f1(1, 0, 5) == 0.0
    assert f1(9, 2, 5) == pytest.approx(2 * 1 * 0.4 / 1.4), "a judge may count more than there is"


def test_a_trailing_newline_is_no_point() -> None:
    assert points("- a\n- b\n") == ["a", "b"]
    said = parse("<profile>\n- a\n- b\n</profile>\n\n<response>\nHi\n</response>")
    assert said is not None and said.profile == ("a", "b") and said.reply == "Hi"


@pytest.mark.parametrize(
    "text",
    [
        "<profile>\n- a\n</profile>\n<response>\nHi\n</response>",  # one newline between
        "<profile>- a\n</profile>\n\n<response>\nHi\n</response>",
        "Hi", "", "<profile>\n- a\n</profile>\n\n<response>\nHi", "x <profile>\n</profile>\n\n<response>\n</response>",
    ],
)  # fmt: skip
def test_any_other_form_is_malformed(text: str) -> None:
    assert parse(text) is None and bare(text) == text


def turn(profile: list[str], reply: str) -> str:
    return "<profile>\n" + "".join(f"- {p}\n" for p in profile) + f"</profile>\n\n<response>\n{reply}\n</response>"


GOLD = [f"slot{i}: v{i}" for i in range(5)]


def user(**changes: Any) -> SimulatedUser:
    settings: dict[str, Any] = {"strip_tags": True, "reply_weight": 1.0, "instruct": True}
    return SimulatedUser(**(settings | changes))


def test_the_reward_of_a_turn() -> None:
    env = user()
    first = env.reset(record(meta={"profile": GOLD}), 0)
    good = env.step(first, turn([*GOLD[:3], "slot9: x"], "Hello, what do you do?"))
    assert good.reward == pytest.approx(1.666667, abs=1e-6) and good.parts == {
        "profile": f1(3, 4, 5),
        "reply": 1.0,
        "form": 1.0,
    }
    assert good.episode.messages[-1] == {"role": "user", "content": GOLD[0]}, "it was asked, so it tells"
    assert env.step(first, "Hello, what do you do?").reward == 0.0, "malformed, even if the reply is good"
    assert env.step(first, turn(GOLD[:3], "Blue!")).reward == pytest.approx(f1(3, 3, 5))


def test_only_the_newest_turn_keeps_its_tags_and_the_profile_is_never_shown() -> None:
    env = user()
    e = env.reset(record(meta={"profile": GOLD}), 0)
    said = [turn(["a"], "Hello, who are you?"), turn(["b"], "And where?"), turn(["c"], "Good.")]
    for text in said:
        before = [m["content"] for m in e.messages]
        e = env.step(e, text).episode
        assert not any(p in m["content"] for m in e.messages if m["role"] != "user" for p in GOLD)
        assert len(e.messages) == len(before) + 2, "the history grows by a turn and an answer"
    replies = [m["content"] for m in e.messages if m["role"] == "assistant"]
    assert replies == ["Hello, who are you?", "And where?", said[2]]
    assert [m["content"] for m in e.messages if m["role"] == "user"] == ["Hello", GOLD[0], GOLD[1], "I see."]


def test_batches_equal_single_turns() -> None:
    env = user()
    e = env.reset(record(meta={"profile": GOLD}), 0)
    texts = [turn(GOLD, "Hello?"), "no form", turn([], "x")]
    assert steps(env, [e] * 3, texts) == [env.step(e, t) for t in texts]


def test_a_record_without_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"f:1: environment=simulated_user needs a list of texts as profile"):
        user().reset(record(), 0)


# -- the section -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward=environment"], "reward=environment: there is no environment; type environment=NAME (rlhf list environment)"),
        (["environment=guess_number", "environment.rows=turns"], "environment.rows: 'turns' is not allowed; choose one of episode, turn; did you mean 'turn'?"),
        (["environment=guess_number", "environment.turns=0"], "environment.turns: 0 is not allowed; type a whole number from 1 on"),
        (["algo=sft", "environment=guess_number"], "environment: recorded responses answer nobody; type source=sampled, or environment=none"),
        (["environment=guess_number", "environment.highst=3"], "environment.highst: unknown key; did you mean 'highest'?"),
        (["shaping=turns", "+reward.environment.weight=1", "credit=gae", "algo=ppo"], None),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(words: list[str], said: str | None) -> None:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", words, None))
    assert said is None or str(e.value) == said


# -- the judged user ---------------------------------------------------------------------------------------------------


class Answers:
    """A judge that replies by the question's schema."""

    def __init__(self, **replies: str) -> None:
        self.replies, self.asked = replies, []  # type: ignore[var-annotated]

    def check(self, asks: Any) -> None:
        pass

    def ask(self, asks: Any) -> list[Reply]:
        self.asked += asks
        names = [next(iter(a.schema["properties"])) for a in asks]
        return [Reply(self.replies[n]) if n in self.replies else Reply(error="no connection") for n in names]


def judged(**replies: str) -> tuple[JudgedUser, Answers]:
    env, judge = JudgedUser(strip_tags=True, reply_weight=1.0, instruct=True), Answers(**replies)
    env.connect(judge)  # type: ignore[arg-type]
    return env, judge


def verdict(**wrong: bool) -> str:
    return json.dumps(dict.fromkeys(CRITERIA, True) | wrong)


def test_a_judge_plays_the_user_counts_and_judges() -> None:
    env, judge = judged(message='{"message": "I bake."}', covered='{"covered": 3}', naturalness=verdict())
    first = env.reset(record(meta={"profile": GOLD}), 0)
    made = env.step(first, turn(["a", "b", "c", "d"], "Hi?"))
    assert made.reward == pytest.approx(1.666667, abs=1e-6) and made.episode.messages[-1]["content"] == "I bake."
    told = {next(iter(a.schema["properties"])): a.user for a in judge.asked}
    assert "<profile>" not in told["message"] and GOLD[0] in told["message"], (
        "the user knows itself and sees bare replies"
    )
    assert GOLD[0] not in told["naturalness"] and "d" in told["naturalness"], (
        "replies are judged against the inferred profile"
    )
    one_fails, _ = judged(message='{"message": "x"}', covered='{"covered": 9}', naturalness=verdict(logic=False))
    assert one_fails.step(first, turn(["a", "b"], "Hi?")).reward == pytest.approx(f1(2, 2, 5)), "hits are clamped"


def test_a_judge_that_fails_is_missing_and_a_user_that_fails_has_left() -> None:
    first = user().reset(record(meta={"profile": GOLD}), 0)
    silent, _ = judged()
    made = silent.step(first, turn(["a"], "Hi?"))
    assert made.reward is None and made.done and made.reason == "no connection"
    odd, _ = judged(message='{"message": "x"}', covered='{"covered": true}', naturalness=verdict())
    assert odd.step(first, turn(["a"], "Hi?")).reward is None
    assert silent.step(first, "no form").reward == 0.0, "a malformed turn needs no judge"


def test_the_rule_that_stands_in_answers_in_the_right_form() -> None:
    env = JudgedUser(strip_tags=True, reply_weight=1.0, instruct=True)
    env.connect(Judge(Rule("hash"), Sampling(0.0, 64, True, {}), Cache(None)))
    made = env.step(env.reset(record(meta={"profile": GOLD}), 0), turn(GOLD[:2], "Who are you?"))
    assert made.reward is not None and 0 <= made.reward <= 2 and made.episode.messages[-1]["content"] == GOLD[0]
