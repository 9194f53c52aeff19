"""Dialogues as rows: masks, prefixes, rewards at turns, candidates, limits, resuming; on the tiny random model."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rlhf_cli import stages
from rlhf_cli.credit import gae
from rlhf_cli.data.record import Record
from rlhf_cli.data.text import check_dialogue, follow_up, render
from rlhf_cli.engine.comm import Comm
from rlhf_cli.environments.episode import Episode, Turn
from rlhf_cli.environments.simulated_user import SimulatedUser
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.models.heads import PolicyHead
from rlhf_cli.models.packing import register
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.rewards.environment import Environment
from rlhf_cli.rollout.sampler import Decoding, Rollout, Sampler
from rlhf_cli.shaping import by_turn, token_kl
from rlhf_cli.shaping.place import at_end
from rlhf_cli.sources.episodes import Episodes, play
from rlhf_cli.sources.play import Player, best_of, shared
from rlhf_cli.sources.sampled import Sampled, row_seed
from rlhf_cli.types import Experience

TEXTS = ["What is it?", "Why", "A longer prompt"]
RECORDS = [Record(({"role": "user", "content": p},), p, uid=str(i)) for i, p in enumerate(TEXTS)]
COMM = Comm(torch.device("cpu"))


class Echo:
    """Says how long a response was; ends after `last` turns, or at once for a record's uid in `short`."""

    def __init__(self, last: int = 3, short: tuple[str, ...] = (), rewrite: bool = False) -> None:
        self.last, self.short, self.rewrite = last, short, rewrite

    def reset(self, record: Record, seed: int) -> Episode:
        return Episode(record.messages, {"n": 0, "uid": record.uid})

    def step(self, episode: Episode, response: str) -> Turn:
        n = episode.state["n"] + 1
        after = episode.after(response, f"you said {len(response)}", state={**episode.state, "n": n})
        if self.rewrite:
            after = replace(after, messages=({"role": "user", "content": "new"}, *after.messages[1:]))
        reward = float(sum(response.encode()) % 7)
        return Turn(after, reward, {"n": float(n)}, done=n >= self.last or episode.state["uid"] in self.short)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    model = tiny_causal(0, torch.float32)
    model.generation_config.eos_token_id = [257, *range(60, 90)]  # so that some turns end early
    return Sampler(model, tiny_tokenizer(), Decoding(max_tokens=6, rows=4), device="cpu")


def player(sampler: Sampler, env: Any, rows: str = "episode", turns: int = 5, prompt_tokens: int = 999) -> Player:
    return Player(env, sampler, True, rows, turns, prompt_tokens)


def source(p: Player, **changes: Any) -> Episodes:
    encoded = [p.opening(r) for r in RECORDS]
    settings: dict[str, Any] = {"prompts": 3, "samples": 2, "seed": 0} | changes
    return Episodes(p, RECORDS, encoded, p.sampler, lambda: None, COMM, **settings)


def test_a_row_is_what_was_read_and_written_and_only_own_tokens_are_trained(sampler: Sampler) -> None:
    exp = next(source(player(sampler, Echo())))
    tokenizer = sampler.tokenizer
    assert len(exp) == 6 and exp.group.tolist() == [0, 0, 1, 1, 2, 2]
    for i, sample in enumerate(exp.samples):
        turns = sample.meta["turns"]
        assert len(turns) == 3
        ids = exp.ids[i, exp.attention[i]].tolist()
        prompt = render(({"role": "user", "content": TEXTS[int(sample.uid)]},), tokenizer, True)
        assert ids[: len(prompt)] == prompt and not exp.mask[i, : len(prompt)].any()
        # the stretches of the mask decode to the turns, and what lies between them to what the environment said
        starts = [t for t in range(1, len(ids)) if exp.mask[i, t] and not exp.mask[i, t - 1]]
        assert len(starts) == 3
        for turn, start in zip(turns, starts, strict=True):
            stop = (
                start + int((~exp.mask[i, start : len(ids)]).int().argmax())
                if not exp.mask[i, start : len(ids)].all()
                else len(ids)
            )
            assert tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip() == turn["response"]
        between = tokenizer.decode([t for t, m in zip(ids, exp.mask[i].tolist(), strict=False) if not m])
        assert all(f"user: you said {len(t['response'])}\nassistant: " in between for t in turns[:2])
    assert (exp.behavior_logp[exp.mask] < 0).all() and not exp.behavior_logp[~exp.mask].any()


