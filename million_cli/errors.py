"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A wrong value from the user: the message is one line that names the value and what is accepted.

    The command line prints it without a traceback and exits with code 2.  Mistakes of ours are asserts.
    """
