"""Finds what a kernel could lose without the compiler noticing: barriers, waits and conditions.

Every one that a kernel file has is found here by itself, none is listed by hand: a barrier is removed, and a
condition, or one conjunct of it, is taken for granted. (`if (x) return;` then loses the early return.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STATEMENT = re.compile(r"(?:__sync(?:threads|warp)|cp_async_(?:wait|commit))[\w<>]*\([^()]*\);")
CONDITION = re.compile(r"\b(?:if|while) (?=\()")
AND = re.compile(r"\s&&\s")
BOUNDARY = re.compile(
    r";|\?|\s:\s|&&|\|\||\breturn\b|\s=\s|\{"
)  # around an operand of &&, outside of brackets
CHOICE = re.compile(r"\b(\w+) \? ")  # a flag that guards a value
RETURN = re.compile(r"\s*return\b[^;]*;")


@dataclass(frozen=True)
class Mutant:
    """A file with text[start:end] replaced."""

    file: str  # relative to csrc
    start: int
    end: int
    replacement: str
    line: int
    removed: str

    def apply(self, csrc: Path) -> None:
        path = csrc / self.file
        text = path.read_text()
        path.write_text(text[: self.start] + self.replacement + text[self.end :])

    def __str__(self) -> str:
        return f"{self.file}:{self.line} without {self.removed}"


def without_comments(text: str) -> str:
    """The same length, with comments and preprocessor lines blank."""
    pattern = r"//[^\n]*|/\*.*?\*/|^[ ]*#[^\n]*"
    return re.sub(pattern, lambda m: " " * len(m[0]), text, flags=re.MULTILINE | re.DOTALL)


def closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at start."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"the bracket at {start} is not closed")


def operand_before(text: str, end: int) -> int:
    """Where the operand that ends at end begins."""
    depth = 0
    for i in range(end - 1, -1, -1):
        depth += (text[i] in ")]") - (text[i] in "([")
        if depth < 0:
            return i + 1
        if depth == 0 and (m := BOUNDARY.match(text, i)):
            return m.end()
    return 0


def operand_after(text: str, start: int) -> int:
    """Where the operand that begins at start ends."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([") - (text[i] in ")]")
        if depth < 0 or (depth == 0 and BOUNDARY.match(text, i)):
            return i
    return len(text)


def stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the white space at both ends."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def find(csrc: Path, file: str) -> list[Mutant]:
    """All mutants of one file, in order."""
    original = (csrc / file).read_text()
    text = without_comments(original)
    found: dict[tuple[int, int], str] = {}
    for m in STATEMENT.finditer(text):
        found[m.start(), m.end()] = ";"
    for m in CHOICE.finditer(text):
        found[m.start(1), m.end(1)] = "true"
    for m in CONDITION.finditer(text):
        end = closing(text, m.end())
        if not AND.search(text, m.end(), end):
            skips = RETURN.match(text, end + 1) is not None
            found[m.end() + 1, end] = "false" if skips else "true"
    for m in AND.finditer(text):
        found[stripped(text, operand_before(text, m.start()), m.start())] = "true"
        found[stripped(text, m.end(), operand_after(text, m.end()))] = "true"
    return [
        Mutant(
            file, start, end, new, text.count("\n", 0, start) + 1, " ".join(text[start:end].split())
        )
        for (start, end), new in sorted(found.items())
    ]


def kernel_files(csrc: Path, folder: str) -> list[str]:
    """The kernel files of a folder of csrc, relative to csrc."""
    paths = sorted((csrc / folder).glob("*.cu*"))
    return [str(path.relative_to(csrc)) for path in paths]
