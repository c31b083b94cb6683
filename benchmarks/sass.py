"""What nvcc made of the CUDA kernels: resources, and the instructions of each kernel and its hot loop.

Reads a built library, object or cubin with NVIDIA's cuobjdump and nvdisasm (in the `test` extra); needs no GPU.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# Classes of instructions that bars may name, by opcode; the first that matches counts. The class `slots` is
# every instruction: each one takes an issue slot of its warp; `way` those of a loop's shortest way around, `work` those
# of the shortest one on which it writes most to global memory.
CLASSES = {
    name: re.compile(pattern)
    for name, pattern in {
        "local": r"LDL|STL",  # local memory: spilled registers, or arrays indexed at run time
        "cp.async": r"LDGSTS",
        "LDG.128": r"LDG\..*128",
        "LDG.64": r"LDG\..*64",
        "LDG": r"LDG",  # 32 bits and less
        "STG.128": r"STG\..*128",
        "STG.64": r"STG\..*64",
        "STG": r"STG",
        "LDSM": r"LDSM",
        "LDS.128": r"LDS\..*128",
        "LDS": r"LDS",
        "STS": r"STSM?",
        "CAS": r"ATOMG?S?\..*CAS",  # an atomic that the hardware lacks, as a retry loop
        "RED.128": r"REDG?\..*(x4|128)",
        "RED": r"RED",  # an atomic whose result nobody reads
        "ATOM": r"ATOM",
        "HGMMA": r"[HIQ]GMMA",
        "HMMA": r"[HIQ]MMA",
        "UTCMMA": r"UTC[A-Z]*MMA",  # tensor cores of sm_100
        "FP64": r"D(ADD|MUL|FMA|SETP|MNMX)",
        "FP32": r"F(FMA|MUL|ADD)",
        "FP16x2": r"H(FMA|ADD|MUL|MNMX)2",
        "MUFU": r"MUFU",
        "convert": r"I2F|F2I|FRND",
        "SHFL": r"SHFL",
        "BAR": r"BAR\.",
    }.items()
}
STORES = ("STG.128", "STG.64", "STG")
WRITES = re.compile(r"ST\b|STG|RED|ATOMG?\b")
CALLS = {"div64": "_s64", "div64u": "_u64", "fdiv": "div_rn", "call": ""}  # by the callee's name
METRICS = ("slots", "way", "work", *CLASSES, *CALLS)

KERNEL_NAMES = {"__nv_bfloat16": "bfloat16", "__half": "half"}


@dataclass(frozen=True)
class Loop:
    """A natural loop; its mix counts instructions by class."""

    innermost: bool
    mix: dict[str, int]


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Sizes are bytes; stack is per thread and holds spilled registers."""

    name: str  # without namespaces and arguments, e.g. flow_warp_backward_kernel<float, 1, 4, 8>
    arch: str  # e.g. 90a
    nvcc: str
    registers: int
    stack: int
    shared: int  # static
    threads: int  # of __launch_bounds__; 0 without
    mix: dict[str, int]
    loops: tuple[Loop, ...]

    def hot_loop(self, which: str = "innermost") -> dict[str, int]:
        """The mix of the longest innermost loop, or of the longest loop of all; empty without loops.

        "pipelined" is the longest of all with asynchronous copies, if any: beside it there may be a loop for the rest,
        and on sm_100 there are loops in it that wait for the tensor cores. "storing" is the shortest of all that have
        stores.
        """
        if which == "storing":
            storing = [loop.mix for loop in self.loops if any(map(loop.mix.get, STORES))]
            return min(storing, key=lambda mix: mix["slots"], default={})
        loops = [loop.mix for loop in self.loops if loop.innermost or which == "longest"]
        if which == "pipelined":
            loops = [loop.mix for loop in self.loops if loop.mix.get("cp.async")] or loops
        return max(loops, key=lambda mix: mix["slots"], default={})


