"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A wrong value from the user: the message is one line that names the value and what is accepted.

    The command line prints it without a traceback and exits with code 2.  Mistakes of ours are asserts.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
