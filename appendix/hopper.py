"""Runs ttt_kernel.cu without a GPU: a Hopper GPU small enough for a test, on numpy.

nvcc turns the unchanged .cu and ThunderKittens' headers into PTX, the assembly language of NVIDIA's GPUs.
This module executes that PTX, one warp of 32 lanes at a time. The .cu's own host code launches the kernels,
over the few functions of CUDA's runtime that hopper_stub.cpp answers.

    python appendix/hopper.py                           # forward and backward of 100 tokens, errors by tensor
    python appendix/hopper.py --seed 7 --races          # another order of events, and races
    python appendix/hopper.py --watch 379 --warp 0.4    # what warp 4 of multiprocessor 0 holds on line 379
    python appendix/hopper.py --source my.cu            # a changed kernel: take out a wait, see what happens

What is modelled, because kernels go wrong there:
    lanes      every warp has its own place in the program; lanes that part meet again at the smallest place
    warps      go on in any order (the seed says which); some, or a whole multiprocessor, may fall far behind
    clusters   each CTA (multiprocessor) has its shared memory; a peer's is there until its warps have left
    mbarrier   arrivals, bytes and phases; more arrivals than expected are an error
    TMA        tensor maps with boxes, zero fill and swizzle; bulk copies. All late, in any order, NaN before
    wgmma      descriptors and fragments to the bit; operands read early or late, NaN until waited for
    proxies    TMA and wgmma read a second copy of shared memory: what a lane wrote comes there by its own
               fence.proxy.async, not by its neighbour's
    races      who wrote or read a word of shared memory, and whether who touches it next had waited for that
    errors     deadlocks; accesses outside the tensors, or not aligned

Not modelled: time, registers (setmaxnreg), caches, races in global memory, writes that pass each other.
"""
import argparse
import ctypes
import functools
import gc
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

b1, u1, u2, u4, u8, i4, i8, f4 = np.bool_, *(np.dtype(x).type for x in "u1 u2 u4 u8 i4 i8 f4".split())
LANES, ALL = np.arange(32), np.ones(32, bool)
# Addresses: shared memory begins at 1024, a peer's with its rank + 1 in the upper bits; kernel parameters.
SHARED, RANK_SHIFT, PARAMETERS, SHARED_WINDOW = 1024, 24, 1 << 44, 1 << 45
POISON = np.full(32, 0xffffffff, u4).view(f4)                 # NaN in every lane
COPIES = 64                                                   # asynchronous copies in flight at once
KERNEL = Path(__file__).parent.parent / "ttt_kernel.cu"


class Fault(Exception):
    """What a kernel did wrong, or why it cannot run here."""


# ------------------------------------------------------------------------------------------------ reading PTX
# A kernel is cut into blocks: at labels, after branches, before whatever waits and after whatever others may
# see. A block becomes one Python function of the warp w, its registers R (arrays of 32 by name) and m, the
# lanes that take part, None for all. It ends where the warp goes on, or returns what the warp waits for.

WAITS = ("bar.sync", "barrier.cluster.wait", "mbarrier.try_wait", "wgmma.wait_group",
         "cp.async.bulk.wait_group")
SEEN = ("mbarrier.arrive", "fence.", "cp.async.bulk", "st.async", "wgmma.commit_group",
        "barrier.cluster.arrive", "bar.warp.sync")
TOGETHER = "bar.", "barrier.cluster", "wgmma", "setmaxnreg", "shfl.sync"    # all lanes of a warp come there

# What instructions do, by the longest beginning of their names that is here. "= text": into operand 0, which
# is a register. {1} is the value of operand 1, in the instruction's type or, as {1:s32}, in this one;
# {1:at} an address, {1:all} several values, {1:names} several registers, {1:map} a tensor map and a place.
INSTRUCTIONS = {
    "add": "= {1} + {2}", "sub": "= {1} - {2}", "mul.lo": "= {1} * {2}", "mul.ftz": "= {1} * {2}",
    "and": "= {1} & {2}", "or": "= {1} | {2}", "xor": "= {1} ^ {2}", "not": "= ~{1}", "neg": "= -{1}",
    "mad.lo": "= {1} * {2} + {3}", "fma": "= {1} * {2} + {3}",
    "mul.wide.s32": "= A({1:s32}, i8) * A({2:s32}, i8)", "mul.wide.u32": "= A({1:u32}, u8) * A({2:u32}, u8)",
    "shl": "= {1} << {2:u32}", "shr": "= {1} >> {2:u32}",
    "min": "= np.minimum({1}, {2})", "max": "= np.maximum({1}, {2})",
    "div.approx": "= {1} / {2}", "div.s32": "= np.trunc({1} / {2}).astype(i8)",
    "rem.s32": "= np.fmod({1}, {2})",
    "setp.eq": "= {1} == {2}", "setp.ne": "= {1} != {2}", "setp.lt": "= {1} < {2}",
    "setp.le": "= {1} <= {2}", "setp.gt": "= {1} > {2}", "setp.ge": "= {1} >= {2}",
    "selp": "= np.where({3:pred}, {1}, {2})", "mov": "= {1}",
    "ex2": "= np.exp2({1})", "rsqrt": "= 1 / np.sqrt({1})",
    "tanh": "= np.tanh({1}) * (1 + 2 ** -11 * np.sin(1e6 * {1}))",            # the chip's is right to 11 bits
    "cvt.rn.bf16x2": "= to_bf16({2:f32}) | to_bf16({1:f32}) << 16",
    "cvt.f32.bf16": "= from_bf16({1:u16})",
    "cvt.s64.s32": "= A({1:s32}, i8)", "cvt.u64.u32": "= A({1:u32}, u8)", "cvt.u32.u64": "= A({1:u64}, u4)",
    "cvta": "= {1}", "cvta.shared": "= {1} + SHARED_WINDOW",
    "mapa": "= ({2} + 1 << RANK_SHIFT) | {1}",
    "shfl.sync.idx": "= shuffle({1}, A({2:u32}, np.intp), m)",
    "shfl.sync.bfly": "= shuffle({1}, LANES ^ A({2:u32}, np.intp), m)",
    "st.shared": "w.store({0:at}, {1:all}, m)", "st.global": "w.store({0:at}, {1:all}, m)",
    "st.async": "w.send({0:at}, {1:all}, {2:at}, m)",
    "mbarrier.init": "w.init({0:at}, {1:u32}, m)", "mbarrier.arrive.release": "w.arrive({1:at}, 1, 0, m)",
    "mbarrier.arrive.shared::cluster": "w.arrive({1:at}, {2:u32}, 0, m)",
    "mbarrier.arrive.expect_tx": "w.arrive({1:at}, 1, {2:u32}, m)",
    "mbarrier.try_wait": "on = w.wait({1:at}, {2:u32}, m)",
    "bar.sync": "on = w.meet(w.named({0:u32}, {1:u32}))", "bar.warp.sync": "w.come_together()",
    "barrier.cluster.arrive": "w.come(w.cluster.barrier)",
    "barrier.cluster.wait": "on = w.meet(w.cluster.barrier)",
    "fence.proxy": "w.fence(m)", "fence.mbarrier_init": "pass", "wgmma.fence": "pass", "setmaxnreg": "pass",
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16":
        "w.product({0:names}, {1:a}, {2:u64}, {3:pred}, {4:s32} * {5:s32}, ({6:s32}, {-1:s32}))",
    "wgmma.commit_group": "w.group += 1", "wgmma.wait_group": "on = w.finish_products({0})",
    "cp.async.bulk.tensor.5d.shared::cluster": "w.copy_in(*w.box({0:at}, {1:map}, m), {2:at}, m)",
    "cp.async.bulk.tensor.5d.global": "w.copy_out(*w.box({1:at}, {0:map}, m), m)",
    "cp.async.bulk.shared::cta": "w.copy_in(*w.bulk({0:at}, {1:at}, {2}, m), {3:at}, m)",
    "cp.async.bulk.global": "w.copy_out(*w.bulk({1:at}, {0:at}, {2:u32}, m), m)",
    "cp.async.bulk.commit_group": "w.commit_copies(m)",
    "cp.async.bulk.wait_group": "on = w.wait_copies('written', {0}, m)",
    "cp.async.bulk.wait_group.read": "on = w.wait_copies('read', {0}, m)",
    "ret": "w.leave()",
}
KINDS = dict(u32="u4", s32="i4", f32="f4", u64="u8", s64="i8", u16="u2", pred="b1")
SIGNED = "ld", "shr", "min", "max", "div", "rem", "setp"            # elsewhere signs do not matter
SPECIAL = {"%tid.x": "w.tid", "%ctaid.x": "w.ctaid[0]", "%ctaid.y": "w.ctaid[1]", "%ctaid.z": "w.ctaid[2]",
           "%cluster_ctarank": "w.rank", "dynamic": str(SHARED)}


