"""Errors that a person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input or options; the command line prints the message alone and exits with code 2."""


def not_finite(name: str, row: int) -> ValueError:
    """What an op raises when it meets a row of logits that is no distribution."""
    return ValueError(
        f"{name}: the logits of row {row} hold NaN or +inf, or nothing but -inf, or overflow when divided by the "
        "temperature; expected finite numbers (-inf is allowed for tokens that must not be drawn)"
    )
