"""Finds what a kernel could lose without the compiler noticing: barriers, waits and conditions.

Every one that a file has is found here by itself, none is listed by hand. A barrier is left out; a condition, or one
conjunct of it, is taken for granted; a check after which code returns or goes on to the next item is dropped. A whole
block that ends so may refuse something, or be one of two ways: its condition is tried both ways. What is there for nvcc
alone is not tried: it does not run here.

with_switches() writes the file so that each of them can be lost at run time: one build serves all mutants.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STATEMENT = re.compile(
    r"(?:__sync(?:threads|warp)|cp_async_(?:wait|commit))(?:<[^<>]*>)?\([^()]*\);"
)
CONDITION = re.compile(r"\b(?:if|while) (?=\()")
AND = re.compile(r"\s&&\s")
OR = re.compile(r"\s\|\|\s")
CHOICE = re.compile(r"\s\?\s")
BOUNDARY = re.compile(
    r";|\?|\s:\s|&&|\|\||\breturn\b|\s[-+*/%&|^]?=\s|\{|,\s"
)  # around an operand, outside of brackets
SKIP = re.compile(r"\s*(?:return\b[^;]*|continue|break);")
SKIP_AT_END = re.compile(r"\b(?:return\b[^;]*|continue|break);\s*$")
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
DIRECTIVE = re.compile(r"\s*#\s*(if|else|elif|endif)")
# What the compiler decides: there is nothing to lose at run time.
CONSTANT = re.compile(r"\bif constexpr \(|\bconstexpr\b[^;{]*[;{]|\bstatic_assert\(")
CONSTANT_OPERAND = re.compile(r"!?k[A-Z]\w*|I [!=]= Interpolation::\w+")


@dataclass(frozen=True)
class Mutant:
    """text[start:end] of a file, which is left out, or counts as `value`."""

    file: str  # relative to csrc
    start: int
    end: int
    value: bool | None  # None: a statement
    line: int
    removed: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} without {self.removed}"

    def switch(self, number: int) -> tuple[str, str]:
        """What goes before and after the text, so that it is lost while mutant_is(number)."""
        lost, seen = f"::cuemu::mutant_is({number})", f"::cuemu::sees({number}, "
        if self.value is None:
            return f"{{ if (!{lost} && {seen}true, false)) ", " }"
        if self.value:
            return f"({lost} || {seen}(", "), true))"
        return f"(!{lost} && {seen}(", "), false))"


def without_nvcc(text: str) -> str:
    """The same length, with what is there for nvcc alone blank."""
    lines, inside = [], []  # inside: of the enclosing #if, whether this branch is nvcc's
    for line in text.splitlines(keepends=True):
        m = DIRECTIVE.match(line)
        if m and m[1] == "if":
            inside.append("defined(__CUDACC__)" in line and "!" not in line)
        elif m and m[1] == "endif":
            inside.pop()
        elif m:
            inside[-1] = False
        lines.append(re.sub(r"[^\n]", " ", line) if any(inside) else line)
    return "".join(lines)


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


def disjuncts(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The operands of || that text[start:end] is made of; all of it where it has none."""
    depth = 0
    first = start
    for i in range(start, end):
        depth += (text[i] in "([") - (text[i] in ")]")
        if depth == 0 and (m := OR.match(text, i)):
            yield stripped(text, first, i)
            first = m.end()
    yield stripped(text, first, end)


def returns_at_end(text: str, start: int) -> bool:
    """Whether a block begins at start after which code does not go on."""
    m = re.compile(r"\s*(?=\{)").match(text, start)
    return m is not None and bool(SKIP_AT_END.search(text[m.end() + 1 : closing(text, m.end())]))


def constant_spans(text: str) -> list[tuple[int, int]]:
    return [
        (m.start(), closing(text, m.end() - 1) if m[0].endswith("(") else m.end())
        for m in CONSTANT.finditer(text)
    ]


def find(csrc: Path, file: str) -> list[Mutant]:
    """All mutants of one file, in order."""
    text = without_comments(without_nvcc((csrc / file).read_text()))
    found: dict[tuple[int, int], bool | None] = {}
    for m in CHOICE.finditer(text):
        found[stripped(text, operand_before(text, m.start()), m.start())] = True
    for m in CONDITION.finditer(text):
        end = closing(text, m.end())
        if AND.search(text, m.end(), end):
            continue
        if SKIP.match(text, end + 1):
            found |= dict.fromkeys(disjuncts(text, m.end() + 1, end), False)
        else:
            found[m.end() + 1, end] = True
        if returns_at_end(text, end + 1):
            found[m.end(), end + 1] = False  # with its brackets, to lie around the other
    for m in AND.finditer(text):
        found[stripped(text, operand_before(text, m.start()), m.start())] = True
        found[stripped(text, m.end(), operand_after(text, m.end()))] = True
    for m in STATEMENT.finditer(text):
        found[m.start(), m.end()] = None
    constant = constant_spans(text)
    return [
        Mutant(
            file,
            start,
            end,
            value,
            text.count("\n", 0, start) + 1,
            " ".join(text[start:end].split()),
        )
        for (start, end), value in sorted(found.items())
        if not any(first <= start < last for first, last in constant)
        and not CONSTANT_OPERAND.fullmatch(text, start, end)
    ]


def with_switches(text: str, numbered: Sequence[tuple[int, Mutant]]) -> str:
    """The text in which each mutant is lost while mutant_is() its number; they may lie in each other."""
    pieces: list[tuple[int, int, int, str]] = []  # place, order there, text
    for number, mutant in numbered:
        before, after = mutant.switch(number)
        length = mutant.end - mutant.start
        pieces.append((mutant.start, 1, -length, before))  # what encloses opens first
        pieces.append((mutant.end, 0, length, after))  # and closes last
    result, last = [], 0
    for place, _, _, piece in sorted(pieces):
        result += [text[last:place], piece]
        last = place
    return "".join(['#include "switches.h"\n', *result, text[last:]])


def kernel_files(csrc: Path) -> list[str]:
    """All that kernels are compiled from: the .cu files and the headers that they include; relative to csrc."""
    found: set[str] = set()
    left = [str(path.relative_to(csrc)) for path in csrc.glob("*/*.cu")]
    while left:
        file = left.pop()
        if file not in found and (csrc / file).exists():  # else a header of the emulator
            found.add(file)
            left += INCLUDE.findall((csrc / file).read_text())
    return sorted(found)
