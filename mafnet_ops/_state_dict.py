"""Loading the checkpoints of other implementations: their parameter names become ours on the way in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


class RenameOnLoad:
    """A pre-hook of ``load_state_dict`` that rewrites names; the first rule whose pattern is the whole name wins.

    Args:
        rules: (pattern, replacement) pairs for the names below the module, in ``re.sub`` syntax.
    """

    def __init__(self, rules: Sequence[tuple[str, str]]) -> None:
        self.rules = tuple(rules)

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
    ) -> None:
        for name in [n for n in state_dict if n.startswith(prefix)]:
            state_dict[prefix + self._renamed(name.removeprefix(prefix))] = state_dict.pop(name)

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.rules:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        return name