@pytest.mark.parametrize("packing", [True, False])
def test_the_learner_agrees_with_the_sampler_on_every_turn(sampler: Sampler, packing: bool) -> None:
    exp = next(source(player(sampler, Echo())))
    register()
    model = tiny_causal(0, torch.float32)
    if packing:
        from rlhf_cli.models.packing import ATTENTION

        model.set_attn_implementation(ATTENTION)
    head = PolicyHead(model, temperature=1.0, packing=packing)
    logp = head(exp.ids, exp.attention, exp.mask, exp.group, frozenset({"logp"}))["logp"].detach()
    assert (logp - exp.behavior_logp).abs().max() < 1e-4


def test_the_reward_of_a_turn_stands_at_its_last_token(sampler: Sampler) -> None:
    exp = next(source(player(sampler, Echo(short=("1",)))))
    scores = Environment()(exp.samples, exp.group)
    for i, sample in enumerate(exp.samples):
        earned = [t["reward"] for t in sample.meta["turns"]]
        assert len(earned) == (1 if sample.uid == "1" else 3) and scores.value[i] == sum(earned)
        ends = [
            t
            for t in range(exp.ids.shape[1])
            if exp.mask[i, t] and (t + 1 == exp.ids.shape[1] or not exp.mask[i, t + 1])
        ]
        assert [float(exp.turn_reward[i, t]) for t in ends] == earned
    assert torch.equal(exp.turn_reward.sum(-1), scores.value) and scores.components["n"][0] in (1.0, 2.0)


def test_shaping_moves_the_score_to_the_turns() -> None:
    # a row with two turns, tokens 1-2 and 4-5, that earned 2 and 3; another reward of 10 stays at the end; weight 0.5
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    turn_reward = torch.tensor([[0.0, 0, 2, 0, 0, 3, 0]])
    score = torch.tensor([0.5 * 5 + 10])
    reward = by_turn(turn_reward, mask, weight=0.5) + at_end(score, mask)
    assert reward.tolist() == [[0, 0, 1, 0, 0, 1.5 + 10, 0]]


def test_gae_carries_value_and_advantage_over_what_others_say() -> None:
    # two turns of one token each around two tokens of another party whose values are junk; gamma 1, lambda .5:
    # delta_2 = 3 - .4 = 2.6; delta_1 = 2 + .4 - .5 = 1.9; A_1 = 1.9 + .5 * 2.6 = 3.2
    mask = torch.tensor([[0, 1, 0, 0, 1]]).bool()
    value = torch.tensor([[9.0, 0.5, 99, -99, 0.4]])
    made = gae(torch.tensor([[0.0, 2, 0, 0, 3]]), value, mask, gamma=1.0, lam=0.5, whiten=False)
    assert torch.allclose(made.advantage, torch.tensor([[0.0, 3.2, 0, 0, 2.6]]))


def test_one_turn_and_one_candidate_are_the_ordinary_source(sampler: Sampler) -> None:
    for rows in ("episode", "turn"):
        p = player(sampler, Echo(), rows=rows, turns=1)
        plain = Sampled(
            RECORDS, [p.opening(r) for r in RECORDS], sampler, lambda: None, COMM, prompts=3, samples=1, seed=0
        )
        a, b = next(source(p, samples=1)), next(plain)
        for name in ("ids", "attention", "mask", "group", "behavior_logp", "truncated", "version"):
            assert torch.equal(getattr(a, name), getattr(b, name)), (rows, name)
        assert [s.response for s in a.samples] == [s.response for s in b.samples]


