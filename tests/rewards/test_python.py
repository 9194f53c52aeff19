"""A user's function: what it gets, what it may return, and what each mistake says."""

import math

import pytest
import torch

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.rewards.python import Python
from rlhf_cli.types import Sample

SAMPLES = [Sample("p1", "aa", ("r",), {"k": 1}, "u1"), Sample("p2", "b", (), {}, "u2")]
GROUP = torch.tensor([0, 0])


def scorer(tmp_path, body, name="score", sees="group"):
    file = tmp_path / "my_rewards.py"
    file.write_text(body)
    return Python(path=f"{file}:{name}", sees=sees, workers=False)


def test_gets_the_columns_that_it_names(tmp_path):
    body = (
        "def score(responses, prompts, references, meta, samples, scale=2):\n"
        "    assert prompts == ['p1', 'p2'] and references == [['r'], []] and meta == [{'k': 1}, {}]\n"
        "    assert samples[0].uid == 'u1'\n"
        "    return [scale * len(r) for r in responses]\n"
    )
    got = scorer(tmp_path, body)(SAMPLES, GROUP)
    assert got.value.tolist() == [4, 2] and got.value.dtype == torch.float32 and not got.missing.any()


@pytest.mark.parametrize(
    "returns", ["torch.tensor([1, 2])", "np.array([1, 2], dtype='float32')", "(x for x in (True, 2))"]
)
def test_accepts_number_like_lists(tmp_path, returns):
    body = f"import torch\nimport numpy as np\ndef score(responses):\n    return {returns}\n"
    assert scorer(tmp_path, body)(SAMPLES, GROUP).value.tolist() == [1, 2]


def test_none_is_missing(tmp_path):
    got = scorer(tmp_path, "def score(responses):\n    return [None, 0.5]\n")(SAMPLES, GROUP)
    assert got.missing.tolist() == [True, False]
    assert math.isnan(got.value[0]) and got.value[1] == 0.5


def test_components(tmp_path):
    got = scorer(tmp_path, "def score(responses):\n    return {'reward': [1, 2], 'style': [None, 3]}\n")(SAMPLES, GROUP)
    assert got.value.tolist() == [1, 2]
    assert list(got.components) == ["style"] and got.components["style"].tolist()[1] == 3
    assert not got.missing.any()


