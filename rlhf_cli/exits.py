"""Exit statuses of the command, of a rank and of a point of a sweep; docs/commands.md lists them."""

from __future__ import annotations

DONE = 0
FAILED = 1
WRONG_INPUT = 2  # a ConfigError
GATE = 3  # a GateError
# EX_TEMPFAIL: stopped by a signal after a checkpoint, or by its own watch of silence; start it again to go on
STOPPED = 75
INTERRUPTED = 130  # by a second Ctrl-C