def test_one_turn_and_one_candidate_are_learnt_as_by_plain_ppo(sampler: Sampler) -> None:
    g = torch.Generator().manual_seed(0)
    plain = next(Sampled(RECORDS, [player(sampler, Echo()).opening(r) for r in RECORDS], sampler, lambda: None, COMM, prompts=3, samples=1, seed=0))  # fmt: skip
    earned = torch.tensor([float(sum(s.response.encode()) % 7) for s in plain.samples])  # Echo's reward
    value, ref = (torch.randn(plain.mask.shape, generator=g) for _ in range(2))
    kl = partial(token_kl, beta=0.05, kind="k1")
    credit = stages.crediting(partial(gae, gamma=1.0, lam=0.95, whiten=True), 1e9)

    def learnt(exp: Experience, *more: Any) -> Experience:
        return credit(stages.shaping([kl, *more])(replace(exp, ref_logp=exp.behavior_logp + 0.1 * ref, value=value)))

    wanted = learnt(replace(plain, score=earned))
    assert earned.unique().numel() > 1 and wanted.advantage.abs().max() > 0.1
    for rows, more in (("turn", ()), ("episode", (partial(by_turn, weight=1.0),))):
        exp = next(source(player(sampler, Echo(), rows=rows, turns=1), samples=1))
        found = learnt(replace(exp, score=Environment()(exp.samples, exp.group).value), *more)
        assert torch.equal(found.advantage, wanted.advantage) and torch.equal(found.returns, wanted.returns), rows


class Says:
    """A policy that writes a profile of nothing, and asks, in every turn."""

    tokenizer, eos, decoding = tiny_tokenizer(), (257,), Decoding()

    def sample(self, prompts: Any, k: int, seeds: Any, decoding: Any) -> Rollout:
        text = "<profile>\n- nothing\n</profile>\n\n<response>\nSo, what else?\n</response>"
        ids = [[*text.encode(), 257] for _ in seeds]
        return Rollout(ids, torch.zeros(len(ids), len(ids[0])), torch.zeros(len(ids), dtype=torch.bool))


@pytest.mark.parametrize("rows", ["episode", "turn"])
def test_what_the_user_did_not_tell_is_in_no_token_that_the_policy_reads(rows: str) -> None:
    gold = [f"likes the number {n}{n}{n}" for n in range(1, 6)]
    record = Record(({"role": "user", "content": "Hello"},), "Hello", uid="u", meta={"profile": gold})
    env = SimulatedUser(strip_tags=rows == "turn", reply_weight=1.0, instruct=True)
    (played,) = player(Says(), env, rows=rows, turns=4, prompt_tokens=9999).play([record], 1, [0], Decoding())  # type: ignore[arg-type]
    told = []
    for row in played:
        read = Says.tokenizer.decode(row.prompt if rows == "turn" else row.context())
        told.append(row.turns[-1][0].state["told"])
        assert "Hello" in read and [g in read for g in gold] == [n < told[-1] for n in range(5)]
    assert told == ([0, 1, 2, 3] if rows == "turn" else [3])


def test_the_best_candidate_goes_on_and_all_are_rows(sampler: Sampler) -> None:
    exp = next(source(player(sampler, Echo(last=3), rows="turn"), prompts=1, samples=4))
    assert len(exp) == 12 and exp.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    said = ()
    for t in range(3):
        group = exp.samples[4 * t : 4 * t + 4]
        assert all(len(s.meta["turns"]) == 1 for s in group)
        assert all(len(s.meta["messages"]) == 2 * t + 1 for s in group), "the history grew by a turn and an answer"
        if said:
            assert group[0].meta["messages"][-2:] == [
                {"role": "assistant", "content": said[0]}, {"role": "user", "content": f"you said {len(said[0])}"}
            ]  # fmt: skip
        best = max(range(4), key=lambda i: group[i].meta["turns"][0]["reward"])
        said = (group[best].response,)


def test_the_first_of_equal_candidates_goes_on() -> None:
    def row(reward: float | None) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(turns=[(None, "", Turn(Episode(()), reward))])

    rows = [row(r) for r in (0.2, 1.4, 0.9, 1.4)]
    assert best_of(rows) is rows[1]
    assert best_of([row(None), row(-1.0)]).turns[0][2].reward == -1.0 and best_of([row(None)]) is None  # type: ignore[union-attr]


