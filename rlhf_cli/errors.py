"""The two ways a run ends early on purpose."""


class ConfigError(ValueError):
    """Something the user can fix: what is wrong, what is allowed, what to type. Printed as one line, without a traceback."""


class GateError(RuntimeError):
    """A gate refused to go on with silently wrong science: names the rank, the step, the number and the knob."""
