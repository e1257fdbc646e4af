"""The one exception for mistakes a user can mend, and the checks that raise it most often."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong value from the user: the message is one line that names the value and what is accepted.

    The command line prints it without a traceback and exits with code 2.  Mistakes of ours are asserts.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def check(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise UserError(f"{name}={value}: accepted are {', '.join(accepted)}")


def at_least(name: str, value: int, least: int) -> None:
    """Raise UserError unless `value` >= `least`."""
    if value < least:
        raise UserError(f"{name}={value}: accepted are integers from {least}")