def test_a_dialogue_ends_at_its_turns_and_where_no_prompt_fits(sampler: Sampler) -> None:
    exp = next(source(player(sampler, Echo(last=9), turns=2)))
    assert {len(s.meta["turns"]) for s in exp.samples} == {2}
    short = next(source(player(sampler, Echo(last=9), prompt_tokens=45)))
    assert short.truncated.all() and int(short.attention.sum(-1).max()) <= 45 + 6
    assert exp.mask.any(-1).all() and short.mask[torch.arange(6), short.attention.sum(-1) - 1].all(), (
        "a row ends with its own turn"
    )


def test_a_missing_reward_ends_the_dialogue_and_is_missing(sampler: Sampler) -> None:
    class Fails(Echo):
        def step(self, episode: Episode, response: str) -> Turn:
            turn = super().step(episode, response)
            return replace(turn, reward=None, reason="nobody is there") if turn.parts["n"] == 2 else turn

    exp = next(source(player(sampler, Fails())))
    scores = Environment()(exp.samples, exp.group)
    assert scores.missing is not None and scores.missing.all() and scores.reasons[0] == "nobody is there"
    assert all(len(s.meta["turns"]) == 2 for s in exp.samples)


@pytest.mark.parametrize("rows", ["episode", "turn"])
def test_it_goes_on_identically_from_its_state(sampler: Sampler, rows: str) -> None:
    first = source(player(sampler, Echo(), rows=rows), prompts=2)
    for step in range(2):
        next(first)
        first.publish(step + 1)
    other = source(player(sampler, Echo(), rows=rows), prompts=2)
    other.load_state_dict(first.state_dict())
    a, b = next(first), next(other)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.turn_reward, b.turn_reward) and a.samples == b.samples


@pytest.mark.parametrize("rows", ["episode", "turn"])
def test_ranks_play_what_one_would(sampler: Sampler, rows: str) -> None:
    p = player(sampler, Echo(), rows=rows)
    seeds = [row_seed(0, 0, i, k) for i in range(3) for k in range(2)]
    alone = play(p, RECORDS, 2, seeds, COMM, sampler.decoding)

    class Rank:
        def __init__(self, rank: int, parts: list[Any]) -> None:
            self.rank, self.world, self.parts = rank, 2, parts

        def gather(self, own: Any) -> list[Any]:
            self.parts.append(own)
            return self.parts if len(self.parts) == 2 else [[own[0]] * 2] * 2

    parts: list[Any] = []
    for rank in range(2):
        comm: Any = Rank(rank, parts)
        together = play(p, RECORDS, 2, seeds, comm, sampler.decoding)
    assert [[r.context() for r in rs] for rs in together] == [[r.context() for r in rs] for rs in alone]
    assert [[r.sample() for r in rs] for rs in together] == [[r.sample() for r in rs] for rs in alone]


def test_an_environment_that_rewrites_the_past_needs_rows_of_turns(sampler: Sampler) -> None:
    with pytest.raises(ConfigError, match=r"the environment changes earlier turns.*environment.rows=turn"):
        next(source(player(sampler, Echo(rewrite=True))))
    next(source(player(sampler, Echo(rewrite=True), rows="turn")))


# -- text --------------------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"


def test_ids_grow_and_equal_the_whole_rendering() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    asked, answer, more = ({"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b"), ("user", "c")))
    end = 257
    grown = [*render((asked,), tokenizer, True), *b"b", end, *follow_up((more,), tokenizer, True, ended=True)]
    assert grown == render((asked, answer, more), tokenizer, True)
    cut = [*render((asked,), tokenizer, True), *b"b", *follow_up((more,), tokenizer, True, ended=False)]
    assert cut == grown, "a turn that was cut is closed by a token that is not trained"
    assert follow_up((more,), tokenizer, False, ended=True) == list(b"\n\nc")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_dialogue(tokenizer, True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    check_dialogue(tokenizer, False)
    with pytest.raises(GateError, match="the chat template rewrites earlier turns of a dialogue"):
        check_dialogue(tokenizer, True)


def test_equal_contexts_are_read_once() -> None:
    assert shared([[1], [1], [2], [2]]) == ([[1], [2]], 2)
    assert shared([[1], [1], [2]]) == ([[1], [1], [2]], 1)