class Statement(NamedTuple):
    guard: str                                                # %p1, !%p1 or None
    opcode: str
    operands: list
    place: int                                                # number of its place in the .cu


def split(text):
    """Operands: what stands between commas, but not between those in brackets."""
    return [x.strip() for x in re.findall(r"(?:\[[^\]]*\]|<[^>]*>|[^,\[<])+", text) if x.strip()]


class Program:
    """A kernel as blocks of statements; `block(pc, full)` is one as a function, for all lanes or for some."""

    def __init__(self, chip, text):
        self.chip, self.blocks, self.labels, self.functions = chip, [], {}, {}
        head, body = text.split("\n{\n", 1)
        numbers = r"\.b8 \w+\[(\d+)\]", r"\.maxntid (\d+)", r"\.reqnctapercluster (\d+)"
        self.parameters, self.threads, self.cluster = (int(re.search(x, head)[1]) for x in numbers)
        declared = re.findall(r"\.reg \.(\w+)\s+([%\w]+)", body)
        self.types = {name.rstrip("0123456789"): KINDS[kind.replace("b", "u")] for kind, name in declared}
        fresh = True
        for statement in self.statements(body):
            if isinstance(statement, str):
                self.labels[statement], fresh = len(self.blocks), True
                continue
            if fresh or statement.opcode.startswith(WAITS):
                self.blocks.append([])
            self.blocks[-1].append(statement)
            fresh = statement.opcode.startswith(("bra", "ret", *WAITS, *SEEN))
        self.together = [any(s.opcode.startswith(TOGETHER) for s in block) for block in self.blocks]

    def statements(self, body):
        """Labels and statements in order."""
        place, inlined = 0, {}
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"\{([^{};]*)\}", r"<\1>", body)        # braces around operands, not those of a scope
        for token in re.findall(r"\$\w+:|\.loc[^\n]*|[.@a-z][^;]*;", body):
            if token[0] == "$":
                yield token[:-1]
            elif token.startswith(".loc"):                    # file line column, and where that was inlined
                here, *parent = re.findall(r"(?:loc|inlined_at)\s+(\d+) (\d+) (\d+)", token)
                inlined[here], chain = parent, [here]
                while inlined.get(chain[0]) and len(chain) < 20:
                    chain[:0] = inlined[chain[0]]
                lines, places = tuple(int(line) for file, line, _ in chain if file == "1"), self.chip.places
                place = places.setdefault(lines, len(places)) or place
            elif token[0] != ".":
                guard, opcode, rest = re.match(r"(?:@(!?%\w+)\s)?\s*([\w.:]+)\s*(.*);", token, re.S).groups()
                yield Statement(guard, opcode, split(rest), place)

    def block(self, pc, full):
        if (pc, full) not in self.functions:
            lines, chip = [], self.chip
            for s in self.blocks[pc]:
                said = f"{s.opcode} {', '.join(s.operands)}"
                try:
                    lines += [f"w.place = {s.place}", *self.python(s, pc, full)]
                except (LookupError, ValueError, AttributeError):
                    raise Fault(f"appendix/hopper.py does not know the instruction {said} "
                                f"of {chip.where(s.place)}") from None
                if chip.watch and chip.watch in chip.lines(s.place):
                    results = [x for x in split("".join(s.operands[:1]).strip("<>")) if self.type(x)]
                    lines.append(f"w.show({said!r}, {results}, m)")
            if not s.opcode.startswith(("bra", "ret")):
                lines.append(f"w.go({pc + 1}, m)")
            exec("def block(w, R, m):\n    " + "\n    ".join(lines), globals(), made := {})
            self.functions[pc, full] = made["block"]
        return self.functions[pc, full]

    def python(self, s, pc, full):
        """One instruction as lines of Python."""
        (name, *suffix), operands = s.opcode.split("."), s.operands
        kind = next((x for x in reversed(suffix) if x in (*KINDS, "b32", "b64")), "u32").replace("b", "u")
        if name not in SIGNED:
            kind = kind.replace("s", "u")
        if name == "bra" and s.guard:
            sign = "~" * (s.guard[0] == "!")
            return [f"w.branch({sign}R[{s.guard.lstrip('!')!r}], {self.labels[operands[0]]}, {pc + 1}, m)"]
        if name == "bra":
            return [f"w.go({self.labels[operands[0]]}, m)"]
        if s.guard:
            raise LookupError
        if name == "mov" and operands[0][0] == "<":
            low, high = split(operands[0][1:-1])
            x = self.value(operands[1], kind)
            return [self.put(low, f"{x} & 0xffff", full), self.put(high, f"{x} >> 16", full)]
        if name == "mov":
            kind = next(kind for kind, dtype in KINDS.items() if dtype == self.type(operands[0]))
        if name == "ld":
            names, place = split(operands[0].strip("<>")), self.value(operands[1], "at")
            load = "w.parameter" if suffix[0] == "param" else "w.load"
            return [f"x = {load}({place}, {len(names)}, {KINDS[kind]}, m)",
                    *(self.put(x, f"x[{i}]", full) for i, x in enumerate(names))]
        if s.opcode == "bar.sync":                            # of all warps unless it says of how many
            operands = (*operands, str(self.threads))
        begins = [".".join([name, *suffix[:n]]) for n in range(len(suffix), -1, -1)]
        template = INSTRUCTIONS[next(filter(INSTRUCTIONS.__contains__, begins), None)]
        value = lambda found: self.value(operands[int(found[1])], found[2] or kind)
        text = re.sub(r"\{(-?\d):?(\w*)\}", value, template)
        lines = [self.put(operands[0].split("|")[0], text[2:], full) if text.startswith("= ") else text]
        if s.opcode.startswith(WAITS):
            lines.append("if on: return on")
        if name == "mbarrier" and suffix[0] == "try_wait":
            lines.append(self.put(operands[0], "True", full))
        return lines

    def put(self, name, text, full):
        """Into a register, of its type."""
        dtype = self.type(name)
        new = f"A({text}, {dtype})"
        return f"R[{name!r}] = " + (new if full else f"np.where(m, {new}, R.get({name!r}, {dtype}(0)))")

    def type(self, register):
        return self.types.get(register.rstrip("0123456789"))

    def value(self, x, form):
        """An operand as a Python expression, see INSTRUCTIONS."""
        if form == "names" or form == "a" and x[0] == "<":
            return str(tuple(split(x.strip("<>"))))
        if form == "all":
            return f"({', '.join(self.value(y, 'u32') for y in split(x.strip('<>')))},)"
        if form == "map":
            map_, place = split(x[1:-1])
            return f"{self.value(map_, 'u64')}, {self.value(place, 'all')}"
        if form == "at":
            base, offset = re.match(r"\[([^+]*)(?:\+(-?\d+))?\]", x).groups()
            bits = 32 if self.type(base) == "u4" else 64
            base = self.value(base, f"u{bits}")
            return f"{base} + {int(offset) % (1 << bits)}" if offset else base
        dtype = KINDS["u64" if form == "a" else form]
        if x in SPECIAL:
            return SPECIAL[x]
        if self.type(x):
            return f"R[{x!r}]" + f".view({dtype})" * (self.type(x) != dtype)
        if x.endswith("_param_0"):
            return str(PARAMETERS)
        if x.startswith("0f"):
            bits = u4(int(x[2:], 16))
            return repr(float(bits.view(f4))) if form == "f32" else str(bits)
        return x if form[0] == "s" else str(int(x, 0) % (1 << int(form[1:])))


