"""Machine instructions of a compiled kernel: which of them normal data executes, and what they cost.

The path taken is one way through the control flow from the first instruction to an unconditional EXIT:

- Of all ways, those that access most bytes in global memory (work is never skipped), of these the ones with the fewest
  calls (what ptxas leaves in subroutines are the slow paths of divisions), of these the shortest.
- A conditional EXIT is passed. Instructions whose predicate is false are issued as others are, and count.
- A loop counts its body, chosen the same way, as often as it takes to read the kernel's input once; what is read
  before the first turn counts besides.

It is what one warp issues; warps that take other ways (padding, tensor scales out of range) are not seen.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

# By the pipe of sm_90 that executes them. FP32 runs on both halves of the FMA pipe, integer multiplication on one;
# conversions to narrow floats (F2FP) belong to the ALU, others to the XU.
PIPES = {
    pipe: tuple(opcodes.split())
    for pipe, opcodes in {
        "fp32": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
        "imad": "IMAD IDP",
        "alu": "LOP3 LOP SHF SHL SHR IADD IADD3 VIADD VIADDMNMX LEA IABS IMNMX VIMNMX VIMNMX3 FMNMX FMNMX3 "
        "HMNMX2 ISETP FSETP HSETP2 FSET HSET2 FCHK SEL FSEL PRMT PLOP3 BMSK SGXT MOV CS2R P2R R2P VOTE F2FP I2FP",
        "xu": "MUFU F2I I2F F2F FRND POPC FLO BREV",
        "fp64": "DADD DMUL DFMA DSETP DMNMX",
        "shuffle": "SHFL",
        "shared": "LDS STS LDSM STSM ATOMS",
        "global": "LDG LDGSTS STG ATOM ATOMG RED REDG LD ST",
        "local": "LDL STL",  # spilled registers
        "other": "BRA EXIT CALL RET BAR BSSY BSYNC BREAK WARPSYNC NOP DEPBAR LDGDEPBAR S2R S2UR R2UR LDC MEMBAR ERRBAR "
        "CGAERRBAR CCTL FENCE YIELD NANOSLEEP ELECT REDUX VOTEU",
    }.items()
}
_PIPE = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\*", re.MULTILINE)
_LEAVES = ("BRA", "EXIT", "RET")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@functools.cache
def cuobjdump() -> str:
    """The path of the disassembler, which Triton ships. FileNotFoundError where there is none."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(path) if path.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"Triton ships cuobjdump, but {path} is missing")
    return found


def resources(cubin: Path) -> dict[str, int]:
    """{"REG": ..., "STACK": ..., "LOCAL": ...} of a compiled kernel."""
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}


