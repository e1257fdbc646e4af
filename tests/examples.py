"""How many examples a property test runs: its own number in the default profile, more in that of CI."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

DEFAULT = 100
"""`max_examples` of the default profile (see conftest.py); other profiles scale every test by it."""


def examples(count: int, **options: Any) -> settings:
    """Settings of `count` examples in the default profile."""
    return settings(max_examples=max(1, count * settings.default.max_examples // DEFAULT), **options)
