"""Guess a number: a game by rule, in which every turn can be rewarded for what it found out."""

from __future__ import annotations

import hashlib
import math
import re

from rlhf_cli.data.record import Record
from rlhf_cli.environments.episode import Episode, Turn
from rlhf_cli.errors import ConfigError

_NUMBER = re.compile(r"(?<![0-9.,-])[0-9]{1,9}(?![0-9])")


class GuessNumber:
    """The environment thinks of a whole number; each guess is answered by higher, lower or right.

    The reward of a turn is the information that it gained, log2(before / after) / log2(n) with the numbers that were possible before
    and after it: whoever finds the number has earned 1 in all, and halving what is left earns most on average. A turn without a
    number in range earns 0. The number is a function of the record, so that all dialogues of a group play the same game.
    Parts: `found`, `valid`.
    """

    def __init__(self, *, highest: int) -> None:
        """Args:
        highest: numbers go from 1 to it
        """
        if not 2 <= highest <= 10**9:
            raise ConfigError(
                f"environment.highest: {highest} is not allowed; type a whole number from 2 to 1000000000"
            )
        self.highest = highest

    def reset(self, record: Record, seed: int) -> Episode:
        """The first message, whatever the record says."""
        digest = hashlib.blake2b(record.uid.encode(), digest_size=8).digest()
        secret = int.from_bytes(digest, "big") % self.highest + 1
        asked = f"I think of a whole number from 1 to {self.highest}. Guess it: reply with one number."
        return Episode(({"role": "user", "content": asked},), {"secret": secret, "low": 1, "high": self.highest})

    def step(self, episode: Episode, response: str) -> Turn:
        """Higher, lower or right, and the share of the unknown that the guess removed."""
        secret, low, high = (episode.state[k] for k in ("secret", "low", "high"))
        match = _NUMBER.search(response)
        guess = int(match[0]) if match else 0
        if not 1 <= guess <= self.highest:
            parts = {"found": 0.0, "valid": 0.0}
            return Turn(episode.after(response, f"That is no number from 1 to {self.highest}."), 0.0, parts)
        left = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
        left = (secret, secret) if guess == secret else left
        gain = math.log2((high - low + 1) / (left[1] - left[0] + 1)) / math.log2(self.highest)
        said = "Right." if guess == secret else "Higher." if guess < secret else "Lower."
        after = episode.after(response, said, state={"secret": secret, "low": left[0], "high": left[1]})
        return Turn(after, gain, {"found": float(guess == secret), "valid": 1.0}, done=guess == secret)