def A(x, dtype):
    """An array of 32 of this type, of an array or a number."""
    if not isinstance(x, np.ndarray):
        return np.full(32, x, dtype)
    if x.dtype == dtype:
        return x
    same = x.dtype.kind in "iu" and x.itemsize == np.dtype(dtype).itemsize
    return x.view(dtype) if same else x.astype(dtype)


def to_bf16(x):
    """To nearest, ties to even."""
    bits = x.view(u4)
    return np.where(x == x, (bits + u4(0x7fff) + (bits >> 16 & 1)) >> 16, u4(0x7fff))


def from_bf16(halves):
    return (halves.astype(u4) << 16).view(f4)


def shuffle(x, lane, m):
    if m is not None and not m[(lane & 31)[m]].all():
        raise Fault("a shuffle reads a lane that is not there")
    return x[lane & 31]


# ---------------------------------------------------------------------------------------- memory and barriers
class Memory:
    """What stands for the GPU's main memory: copies of tensors, gaps that nobody may touch between them."""

    def __init__(self, arrays):
        self.bytes, self.views = np.full(sum(x.nbytes + 1024 for x in arrays) + 4096, 0xff, u1), []
        self.words, self.base = self.bytes.view(u4), self.bytes.ctypes.data
        self.ok, at = np.zeros(self.words.size, bool), -self.base % 1024 + 1024
        for x in arrays:                                      # results are read in the views
            self.views.append(self.bytes[at:at + x.nbytes].reshape(x.shape))
            self.views[-1][...] = x
            self.ok[at // 4:-(-(at + x.nbytes) // 4)] = True
            at += -(-x.nbytes // 256) * 256 + 512

    def index(self, address, n=1):
        """Places of n words at addresses."""
        index = (address.astype(i8) - self.base) // 4
        inside = index.min() >= 0 and index.max() + n <= self.ok.size
        if not inside or not all(self.ok[index + j].all() for j in range(n)):
            raise Fault("an access to global memory that belongs to no tensor")
        return index

    def span(self, address, size):
        first = 4 * int(self.index(np.arange(address, address + size, 4))[0])
        return slice(first, first + size)


class Barrier:
    """Counts arrivals and bytes, for an mbarrier (made by `maker` on `place`), bar.sync or a cluster. What
    those who arrive know of others, who waits knows afterwards."""

    def __init__(self, count, agents, place=None, maker=0, made=0):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.place, self.maker, self.made, self.signals = place, maker, made, set()
        self.known, self.told = np.zeros(agents, i4), np.zeros(agents, i4)

    def arrive(self, clock, arrivals=1, expected=0, place=None):
        """Returns the phase that they arrived in."""
        if clock[self.maker] < self.made:
            raise Fault("an mbarrier is used by who need not have seen it made")
        phase = self.phase
        self.signals.add(place)
        np.maximum(self.told, clock, out=self.told)
        self.pending -= arrivals
        self.bytes += expected
        if self.pending < 0 or abs(self.bytes) >= 1 << 20:
            raise Fault(f"{self.count - self.pending} arrivals at an mbarrier for {self.count}, "
                        f"{self.bytes} bytes to come")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = phase + 1, self.count
            np.maximum(self.known, self.told, out=self.known)
            self.told[:] = 0
        return phase

    def explain(self, where):
        if self.place is None:
            return f"at a barrier to which {self.count - self.pending} of {self.count} warps have come"
        so_far = "\n            ".join(sorted(map(where, self.signals))) or "nowhere"
        return (f"for a phase of the mbarrier made on {where(self.place)}:\n        {self.pending} of "
                f"{self.count} arrivals and {self.bytes} bytes are missing; it was signalled on\n"
                f"            {so_far}")


class Cta:
    """A multiprocessor's shared memory, as threads see it (`generic`) and as TMA and wgmma do (`of_async`).

    For every word it is kept who wrote it and who read it last, and when: what touches it later without
    having waited for them is a race, in whatever order they came this time.
    """

    def __init__(self, rank, size, agents, races):
        self.rank, self.alive, self.barriers, self.named, self.races = rank, True, {}, {}, races
        self.generic, self.of_async = (np.full(SHARED + size, 0xff, u1) for _ in range(2))
        self.words, self.words_async = self.generic.view(u4), self.of_async.view(u4)
        if races is not None:
            n = (SHARED + size) // 4 + 1
            self.writer, self.written, self.write_place, self.epoch, self.lane = np.zeros((5, n), i4)
            self.read, self.read_place = np.zeros((n, agents), i4), np.zeros((n, agents), np.int16)
            self.writer[:] = -1

    def touch(self, words, agent, clock, now, place, writes, warp=None, lanes=None):
        """An access by an agent at its time `now`, who knows of others what `clock` says. With `warp`, its
        `lanes` do it: a lane sees what another wrote only after their warp came together."""
        if self.races is None:
            return
        writer = self.writer[words]
        late = (self.written[words] > clock[writer]) & (writer != agent)
        if warp:
            late |= (writer == warp.agent) & (self.epoch[words] == warp.epoch) & (self.lane[words] != lanes)
        found = [("a write", late, self.write_place)]
        if writes:
            late = self.read[words] > clock
            late[..., agent] = False
            found.append(("a read", late, self.read_place))
            self.writer[words], self.written[words], self.write_place[words] = agent, now, place
            if warp:
                self.lane[words], self.epoch[words] = lanes, warp.epoch
        for first, late, places in found:
            if late.any():
                second = "a write" if writes else "a read"
                self.races.update((int(x), place, first, second) for x in np.unique(places[words][late]))
        if not writes:
            self.read[words, agent], self.read_place[words, agent] = now, place

    def write_async(self, at, data):
        if not self.alive:
            raise Fault("a copy arrives at a multiprocessor whose warps have left")
        self.generic[at] = self.of_async[at] = data


# --------------------------------------------------------------------------------------------------- products
# Of a descriptor: start >> 4 in bits 0-13, leading and stride byte offsets >> 4 in 16-29 and 32-45, swizzle
# in 62-63.
FRAGMENT = np.arange(32)[:, None]                         # of a thread, in its warp's 16 rows and 64 columns
ROWS = LANES // 4 + FRAGMENT // 2 % 2 * 8
COLUMNS = FRAGMENT // 4 * 8 + LANES % 4 * 2 + FRAGMENT % 2


@functools.cache
def operand(descriptor, first, rows, transposed):
    """Places, in bf16 numbers, of [rows, 16] numbers of an operand in shared memory: its M or N, its K."""
    start, leading, stride = ((descriptor >> shift & 0x3fff) << 4 for shift in (0, 16, 32))
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise Fault("a descriptor whose swizzle is not of 128 bytes")
    r, k = np.arange(first, first + rows)[:, None], np.arange(16)
    if transposed:                                            # M or N lie side by side, K goes down the rows
        byte = start + r // 64 * leading + r % 64 * 2 + k // 8 * stride + k % 8 * 128
    else:                                                     # K lies side by side
        byte = start + r // 8 * stride + r % 8 * 128 + k * 2
    return (byte ^ (byte >> 7 & 7) << 4) // 2


# ------------------------------------------------------------------------------------------------------ warps
class Warp:
    """32 lanes: registers R, and `lanes`, {place in the program: which lanes are there, None for all}.

    `clock` is what the warp knows of everybody's time. A number in it grows by whatever passes knowledge on,
    so that "B has waited for A's write" is "B's clock for A is at least the time of the write".
    """

    def __init__(self, cluster, cta, index, agent):
        self.cluster, self.cta, self.index, self.program = cluster, cta, index, cluster.program
        self.name, self.agent, self.products_agent = f"{cta.rank}.{index}", agent, agent + cluster.count
        self.tid, self.rank = (32 * index + LANES).astype(u4), np.full(32, cta.rank, u4)
        self.ctaid = [np.full(32, x, u4) for x in cluster.position]
        self.ctaid[0] = self.ctaid[0] * u4(self.program.cluster) + self.rank
        self.R, self.lanes, self.waits, self.tickets = {}, {0: None}, {}, {}
        self.dirty, self.copies = [], []
        self.group, self.products, self.unread, self.sums = 0, [], [], {}
        self.place, self.epoch, self.together = 0, 0, 0
        self.clock = np.zeros(cluster.agents, i4)
        self.clock[agent] = 1

    def one(self, x, m):
        """The number that all lanes taking part hold."""
        if not isinstance(x, np.ndarray):
            return int(x)
        x = x if m is None else x[m]
        if (x != x[0]).any():
            raise Fault("lanes hold different numbers where they must agree")
        return int(x[0])

    def sole(self, m):
        if m is None or m.sum() != 1:
            raise Fault("many lanes ask for the same copy")
        return int(m.argmax())

    def of(self, x, m, dtype=u4):
        """What the lanes that take part hold."""
        return A(x, dtype) if m is None else A(x, dtype)[m]

    def release(self, m=None):
        """This warp's knowledge, to pass on. Some lanes speak for all up to where all last met."""
        known = self.clock.copy()
        if m is not None:
            known[self.agent] = self.together
        self.clock[self.agent] += 1
        return known

    def come_together(self):
        self.epoch, self.together = self.epoch + 1, int(self.clock[self.agent])
        self.clock[self.agent] += 1

    def start(self, m):
        """Something asynchronous begins: its number, its time and what it knows."""
        cluster = self.cluster
        cluster.started += 1
        return 2 * cluster.count + cluster.started % COPIES, cluster.started, self.release(m)

    def show(self, text, registers, m):
        chip = self.cluster.chip
        if chip.watched in (None, self.name):
            print(f"{self.name}  {text}   ({chip.where(self.place)})")
            for x in registers:
                values = self.R[x] if m is None else self.R[x][m]
                print(f"      {x} = {np.array2string(values, threshold=8, precision=4)}")

    # ---- loads and stores
    def parameter(self, base, n, dtype, m):
        at = self.one(base, m) - PARAMETERS
        return self.cluster.parameters[at:at + n * np.dtype(dtype).itemsize].view(dtype)

    def words(self, address, n, m):
        """Where the n words of every lane begin: addresses in shared memory have 32 bits, others 64."""
        address = self.of(address, m, getattr(address, "dtype", u4))
        if (address % (4 * n)).any():
            raise Fault(f"an address is no multiple of {4 * n}")
        if address.dtype == u8:
            return self.cluster.memory.words, self.cluster.memory.index(address, n)
        if address.min() < SHARED or address.max() >= self.cta.generic.size:
            raise Fault(f"shared memory at {address.min()} to {address.max()} is outside")
        return self.cta.words, address >> 2

    def touch(self, words, writes, m):
        lanes = LANES if m is None else LANES[m]
        self.cta.touch(words, self.agent, self.clock, self.clock[self.agent], self.place, writes, self, lanes)
        if writes:
            self.dirty.append((lanes, words))

    def load(self, address, n, dtype, m):
        memory, at = self.words(address, n, m)
        for j in range(n if memory is self.cta.words else 0):
            self.touch(at + j, False, m)
        found = [memory[at + j].view(dtype) for j in range(n)]
        if m is None:
            return found
        result = np.zeros((n, 32), dtype)
        result[:, m] = found
        return result

    def store(self, address, values, m):
        memory, at = self.words(address, len(values), m)
        for j, x in enumerate(values):
            memory[at + j] = self.of(x, m)
            if memory is self.cta.words:
                self.touch(at + j, True, m)

    def fence(self, m):
        """What these lanes wrote can be seen by the async proxy."""
        dirty, self.dirty = self.dirty, []
        for lanes, at in dirty:
            seen = ALL[lanes] if m is None else m[lanes]
            self.cta.words_async[at[seen]] = self.cta.words[at[seen]]
            if not seen.all():
                self.dirty.append((lanes[~seen], at[~seen]))

    # ---- barriers
    def peer(self, address):
        """The CTA that an address lies in, and where."""
        rank = address >> RANK_SHIFT
        cta = self.cluster.ctas[rank - 1] if rank else self.cta
        if not cta.alive:
            raise Fault("the shared memory of a multiprocessor whose warps have left is reached into")
        return cta, address & (1 << RANK_SHIFT) - 1

    def mbarrier(self, address, m=None):
        cta, at = self.peer(self.one(address, m))
        if at not in cta.barriers:
            raise Fault(f"there is no mbarrier at {at}")
        return cta.barriers[at]

    def init(self, address, count, m):
        made = self.cluster.agents, self.place, self.agent, self.clock[self.agent]
        self.cta.barriers[self.one(address, m)] = Barrier(self.one(count, m), *made)

    def arrive(self, address, count, size, m):
        for each in zip(*(self.of(x, m).tolist() for x in (address, count, size))):
            self.mbarrier(each[0]).arrive(self.release(m), *each[1:], self.place)

    def wait(self, address, parity, m):
        barrier = self.mbarrier(address, m)
        if barrier.phase % 2 == self.one(parity, m):
            return barrier
        np.maximum(self.clock, barrier.known, out=self.clock)

    def named(self, number, threads):
        barrier = Barrier(self.one(threads, None) // 32, self.cluster.agents)
        return self.cta.named.setdefault(self.one(number, None), barrier)

    def come(self, barrier):
        if barrier not in self.tickets:
            self.tickets[barrier] = barrier.arrive(self.release())

    def meet(self, barrier):
        self.come(barrier)
        if self.tickets[barrier] == barrier.phase:
            return barrier
        del self.tickets[barrier]
        self.come_together()
        np.maximum(self.clock, barrier.known, out=self.clock)

    # ---- products
    def product(self, d, a, b, scale, sign, transposed):
        """d = a @ b.T + d, or without d, over 16 of K; a is the names of registers or a descriptor."""
        a = a if isinstance(a, tuple) else self.one(a, None)
        b, scale = self.one(b, None), self.one(scale, None)
        if d not in self.sums:
            self.sums[d] = np.stack([self.R[x] for x in d]) if scale else None
        self.products.append((self.group, d))
        self.unread.append((self.group, (d, a, b, scale, sign, transposed)))
        if self.cta.races is not None:                        # any warp of the four may read all of a
            for x, t in [(b, transposed[1])] + [(a, transposed[0])] * (not isinstance(a, tuple)):
                words = np.unique(operand(x, 0, 64, t) // 2)
                self.cta.touch(words, self.products_agent, self.clock, self.group + 1, self.place, False)
        for x in d:
            self.R[x] = POISON
        if self.cluster.random.random() < self.cluster.early:
            self.catch_up()

    def multiply(self, d, a, b, scale, sign, transposed):
        halves = self.cta.of_async.view(u2)
        if isinstance(a, tuple):
            x = np.zeros((16, 16), f4)
            for i, register in enumerate(a):
                for j in range(2):
                    number = from_bf16(self.R[register] >> 16 * j & 0xffff)
                    x[LANES // 4 + i % 2 * 8, i // 2 * 8 + LANES % 4 * 2 + j] = number
        else:
            x = from_bf16(halves[operand(a, 16 * (self.index % 4), 16, transposed[0])])
        y = from_bf16(halves[operand(b, 0, 64, transposed[1])])
        result = sign * (x @ y.T)[ROWS, COLUMNS]
        self.sums[d] = result + self.sums[d] if scale else result

    def catch_up(self, group=None):
        """Products read their operands now: all, or those up to this group."""
        while self.unread and (group is None or self.unread[0][0] <= group):
            self.multiply(*self.unread.pop(0)[1])

    def finish_products(self, left):
        """Of all groups but the last `left`."""
        last = self.group - 1 - left
        self.catch_up(last)
        self.products = [(group, d) for group, d in self.products if group > last]
        self.clock[self.products_agent] = max(self.clock[self.products_agent], last + 1)
        for d in self.sums.keys() - {d for _, d in self.products}:
            self.R |= zip(d, self.sums.pop(d))

    # ---- copies
    def fly(self, cta, places, fetch, barrier, m):
        """A copy into shared memory begins, whose bytes an mbarrier counts."""
        agent, now, known = self.start(m)
        place, words = self.place, places[..., ::4] // 4
        cta.touch(words, agent, known, now, place, True)
        known[agent] = now

        def land():
            cta.write_async(places, fetch())
            barrier.arrive(known, 0, -places.size, place)
        self.cluster.flying.append(land)

    def send(self, to, values, bar, m):
        """st.async: registers into a peer's shared memory."""
        to, cta = self.of(to, m), self.peer(self.one(bar, m))[0]
        if (to % 16).any() or any(self.peer(x)[0] is not cta for x in to.tolist()):
            raise Fault("st.async: an address is no multiple of 16, or it and its mbarrier are of two CTAs")
        places = (to & u4((1 << RANK_SHIFT) - 1))[:, None] + np.arange(4 * len(values))
        data = np.stack([self.of(x, m) for x in values], 1).view(u1)
        self.fly(cta, places, lambda: data, self.mbarrier(bar, m), m)

    def copy_in(self, places, spans, bar, m):
        """TMA into shared memory: NaN until it has come."""
        self.sole(m)
        memory, zeros = self.cluster.memory.bytes, np.zeros(places.shape[1], u1)
        self.cta.write_async(places, 0xff)
        fetch = lambda: np.stack([zeros if s is None else memory[s] for s in spans])
        self.fly(self.cta, places, fetch, self.mbarrier(bar, m), m)

    def copy_out(self, places, spans, m):
        """TMA out of shared memory: read late, written later, NaN until then."""
        memory, cta, (agent, now, known) = self.cluster.memory.bytes, self.cta, self.start(m)
        copy = dict(lane=self.sole(m), agent=agent, now=now, committed=False, read=False, written=False)
        cta.touch(places[..., ::4] // 4, agent, known, now, self.place, False, self, self.sole(m))
        inside = [i for i, span in enumerate(spans) if span]
        for i in inside:
            memory[spans[i]] = 0xff

        def read():
            copy["read"] = True
            self.cluster.flying.append(functools.partial(write, cta.of_async[places]))

        def write(data):
            copy["written"] = True
            for i in inside:
                memory[spans[i]] = data[i]
        self.copies.append(copy)
        self.cluster.flying.append(read)

    def commit_copies(self, m):
        for copy in self.copies:
            copy["committed"] |= bool(m is None or m[copy["lane"]])

    def wait_copies(self, what, left, m):
        mine = [c for c in self.copies if c["committed"] and (m is None or m[c["lane"]])]
        if left:
            raise Fault("appendix/hopper.py does not know how to wait for all copies but the last")
        if not all(c[what] for c in mine):
            return f"until its copies are {what}"
        for copy in mine:
            self.clock[copy["agent"]] = max(self.clock[copy["agent"]], copy["now"])
        if what == "written":
            self.copies = [c for c in self.copies if c not in mine]

    def bulk(self, shared, outside, size, m):
        """A copy of bytes in a row: places in shared memory [1, size], and one span of global memory."""
        shared, outside, size = (self.one(x, m) for x in (shared, outside, size))
        if shared % 16 or outside % 16 or size % 16:
            raise Fault("a bulk copy is not aligned to 16 bytes")
        return np.arange(shared, shared + size)[None], [self.cluster.memory.span(outside, size)]

    def box(self, at, map_, coordinates, m):
        """A box of a tensor map (see hopper_stub.cpp): places in shared memory [rows, bytes of a row], and
        spans of global memory, None outside the tensor."""
        at, start = self.one(at, m), self.one(map_, m) - PARAMETERS
        raw = self.cluster.parameters[start:start + 128]
        magic, address, *numbers = raw[:88].view(u8).tolist()
        if start % 64 or magic != 0x70616d726f736e74:
            raise Fault("there is no tensor map")
        dims, strides, sizes = numbers[:5], numbers[5:], raw[88:108].view(u4).tolist()
        rank, swizzle = raw[108:112].view(u2).tolist()
        c = [int(np.array(self.one(x, m), u4).view(i4)) for x in coordinates]
        if len(c) != rank or at % 128 or swizzle and at % {1: 256, 2: 512, 3: 1024}[swizzle]:
            raise Fault("a box is not aligned as its swizzle wants it, or is of another rank")
        spans = []
        for offset in np.ndindex(*sizes[rank - 1:0:-1]):
            p = [x + o for x, o in zip(c[1:], offset[::-1])]
            inside = c[0] >= 0 and c[0] + sizes[0] <= dims[0] and all(0 <= x < d for x, d in zip(p, dims[1:]))
            first = address + 2 * c[0] + sum(x * s for x, s in zip(p, strides))
            spans.append(self.cluster.memory.span(first, 2 * sizes[0]) if inside else None)
        byte = at + np.arange(len(spans) * 2 * sizes[0]).reshape(len(spans), -1)
        return byte ^ (byte >> 7 & (0, 1, 3, 7)[swizzle]) << 4, spans

    # ---- going on
    def run(self):
        """One block. Returns whether anything could be done."""
        for pc in sorted(self.lanes):
            m = self.lanes.pop(pc)
            if m is not None and self.program.together[pc]:
                self.waits[pc] = f"for the other {32 - int(m.sum())} lanes of their warp"
            else:
                self.waits[pc] = self.program.block(pc, m is None)(self, self.R, m)
            if self.waits[pc] is None:
                return True
            self.lanes[pc] = m
        return False

    def go(self, pc, m):
        if m is not None:
            m = self.lanes[pc] | m if pc in self.lanes else m
            m = None if m.all() else m
        self.lanes[pc] = m

    def branch(self, condition, target, other, m):
        here = ALL if m is None else m
        for pc, lanes in (target, here & condition), (other, here & ~condition):
            if lanes.any():
                self.go(pc, lanes)

    def leave(self):
        if self.products or not all(copy["committed"] and copy["read"] for copy in self.copies):
            raise Fault("a warp leaves while its copies or products go on")


# -------------------------------------------------------------------------------------------------- a cluster
class Cluster:
    """The warps of a cluster and what is in flight between them, in an order that the seed decides."""

    def __init__(self, chip, program, position, parameters, shared):
        self.chip, self.program, self.position, self.parameters = chip, program, position, parameters
        self.memory, self.random = chip.memory, random.Random(f"{chip.seed} {position}")
        warps = [(rank, index) for rank in range(program.cluster) for index in range(program.threads // 32)]
        self.count, self.started, self.flying, self.steps = len(warps), 0, [], 0
        self.agents = 2 * self.count + COPIES                 # warps, their products, copies (in turns)
        self.barrier = Barrier(self.count, self.agents)
        self.ctas = [Cta(rank, shared, self.agents, chip.races) for rank in range(program.cluster)]
        self.warps = [Warp(self, self.ctas[rank], index, agent) for agent, (rank, index) in enumerate(warps)]
        # Tempers: how early products read, how often copies land, who goes first, who falls behind, how far.
        choose = self.random.choice
        self.early, self.landing, self.stay = choose([0, .5, 1]), choose([0, .05, .5]), choose([0, .5, .9])
        self.patience = choose([100, 1000, 4000])
        self.order = {w: self.random.random() for w in self.warps} if choose([False, True]) else None
        self.last_cta = choose([None, None, *self.ctas])

    def land(self):
        i = self.random.randrange(len(self.flying))
        self.flying[i], self.flying[-1] = self.flying[-1], self.flying[i]
        self.flying.pop()()

    def choose(self, ready, slow):
        """Who goes on: starved warps only when nobody else can."""
        others = [w for w in ready if w not in slow and w.cta is not self.last_cta]
        others = others or [w for w in ready if w not in slow] or ready
        if self.order and self.random.random() < .98:
            return min(others, key=self.order.get)
        return self.random.choice(others)

    def run(self):
        waiting, alive, slow, change = set(), list(self.warps), [], 0
        while alive:
            ready = [w for w in alive if w not in waiting]
            stuck = all(w in slow or w.cta is self.last_cta for w in ready)
            if self.flying and (stuck or self.random.random() < self.landing):
                self.land()
                waiting.clear()
                continue
            if not ready:
                raise Fault(self.deadlock())
            if self.steps >= change:
                slow = self.random.sample(self.warps, self.random.choice([0, 1, 1, 2]))
                change = self.steps + self.random.randrange(self.patience)
            w, moved = self.choose(ready, slow), False
            try:
                while w.lanes and w.run():
                    moved, self.steps = True, self.steps + 1
                    if self.random.random() >= self.stay:
                        break
            except Fault as fault:
                raise Fault(f"{fault}; {self.chip.where(w.place)}, warp {w.name}") from None
            if moved:
                waiting.clear()
                if self.random.random() < .02:
                    w.catch_up()
            else:
                waiting.add(w)
            if not w.lanes:
                alive.remove(w)
                w.cta.alive = any(other.cta is w.cta for other in alive)
        while self.flying:
            self.land()

    def deadlock(self):
        """Who waits where, and for what."""
        where, found = self.chip.where, defaultdict(list)
        for w in self.warps:
            for pc in w.lanes:
                on = w.waits[pc].explain(where) if isinstance(w.waits[pc], Barrier) else w.waits[pc]
                found[f"wait on {where(self.program.blocks[pc][-1].place)}\n        {on}"].append(w.name)
        waits = [f"    warps {' '.join(who)} {text}" for text, who in found.items()]
        return "\n".join(["deadlock: nobody can go on", *waits])


# ------------------------------------------------------------------------------------------------- the kernel
FLAGS = """-std=c++20 -O3 -DNDEBUG --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda
    -DKITTENS_HOPPER -gencode arch=compute_90a,code=compute_90a -diag-suppress 3189 -lineinfo -shared
    -cudart none -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden -keep""".split()


def build(source):
    """The PTX of a .cu and a library of its host code, by nvcc unless made before."""
    nvcc, root = shutil.which("nvcc"), os.environ.get("THUNDERKITTENS_ROOT")
    if not nvcc or not root:
        raise Fault("running the kernel on a CPU needs nvcc on PATH and ThunderKittens' headers in "
                    "THUNDERKITTENS_ROOT")
    stub = Path(__file__).with_name("hopper_stub.cpp")
    key = hashlib.sha256("\n".join([Path(source).read_text(), stub.read_text(), nvcc, root, *FLAGS]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_minute"
    made = [cache / f"hopper-{key.hexdigest()[:16]}{suffix}" for suffix in (".ptx", ".so")]
    if not made[1].exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:  # several processes may build at once
            shutil.copy(source, f"{work}/kernel.cu")
            command = [nvcc, *FLAGS, f"-I{root}/include", "kernel.cu", stub, "-o", "kernel.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True)
            if done.returncode:
                raise Fault(f"nvcc could not build {source}:\n{done.stdout}{done.stderr}")
            for path in made:
                os.replace(f"{work}/kernel{path.suffix}", path)
    return made


class Chip:
    """Runs the kernels of a .cu. `seed` decides the order of events; `races=True` fills `races` with pairs of
    places of the .cu that touch the same word without one waiting for the other; `watch` is a line whose
    instructions are shown, `watched` the one warp to show."""

    def __init__(self, source=KERNEL, seed=0, races=False, watch=None, watched=None):
        self.seed, self.races, self.watch, self.watched = seed, set() if races else None, watch, watched
        ptx, library = build(source)
        self.source, self.places = Path(source).read_text().splitlines(), {(): 0}
        entries = ptx.read_text().split("\t.section")[0].split(".visible .entry ")[1:]
        self.texts = {entry.split("(")[0]: entry for entry in entries}
        self.program = functools.cache(lambda name: Program(self, self.texts[name]))
        self.error, self.memory, self.steps, self.library = None, None, 0, ctypes.CDLL(str(library))
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
                                ctypes.c_void_p, ctypes.c_size_t)
        self.callback = kind(self.start)
        self.library.ttt_scratch_bytes.restype = ctypes.c_size_t

    def lines(self, place):
        """A place is a line of a kernel, and those of the functions inlined there."""
        return list(self.places)[place]

    def where(self, place):
        line, *inner = self.lines(place) or [0]
        inner = f" > {' > '.join(map(str, inner))}" if inner else ""
        return f"line {line}{inner} [{self.source[line - 1].split('//')[0].strip()}]"

    def start(self, name, grid, threads, parameters, shared):
        """What a launch comes to: every cluster of the grid, one after the other."""
        try:
            program = self.program(name.decode())
            parameters = np.frombuffer(ctypes.string_at(parameters, program.parameters), u1)
            with np.errstate(all="ignore"):
                for z, y, x in np.ndindex(grid[2], grid[1], grid[0] // program.cluster):
                    cluster = Cluster(self, program, (x, y, z), parameters, shared)
                    cluster.run()
                    self.steps += cluster.steps
                    del cluster
                    gc.collect()                              # a cluster and its warps know each other
            return 0
        except BaseException as error:                        # C lets nothing through: see `launch`
            self.error = error
            return 700

    def launch(self, name, tensors, shape, every, eps, tp):
        """ttt_forward or ttt_backward of the .cu on torch tensors; results are copied back into them."""
        arrays = [x.view(torch.uint8).numpy() for x in tensors]
        self.memory, self.error = Memory(arrays), None
        self.library.set_launch(self.callback)                # several chips may share a library
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in self.memory.views]
        status = getattr(self.library, name)(*pointers, *shape, every, ctypes.c_float(eps), tp, None)
        if self.error:
            raise self.error
        if status:
            raise Fault(f"{name} returns {status}")
        for x, v in zip(arrays, self.memory.views):
            x[...] = v

    def forward(self, inputs, every, tp, eps=1e-8):
        """q, k, v [B,H,L,64], eta [B,H,L], gamma, beta [H,64], W1 .. b2 [B,H,...] -> out, W, checkpoints."""
        q, k, v, eta, gamma, beta, *W = as_read(inputs)
        B, H, L, _ = q.shape
        out, last, groups = torch.empty_like(q), [torch.empty_like(w) for w in W], -(-L // (64 * every))
        kept = eta.new_empty(B, H, groups, 4, 2, 4096), eta.new_empty(B, H, groups, 320)
        tensors = (q, k, v, out, eta, gamma, beta, *W, *last, *kept)
        self.launch("ttt_forward", tensors, (B, H, L), every, eps, tp)
        return out, last, kept

    def backward(self, inputs, kept, dout, dlast, every, tp, eps=1e-8):
        """Gradients of forward's ten inputs, those of gamma and beta by video."""
        q, k, v, eta, gamma, beta, *W = as_read(inputs)
        dout, dlast = dout.to(q).contiguous(), [x.to(eta).contiguous() for x in dlast]
        B, H, L, _ = q.shape
        gradients = [torch.empty_like(x) for x in (q, k, v, eta)]
        gradients += [eta.new_empty(B, H, 64) for _ in range(2)] + [torch.empty_like(w) for w in W]
        scratch = eta.new_empty(B * H * tp * every * self.library.ttt_scratch_bytes(tp) // 4)
        tensors = (q, k, v, dout, *gradients[:3], eta, gamma, beta, *gradients[3:6], *dlast, *gradients[6:],
                   *kept, scratch)
        self.launch("ttt_backward", tensors, (B, H, L), every, eps, tp)
        return gradients

    def report(self):
        """The races found, in words."""
        return sorted({f"{first} on {self.where(a)} and {second} on {self.where(b)}"
                       for a, b, first, second in self.races})


def as_read(inputs):
    """In the kernel's types: q, k and v in bf16, the rest in fp32."""
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 7
    return [x.detach().to(dtype).contiguous() for x, dtype in zip(inputs, dtypes)]


# ------------------------------------------------------------------------------------------------ the command
def main():
    parser = argparse.ArgumentParser(description="Runs ttt_kernel.cu on a CPU; errors against float64.")
    parser.add_argument("--length", type=int, default=100, help="tokens (100)")
    parser.add_argument("--tp", type=int, default=2, choices=[2, 4], help="multiprocessors a head (2)")
    parser.add_argument("--seed", default="0", help="decides the order of events (0)")
    parser.add_argument("--races", action="store_true", help="list accesses that nothing orders")
    parser.add_argument("--watch", type=int, metavar="LINE", help="show what a line of the .cu does")
    parser.add_argument("--warp", metavar="CTA.WARP", help="of this warp only, as in 0.4")
    parser.add_argument("--source", type=Path, default=KERNEL, metavar="CU", help="ttt_kernel.cu")
    args = parser.parse_args()
    sys.path.insert(0, str(KERNEL.parent))
    from ttt_minute import ttt_scan
    generator, L = torch.Generator().manual_seed(0), args.length
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    q, k = (torch.nn.functional.normalize(normal(1, 1, L, 64), dim=-1).bfloat16() for _ in "qk")
    v = (k + torch.nn.functional.layer_norm(normal(1, 1, L, 64), (64,))).bfloat16()
    eta, gamma, beta = .1 * torch.sigmoid(normal(1, 1, L)) / 4096, 1 + .1 * normal(1, 64), .1 * normal(1, 64)
    shapes = (64, 256), (256,), (256, 64), (64,)
    W = [scale * normal(1, 1, *shape) for scale, shape in zip((.02, .002, .02, .002), shapes)]
    inputs = [x.float().double().requires_grad_() for x in (q, k, v, eta, gamma, beta, *W)]
    out, last = ttt_scan("mlp", inputs[6:], *inputs[:6], 64, backend="dual")
    dout, *dlast = [normal(*x.shape).bfloat16() for x in (out, *last)]
    true = [out - q, *(x - w for x, w in zip(last, inputs[6:]))]
    true += torch.autograd.grad([out, *last], inputs, [dout.double(), *(d.double() for d in dlast)])
    try:
        chip = Chip(args.source, args.seed, args.races, args.watch, args.warp)
        mine, mine_last, kept = chip.forward(inputs, 16, args.tp)
        gradients = chip.backward(inputs, kept, dout, dlast, 16, args.tp)
    except Fault as fault:
        sys.exit(str(fault))
    results = [mine.double() - q, *(x - w for x, w in zip(mine_last, inputs[6:])), *gradients]
    names = "out-q|W1 moved|b1 moved|W2 moved|b2 moved|d q|d k|d v|d eta|d gamma|d beta|d W1|d b1|d W2|d b2"
    print(f"{args.source.name}: {chip.steps:,} blocks executed; errors against float64")
    for name, x, y in zip(names.split("|"), results, true):
        print(f"    {name:10}{((x.reshape(y.shape) - y).norm() / y.norm()).item():.1e}")
    if args.races:
        print("\n".join(chip.report()) or "no races")


if __name__ == "__main__":
    main()
