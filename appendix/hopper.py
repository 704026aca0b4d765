"""Runs ttt_kernel.cu without a GPU: a Hopper GPU small enough for a test, on numpy.

nvcc turns the unchanged .cu and ThunderKittens' headers into PTX, the assembly language of NVIDIA's GPUs.
This module executes that PTX, one warp of 32 lanes at a time. The .cu's own host code launches the kernels,
over the few functions of CUDA's runtime that hopper_stub.cpp answers.

    python appendix/hopper.py                           # forward and backward of 100 tokens, errors by tensor
    python appendix/hopper.py --seed 7 --races          # another order of events, and races
    python appendix/hopper.py --watch 390 --warp 0.4    # what warp 4 of multiprocessor 0 holds on line 390
    python appendix/hopper.py --source my.cu            # a changed kernel: take out a wait, see what happens

What is modelled, because kernels go wrong there:
    lanes      every warp has its own place in the program; lanes that part meet again at the smallest place
    warps      go on in any order (the seed says which); some, or a whole multiprocessor, may fall far behind
    clusters   each CTA (multiprocessor) has its shared memory; a peer's is there until its warps have left
    mbarrier   arrivals, bytes and phases; more arrivals than expected are an error
    TMA        tensor maps with boxes, zero fill and swizzle; bulk copies. They finish late, in any order;
               until then NaN lies there
    wgmma      descriptors and fragments to the bit; operands are read early or late, results are NaN until
               waited for
    proxies    TMA and wgmma read a second copy of shared memory: what a lane wrote comes there by its own
               fence.proxy.async, not by its neighbour's
    races      who wrote or read a word of shared memory, and whether who touches it next had waited for that
    memory     accesses outside the tensors, or not aligned, are errors; if nobody can go on: a deadlock

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
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

u1, u2, u4, u8, i4, i8, f4 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32
LANES = np.arange(32)
# Addresses: shared memory begins at 1024, a peer's with its rank + 1 in the upper bits; kernel parameters.
SHARED, RANK_SHIFT, PARAMETERS, SHARED_WINDOW = 1024, 24, 1 << 44, 1 << 45
POISON = np.frombuffer(b"\xff" * 128, f4)                     # NaN in every lane
COPIES = 64                                                   # asynchronous copies in flight at once
KERNEL = Path(__file__).parent.parent / "ttt_kernel.cu"


class Fault(Exception):
    """What a kernel did wrong."""


class CannotBuild(Exception):
    """Why the kernel cannot be turned into PTX here."""


# ------------------------------------------------------------------------------------------------ reading PTX
# A kernel is cut into blocks: at labels, after branches, before whatever waits and after whatever others may
# see. A block becomes one Python function of the warp w, its registers R (a list of arrays of 32), and m, the
# lanes that take part, None for all.

WAITS = ("bar.sync", "barrier.cluster.wait", "mbarrier.try_wait", "wgmma.wait_group",
         "cp.async.bulk.wait_group")
SEEN = ("mbarrier.arrive", "fence.", "cp.async.bulk", "st.async", "wgmma.commit_group",
        "barrier.cluster.arrive", "bar.warp.sync")
TOGETHER = "bar.", "barrier.cluster", "wgmma", "setmaxnreg", "shfl.sync"    # all lanes of a warp come there
DTYPES = {"p": bool, "rs": u2, "f": f4, "r": u4, "rd": u8}
KINDS = dict(u32=u4, s32=i4, f32=f4, u64=u8, s64=i8, u16=u2, pred=bool)


class Statement(NamedTuple):
    guard: str                                                # %p1, !%p1 or None
    opcode: str
    operands: list
    place: int                                                # number of its place in the .cu


def dtype_of(register):
    return DTYPES[re.match(r"%([a-z]+)", register)[1]]


def split(text):
    """Operands: what stands between commas, but not between those in brackets."""
    return [x.strip() for x in re.findall(r"(?:\[[^\]]*\]|<[^>]*>|[^,\[<])+", text) if x.strip()]


class Kernels:
    """The kernels of a PTX file, {name: Program}; each is read when it is first asked for."""

    def __init__(self, ptx, source):
        self.source, self.places, self.texts, self.programs = source.splitlines(), [()], {}, {}
        self.file = re.search(r'\.file\s+(\d+) "[^"]*\.cu"', ptx)[1]
        for entry in ptx.split(".visible .entry ")[1:]:
            self.texts[entry.split("(")[0]] = entry

    def __getitem__(self, name):
        if name not in self.programs:
            self.programs[name] = Program(self, *self.texts[name].split("\n{\n", 1))
        return self.programs[name]

    def where(self, place):
        """A place in words: the line of the kernel, and those of the functions inlined there."""
        lines = self.places[place]
        if not lines:
            return "an unknown line"
        inner = f" > {' > '.join(map(str, lines[1:]))}" if len(lines) > 1 else ""
        return f"line {lines[0]}{inner} [{self.source[lines[0] - 1].split('//')[0].strip()}]"

    def statements(self, body):
        """[(labels, Statement)]; registers of an inner scope get names of their own."""
        labels, scopes, place, unique, inlined, numbers = [], [{}], 0, 0, {}, {}
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"\{([^{};]*)\}", r"<\1>", body)    # braces around operands, not those of a scope
        for found in re.finditer(r"\$\w+:|[{}]|\.loc[^\n]*|[^\s{};][^{};]*;", body):
            token = found[0]
            if token.endswith(":"):
                labels.append(token[:-1])
            elif token == "{":
                scopes.append({})
            elif token == "}":
                scopes.pop()
                if not scopes:
                    return
            elif token.startswith(".loc"):                    # file line column, and where that was inlined
                spots = re.findall(r"(?:loc|inlined_at)\s+(\d+ \d+ \d+)", token)
                here, *parent = [tuple(x.split()) for x in spots]
                inlined[here] = parent[0] if parent else None
                chain, spot = (), here
                while spot and len(chain) < 20:
                    chain, spot = (spot, *chain), inlined.get(spot)
                lines = tuple(int(line) for file, line, _ in chain if file == self.file)
                if lines and lines not in numbers:
                    numbers[lines] = len(self.places)
                    self.places.append(lines)
                place = numbers.get(lines, place)
            elif token.startswith(".reg"):
                if len(scopes) > 1:
                    kind, local = token[:-1].split()[1:3]
                    unique += 1
                    scopes[-1][local] = f"%{dict(pred='p', b64='rd', b32='r')[kind[1:]]}_{unique}"
            elif not token.startswith("."):
                token = " ".join(token[:-1].split())
                for scope in scopes:
                    for local, new in scope.items():
                        token = re.sub(rf"(?<![\w%]){re.escape(local)}(?!\w)", new, token)
                guard, opcode, rest = re.match(r"(?:@(!?%\w+) )?([\w.:]+) ?(.*)", token).groups()
                yield labels, Statement(guard, opcode, split(rest), place)
                labels = []


class Program:
    """Blocks of one kernel: `block(pc)` is what to run, `ends[pc]` how it goes on."""

    def __init__(self, kernels, head, body):
        self.kernels, self.watch, self.registers, self.blocks = kernels, None, {}, {}
        self.groups, self.ends = [], []
        numbers = r"\.b8 \w+\[(\d+)\]", r"\.maxntid (\d+)", r"\.reqnctapercluster (\d+)"
        self.parameters, self.threads, self.cluster = (int(re.search(x, head)[1]) for x in numbers)
        at, fresh = {}, True
        for labels, statement in kernels.statements(body):
            opcode = statement.opcode
            if labels or fresh or opcode.startswith(WAITS):
                self.groups.append([])
                at |= {label: len(self.groups) - 1 for label in labels}
            self.groups[-1].append(statement)
            fresh = opcode.split(".")[0] in ("bra", "ret") or opcode.startswith(WAITS + SEEN)
        for group in self.groups:
            operands = " ".join(x for s in group for x in s.operands)
            for register in re.findall(r"%(?:p|rs|rd|r|f)_?\d+", operands):
                self.register(register)
        self.together = [any(s.opcode.startswith(TOGETHER) for s in group) for group in self.groups]
        self.last = [group[-1].place for group in self.groups]
        for group in self.groups:
            guard, opcode, operands, _ = group[-1]
            if opcode.startswith("bra"):
                condition = guard and self.register(guard.lstrip("!"))
                self.ends.append(("bra", condition, guard and guard[0] == "!", at[operands[0]]))
            elif opcode == "ret" or opcode.startswith(WAITS):
                registers = lambda x: (self.register(x),) if x[0] == "%" else int(x)
                self.ends.append((opcode, *[registers(x.strip("[]")) for x in operands]))
            else:
                self.ends.append(("next",))
                continue
            group.pop()

    def register(self, name):
        return self.registers.setdefault(name, len(self.registers))

    def block(self, pc, full):
        """The function of a block, for all lanes or for some of them."""
        if (pc, full) not in self.blocks:
            text, place = ["pass"], None
            for s in self.groups[pc]:
                text += [f"w.place = {s.place}"] * (s.place != place)
                place = s.place
                try:
                    assert s.guard is None
                    text += self.python(s.opcode, s.operands, full)
                except (LookupError, AssertionError, StopIteration, ValueError, TypeError, AttributeError):
                    raise Fault(f"appendix/hopper.py does not know the instruction {s.opcode} "
                                f"{', '.join(s.operands)} of {self.kernels.where(s.place)}") from None
                if self.watch in self.kernels.places[s.place]:
                    results = [x for x in split(s.operands[0].strip("<>")) if x in self.registers]
                    text.append(f"w.show({s.opcode + ' ' + ', '.join(s.operands)!r}, {results}, m)")
            space = dict(HELPERS)
            exec("def block(w, R, m):\n    " + "\n    ".join(text), space)
            self.blocks[pc, full] = space["block"]
        return self.blocks[pc, full]

    # ---- one instruction as lines of Python
    def value(self, x, kind):
        """An operand as a Python expression of a kind: u32, s32, f32, u64, s64, u16 or pred."""
        if x in SPECIAL:
            return SPECIAL[x]
        if x.startswith("%"):
            same = dtype_of(x) is KINDS[kind]
            return f"R[{self.register(x)}]" + ("" if same else f".view({KINDS[kind].__name__})")
        if x == "dynamic" or x.endswith("_param_0"):
            return str(SHARED if x == "dynamic" else PARAMETERS)
        if x.startswith("0f"):
            bits = np.array(int(x[2:], 16), u4)
            return repr(float(bits.view(f4))) if kind == "f32" else str(bits)
        return x if kind[0] == "s" else str(int(x, 0) % (1 << int(kind[1:])))

    def address(self, x):
        """[%r1+8]: expression of the base, offset."""
        base, offset = re.match(r"\[(.*?)(?:\+(-?\d+))?\]", x).groups()
        wide = base[0] != "%" or dtype_of(base) is u8
        return self.value(base, "u64" if wide else "u32"), int(offset or 0)

    def put(self, name, text, full):
        """Into a register, of its type."""
        i, dtype = self.register(name), dtype_of(name).__name__
        return [f"R[{i}] = A({text}, {dtype})" if full else f"R[{i}] = mix(R[{i}], {text}, m, {dtype})"]

    def python(self, opcode, ops, full):
        name, *suffix = opcode.split(".")
        kind = next((s for s in reversed(suffix) if s in ("b32", "b64", *KINDS)), "u32").replace("b", "u")
        bits = kind.replace("s", "u") if kind != "pred" else kind               # where signs do not matter
        v = lambda i, kind=kind: self.value(ops[i], kind)
        put = lambda text: self.put(ops[0], text, full)
        numbers = lambda x: ", ".join(self.value(y, "u32") for y in split(x.strip("<>"))) + ","
        at = lambda i: self.address(ops[i])[0]
        if name in ("add", "sub", "mul", "and", "or", "xor"):
            sign = dict(zip(("add", "sub", "mul", "and", "or", "xor"), "+-*&|^"))[name]
            if suffix[0] == "wide":
                wide = "i8" if kind == "s32" else "u8"
                return put(f"A({v(1)}, {wide}) * A({v(2)}, {wide})")
            return put(f"{v(1, bits)} {sign} {v(2, bits)}")
        if name in ("mad", "fma"):
            return put(f"{v(1, bits)} * {v(2, bits)} + {v(3, bits)}")
        if name in ("shl", "shr"):
            return put(f"{v(1)} {'<<' if name == 'shl' else '>>'} {v(2, 'u32')}")
        if name in ("not", "neg"):
            return put(f"{'~' if name == 'not' else '-'}{v(1)}")
        if name in ("min", "max"):
            return put(f"np.{name}imum({v(1)}, {v(2)})")
        if name in ("div", "rem"):
            return put(f"{v(1)} / {v(2)}" if kind == "f32" else f"c_{name}({v(1)}, {v(2)})")
        if name == "setp":
            sign = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")[suffix[0]]
            return put(f"{v(1)} {sign} {v(2)}")
        if name == "selp":
            return put(f"np.where({v(3, 'pred')}, {v(1)}, {v(2)})")
        if name in ("ex2", "rsqrt", "tanh"):
            return put(dict(ex2="np.exp2({})", rsqrt="1 / np.sqrt({})", tanh="tanh({})")[name].format(v(1)))
        if name == "mov" and ops[0][0] == "<":
            low, high = split(ops[0][1:-1])
            return self.put(low, f"{v(1)} & 0xffff", full) + self.put(high, f"{v(1)} >> 16", full)
        if name == "mov" and ops[1][0] == "<":
            low, high = (self.value(x, "u16") for x in split(ops[1][1:-1]))
            return put(f"A({low}, u4) | A({high}, u4) << 16")
        if name == "mov":
            return put(v(1, next(k for k, dtype in KINDS.items() if dtype is dtype_of(ops[0]))))
        if name == "cvt" and "bf16x2" in suffix:
            return put(f"to_bf16({v(2, 'f32')}) | to_bf16({v(1, 'f32')}) << 16")
        if name == "cvt" and suffix == ["f32", "bf16"]:
            return put(f"(A({v(1, 'u16')}, u4) << 16).view(f4)")
        if name == "cvt":
            return put(f"A({v(1, suffix[1])}, {KINDS[suffix[0]].__name__})")
        if name == "cvta":
            return put(v(1, "u64") + f" + {SHARED_WINDOW}" * (suffix[0] == "shared"))
        if name == "shfl":
            text = f"shuffle_{suffix[1]}({v(1, 'u32')}, {v(2, 'u32')}, m)"
            return self.put(ops[0].split("|")[0], text, full)
        if name == "mapa":
            return put(f"({v(2, 'u32')} + 1 << {RANK_SHIFT}) | {v(1, 'u32')}")
        if name == "st" and suffix[0] == "async":
            return [f"w.send({at(0)}, ({numbers(ops[1])}), {at(2)}, m)"]
        if name in ("ld", "st"):
            space = next(s for s in suffix if s in ("shared", "global", "param"))
            return self.memory(name, kind, space, ops, full)
        if name == "mbarrier":
            count = self.value(ops[-1], "u32") if ops[-1][0] != "[" else "1"
            what = "init" if suffix[0] == "init" else "expect" if "expect_tx" in suffix else "arrive"
            return [f"w.{what}({at(what != 'init')}, {count}, m)"]
        if name == "fence":
            return ["w.fence(m)"] * (suffix[0] == "proxy")
        if opcode.startswith("bar.warp"):
            return ["w.come_together()"]
        if opcode.startswith("barrier.cluster.arrive"):
            return ["w.cluster_arrive()"]
        if name == "setmaxnreg" or opcode.startswith("wgmma.fence"):
            return []
        if opcode.startswith("wgmma.commit_group"):
            return ["w.commit_products()"]
        if name == "wgmma":
            assert opcode.endswith("m64n64k16.f32.bf16.bf16") and ops[4:6] == ["1", "1"]
            registers = lambda x: tuple(self.register(y) for y in split(x[1:-1]))
            a = registers(ops[1]) if ops[1][0] == "<" else v(1, "u64")
            transposed = [int(x) for x in ops[6:]]
            return [f"w.product({registers(ops[0])}, {a}, {v(2, 'u64')}, {v(3, 'pred')}, {transposed})"]
        assert opcode.startswith("cp.async.bulk")
        if suffix[-1] == "commit_group":
            return ["w.commit_bulk(m)"]
        if "tensor" in suffix:
            map_, c = split(next(x for x in ops if "<" in x)[1:-1])
            map_, c = self.value(map_, "u64"), numbers(c)
            if "mbarrier" in opcode:
                return [f"w.load_box({at(0)}, {map_}, ({c}), {at(2)}, m)"]
            return [f"w.store_box({at(1)}, {map_}, ({c}), m)"]
        if "mbarrier" in opcode:
            return [f"w.load_bulk({at(0)}, {at(1)}, {v(2, 'u32')}, {at(3)}, m)"]
        return [f"w.store_bulk({at(0)}, {at(1)}, {v(2, 'u32')}, m)"]

    def memory(self, name, kind, space, ops, full):
        """ld and st, of one to four numbers."""
        target, place = ops if name == "ld" else ops[::-1]
        (base, offset), names = self.address(place), split(target.strip("<>"))
        words = 2 if "64" in kind else 1
        if name == "st":
            values = ", ".join(self.value(x, "u32") for x in names)
            return [f"w.store_{space}({base}, {offset}, ({values},), m)"]
        if space == "param" and kind == "s32" and dtype_of(target) is u8:               # a number grows
            return self.put(target, f"w.param({base}, {offset}, 1, m).view(i4).astype(i8)", full)
        if space == "param":
            reads = [f"w.param({base}, {offset + 4 * words * i}, {words}, m)" for i in range(len(names))]
        else:
            assert words == 1
            reads = [f"x[{i}]" for i in range(len(names))]
        lines = [f"x = w.load_{space}({base}, {offset}, {len(names)}, m)"] * (space != "param")
        for x, read in zip(names, reads):
            lines += self.put(x, f"{read}.view({dtype_of(x).__name__})", full)
        return lines


SPECIAL = {"%tid.x": "w.tid", "%ctaid.x": "w.ctaid[0]", "%ctaid.y": "w.ctaid[1]", "%ctaid.z": "w.ctaid[2]",
           "%cluster_ctarank": "w.rank"}


def A(x, dtype):
    """An array of 32 of this type, of an array or a number."""
    if not isinstance(x, np.ndarray):
        return np.full(32, x, dtype)
    if x.dtype == dtype:
        return x
    same = x.dtype.kind in "iu" and x.itemsize == np.dtype(dtype).itemsize
    return x.view(dtype) if same else x.astype(dtype)


def mix(old, new, m, dtype):
    return np.where(m, A(new, dtype), np.zeros(32, dtype) if old is None else old)


def c_div(a, b):
    """Towards zero, as in C."""
    a, b = A(a, i8), A(b, i8)
    return np.sign(a) * np.sign(b) * (abs(a) // np.where(b == 0, 1, abs(b)))


def c_rem(a, b):
    return A(a, i8) - c_div(a, b) * A(b, i8)


def tanh(x):
    """tanh.approx is right to 11 bits; so is this, and no more."""
    return np.tanh(x) * (f4(1) + f4(2 ** -11) * np.sin(f4(1e6) * x))


def to_bf16(x):
    """To nearest, ties to even."""
    bits = x.view(u4)
    return np.where(x == x, (bits + u4(0x7fff) + (bits >> 16 & 1)) >> 16, u4(0x7fff))


def from_bf16(halves):
    return (halves.astype(u4) << 16).view(f4)


def shuffle_idx(x, lane, m):
    to = A(lane, np.intp) & 31
    if m is not None and not m[to[m]].all():
        raise Fault("a shuffle reads a lane that is not there")
    return x[to]


def shuffle_bfly(x, distance, m):
    return shuffle_idx(x, LANES ^ A(distance, np.intp), m)


HELPERS = dict(np=np, A=A, mix=mix, c_div=c_div, c_rem=c_rem, tanh=tanh, to_bf16=to_bf16,
               shuffle_idx=shuffle_idx, shuffle_bfly=shuffle_bfly, uint16=u2, uint32=u4, uint64=u8, int32=i4,
               int64=i8, float32=f4, bool=bool, u4=u4, u8=u8, i4=i4, i8=i8, f4=f4)


# ---------------------------------------------------------------------------------------- memory and barriers
class Memory:
    """What stands for the GPU's main memory: tensors are put into it, gaps that nobody may touch between."""

    def __init__(self, size=1 << 26):
        self.bytes, self.ok, self.names = np.full(size, 0xff, u1), np.zeros(size // 4, bool), []
        self.words, self.base = self.bytes.view(u4), self.bytes.ctypes.data
        self.used = -self.base % 1024 + 1024

    def put(self, array, name):
        """A copy of an array in this memory, as a view of it: results are read there."""
        start, end = self.used, self.used + array.nbytes
        if end + 4096 > self.bytes.size:
            raise MemoryError(f"{name} does not fit the machine's {self.bytes.size >> 20} MB of memory")
        self.ok[start // 4:-(-end // 4)] = True
        self.names.append((start, end, name))
        self.used = -(-end // 256) * 256 + 512
        view = self.bytes[start:end].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    def outside(self, address):
        at = address - self.base
        near = (f"{name} + {at - start}" for start, end, name in self.names if start - 256 <= at < end + 256)
        raise Fault(f"global memory at {next(near, hex(address))} belongs to no tensor")

    def index(self, address, words):
        """Places of words at addresses."""
        if (address % (4 * words)).any():
            raise Fault(f"a global address is no multiple of {4 * words}")
        index = (address - u8(self.base) >> 2).astype(i8)
        if index.min() < 0 or index.max() + words > self.ok.size:
            self.outside(int(address[0]))
        for j in range(words):
            if not self.ok[index + j].all():
                self.outside(int(address[~self.ok[index + j]][0]))
        return index

    def span(self, address, size):
        start = int(address) - self.base
        inside = 0 <= start <= self.bytes.size - size
        if not inside or not self.ok[start // 4:-(-(start + size) // 4)].all():
            self.outside(int(address))
        return slice(start, start + size)


class MBarrier:
    """Counts arrivals and bytes. What those who arrive know of others, who waits knows afterwards."""

    def __init__(self, count, agents, maker, clock, place):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.maker, self.made, self.place, self.signals = maker, clock[maker], place, set()
        self.known, self.told = np.zeros(agents, i4), np.zeros(agents, i4)

    def change(self, arrivals, expected, clock, place=None):
        if clock[self.maker] < self.made:
            raise Fault("an mbarrier is used by who need not have seen it made")
        if place:
            self.signals.add(place)
        np.maximum(self.told, clock, out=self.told)
        self.pending -= arrivals
        self.bytes += expected
        if self.pending < 0 or abs(self.bytes) >= 1 << 20:
            come = self.count - self.pending
            raise Fault(f"{come} arrivals at an mbarrier for {self.count}, {self.bytes} bytes to come")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            np.maximum(self.known, self.told, out=self.known)
            self.told[:] = 0


class Barrier:
    """bar.sync, and that of a cluster: who comes gets a ticket, good once as many have come as were to."""

    def __init__(self, agents):
        self.come = self.round = 0
        self.known, self.told = np.zeros(agents, i4), np.zeros(agents, i4)

    def arrive(self, count, clock):
        np.maximum(self.told, clock, out=self.told)
        self.come, ticket = self.come + 1, self.round
        if self.come == count:
            self.come, self.round = 0, self.round + 1
            np.maximum(self.known, self.told, out=self.known)
        return ticket


class Cta:
    """A multiprocessor's shared memory, as threads see it (`generic`) and as TMA and wgmma do (`of_async`).

    For every word it is kept who wrote it and who read it last, and when: what touches it later without
    having waited for them is a race, in whatever order they came this time.
    """

    def __init__(self, rank, size, agents, races):
        self.rank, self.alive, self.barriers, self.races = rank, True, {}, races
        self.named = defaultdict(lambda: Barrier(agents))
        self.generic, self.of_async = (np.full(SHARED + size, 0xff, u1) for _ in range(2))
        self.words, self.words_async, self.halves_async = (x.view(t) for x, t in (
            (self.generic, u4), (self.of_async, u4), (self.of_async, u2)))
        if races is not None:
            n = (SHARED + size) // 4 + 1
            self.writer, self.written, self.write_place, self.epoch = (np.zeros(n, i4) for _ in range(4))
            self.read, self.read_place = np.zeros((n, agents), i4), np.zeros((n, agents), np.int16)
            self.lane = np.full(n, -1, i4)

    def touch(self, words, agent, clock, now, place, writes, warp=None, lanes=None):
        """An access by an agent at its time `now`, who knows of others what `clock` says. With `warp`, its
        `lanes` do it: a lane sees what another wrote only after their warp came together."""
        if self.races is None:
            return
        if writes:
            late = self.read[words] > clock
            late[..., agent] = False
            self.race(late.any(), self.read_place, (words, late), place, "a read", "a write")
        late = (self.written[words] > clock[self.writer[words]]) & (self.writer[words] != agent)
        if warp is not None:
            own = (self.writer[words] == warp.agent) & (self.epoch[words] == warp.epoch)
            late |= own & (self.lane[words] != lanes) & (self.lane[words] >= 0)
        second = "a write" if writes else "a read"
        self.race(late.any(), self.write_place, (words, late), place, "a write", second)
        if writes:
            self.writer[words], self.written[words], self.write_place[words] = agent, now, place
            self.lane[words] = lanes if warp is not None and agent == warp.agent else -1
            self.epoch[words] = warp.epoch if warp is not None else 0
        else:
            self.read[words, agent], self.read_place[words, agent] = now, place

    def race(self, found, places, which, place, first, second):
        if found:
            words, late = which
            self.races.update((int(x), place, first, second) for x in np.unique(places[words][late]))

    def barrier(self, address):
        if address not in self.barriers:
            raise Fault(f"there is no mbarrier at {address}")
        return self.barriers[address]

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


class Product:
    """A product in flight: d += a @ b.T, over 16 of K; after `before`, or with `base`."""

    def __init__(self, d, a, b, transposed, before, base):
        self.d, self.a, self.b, self.transposed, self.before, self.base = d, a, b, transposed, before, base
        self.result = None

    def run(self, w):
        if self.result is not None:
            return
        halves = w.cta.halves_async
        if isinstance(self.a, tuple):                         # a is a fragment in registers
            x = np.zeros((16, 16), f4)
            for i, register in enumerate(self.a):
                for j in range(2):
                    number = from_bf16(w.R[register] >> 16 * j & 0xffff)
                    x[LANES // 4 + i % 2 * 8, i // 2 * 8 + LANES % 4 * 2 + j] = number
        else:
            x = from_bf16(halves[operand(self.a, 16 * (w.index % 4), 16, self.transposed[0])])
        y = from_bf16(halves[operand(self.b, 0, 64, self.transposed[-1])])
        self.result = (x @ y.T)[ROWS, COLUMNS]
        base = self.before.result if self.before else self.base
        if base is not None:
            self.result += base


# ------------------------------------------------------------------------------------------------------ warps
class Warp:
    """32 lanes: registers R, and `lanes`, {place in the program: which lanes are there, None for all}.

    `clock` is what the warp knows of everybody's time. A number in it grows by whatever passes knowledge on,
    so that "B has waited for A's write" is "B's clock for A is at least the time of the write".
    """

    def __init__(self, cluster, cta, index, agent):
        self.cluster, self.cta, self.index, self.program = cluster, cta, index, cluster.program
        self.tid, self.rank = (32 * index + LANES).astype(u4), np.full(32, cta.rank, u4)
        self.ctaid = [np.full(32, x, u4) for x in cluster.position]
        self.ctaid[0] = self.ctaid[0] * u4(self.program.cluster) + self.rank
        self.R, self.lanes = [None] * len(self.program.registers), {0: None}
        self.ticket = self.cluster_ticket = None
        self.dirty, self.jobs, self.groups, self.group_times, self.chains = [], [], [], [], {}
        self.open_copies, self.copies = defaultdict(list), defaultdict(list)
        self.place, self.epoch, self.together = 0, 0, 0
        self.agent, self.products_agent = agent, agent + cluster.count
        self.clock = np.zeros(cluster.agents, i4)
        self.clock[agent] = 1

    def name(self):
        return f"{self.cta.rank}.{self.index}"

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
        agent = self.cluster.next_agent()
        self.cluster.times[agent] += 1
        return agent, int(self.cluster.times[agent]), self.release(m)

    def show(self, text, registers, m):
        if self.cluster.watching(self):
            print(f"{self.name()}  {text}   ({self.program.kernels.where(self.place)})")
            for x in registers:
                values = self.of(self.R[self.program.register(x)], m, dtype_of(x))
                print(f"      {x} = {np.array2string(values, threshold=8, precision=4)}")

    # ---- loads and stores
    def param(self, base, offset, words, m):
        at = self.one(base, m) - PARAMETERS + offset
        return np.tile(self.cluster.parameters[at:at + 4 * words], 32)

    def word(self, base, offset, words, m):
        address = self.of(base, m) + u4(offset % (1 << 32))
        if np.bitwise_or.reduce(address) & (4 * words - 1):
            raise Fault(f"a shared address is no multiple of {4 * words}")
        if address.min() < SHARED or address.max() >= self.cta.generic.size:
            raise Fault(f"shared memory at {address.min()} to {address.max()} is outside")
        return address >> 2

    def touch(self, words, writes, m):
        lanes = LANES if m is None else LANES[m]
        self.cta.touch(words, self.agent, self.clock, self.clock[self.agent], self.place, writes, self, lanes)

    def load_shared(self, base, offset, words, m):
        at, result = self.word(base, offset, words, m), []
        for j in range(words):
            self.touch(at + j, False, m)
            x = self.cta.words[at + j]
            result.append(x if m is None else spread(x, m))
        return result

    def store_shared(self, base, offset, values, m):
        at = self.word(base, offset, len(values), m)
        for j, x in enumerate(values):
            self.cta.words[at + j] = self.of(x, m)
            self.dirty.append((at + j, m))
            self.touch(at + j, True, m)

    def load_global(self, base, offset, words, m):
        at = self.cluster.memory.index(self.of(base, m, u8) + u8(offset % (1 << 64)), words)
        found = [self.cluster.memory.words[at + j] for j in range(words)]
        return found if m is None else [spread(x, m) for x in found]

    def store_global(self, base, offset, values, m):
        at = self.cluster.memory.index(self.of(base, m, u8) + u8(offset % (1 << 64)), len(values))
        for j, x in enumerate(values):
            self.cluster.memory.words[at + j] = self.of(x, m)

    def fence(self, m):
        """What these lanes wrote can be seen by the async proxy."""
        left = []
        for at, lanes in self.dirty:
            if m is not None:
                wrote = np.ones(32, bool) if lanes is None else lanes
                if (wrote & ~m).any():
                    left.append((at[~m[wrote]], wrote & ~m))
                at = at[m[wrote]]
            self.cta.words_async[at] = self.cta.words[at]
        self.dirty = left

    # ---- barriers
    def peer(self, address):
        """The CTA that an address lies in, and where."""
        rank = address >> RANK_SHIFT
        cta = self.cluster.ctas[rank - 1] if rank else self.cta
        if not cta.alive:
            raise Fault("the shared memory of a multiprocessor whose warps have left is reached into")
        return cta, address & (1 << RANK_SHIFT) - 1

    def mbarriers(self, addresses, m):
        """The mbarrier of every lane that takes part."""
        for address in self.of(addresses, m).tolist():
            cta, at = self.peer(address)
            yield cta.barrier(at)

    def init(self, address, count, m):
        for address, count in zip(self.of(address, m).tolist(), self.of(count, m).tolist()):
            barrier = MBarrier(count, self.cluster.agents, self.agent, self.clock, self.place)
            self.cta.barriers[address] = barrier

    def arrive(self, address, count, m):
        for barrier, count in zip(self.mbarriers(address, m), self.of(count, m).tolist()):
            barrier.change(count, 0, self.release(m), self.place)

    def expect(self, address, size, m):
        for barrier, size in zip(self.mbarriers(address, m), self.of(size, m).tolist()):
            barrier.change(1, size, self.release(m), self.place)

    def cluster_arrive(self):
        self.cluster_ticket = self.cluster.barrier.arrive(len(self.cluster.warps), self.release())

    def send(self, to, values, bar, m):
        """st.async: registers into a peer's shared memory, whose mbarrier counts the bytes."""
        to, barriers = self.of(to, m), list(self.mbarriers(bar, m))
        if (to % 16).any() or len({int(x) >> RANK_SHIFT for x in (*to, *self.of(bar, m))}) != 1:
            raise Fault("st.async: an address is no multiple of 16, or it and its mbarrier are of two CTAs")
        cta, at = self.peer(int(to[0]))[0], (to & u4((1 << RANK_SHIFT) - 1)) >> 2
        agent, now, known = self.start(m)
        for j in range(len(values)):
            cta.touch(at + j, agent, known, now, self.place, True)
        known[agent], data, place = now, [self.of(x, m) for x in values], self.place

        def land():
            if not cta.alive:
                raise Fault("st.async arrives at a multiprocessor whose warps have left")
            for j, x in enumerate(data):
                cta.words[at + j] = cta.words_async[at + j] = x
            for barrier in barriers:
                barrier.change(0, -4 * len(data), known, place)
        self.cluster.flying.append(land)

    # ---- products
    def product(self, d, a, b, scale, transposed):
        a = a if isinstance(a, tuple) else self.one(a, None)
        b, scale = self.one(b, None), self.one(scale, None)
        before = self.chains.get(d)
        if before is None and any(set(d) & set(other) for other in self.chains):
            raise Fault("the registers of a product overlap with those of one in flight")
        base = None if before or not scale else np.stack([self.R[i] for i in d])
        self.chains[d] = Product(d, a, b, transposed, before if scale else None, base)
        self.jobs.append(self.chains[d])
        if self.cta.races is not None:                        # any warp of the four may read all of a
            now = int(self.cluster.times[self.products_agent]) + 1
            for x, t in [(b, transposed[-1])] + [(a, transposed[0])] * (not isinstance(a, tuple)):
                words = np.unique(operand(x, 0, 64, t) // 2)
                self.cta.touch(words, self.products_agent, self.clock, now, self.place, False)
        for i in d:
            self.R[i] = POISON
        if self.cluster.random.random() < self.cluster.early:
            self.catch_up()

    def catch_up(self):
        """Products read their operands now."""
        for job in [job for group in self.groups for job in group] + self.jobs:
            job.run(self)

    def commit_products(self):
        self.groups.append(self.jobs)
        self.jobs = []
        self.cluster.times[self.products_agent] += 1
        self.group_times.append(int(self.cluster.times[self.products_agent]))

    def finish_products(self, left):
        done, self.groups = self.groups[:len(self.groups) - left], self.groups[len(self.groups) - left:]
        for group in done:
            self.clock[self.products_agent] = self.group_times.pop(0)
            for job in group:
                job.run(self)
                if self.chains.get(job.d) is job:
                    del self.chains[job.d]
                    for i, x in zip(job.d, job.result):
                        self.R[i] = x

    # ---- copies
    def load(self, places, fetch, bar, m):
        """Into shared memory: NaN until it has come."""
        self.sole(m)
        cta, barrier, place = self.cta, self.cta.barrier(self.one(bar, m)), self.place
        cta.write_async(places, 0xff)
        agent, now, known = self.start(m)
        cta.touch(words_of(places), agent, known, now, place, True)
        known[agent] = now

        def land():
            data = fetch()
            cta.write_async(places, data)
            barrier.change(0, -data.size, known, place)
        self.cluster.flying.append(land)

    def store(self, places, write, m):
        """Out of shared memory: read late, written later."""
        agent, now, known = self.start(m)
        cta, state = self.cta, dict(read=False, written=False, agent=agent, now=now)
        cta.touch(words_of(places), agent, known, now, self.place, False, self, self.sole(m))

        def read():
            data, state["read"] = cta.of_async[places].copy(), True
            self.cluster.flying.append(lambda: state.update(written=True, done=write(data)))
        self.open_copies[self.sole(m)].append(state)
        self.cluster.flying.append(read)

    def commit_bulk(self, m):
        for lane in self.of(LANES, m):
            self.copies[lane] += self.open_copies.pop(lane, [])

    def pending(self, lanes, what):
        return any(not state[what] for lane in lanes for state in self.copies.get(lane, []))

    def bulk(self, shared, outside, size, m):
        shared, outside, size = (self.one(x, m) for x in (shared, outside, size))
        if shared % 16 or outside % 16 or size % 16:
            raise Fault("a bulk copy is not aligned to 16 bytes")
        if shared < SHARED or shared + size > self.cta.generic.size:
            raise Fault("a bulk copy reaches outside shared memory")
        return slice(shared, shared + size), self.cluster.memory.span(outside, size)

    def load_bulk(self, to, source, size, bar, m):
        places, span = self.bulk(to, source, size, m)
        self.load(places, lambda: self.cluster.memory.bytes[span].copy(), bar, m)

    def store_bulk(self, to, source, size, m):
        places, span = self.bulk(source, to, size, m)
        self.cluster.memory.bytes[span] = 0xff
        self.store(places, lambda data: self.cluster.memory.bytes.__setitem__(span, data), m)

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

    def load_box(self, to, map_, coordinates, bar, m):
        places, spans = self.box(to, map_, coordinates, m)
        memory, zeros = self.cluster.memory.bytes, np.zeros(places.shape[1], u1)
        self.load(places, lambda: np.stack([zeros if s is None else memory[s] for s in spans]), bar, m)

    def store_box(self, source, map_, coordinates, m):
        places, spans = self.box(source, map_, coordinates, m)

        def write(data):
            for span, row in zip(spans, data):
                if span is not None:
                    self.cluster.memory.bytes[span] = row
        self.store(places, write, m)

    # ---- going on
    def passes(self, end, m):
        """Whether a wait is over. Who comes to a barrier for the first time arrives there."""
        what, *operands = end
        number = lambda x: self.one(self.R[x[0]], m) if isinstance(x, tuple) else x
        if what.startswith("mbarrier"):
            barrier = self.cta.barrier(number(operands[1]))
            if barrier.phase % 2 == number(operands[2]):
                return False
            np.maximum(self.clock, barrier.known, out=self.clock)
            done, = operands[0]
            self.R[done] = np.ones(32, bool) if m is None else mix(self.R[done], True, m, bool)
        elif what == "bar.sync":
            barrier = self.cta.named[number(operands[0])]
            if self.ticket is None:
                count = number(operands[1]) if operands[1:] else self.program.threads
                self.ticket = barrier.arrive(count // 32, self.release())
            if self.ticket == barrier.round:
                return False
            self.ticket = None
            self.come_together()
            np.maximum(self.clock, barrier.known, out=self.clock)
        elif what.startswith("barrier.cluster"):
            if self.cluster_ticket == self.cluster.barrier.round:
                return False
            np.maximum(self.clock, self.cluster.barrier.known, out=self.clock)
        elif what.startswith("wgmma"):
            self.finish_products(operands[0])
        else:                                                 # cp.async.bulk.wait_group
            lanes, read = self.of(LANES, m), what.endswith("read")
            if operands[0] != 0 or self.pending(lanes, "read" if read else "written"):
                return False
            for lane in lanes:
                for state in self.copies.get(lane, []):
                    self.clock[state["agent"]] = max(self.clock[state["agent"]], state["now"])
                if not read:
                    self.copies.pop(lane, None)
        return True

    def run(self):
        """One block. Returns whether anything could be done."""
        for pc in sorted(self.lanes):
            m, end = self.lanes[pc], self.program.ends[pc]
            if m is not None and self.program.together[pc]:
                continue
            if end[0].startswith(WAITS):
                self.place = self.program.last[pc]
                if not self.passes(end, m):
                    continue
            else:
                self.program.block(pc, m is None)(self, self.R, m)
            self.cluster.count_block(self, pc)
            del self.lanes[pc]
            if end[0] == "ret":
                if any(self.open_copies.values()) or self.pending(LANES, "read") or self.groups or self.jobs:
                    raise Fault("a warp leaves while its copies or products go on")
            elif end[0] != "bra":
                self.go(pc + 1, m)
            elif end[1] is None:
                self.go(end[3], m)
            else:
                here = np.ones(32, bool) if m is None else m
                taken = here & (self.R[end[1]] ^ end[2])
                if taken.any():
                    self.go(end[3], taken)
                if (here & ~taken).any():
                    self.go(pc + 1, here & ~taken)
            return True
        return False

    def go(self, pc, m):
        if m is not None:
            m = self.lanes[pc] | m if pc in self.lanes else m
            m = None if m.all() else m
        self.lanes[pc] = m


def spread(x, m):
    y = np.zeros(32, x.dtype)
    y[m] = x
    return y


def words_of(places):
    """Words that bytes lie in."""
    if isinstance(places, slice):
        return np.arange(places.start // 4, places.stop // 4)
    return np.unique(places // 4)


# -------------------------------------------------------------------------------------------------- a cluster
class Cluster:
    """The warps of a cluster and what is in flight between them, in an order that the seed decides."""

    def __init__(self, chip, program, position, parameters, shared):
        self.chip, self.program, self.position, self.parameters = chip, program, position, parameters
        self.memory, self.random = chip.memory, random.Random(f"{chip.seed} {position}")
        warps = [(rank, index) for rank in range(program.cluster) for index in range(program.threads // 32)]
        self.count, self.started, self.flying, self.steps = len(warps), 0, [], 0
        self.agents = 2 * self.count + COPIES                 # warps, their products, copies
        self.barrier, self.times = Barrier(self.agents), np.zeros(self.agents, i4)
        self.ctas = [Cta(rank, shared, self.agents, chip.races) for rank in range(program.cluster)]
        self.warps = [Warp(self, self.ctas[rank], index, agent) for agent, (rank, index) in enumerate(warps)]
        # Tempers: how early products read, how often copies land, who goes first, who falls behind, how far.
        choose = self.random.choice
        self.early, self.landing, self.stay = choose([0, .5, 1]), choose([0, .05, .5]), choose([0, .5, .9])
        self.patience = choose([100, 1000, 4000])
        self.order = {w: self.random.random() for w in self.warps} if choose([False, True]) else None
        self.last_cta = choose([None, None, *self.ctas])

    def next_agent(self):
        """Copies take turns with numbers: enough of them that none is in flight twice."""
        self.started += 1
        return 2 * self.count + self.started % COPIES

    def watching(self, warp):
        return self.chip.watched in (None, warp.name())

    def count_block(self, warp, pc):
        if self.chip.counts is not None:
            self.chip.counts[self.program, warp.name(), pc] += 1

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
            while w.lanes and w.run():
                moved, self.steps = True, self.steps + 1
                if self.random.random() >= self.stay:
                    break
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
        where, found = self.program.kernels.where, defaultdict(list)
        for w in self.warps:
            for pc, m in w.lanes.items():
                what, *operands = self.program.ends[pc]
                text = f"wait on {where(self.program.last[pc])}"
                if what.startswith("mbarrier"):
                    barrier = w.cta.barrier(w.one(w.R[operands[1][0]], m))
                    so_far = "\n            ".join(sorted(map(where, barrier.signals))) or "nowhere"
                    missing = f"{barrier.pending} of {barrier.count} arrivals and {barrier.bytes} bytes"
                    text += (f"\n        for a phase of the mbarrier made on {where(barrier.place)}:"
                             f"\n        {missing} are missing; it was signalled on\n            {so_far}")
                elif what == "bar.sync":
                    number = operands[0] if isinstance(operands[0], int) else w.one(w.R[operands[0][0]], m)
                    text += f"\n        at a barrier to which {w.cta.named[number].come} warps have come"
                elif m is not None and self.program.together[pc]:
                    text += f"\n        for the other {32 - int(m.sum())} lanes of their warp"
                found[text].append(w.name())
        waits = [f"    warps {' '.join(who)} {text}" for text, who in found.items()]
        return "\n".join(["deadlock: nobody can go on", *waits])


# ------------------------------------------------------------------------------------------------- the kernel
FLAGS = """-std=c++20 -O3 -DNDEBUG --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda
    -DKITTENS_HOPPER -gencode arch=compute_90a,code=compute_90a -diag-suppress 3189 -lineinfo -shared
    -cudart none -Xcompiler=-fPIC,-fno-strict-aliasing,-Wno-psabi,-fvisibility=hidden""".split()


def build(source):
    """The PTX of a .cu and a library of its host code, by nvcc unless made before. Raises CannotBuild."""
    nvcc, root = shutil.which("nvcc"), os.environ.get("THUNDERKITTENS_ROOT")
    if not nvcc or not root:
        raise CannotBuild("running the kernel on a CPU needs nvcc on PATH and ThunderKittens' headers in "
                          "THUNDERKITTENS_ROOT")
    stub, include = Path(__file__).with_name("hopper_stub.cpp"), Path(root) / "include"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    headers = [path.read_text() for path in sorted(include.rglob("*.cuh"))]
    parts = [Path(source).read_text(), stub.read_text(), version, *FLAGS, *headers]
    key = hashlib.sha256("\n".join(parts).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_minute"
    folder = cache / f"hopper-{key.hexdigest()[:16]}"
    if not folder.exists():
        work = cache / f"{folder.name}-{os.getpid()}"         # several processes may build at once
        work.mkdir(parents=True)
        shutil.copy(source, work / "kernel.cu")
        command = [nvcc, *FLAGS, f"-I{include}", "kernel.cu", stub, "-keep", "-o", "kernel.so"]
        made = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(work)
            raise CannotBuild(f"nvcc could not build {source}:\n{made.stdout}{made.stderr}")
        for path in work.iterdir():
            if path.name not in ("kernel.cu", "kernel.ptx", "kernel.so"):
                path.unlink()
        try:
            work.rename(folder)
        except OSError:                                       # another process was faster
            shutil.rmtree(work)
    return folder / "kernel.ptx", folder / "kernel.so"


class Chip:
    """Runs the kernels of a .cu. `seed` decides the order of events; `races=True` fills `races` with pairs of
    places of the .cu that touch the same word without one waiting for the other; `watch` is a line whose
    instructions are shown, `watched` the one warp to show; `counts=True` counts what each warp executes."""

    def __init__(self, source=KERNEL, seed=0, races=False, watch=None, watched=None, counts=False):
        self.seed, self.races, self.watch, self.watched = seed, set() if races else None, watch, watched
        self.error = None
        self.counts = defaultdict(int) if counts else None
        ptx, library = build(source)
        self.kernels, self.memory, self.steps = Kernels(ptx.read_text(), Path(source).read_text()), None, 0
        self.library = ctypes.CDLL(str(library))
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
                                ctypes.c_void_p, ctypes.c_size_t)
        self.callback = kind(self.start)
        self.library.ttt_scratch_bytes.restype = ctypes.c_size_t
        for function, pointers in (self.library.ttt_forward, 17), (self.library.ttt_backward, 24):
            function.argtypes = ([ctypes.c_void_p] * pointers + [ctypes.c_int] * 4
                                 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p])

    def start(self, name, grid, threads, parameters, shared):
        """What a launch comes to: every cluster of the grid, one after the other."""
        try:
            program = self.kernels[name.decode()]
            program.watch = self.watch
            if threads != program.threads or grid[0] % program.cluster:
                raise Fault("a launch whose threads or grid are not the kernel's")
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
            place = self.place_of(error)
            self.error = Fault(f"{error}; {place}") if isinstance(error, Fault) and place else error
            return 700

    def place_of(self, error):
        """Where in the .cu the warp at hand was."""
        frame, place = error.__traceback__, None
        while frame:
            warp = frame.tb_frame.f_locals.get("self")
            if isinstance(warp, Warp) and warp.place:
                place = f"{self.kernels.where(warp.place)}, warp {warp.name()}"
            frame = frame.tb_next
        return place

    def launch(self, name, tensors, shape, every, eps, tp):
        """ttt_forward or ttt_backward of the .cu on torch tensors; results are copied back into them."""
        arrays = [x.view(dtype_like(x)).numpy() for x in tensors]
        self.memory = Memory(sum(x.nbytes for x in arrays) + 1024 * len(arrays) + (1 << 16))
        views = [self.memory.put(x, f"argument {i} of {name}") for i, x in enumerate(arrays)]
        self.error = None
        self.library.set_launch(self.callback)                # several chips may share a library
        status = getattr(self.library, name)(*[v.ctypes.data for v in views], *shape, every, eps, tp, None)
        if self.error:
            raise self.error
        if status:
            raise Fault(f"{name} returns {status}")
        for x, v in zip(arrays, views):
            x[...] = v

    def forward(self, inputs, every, tp, eps=1e-8):
        """q, k, v [B,H,L,64], eta [B,H,L], gamma, beta [H,64], W1 .. b2 [B,H,...] -> out, W, checkpoints."""
        q, k, v, eta, gamma, beta, *W = self.prepare(inputs)
        B, H, L, _ = q.shape
        out, last, groups = q.new_empty(q.shape), [w.new_empty(w.shape) for w in W], -(-L // (64 * every))
        kept = eta.new_empty(B, H, groups, 4, 2, 4096), eta.new_empty(B, H, groups, 320)
        tensors = (q, k, v, out, eta, gamma, beta, *W, *last, *kept)
        self.launch("ttt_forward", tensors, (B, H, L), every, eps, tp)
        return out, last, kept

    def backward(self, inputs, kept, dout, dlast, every, tp, eps=1e-8):
        """Gradients of forward's ten inputs, those of gamma and beta by video."""
        q, k, v, eta, gamma, beta, *W = self.prepare(inputs)
        dout, dlast = dout.to(q).contiguous(), [x.to(eta).contiguous() for x in dlast]
        B, H, L, _ = q.shape
        gradients = [x.new_empty(x.shape) for x in (q, k, v, eta)]
        gradients += [eta.new_empty(B, H, 64) for _ in range(2)]
        dW = [x.new_empty(x.shape) for x in dlast]
        scratch = eta.new_empty(B * H * tp * every * self.library.ttt_scratch_bytes(tp) // 4)
        tensors = (q, k, v, dout, *gradients[:3], eta, gamma, beta, *gradients[3:], *dlast, *dW, *kept,
                   scratch)
        self.launch("ttt_backward", tensors, (B, H, L), every, eps, tp)
        return *gradients, *dW

    def prepare(self, inputs):
        """In the kernel's types: q, k and v in bf16, the rest in fp32."""
        import torch
        dtypes = [torch.bfloat16] * 3 + [torch.float32] * 7
        return [x.detach().to(dtype).contiguous() for x, dtype in zip(inputs, dtypes)]

    def report(self):
        """The races found, in words."""
        return sorted({f"{first} on {self.kernels.where(a)} and {second} on {self.kernels.where(b)}"
                       for a, b, first, second in self.races})


def dtype_like(x):
    """numpy knows no bf16: its bits are integers of 16."""
    import torch
    return torch.int16 if x.dtype == torch.bfloat16 else x.dtype


# ------------------------------------------------------------------------------------------------ the command
def main():
    parser = argparse.ArgumentParser(description="Runs ttt_kernel.cu on a CPU; errors against float64.")
    parser.add_argument("--length", type=int, default=100, help="tokens (100)")
    parser.add_argument("--heads", type=int, default=1, help="heads (1)")
    parser.add_argument("--every", type=int, default=16, help="mini-batches between checkpoints (16)")
    parser.add_argument("--tp", type=int, default=2, choices=[2, 4], help="multiprocessors a head (2)")
    parser.add_argument("--seed", default="0", help="decides the order of events (0)")
    parser.add_argument("--races", action="store_true", help="list accesses that nothing orders")
    parser.add_argument("--watch", type=int, metavar="LINE", help="show what a line of the .cu does")
    parser.add_argument("--warp", metavar="CTA.WARP", help="of this warp only, as in 0.4")
    parser.add_argument("--source", type=Path, default=KERNEL, metavar="CU", help="ttt_kernel.cu")
    args = parser.parse_args()
    import torch
    sys.path.insert(0, str(KERNEL.parent))
    from ttt_minute import ttt_scan
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    H, L = args.heads, args.length
    q, k = (torch.nn.functional.normalize(normal(1, H, L, 64), dim=-1).bfloat16().double() for _ in "qk")
    v = (k + torch.nn.functional.layer_norm(normal(1, H, L, 64), (64,))).bfloat16().double()
    shapes = (64, 256), (256,), (256, 64), (64,)
    W = [scale * normal(1, H, *shape) for scale, shape in zip((.02, .002, .02, .002), shapes)]
    eta, gamma, beta = .1 * torch.sigmoid(normal(1, H, L)) / 4096, 1 + .1 * normal(H, 64), .1 * normal(H, 64)
    inputs = [q, k, v, eta, gamma, beta, *W]
    inputs = [x.float().double().requires_grad_() for x in inputs]
    out, last = ttt_scan("mlp", inputs[6:], *inputs[:6], 64, backend="dual")
    dout, *dlast = [normal(*x.shape).bfloat16().double() for x in (out, *last)]
    gradients = torch.autograd.grad([out, *last], inputs, [dout, *dlast])
    names = "q k v eta gamma beta W1 b1 W2 b2".split()
    relative = lambda x, y: ((x.detach().double() - y).norm() / y.norm()).item()
    try:
        chip = Chip(args.source, args.seed, args.races, args.watch, args.warp)
        start = time.process_time()
        mine, mine_last, kept = chip.forward(inputs, args.every, args.tp)
        grads = chip.backward(inputs, kept, dout, dlast, args.every, args.tp)
    except (Fault, CannotBuild) as error:
        sys.exit(str(error))
    seconds = time.process_time() - start
    print(f"{args.source.name}: {chip.steps:,} blocks executed, {seconds:.1f} s; errors against float64")
    print(f"    out - q   {relative(mine.double() - q, out - q):.1e}")
    for name, x, true, first in zip(names[6:], mine_last, last, inputs[6:]):
        print(f"    {name} - its first value   {relative(x.double() - first, true - first):.1e}")
    for name, x, true in zip(names, grads, gradients):
        print(f"    d {name:8}{relative(x.sum(0) if x.ndim > true.ndim else x, true):.1e}")
    if args.races:
        print("\n".join(chip.report()) or "no races")


if __name__ == "__main__":
    main()
