"""One function in the place of another, wherever it was imported."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as an object of its own: exchanging it back does not touch who imported ``function`` itself."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


def exchange(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Rebind every name that is ``old`` in the namespaces of all imported modules."""
    for module in list(sys.modules.values()):
        # vars() and not getattr(): the latter would import what lazy modules put off. Some entries are no modules.
        names = getattr(module, "__dict__", {})
        for name in [name for name, value in list(names.items()) if value is old]:
            setattr(module, name, new)
