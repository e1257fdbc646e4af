"""Haystacks as large as a length allows."""

from __future__ import annotations

from collections.abc import Callable


def fitted(
    tokens: Callable[[int], int],
    room: int,
    least: int,
    most: int | None = None,
    guess: int | None = None,
    slack: int = 0,
) -> int | None:
    """The largest size from `least` to `most` whose prompt has at most `room` tokens.

    Larger haystacks are taken to have more tokens.  Tokenizing a long prompt takes time, so sizes are
    interpolated, and one that leaves at most `slack` tokens free will do.

    Args:
        tokens: of the prompt of a size.
        guess: where to begin.

    Returns:
        The size; None if even `least` has more tokens.
    """
    low, used = least, tokens(least)
    if used > room:
        return None
    first = used
    high: int | None = None if most is None else most + 1
    over: int | None = None  # tokens at `high`, once asked
    size, bisect = guess or 2 * least, False
    while room - used > slack and (high is None or high - low > 1):
        size = max(size, low + 1) if high is None else min(max(size, low + 1), high - 1)
        found = tokens(size)
        if found <= room:
            low, used = size, found
        else:
            high, over = size, found
        if high is not None and over is not None:  # a line alone may stay at one end for long
            size = low + (high - low) * (room - used) // (over - used) if not bisect else (low + high) // 2
            bisect = not bisect
        elif used > first:
            size = low + (low - least) * (room - used) // (used - first)
        else:
            size = 2 * low
    return low
