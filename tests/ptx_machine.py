"""A machine of numpy for the PTX of `kernels/hopper_attend.py`, which Triton's interpreter does not know and most computers cannot run.

    machine = Machine(Program(ptx), parameters, descriptors, memory, program=0, seed=0)
    machine.run()                                   # raises Stuck when all warps wait

Warps run in random order, some instructions at a time. The machine keeps the books of named barriers, of barriers in shared memory and of
registers that groups give and take; it finishes loads of tiles in random order; and it multiplies when a warp waits for a product, so that
an operand that is overwritten too early shows. It has only the instructions that this kernel uses.
"""

import random
import re
import struct
from dataclasses import dataclass

import numpy as np
import torch

LANES = np.arange(32)
FULL = np.ones(32, bool)
# where shared memory, global memory and parameters begin
SHARED, GLOBAL, PARAMETERS = 1024, 1 << 28, 7 << 28
SHARED_BYTES = 232_448
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "u16": np.uint16,
         "b16": np.uint16, "f32": np.float32, "bf16": np.uint16, "pred": np.bool_, "b8": np.uint8}
COMPARISONS = {"lt": np.less, "gt": np.greater, "eq": np.equal, "ne": np.not_equal, "le": np.less_equal, "ge": np.greater_equal,
               "nan": lambda x, y: np.isnan(x) | np.isnan(y)}
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


class Stuck(Exception):
    """Every warp waits for something that will not come."""


def arguments_of(text):
    """Split at the commas outside of brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def statements_of(text):
    """Statements, labels with their colon, and the braces of blocks."""
    held = ""
    for letter, following in zip(text, text[1:] + " "):
        if letter == ";" or (letter in "{}" and not held.strip()):
            yield held.strip() if letter == ";" else letter
            held = ""
        elif letter == ":" and following != ":" and re.fullmatch(r"\s*[$A-Za-z_][\w$]*", held):
            yield held.strip() + ":"
            held = ""
        else:
            held += letter


class Program:
    """code: (operation, arguments, (predicate, whether it is negated) or None)."""

    def __init__(self, text):
        self.threads = int(re.search(r"\.reqntid (\d+)", text).group(1))
        self.registers = int(re.search(r"\.maxnreg (\d+)", text).group(1))
        self.code, self.labels, self.tables = [], {}, {}
        text = re.sub(r"//.*|\.(loc|pragma)\s.*", "", text[text.index("// -- Begin function"):].replace("// %bb.0:", "start:"))
        name = re.search(r"\.entry (\w+)", text).group(1)
        statements = list(statements_of(text[text.index("{", text.index(".maxnreg")) + 1:].replace(f"{name}_param_", "param_")))
        names, inside, number = [{}], [], 0
        # what a block declares may be used before its declaration
        for statement in statements:
            if statement == "{":
                number += 1
                names.append({})
            inside.append(number if statement == "{" else inside[-1] if inside else 0)
            if statement == "}":
                inside[-1] = 0
            block = inside[-1]
            if block and (label := re.fullmatch(r"(\w+):", statement)):
                names[block][label[1]] = f"{label[1]}_{block}"
            if block and statement.startswith(".reg"):
                names[block].update({register: f"%{register}_{block}" for register in arguments_of(statement.split(None, 2)[2])})
        for statement, block in zip(statements, inside):
            for name, unique in names[block].items():
                statement = re.sub(rf"(?<![\w%$.]){name}(?![\w.])", unique, statement)
            self._add(statement)
            if statement == "ret":
                break

    def _add(self, statement):
        if statement.startswith(".branchtargets"):
            self.tables[self.label] = arguments_of(statement.removeprefix(".branchtargets"))
        elif statement.endswith(":"):
            self.label = statement[:-1]
            self.labels[self.label] = len(self.code)
        elif statement not in "{}" and not statement.startswith(".reg"):
            predicate, rest = re.fullmatch(r"(?:@(!?%?\w+)\s+)?(.*)", statement, re.S).groups()
            operation, *rest = rest.split(None, 1)
            self.code.append((operation, arguments_of(rest[0] if rest else ""),
                              predicate and (predicate.lstrip("!"), predicate.startswith("!"))))


@dataclass
class Tiles:
    """A tensor that tiles are loaded from: bytes, and shape, strides and tile in bytes. width: of a row that is swizzled."""

    data: np.ndarray
    shape: list
    strides: list
    box: list
    width: int

    def tile(self, start):
        """The bytes of the tile that begins at these coordinates."""
        offset = np.zeros((), np.int64)
        for first, size, stride, extent in zip(start, self.box, self.strides, self.shape):
            assert 0 <= first and first + size <= extent, "a tile outside of its tensor"
            offset = offset[..., None] + (first + np.arange(size)) * stride
        return self.data[offset.reshape(-1)]


def swizzled(address, width):
    return address ^ ((address >> 7 & {128: 7, 64: 3, 32: 1}[width]) << 4)


@dataclass
class Barrier:
    """In shared memory. bytes: that loads still owe."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0

    def arrived(self, threads=0, loaded=0):
        self.missing -= threads
        self.bytes -= loaded
        assert self.missing >= 0
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, self.phase ^ 1