@dataclass(frozen=True)
class Instruction:
    """`opcode` without and `name` with modifiers; `predicate` or "" where it is always executed."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        """ValueError where the opcode is not in PIPES."""
        opcode = self.opcode
        if opcode in _PIPE:
            return _PIPE[opcode]
        if opcode.startswith("U"):  # the uniform data path
            return "other"
        raise ValueError(f"{self.name}: no pipe is known for this opcode")

    @property
    def width(self) -> int:
        """Bytes a thread accesses; 0 for what accesses no memory."""
        if self.pipe not in ("global", "shared", "local"):
            return 0
        parts = self.name.split(".")
        if parts[0] in ("LDSM", "STSM"):
            return 4 * int(parts[-1]) if parts[-1].isdecimal() else 4
        return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)

    @property
    def target(self) -> int:
        """Where a BRA or CALL goes."""
        return int(re.findall(r"0x[0-9a-f]+", self.operands)[-1], 16)

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.operands


def disassemble(cubin: Path) -> list[Instruction]:
    """Instructions of the only kernel of a file, without the padding behind the last."""
    text = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    code = [
        Instruction(int(a, 16), p, name, rest) for a, p, name, rest in _LINE.findall(re.sub(r";(?=\s)", " ;", text))
    ]
    while code and (code[-1].opcode == "NOP" or (code[-1].opcode == "BRA" and code[-1].target == code[-1].address)):
        code.pop()
    return code


@dataclass
class Cost:
    """Executed instructions: how many of each name, and what ways are compared by."""

    names: Counter[str] = field(default_factory=Counter)
    moved: float = 0.0  # bytes of global memory a thread
    loaded: float = 0.0  # of which are read
    calls: float = 0.0

    @property
    def count(self) -> float:
        return sum(self.names.values())

    @property
    def order(self) -> tuple[float, float, float]:
        return -self.moved, self.calls, self.count

    def __add__(self, other: Cost) -> Cost:
        names = Counter(self.names)
        names.update(other.names)
        return Cost(names, self.moved + other.moved, self.loaded + other.loaded, self.calls + other.calls)

    def __mul__(self, times: float) -> Cost:
        names = Counter({name: count * times for name, count in self.names.items()})
        return Cost(names, self.moved * times, self.loaded * times, self.calls * times)

    def add(self, one: Instruction) -> None:
        self.names[one.name] += 1
        if one.pipe == "global":
            self.moved += one.width
            self.loaded += one.width * (one.opcode in ("LDG", "LDGSTS"))
        self.calls += one.opcode == "CALL"


class Flow:
    """The control flow of a kernel. `bytes_per_thread`: of the input, for the trips of loops."""

    def __init__(self, code: list[Instruction], bytes_per_thread: float = 0.0) -> None:
        self.bytes_per_thread = bytes_per_thread
        at = {one.address: i for i, one in enumerate(code)}
        leaders = {0}
        for i, one in enumerate(code):
            if one.opcode in ("BRA", "CALL"):
                leaders.add(at[one.target])
            if one.opcode in _LEAVES:
                leaders.add(i + 1)
        starts = sorted(i for i in leaders if i < len(code))
        self.following: dict[int, set[int]] = {}
        self.ends: set[int] = set()
        self.costs: dict[int, Cost] = {}
        for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
            last, cost = code[stop - 1], Cost()
            for one in code[start:stop]:
                cost.add(one)
            self.costs[start] = cost
            falls = last.opcode not in _LEAVES or (last.conditional and last.opcode != "RET")
            following = {stop} if falls else set()
            if last.opcode == "BRA":
                following.add(at[last.target])
            elif not falls:
                self.ends.add(start)
            self.following[start] = {block for block in following if block < len(code)}
        # A call costs its subroutine, by the same rule.
        for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
            for one in code[start:stop]:
                if one.opcode == "CALL":
                    self.costs[start] += self.way(at[one.target], set(starts), self.ends)

    def taken(self) -> Cost:
        """What a warp issues from the first instruction to an EXIT."""
        return self.way(0, set(self.following), self.ends)

    def way(self, entry: int, blocks: set[int], ends: set[int]) -> Cost:
        """The best way from `entry` to one of `ends` within `blocks`. ValueError where there is none."""
        loops = {block: loop for loop in _cycles(self.following, blocks) for block in loop}
        best: dict[int, Cost | None] = {}

        def from_(block: int) -> Cost | None:
            """Of a loop: from its entry on."""
            if block in best:
                return best[block]
            loop = loops.get(block, frozenset([block]))
            cost = self._loop(block, loop) if block in loops else self.costs[block]
            exits = {b for inner in loop for b in self.following[inner] if b in blocks and b not in loop}
            ways = [cost + rest for rest in map(from_, sorted(exits)) if rest is not None]
            if loop & ends:
                ways.append(cost)
            best[block] = min(ways, key=lambda one: one.order) if ways else None
            return best[block]

        found = from_(entry)
        if found is None:
            raise ValueError("no way through the kernel ends")
        return found

    def _loop(self, header: int, loop: frozenset[int]) -> Cost:
        latches = {block for block in loop if header in self.following[block]}
        kept, self.following = self.following, {b: set(f) - {header} for b, f in self.following.items()}
        body = self.way(header, set(loop), latches)
        self.following = kept
        if not body.loaded:
            raise ValueError("a loop reads no memory, so its trips are unknown")
        return body * max(1.0, self.bytes_per_thread / body.loaded)


def _cycles(following: dict[int, set[int]], blocks: set[int]) -> list[frozenset[int]]:
    """Strongly connected parts of more than one block, or of one that follows itself."""
    reach: dict[int, set[int]] = {}
    for block in blocks:
        seen: set[int] = set()
        stack = [block]
        while stack:
            for other in following[stack.pop()] & blocks:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        reach[block] = seen
    parts = {frozenset(b for b in reach[a] if a in reach[b]) for a in blocks if a in reach[a]}
    return list(parts)


def pipes(names: Counter[str]) -> dict[str, float]:
    """Instructions a pipe."""
    found: Counter[str] = Counter()
    for name, count in names.items():
        found[Instruction(0, "", name, "").pipe] += count
    return {pipe: found[pipe] for pipe in PIPES}


def memory(names: Counter[str]) -> dict[str, float]:
    """Accesses to memory a thread: {"LDG.16": 4} are four loads of 16 bytes."""
    found: Counter[str] = Counter()
    for name, count in names.items():
        one = Instruction(0, "", name, "")
        if one.width:
            found[f"{one.opcode}.{one.width}"] += count
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Machine:
    """What bounds a kernel: every scheduler issues one instruction a cycle, and pipes are narrower than a warp."""

    multiprocessors: int
    gigahertz: float
    schedulers: int = 4
    registers: int = 65536  # of a multiprocessor, as the rest
    warps: int = 64
    shared_bytes: int = 227 << 10

    def busy_us(self, issued: Counter[str]) -> dict[str, float]:
        """Microseconds that each pipe needs for instructions of warps, spread evenly over all schedulers."""
        per_us = self.multiprocessors * self.schedulers * self.gigahertz * 1e3
        return {pipe: n / per_us for pipe, n in cycles(issued).items()}

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Programs of so many warps, registers a thread and bytes of shared memory that fit a multiprocessor."""
        of_warp = 32 * (-(-registers // 8) * 8)
        by_registers = self.registers // (of_warp * warps)
        return min(32, self.warps // warps, by_registers, self.shared_bytes // (shared + 1024))


H100 = Machine(132, 1.755)


def cycles(names: Counter[str]) -> dict[str, float]:
    """Cycles of a scheduler that a warp's instructions keep each pipe of sm_90 busy.

    16 lanes of ALU and of each half of the FMA pipe, 4 of XU, 16 of FP64; shuffles and accesses to memory go through
    one unit a multiprocessor, 32 lanes of 4 bytes a cycle.
    """
    count = pipes(names)
    accesses = sum(
        n * max(1.0, one.width / 4) for name, n in names.items() for one in [Instruction(0, "", name, "")] if one.width
    )
    return {
        "issue": sum(names.values()),
        "ALU": 2 * count["alu"],
        "FMA": max(count["fp32"] + count["imad"], 2 * count["imad"]),
        "XU": 8 * count["xu"],
        "FP64": 2 * count["fp64"],
        "LSU": 4 * (count["shuffle"] + accesses),
    }