def find_tool(name: str) -> str | None:
    """The pinned tool of the Python environment, else the toolkit's."""
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [packages / "nvidia/cu13/bin", Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    candidates = [folders[0] / name, folders[1] / "bin" / name]
    return next((str(c) for c in candidates if c.exists()), shutil.which(name))


def missing_tools() -> list[str]:
    return [name for name in ("cuobjdump", "nvdisasm", "c++filt") if find_tool(name) is None]


def run_tool(name: str, *arguments: str, text: str | None = None, cwd: Path | None = None) -> str:
    path = find_tool(name)
    if path is None:
        raise SystemExit(f"{name} not found: pip install 'mafnet[test]', or install a CUDA toolkit")
    command = [path, *arguments]
    return subprocess.run(
        command, input=text, cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def short_name(demangled: str) -> str:
    """`void mafnet::f_kernel<__half, (mafnet::Mode)1>(mafnet::P)` -> `f_kernel<half, 1>`."""
    name = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(\w+::)+", "", name)
    name = re.sub(r"\(\w[\w ]*\)(-?\d+)", r"\1", name)  # casts of enumerators and integers
    for long, short in KERNEL_NAMES.items():
        name = name.replace(long, short)
    return name.split("(")[0].removeprefix("void ").strip()


@functools.cache
def classify(opcode: str) -> str | None:
    return next((name for name, pattern in CLASSES.items() if pattern.match(opcode)), None)


def count(instructions: list[tuple[str, str]]) -> dict[str, int]:
    """Instructions by class; `slots` is all of them."""
    mix: Counter[str] = Counter(slots=0)
    for opcode, operands in instructions:
        if opcode == "NOP":
            continue
        mix["slots"] += 1
        name = classify(opcode)
        if opcode.startswith("CALL"):
            name = next(call for call, callee in CALLS.items() if callee in operands)
        if name is not None:
            mix[name] += 1
    return dict(mix)


# An instruction: predicate, opcode, operands.
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
_LABEL = re.compile(r"(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


_JUMPS = ("BRA", "JMP", "CALL")


@dataclass
class Function:
    """The instructions of one function (opcode, operands) and where each may continue."""

    instructions: list[tuple[str, str]]
    successors: list[set[int]]

    @classmethod
    def parse(cls, listing: list[str]) -> Function:
        labels: dict[str, int] = {}
        found: list[re.Match[str]] = []
        for line in listing:
            if label := _LABEL.match(line):
                labels[label[1]] = len(found)
            elif instruction := _INSTRUCTION.match(line):
                found.append(instruction)
        successors = []
        for i, (predicate, opcode, operands) in enumerate(f.groups() for f in found):
            target = _TARGET.search(operands) if opcode.startswith(_JUMPS) else None
            next_ = {labels[target[1]]} if target and target[1] in labels else set()
            # "BRA P1, `(.L)`" and "BRA.U !UP0, ..." are conditional as well. What sm_80 calls within a function does
            # not return: that is how loops are left there.
            conditional = predicate or re.match(r"\s*!?U?P\d", operands)
            jumps = opcode.startswith(("BRA", "JMP", "EXIT", "RET")) or next_
            if conditional or not jumps:
                next_.add(i + 1)
            successors.append({n for n in next_ if n < len(found)})
        return cls([(f[2], f[3]) for f in found], successors)

    def loops(self) -> dict[int, set[int]]:
        """Natural loops by their headers: all that leads back to a header by a branch that the header dominates.

        Ranges of addresses would not do: nvcc moves rare blocks behind the end and lets them jump back.
        """
        bodies: dict[int, set[int]] = {}
        predecessors = invert(self.successors)
        for header, sources in enumerate(predecessors):
            backward = [branch for branch in sources if header < branch]
            avoidable = reach(self.successors, 0, header) if backward else set()
            for branch in backward:
                if branch not in avoidable:
                    bodies.setdefault(header, {header}).update(reach(predecessors, branch, header))
        return {header: body for header, body in bodies.items() if not self.is_spin(body)}

    def way(self, header: int, body: set[int]) -> int:
        """Instructions of the shortest way through a loop, from its header back to it.

        Where a subroutine lies between, whose return is not followed, all instructions of the loop.
        """
        pending, seen = [(0, header)], set[int]()
        while pending:
            length, i = heapq.heappop(pending)
            if i == header and length > 0:
                return length
            if i not in seen:
                seen.add(i)
                length += self.instructions[i][0] != "NOP"
                for following in self.successors[i] & body:
                    heapq.heappush(pending, (length, following))
        return count([self.instructions[i] for i in body])["slots"]

    def work(self, header: int, bodies: dict[int, set[int]]) -> int:
        """Instructions of the way through a loop on which it writes most to global memory, of the shortest of those.

        Loops within are gone through once.
        """
        body = bodies[header]
        back = {(i, h) for h, inside in bodies.items() for i in inside if h in self.successors[i]}
        forward = {i: {n for n in self.successors[i] & body if (i, n) not in back} for i in body}
        best, ends = {header: (0, 0)}, []  # writes and, negative, instructions before each one
        for i in in_order(forward, header):
            opcode = self.instructions[i][0]
            done = best[i][0] + bool(WRITES.match(opcode)), best[i][1] - (opcode != "NOP")
            for following in forward[i]:
                best[following] = max(best.get(following, done), done)
            if (i, header) in back:
                ends.append(done)
        return -max(ends)[1]

    def is_spin(self, body: set[int]) -> bool:
        """The few instructions in which sm_75 lets diverged lanes wait for each other: no work of ours."""
        return len(body) <= 16 and any(self.instructions[i][0] == "YIELD" for i in body)


def in_order(edges: dict[int, set[int]], start: int) -> list[int]:
    """Nodes that can be reached, each after all that lead to it."""
    left: list[int] = []
    seen, pending = {start}, [(start, iter(edges[start]))]
    while pending:
        node, following = pending[-1]
        new = next((n for n in following if n not in seen), None)
        if new is None:
            left.append(node)
            pending.pop()
        else:
            seen.add(new)
            pending.append((new, iter(edges[new])))
    return left[::-1]


def invert(successors: list[set[int]]) -> list[set[int]]:
    predecessors: list[set[int]] = [set() for _ in successors]
    for i, targets in enumerate(successors):
        for target in targets:
            predecessors[target].add(i)
    return predecessors


def reach(edges: list[set[int]], start: int, barrier: int) -> set[int]:
    """Nodes that can be reached from ``start``, itself included, without stepping on ``barrier``."""
    seen: set[int] = set()
    pending = [] if start == barrier else [start]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += edges[node] - {barrier}
    return seen


def read_functions(sass: str) -> Iterator[tuple[str, list[str]]]:
    """Mangled name and listing of each kernel; out-of-line helpers (divisions) are left out."""
    for section in sass.split("\n//--------------------- .text.")[1:]:
        name = section.split(maxsplit=1)[0]
        lines = section.splitlines()
        helper = (
            i for i, line in enumerate(lines) if line.lstrip().startswith(".type") and "$" in line
        )
        yield name, lines[: next(helper, len(lines))]


def read_resources(cubin: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED, LOCAL per mangled name, and THREADS where there are launch bounds."""
    resources: dict[str, dict[str, int]] = {}
    usage = run_tool("cuobjdump", "-res-usage", str(cubin))
    for name, line in re.findall(r"Function (\S+):\n(.*)", usage):
        resources[name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    for section in run_tool("cuobjdump", "-elf", str(cubin)).split("\n.nv.info.")[1:]:
        bounds = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\s.*\s.*Value:\s+((?:0x\w+ ?)+)", section
        )
        name = section.split(maxsplit=1)[0]
        if bounds and name in resources:
            x, y, z = (int(v, 16) for v in bounds[1].split())
            resources[name]["THREADS"] = x * y * z
    return resources


def read_cubin(cubin: Path) -> list[Kernel]:
    arch = re.search(r"sm_(\w+)", cubin.name)
    assert arch is not None, f"{cubin.name} names no architecture"
    version = re.search(rb"release ([\d.]+), V[\d.]+", cubin.read_bytes())
    resources = read_resources(cubin)
    functions = dict(read_functions(run_tool("nvdisasm", "-c", "-ndf", str(cubin))))
    names = run_tool("c++filt", text="\n".join(functions)).splitlines()
    kernels = []
    for (mangled, listing), demangled in zip(functions.items(), names):
        use = resources[mangled]
        function = Function.parse(listing)
        bodies = function.loops()
        loops = [
            Loop(
                innermost=not any(other < body for other in bodies.values()),
                mix={
                    **count([function.instructions[i] for i in body]),
                    "way": function.way(header, body),
                    "work": function.work(header, bodies),
                },
            )
            for header, body in bodies.items()
        ]
        kernels.append(
            Kernel(
                name=short_name(demangled),
                arch=arch[1],
                nvcc=version[1].decode() if version else "unknown",
                registers=use["REG"],
                stack=use["STACK"] + use["LOCAL"],
                shared=use["SHARED"],
                threads=use.get("THREADS", 0),
                mix=count(function.instructions),
                loops=tuple(loops),
            )
        )
    return kernels


def read_kernels(library: Path, cache: Path | None = None) -> list[Kernel]:
    """Every kernel of a library, object or cubin; with a cache folder, each cubin is read once per content."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        run_tool("cuobjdump", "-xelf", "all", str(library.resolve()), cwd=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        found = list(pool.map(lambda cubin: read_cached(cubin, cache), cubins))
    kernels = [kernel for of_cubin in found for kernel in of_cubin]
    return sorted(kernels, key=lambda k: (k.name, int(re.sub(r"\D", "", k.arch))))


def read_cached(cubin: Path, cache: Path | None) -> list[Kernel]:
    if cache is None:
        return read_cubin(cubin)
    key = hashlib.sha256(cubin.read_bytes() + Path(__file__).read_bytes())
    key.update(run_tool("nvdisasm", "--version").encode())
    entry = cache / f"{key.hexdigest()}.json"
    if not entry.exists():
        cache.mkdir(parents=True, exist_ok=True)
        entry.write_text(json.dumps([asdict(k) for k in read_cubin(cubin)]))
    return [
        Kernel(**{**fields, "loops": tuple(Loop(**loop) for loop in fields["loops"])})
        for fields in json.loads(entry.read_text())
    ]


def ptx_archs(library: Path) -> list[str]:
    """Architectures whose PTX the library carries, for GPUs newer than all of its machine code."""
    listing = run_tool("cuobjdump", "-lptx", str(library.resolve()))
    return sorted(set(re.findall(r"sm_(\w+)\.ptx", listing)))
