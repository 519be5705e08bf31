"""What this library raises of its own, and how it words what it got."""

import reprlib


class BackendUnavailable(RuntimeError):
    """The implementation asked for by name cannot run here or on these inputs."""


class UserError(ValueError):
    """Bad input or options; the command line prints the message alone and exits with code 2."""


def described(value: object) -> str:
    """What an error says it got: nothing, a text or a number itself, cut short; of anything else the type."""
    if value is None or isinstance(value, str | int | float):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__}"


# What a temperature or a soft cap is to be: a normal number of float32, in which logits are divided by it.
NORMAL = "a number in [1.175e-38, 3.403e+38] (float32's range)"
LARGEST = (2 - 2.0**-23) * 2.0**127


def is_normal(value: float) -> bool:
    return 2.0**-126 <= value <= LARGEST


# What is wrong with a row of logits that an op refuses, and what it wants.
NO_DISTRIBUTION = (
    "hold NaN or +inf, or nothing but -inf, or overflow when divided by the temperature; expected finite numbers (-inf is "
    "allowed for tokens that must not be drawn)"
)


def not_finite(name: str, row: int) -> ValueError:
    """What an op raises when it meets a row of logits that is no distribution."""
    return ValueError(f"{name}: the logits of row {row} {NO_DISTRIBUTION}")


# What is wrong with scores of `decode_attention` that it refuses.
NO_SCORES = "hold NaN or +inf, or nothing but -inf; expected finite numbers"


def scores_not_finite(row: int) -> ValueError:
    """What `decode_attention` raises when a row's scores are no numbers."""
    return ValueError(f"decode_attention: the scores of row {row} {NO_SCORES}")