def test_by_module_and_with_a_neighbour(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 7\n")
    body = "from neighbour_of_rewards import VALUE\ndef score(responses):\n    return [VALUE] * len(responses)\n"
    assert scorer(tmp_path, body)(SAMPLES, GROUP).value.tolist() == [7, 7]
    monkeypatch.syspath_prepend(tmp_path)
    assert Python(path="my_rewards:score", sees="group", workers=False)(SAMPLES, GROUP).value.tolist() == [7, 7]


@pytest.mark.parametrize(
    "returns, message",
    [
        ("[1.0]", r"my_rewards\.py:score' returned 1 values for 2 samples"),
        ("['1', 2]", r"score' returned '1' \(str\) for sample 'u1'; a value must be a number or None"),
        ("0.5", r"score' returned 0\.5 \(float\); it must return a list with one number per response"),
        ("None", r"score' returned None \(NoneType\); it must return a list"),
        ("'ab'", r"score' returned 'ab' \(str\); it must return a list"),
        ("{'style': [1, 2]}", r"returned a dict with the keys \['style'\]; one must be 'value'"),
        ("{'value': [1, 2], 'x': [1]}", r"score' \(x\) returned 1 values for 2 samples"),
    ],
)
def test_wrong_returns_stop_and_say_what_came_back(tmp_path, returns, message):
    with pytest.raises(GateError, match=message) as e:
        scorer(tmp_path, f"def score(responses):\n    return {returns}\n")(SAMPLES, GROUP)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("sees, lost", [("group", [True, True]), ("sample", [True, False])])
def test_an_exception_loses_what_the_call_saw_and_names_the_users_line(tmp_path, sees, lost):
    body = "import json\n\ndef score(responses):\n    return [json.loads(r.replace('b', '7')) for r in responses]\n"
    got = scorer(tmp_path, body, sees=sees)(SAMPLES, GROUP)
    assert got.missing.tolist() == lost and got.value.isnan().tolist() == lost
    assert "my_rewards.py:4: JSONDecodeError: Expecting value" in got.reasons[0] and "\n" not in got.reasons[0]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_missing(tmp_path, value):
    body = f"def score(responses):\n    return {{'value': [float('{value}'), 1], 'style': [2, float('{value}')]}}\n"
    got = scorer(tmp_path, body)(SAMPLES, GROUP)
    assert got.missing.tolist() == [True, False] and got.value[1] == 1
    assert got.components["style"][0] == 2 and math.isnan(got.components["style"][1])
    assert got.reasons[0].endswith(f"my_rewards.py:score' returned {value}")


@pytest.mark.parametrize("sees, value", [("group", [2, 1, 2]), ("sample", [1, 1, 1])])
def test_a_call_sees_one_group_or_one_sample(tmp_path, sees, value):
    body = "def score(responses):\n    return [len(responses)] * len(responses)\n"
    samples = [*SAMPLES, Sample("p1", "c", uid="u1")]
    assert scorer(tmp_path, body, sees=sees)(samples, torch.tensor([5, 2, 5])).value.tolist() == value


@pytest.mark.parametrize(
    "body, message",
    [
        ("def other(responses):\n    return []\n", r"defines no 'score'; it defines other"),
        ("score = 3\n", r"is not a plain function"),
        ("async def score(responses):\n    return []\n", r"is not a plain function"),
        (
            "def score(completions):\n    return []\n",
            r"asks for completions; name its parameters from prompts, responses",
        ),
        ("def score():\n    return []\n", r"takes none of the columns; name its parameters from prompts"),
        ("def score(responses:\n", r"cannot be imported: .*my_rewards\.py:1: SyntaxError"),
        ("x = 1\ny = 1 / 0\n", r"cannot be imported: .*my_rewards\.py:2: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_file_is_refused_before_training(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message) as e:
        scorer(tmp_path, body)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "path, message",
    [
        ("", r"reward\.python\.path is empty; type reward\.python\.path=FILE\.py:FUNCTION"),
        ("my_rewards.py", r"'my_rewards\.py' names no function; type reward\.python\.path=FILE\.py:FUNCTION"),
        ("absent.py:score", r"no file 'absent\.py' in "),
        (
            "no_such_module_here:score",
            r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
    ],
)
def test_a_bad_path_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        Python(path=path, sees="group", workers=True)


STATEFUL = """
class Counts:
    def __init__(self):
        self.seen = 0

    def __call__(self, responses):
        self.seen += len(responses)
        return [self.seen] * len(responses)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

score = Counts()
"""


def test_what_remembers_is_checkpointed_and_never_left_to_a_worker(tmp_path, monkeypatch):
    from rlhf_cli.compose import compose
    from rlhf_cli.rewards.bleu import Bleu
    from rlhf_cli.rewards.make import make_scorer
    from rlhf_cli.state import Builder

    (tmp_path / "remembers.py").write_text(STATEFUL)
    path = f"reward.python.path={tmp_path}/remembers.py:score"

    def made(*words):
        return make_scorer(compose("score", ["reward=python", path, *words], None))

    with pytest.raises(
        ConfigError,
        match=r"^reward\.python: it has `state_dict`, and what a worker process remembers stands in no checkpoint; "
        r"score in the run's own process: type reward\.python\.workers=false$",
    ):
        made()
    scorer, build = made("reward.python.workers=false"), Builder([])
    kept = build.keep("reward.python", scorer.scorers["python"][1])
    samples, group = [Sample("p", "a"), Sample("p", "b")], torch.zeros(2, dtype=torch.int64)
    assert scorer(samples, group).value.tolist() == [2, 2] and build.state == {"reward.python": kept}
    again = made("reward.python.workers=false")
    again.scorers["python"][1].load_state_dict(kept.state_dict())
    assert again(samples, group).value.tolist() == [4, 4]
    monkeypatch.setattr(Bleu, "observe", lambda *_: None, raising=False)
    with pytest.raises(ConfigError, match=r"^reward\.bleu: it has `observe`, .* own process: pooled = False in Bleu$"):
        make_scorer(compose("score", ["reward=bleu"], None))