class Warp:
    """at: the next instruction of each lane. ready: whether what it waits for has come. groups: products that are not waited for."""

    def __init__(self, number, registers):
        self.number, self.allowed = number, registers
        self.registers, self.at, self.ready, self.done = {}, np.zeros(32, int), None, False
        self.begun, self.groups = [], []


class Machine:
    """One program of a launch. parameters: numbers, by position. descriptors: `Tiles` of the parameters that are such. memory: uint8, which
    has the address GLOBAL. index: of the program."""

    def __init__(self, program, parameters, descriptors, memory, index, seed):
        self.program, self.parameters, self.descriptors, self.memory, self.index = program, parameters, descriptors, memory, index
        self.shared = np.full(SHARED_BYTES, 0xCD, np.uint8)
        self.warps = [Warp(number, program.registers) for number in range(program.threads // 32)]
        self.free, self.named, self.barriers, self.loads = 0, {}, {}, []
        self.random = random.Random(seed)

    def run(self):
        with np.errstate(all="ignore"):
            while any(not warp.done for warp in self.warps):
                ready = [warp for warp in self.warps if not warp.done and (warp.ready is None or warp.ready())]
                if self.loads and (not ready or self.random.random() < 0.5):
                    tiles, start, to, barrier = self.loads.pop(self.random.randrange(len(self.loads)))
                    data = tiles.tile(start)
                    self.shared[swizzled(to + np.arange(data.size), tiles.width) - SHARED] = data
                    self.barriers[barrier].arrived(loaded=data.size)
                elif not ready:
                    raise Stuck({warp.number: self.program.code[warp.at.min()][:2] for warp in self.warps if not warp.done})
                else:
                    warp = self.random.choice(ready)
                    warp.ready = None
                    for _ in range(self.random.choice((20, 200, 1000))):
                        self._step(warp)
                        if warp.done or warp.ready:
                            break

    def _step(self, warp):
        """The lanes that are furthest behind execute an instruction."""
        here = int(warp.at.min())
        lanes = warp.at == here
        operation, arguments, predicate = self.program.code[here]
        active = lanes
        if predicate:
            active = lanes & (warp.registers[predicate[0]] ^ predicate[1])
        warp.at = np.where(lanes, here + 1, warp.at)
        if operation.startswith("bra"):
            warp.at = np.where(active, self.program.labels[arguments[0]], warp.at)
        elif operation == "brx.idx":
            warp.at[:] = self.program.labels[self.program.tables[arguments[1]][int(self.value(warp, arguments[0], np.uint32)[0])]]
        elif operation == "ret":
            warp.done = True
            assert not warp.groups and not warp.begun, "products that nobody waited for"
        elif active.any() and getattr(self, "_" + operation.partition(".")[0])(warp, operation.split("."), arguments, active) == "again":
            warp.at[:] = here

    # operands

    def value(self, warp, name, kind):
        if name.startswith("%tid"):
            return (warp.number * 32 + LANES).astype(kind)
        if name in warp.registers:
            return warp.registers[name].view(kind)
        if name.startswith("0f"):
            return np.full(32, struct.unpack(">f", bytes.fromhex(name[2:]))[0], np.float32).view(kind)
        assert name.startswith("%ctaid") or not name.startswith("%"), f"{name} is read before it is written"
        if kind is np.bool_:
            return np.full(32, name not in ("0", "false"))
        number = self.index if name.startswith("%ctaid") else SHARED if name == "global_smem" else (
            PARAMETERS + int(name[6:]) if name.startswith("param_") else int(name.rstrip("U"), 0))
        size = np.dtype(kind).itemsize
        return np.full(32, number & (1 << 8 * size) - 1, UNSIGNED[size]).view(kind)

    def put(self, warp, name, value, active):
        value = np.ascontiguousarray(value)
        if value.dtype != np.bool_:
            value = value.view(UNSIGNED[value.dtype.itemsize])
        if not active.all():
            value = np.where(active, value, warp.registers.get(name, np.zeros(32, value.dtype)).view(value.dtype))
        warp.registers[name] = value

    def address(self, warp, text):
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        kind = warp.registers[base].dtype if base in warp.registers else np.uint32
        return self.value(warp, base, kind).astype(np.int64) + int(offset or 0)

    def _apply(self, warp, parts, arguments, active, function):
        kind = TYPES[parts[-1]]
        self.put(warp, arguments[0], function(*(self.value(warp, x, kind) for x in arguments[1:])).astype(kind), active)

    # arithmetic

    def _mov(self, warp, parts, arguments, active):
        kind = TYPES[parts[-1]]
        to, source = arguments
        if not {to[0], source[0]} & {"{"}:
            return self.put(warp, to, self.value(warp, source, kind), active)
        names = arguments_of((to if to[0] == "{" else source).strip("{}"))
        size = np.dtype(kind).itemsize // len(names)
        if source[0] == "{":
            found = np.stack([self.value(warp, name, UNSIGNED[size]) for name in names], axis=1)
            return self.put(warp, to, np.ascontiguousarray(found).view(kind)[:, 0], active)
        found = self.value(warp, source, kind).view(UNSIGNED[size]).reshape(32, -1)
        for name, value in zip(names, found.T):
            self.put(warp, name, value, active)

    def _cvta(self, warp, parts, arguments, active):
        self.put(warp, arguments[0], self.value(warp, arguments[1], warp.registers[arguments[1]].dtype).astype(np.uint64), active)

    def _add(self, *step):
        self._apply(*step, np.add)

    def _sub(self, *step):
        self._apply(*step, np.subtract)

    def _neg(self, *step):
        self._apply(*step, np.negative)

    def _abs(self, *step):
        self._apply(*step, np.abs)

    def _not(self, *step):
        self._apply(*step, np.invert)

    def _max(self, *step):
        self._apply(*step, np.fmax)

    def _min(self, *step):
        self._apply(*step, np.fmin)

    def _and(self, *step):
        self._apply(*step, np.bitwise_and)

    def _or(self, *step):
        self._apply(*step, np.bitwise_or)

    def _xor(self, *step):
        self._apply(*step, np.bitwise_xor)

    def _shl(self, warp, parts, arguments, active):
        kind = TYPES[parts[-1]]
        by = self.value(warp, arguments[2], np.uint32)
        found = self.value(warp, arguments[1], kind) << by.astype(kind)
        self.put(warp, arguments[0], np.where(by < 8 * np.dtype(kind).itemsize, found, 0).astype(kind), active)

    def _shr(self, warp, parts, arguments, active):
        kind = TYPES[parts[-1]]
        by = np.minimum(self.value(warp, arguments[2], np.uint32), 8 * np.dtype(kind).itemsize - 1)
        self.put(warp, arguments[0], self.value(warp, arguments[1], kind) >> by.astype(kind), active)

    def _mul(self, warp, parts, arguments, active):
        kind = TYPES[parts[-1]]
        x, y = (self.value(warp, name, kind) for name in arguments[1:3])
        if {"wide", "hi"} & set(parts):
            wide = np.int64 if kind is np.int32 else np.uint64
            found = x.astype(wide) * y.astype(wide)
            found = found if "wide" in parts else (found >> wide(32)).astype(kind)
        else:
            found = x * y
        if len(arguments) > 3:
            found = found + self.value(warp, arguments[3], found.dtype.type)
        self.put(warp, arguments[0], found, active)

    _mad = _mul

    def _fma(self, *step):
        self._apply(*step, lambda x, y, z: x.astype(float) * y + z)

    def _div(self, warp, parts, arguments, active):
        if parts[-1] == "f32":
            return self._apply(warp, parts, arguments, active, np.divide)
        # integers are never negative here
        self._apply(warp, parts, arguments, active, lambda x, y: x // np.maximum(y, 1))

    def _rem(self, *step):
        self._apply(*step, lambda x, y: x % np.maximum(y, 1))

    def _bfe(self, *step):
        self._apply(*step, lambda x, first, count: x >> first & (1 << count) - 1)

    def _prmt(self, warp, parts, arguments, active):
        x, y, order = (self.value(warp, name, np.uint32) for name in arguments[1:])
        held = np.concatenate([x.view(np.uint8).reshape(32, 4), y.view(np.uint8).reshape(32, 4)], axis=1)
        picked = order[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
        assert (picked < 8).all()
        self.put(warp, arguments[0], np.ascontiguousarray(np.take_along_axis(held, picked.astype(int), 1)).view(np.uint32)[:, 0], active)

    def _selp(self, warp, parts, arguments, active):
        x, y = (self.value(warp, name, TYPES[parts[-1]]) for name in arguments[1:3])
        self.put(warp, arguments[0], np.where(self.value(warp, arguments[3], np.bool_), x, y), active)

    def _setp(self, warp, parts, arguments, active):
        x, y = (self.value(warp, name, TYPES[parts[-1]]) for name in arguments[1:])
        if parts[-1] == "bf16":
            x, y = ((part.astype(np.uint32) << 16).view(np.float32) for part in (x, y))
        self.put(warp, arguments[0], COMPARISONS[parts[1]](x, y), active)

    def _cvt(self, warp, parts, arguments, active):
        if parts[-1] == "bf16":
            found = (self.value(warp, arguments[1], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif parts[-2] in ("bf16x2", "e4m3x2"):
            high, low = (torch.from_numpy(self.value(warp, name, np.float32).copy()) for name in arguments[1:])
            kind = torch.bfloat16 if parts[-2] == "bf16x2" else torch.float8_e4m3fn
            high, low = (x.clamp(-448, 448) if "satfinite" in parts else x for x in (high, low))
            found = torch.stack([low, high], dim=1).to(kind).view(torch.uint8).numpy()
            found = np.ascontiguousarray(found).view(UNSIGNED[found.shape[1]])[:, 0]
        else:
            found = self.value(warp, arguments[1], TYPES[parts[-1]]).astype(TYPES[parts[-2]])
        self.put(warp, arguments[0], found, active)

    def _ex2(self, *step):
        self._apply(*step, lambda x: np.where(x < -126, 0, np.exp2(x)))

    def _shfl(self, warp, parts, arguments, active):
        x, lane = self.value(warp, arguments[1], np.uint32), int(arguments[2])
        self.put(warp, arguments[0], x[LANES ^ lane] if "bfly" in parts else np.full(32, x[lane]), active)

    def _elect(self, warp, parts, arguments, active):
        self.put(warp, arguments[0].split("|")[1], LANES == 0, active)

    # memory

    def _ld(self, warp, parts, arguments, active):
        kind = TYPES[parts[-1]]
        size = np.dtype(kind).itemsize
        if "param" in parts:
            number = self.parameters[int(re.search(r"param_(\d+)", arguments[1])[1])]
            number = struct.unpack("<I", struct.pack("<f", number))[0] if isinstance(number, float) else number
            return self.put(warp, arguments[0], np.full(32, number, kind), active)
        memory, start = (self.shared, SHARED) if "shared" in parts else (self.memory, GLOBAL)
        address = self.address(warp, arguments[1]) - start
        for number, name in enumerate(arguments_of(arguments[0].strip("{}"))):
            at = np.where(active, address + number * size, 0)[:, None] + np.arange(size)
            assert at.min() >= 0
            found = np.ascontiguousarray(memory[at]).view(kind)[:, 0]
            self.put(warp, name, found.astype(np.uint32) if size == 1 else found, active)

    def _st(self, warp, parts, arguments, active):
        size = np.dtype(TYPES[parts[-1]]).itemsize
        memory, start = (self.shared, SHARED) if "shared" in parts else (self.memory, GLOBAL)
        address = self.address(warp, arguments[0]) - start
        for number, name in enumerate(arguments_of(arguments[1].strip("{}"))):
            value = self.value(warp, name, UNSIGNED[size]) if size > 1 else self.value(warp, name, np.uint32).astype(np.uint8)
            at = (address + number * size)[active]
            assert at.min() >= 0
            memory[at[:, None] + np.arange(size)] = np.ascontiguousarray(value[active]).view(np.uint8).reshape(-1, size)

    # barriers and registers

    def _bar(self, warp, parts, arguments, active):
        if parts[1] == "warp":
            return
        threads = int(arguments[1]) if len(arguments) > 1 else self.program.threads
        come = self.named.setdefault(arguments[0], [])
        passed = [False]
        come.append(passed)
        assert 32 * len(come) <= threads
        if 32 * len(come) == threads:
            for other in self.named.pop(arguments[0]):
                other[0] = True
        elif parts[1] == "sync":
            warp.ready = lambda: passed[0]

    _barrier = _bar

    def _setmaxnreg(self, warp, parts, arguments, active):
        more = int(arguments[0]) - warp.allowed
        assert more >= 0 if "inc" in parts else more <= 0
        if 32 * more > self.free:
            warp.ready = lambda: 32 * more <= self.free
            return "again"
        self.free -= 32 * more
        warp.allowed += more

    def _fence(self, *step):
        pass

    def _mbarrier(self, warp, parts, arguments, active):
        if parts[1] == "init":
            for address in set(self.address(warp, arguments[0])[active]):
                count = int(self.value(warp, arguments[1], np.uint32)[0])
                self.barriers[int(address)] = Barrier(count, count)
            return
        barrier = self.barriers[int(self.address(warp, arguments[1])[active][0])]
        if parts[1] == "arrive":
            assert active.sum() == 1
            expected = int(self.value(warp, arguments[2], np.uint32)[0]) if "expect_tx" in parts else 0
            barrier.arrived(threads=1, loaded=-expected)
        else:
            phase = int(self.value(warp, arguments[2], np.uint32)[0])
            self.put(warp, arguments[0], np.full(32, barrier.phase != phase), active)
            if barrier.phase == phase:
                warp.ready = lambda: barrier.phase != phase

    def _cp(self, warp, parts, arguments, active):
        lane = int(np.argmax(active))
        tensor, start = re.fullmatch(r"\[(\S+),\s*\{(.*)\}\]", arguments[1]).groups()
        tensor = int(self.value(warp, tensor, np.uint64)[lane]) - PARAMETERS
        start = [int(self.value(warp, name, np.int32)[lane]) for name in arguments_of(start)]
        to, barrier = (int(self.address(warp, arguments[number])[lane]) for number in (0, 2))
        self.loads.append((self.descriptors[tensor], start[::-1], to, barrier))

    # products

    def _wgmma(self, warp, parts, arguments, active):
        if parts[1] == "commit_group":
            warp.groups.append(warp.begun)
            warp.begun = []
        elif parts[1] == "wait_group":
            while len(warp.groups) > int(arguments[0]):
                for product in warp.groups.pop(0):
                    self._multiply(warp, *product)
        elif parts[1] == "mma_async":
            columns = int(re.search(r"m64n(\d+)k32", ".".join(parts))[1])
            warp.begun.append((*arguments[:3], bool(self.value(warp, arguments[3], np.bool_)[0]), columns, "s8" in parts))

    def _rows(self, warp, name, first, count):
        """Rows of an operand in shared memory, 32 bytes each."""
        descriptor = int(self.value(warp, name, np.uint64)[0])
        start, stride, width = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, {1: 128, 2: 64, 3: 32}[descriptor >> 62]
        row = np.arange(first, first + count)[:, None]
        return self.shared[swizzled(start + row // 8 * stride + row % 8 * width + np.arange(32), width) - SHARED]

    def _multiply(self, warp, results, left, right, adds, columns, whole):
        row, quarter = LANES // 4, LANES % 4
        if left.startswith("{"):
            a = np.zeros((16, 32), np.uint8)
            for number, name in enumerate(arguments_of(left.strip("{}"))):
                at = quarter[:, None] * 4 + 16 * (number // 2) + np.arange(4)
                a[row[:, None] + 8 * (number % 2), at] = self.value(warp, name, np.uint32).view(np.uint8).reshape(32, 4)
        else:
            a = self._rows(warp, left, warp.number % 4 * 16, 16)
        a, b = (x.view(np.int8) if whole else E4M3[x] for x in (a, self._rows(warp, right, 0, columns)))
        kind = np.int32 if whole else np.float32
        product = (a.astype(float) @ b.astype(float).T).astype(kind)
        for number, name in enumerate(arguments_of(results.strip("{}"))):
            found = product[row + 8 * (number // 2 % 2), number // 4 * 8 + quarter * 2 + number % 2]
            self.put(warp, name, found + self.value(warp, name, kind) if adds else found, FULL)
