"""A calculator that the policy may use before it answers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rlhf_cli.data.record import Record
from rlhf_cli.environments.episode import Episode, Turn
from rlhf_cli.errors import ConfigError

INSTRUCTIONS = (
    "You may use a calculator: write <calc>EXPRESSION</calc> and end your turn; you are then told its value. "
    "A turn without a call is your answer; end it with the number alone."
)
_CALL = re.compile(r"<calc>(.*?)</calc>", re.S)
_LONGEST = 200  # characters of an expression
_DIGITS = 100  # of a value
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class Calculator:
    """Word problems with a calculator. A turn that calls it is told the value of the last call; the first without one is the answer.

    Reward: 1 where the answer's final number equals a reference's, else 0, at the turn of the answer; each call costs `cost`.
    Parts: `correct` (of the answer), `call`, `error` (a call that cannot be computed).
    In the manner of Schick et al., Toolformer, arXiv:2302.04761; learnt by reinforcement.
    """

    def __init__(self, *, cost: float, role: str, instruct: bool) -> None:
        """Args:
        cost: taken off the reward of a turn that calls the calculator
        role: chat role that the calculator's words have: user (every template knows it) or tool
        instruct: say in a system turn how to call it
        """
        if role not in ("user", "tool"):
            raise ConfigError(f"environment.role: {role!r} is not allowed; choose one of user, tool")
        self.cost, self.role, self.instruct = cost, role, instruct

    def reset(self, record: Record, seed: int) -> Episode:
        """The record's prompt, under instructions."""
        from rlhf_cli.rewards.math_answer import final_number

        golds = tuple(str(x) for r in record.references if (x := final_number(r, "any")) is not None)
        if not golds:
            raise ConfigError(
                f"{record.where}: environment=calculator needs a reference with a number; map one with dataset.columns.references=COLUMN"
            )
        return Episode(instructed(record, INSTRUCTIONS if self.instruct else ""), golds)

    def step(self, episode: Episode, response: str) -> Turn:
        """The value of a call, or the verdict on an answer."""
        from rlhf_cli.rewards.math_answer import final_number

        calls = _CALL.findall(response)
        if not calls:
            found = final_number(response, "any")
            right = float(found is not None and str(found) in episode.state)
            return Turn(episode, right, {"correct": right, "call": 0.0}, done=True)
        value = evaluate(calls[-1])
        said = "error: not an expression of numbers and + - * / ( )" if value is None else f"= {value}"
        after = episode.after(response, said, self.role)
        return Turn(after, -self.cost if self.cost else 0.0, {"call": 1.0, "error": float(value is None)})


def instructed(record: Record, text: str) -> tuple[dict[str, str], ...]:
    """The record's messages with `text` in their system turn."""
    messages = [dict(m) for m in record.messages]
    if not text:
        return tuple(messages)
    if messages[0]["role"] == "system":
        return ({"role": "system", "content": f"{messages[0]['content']}\n{text}"}, *messages[1:])
    return ({"role": "system", "content": text}, *messages)


def evaluate(text: str) -> str | None:
    """The value of an expression of numbers, + - * / and parentheses, exactly; None where it is none, or divides by 0."""
    if len(text) > _LONGEST:
        return None
    try:
        value = _value(ast.parse(text.strip().replace(",", ""), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, OverflowError):
        return None
    if len(str(value)) > _DIGITS:
        return None
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")
