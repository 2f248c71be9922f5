"""The lossless code of the changes in one tensor: kernels that numba compiles to vector instructions.

Blocks. A tensor is coded in blocks of BLOCK elements. A block is a header of two uint32 (number of bytes after it, number
of changed elements) and two lists with a number for each changed element:

    gap     number of unchanged elements between it and the changed element before
    step    distance that it moved in the order of its dtype's numbers: down 1, up 1, down 2, up 2 are 0, 1, 2, 3

If more than two fifths of the elements changed, a plane of bits replaces the gaps. A block without changes is a header
only. If the code of a block would not be shorter than its elements, the block holds the new elements as they are.

Lists. A list is Golomb-Rice code, written in planes. A byte `order` comes first, then `order` planes: bit 0 of every
number, bit 1, and so on. The rest of each number, shifted right by `order`, is coded in levels: a plane with a bit for
each number that is not yet 0; those continue, decreased by 1. From level `unary` on, each continuing number also writes its
lowest bit and is halved, so that outliers cost a logarithm (Exp-Golomb code), not their size. In a plane the first bit
is the lowest of its byte. Each plane starts on a new byte.

Why by hand. Plain numba loops take 2.4 to 3 times as long to encode and 1.2 to 4.8 times as long to decode
(docs/benchmarks.md): numba has no functions for the instructions that turn comparisons into masks and that move elements
by a mask. The section "Vector instructions" defines the few that the code needs, in LLVM's terms.

Safety. numba does not check indices. Every length that is read from a code is checked before it is used, so damaged or
malicious codes are refused and never read or write outside the arrays.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

BLOCK = 1 << 16
"""Elements of a block: few enough for the L2 cache, and for positions of 16 bits."""
_HEADER = 8
"""Bytes of a block's header."""

_GAPS, _STEPS = np.int64(4), np.int64(1)
"""`unary` of the two lists, chosen by measured sizes: gaps are nearly geometric, steps have heavy tails."""
_LEVELS = 40
"""More levels than a number of 32 bits can have."""

_ZERO: Any = np.int64(0)
"""An int64 0. numba types a literal 0 differently, and would compile every function that it is passed to once more."""

_LANES = 32
"""Elements of a vector. Arrays of numbers have room for one more vector at the end: vectors are read and written whole."""
_NATIVE = {16} if "+avx512vbmi2" in get_host_cpu_features() else set()
"""Element sizes, in bits, for which the processor moves a vector's elements by a mask in one instruction (AVX-512 VBMI2).
Other sizes and processors move them one by one, without branches. (LLVM 20 could emulate `vector.compress`, but wrongly
for vectors that are longer than the processor's.)"""
_WORD = ir.IntType(_LANES)


class _Cache(FunctionCache):
    """Compiled kernels on disk, shared by processes. A disk that fails costs a compilation, not the campaign."""

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)


_kernel = njit(nogil=True)


def _cached_kernel(function: Callable[..., Any]) -> Any:
    kernel = _kernel(function)
    with suppress(RuntimeError):  # no directory can be written to
        kernel._cache = _Cache(function)
    return kernel


# Vector instructions. Each works on _LANES elements of an array, from an index on, and on a word with a bit for each.


def _built(emit: Callable[..., Any]) -> Callable[..., Any]:
    """The function that numba calls to build an instruction: it calls `emit` with a pointer for each (array, index)."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        operands, rest = [], iter(zip(signature.args, arguments, strict=True))
        for kind, value in rest:
            if isinstance(kind, types.Array):
                operands.append(builder.gep(context.make_array(kind)(context, builder, value).data, [next(rest)[1]]))
            else:
                operands.append(value)
        result = emit(builder, *operands)
        return context.get_dummy_value() if result is None else result

    return build


def _vector(place: Any) -> ir.VectorType:
    return ir.VectorType(place.type.pointee, _LANES)


def _read(builder: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _write(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(ir.VectorType(value.type, _LANES), None), value, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, _LANES), None))


def _masked(builder: Any, name: str, operand: Any, bits: Any, otherwise: Any) -> Any:
    """Calls LLVM's masked operation `name`."""
    operands = [operand, builder.bitcast(bits, ir.VectorType(ir.IntType(1), _LANES)), otherwise]
    signature = ir.FunctionType(otherwise.type, [each.type for each in operands])
    name = f"llvm.{name}.v{_LANES}i{otherwise.type.element.width}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), operands)


def _bit(builder: Any, bits: Any, lane: int) -> Any:
    return builder.and_(builder.lshr(bits, _WORD(lane)), _WORD(1))


def _write_some(builder: Any, values: Any, bits: Any, to: Any) -> None:
    if values.type.element.width in _NATIVE:
        undefined = ir.Constant(values.type, ir.Undefined)
        _write(builder, _masked(builder, "experimental.vector.compress", values, bits, undefined), to)
        return
    for lane in range(_LANES):
        builder.store(builder.extract_element(values, _WORD(lane)), to)
        to = builder.gep(to, [_bit(builder, bits, lane)])


@intrinsic
def _nonzero(_: Any, values: Any, at: Any, mask: Any) -> Any:
    """A word whose bit i says whether values[at + i] & mask is not 0."""

    def emit(builder: Any, place: Any, mask: Any) -> Any:
        found = builder.and_(_read(builder, place, _vector(place)), _splat(builder, mask))
        return builder.bitcast(builder.icmp_unsigned("!=", found, ir.Constant(found.type, None)), _WORD)

    return types.uint32(values, types.intp, values.dtype), _built(emit)


@intrinsic
def _compress(_: Any, source: Any, at: Any, bits: Any, target: Any, to: Any) -> Any:
    """Writes source[at + i], for each set bit i, to target[to:]. What follows them in the vector is undefined."""

    def emit(builder: Any, place: Any, bits: Any, to: Any) -> None:
        _write_some(builder, _read(builder, place, _vector(place)), bits, to)

    return types.void(source, types.intp, types.uint32, target, types.intp), _built(emit)


@intrinsic
def _positions(_: Any, first: Any, bits: Any, target: Any, to: Any) -> Any:
    """Writes first + i, for each set bit i, to target[to:]. What follows them in the vector is undefined."""

    def emit(builder: Any, first: Any, bits: Any, to: Any) -> None:
        lanes = ir.Constant(_vector(to), list(range(_LANES)))
        _write_some(builder, builder.add(_splat(builder, builder.trunc(first, lanes.type.element)), lanes), bits, to)

    return types.void(types.intp, types.uint32, target, types.intp), _built(emit)


@intrinsic
def _expand(_: Any, source: Any, at: Any, bits: Any, target: Any, to: Any) -> Any:
    """target[to + i] = the next element of source[at:] if bit i is set, else 1. Reads up to _LANES elements."""

    def emit(builder: Any, place: Any, bits: Any, to: Any) -> None:
        vector = _vector(to)
        if vector.element.width in _NATIVE:
            values = _masked(builder, "masked.expandload", place, bits, ir.Constant(vector, [1] * _LANES))
            _write(builder, values, to)
            return
        place, one = builder.gep(place, [builder.ctpop(bits)]), vector.element(1)
        for lane in reversed(range(_LANES)):  # backwards, since source and target may be one
            less = builder.neg(_bit(builder, bits, lane))
            place = builder.gep(place, [less])
            chosen = builder.and_(
                builder.sub(builder.load(place), one),
                builder.trunc(less, vector.element) if vector.element.width < _LANES else less,
            )
            builder.store(builder.add(chosen, one), builder.gep(to, [_WORD(lane)]))

    return types.void(source, types.intp, types.uint32, target, types.intp), _built(emit)


@intrinsic
def _add(_: Any, values: Any, at: Any, bits: Any, amount: Any) -> Any:
    """Adds `amount` to values[at + i], for each set bit i."""

    def emit(builder: Any, place: Any, bits: Any, amount: Any) -> None:
        mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), _LANES))
        more = builder.select(mask, _splat(builder, amount), ir.Constant(_vector(place), None))
        _write(builder, builder.add(_read(builder, place, more.type), more), place)

    return types.void(values, types.intp, types.uint32, values.dtype), _built(emit)


@intrinsic
def _ones(_: Any, bits: Any) -> Any:
    """Number of set bits."""
    return types.intp(types.uint32), _built(lambda builder, bits: builder.zext(builder.ctpop(bits), ir.IntType(64)))


@intrinsic
def _store(_: Any, word: Any, out: Any, at: Any) -> Any:
    """Writes four bytes, little-endian."""
    return types.void(types.uint32, out, types.intp), _built(_write)


@intrinsic
def _load(_: Any, code: Any, at: Any) -> Any:
    """Reads four bytes, little-endian."""
    return types.uint32(code, types.intp), _built(lambda builder, place: _read(builder, place, _WORD))


# Planes. A plane of n bits has ceil(n / 8) bytes. Writing one may touch three bytes more.


@_kernel
def _bytes(bits: int) -> int:
    return (bits + 7) >> 3


@_kernel
def _write_plane(values: np.ndarray, n: int, bit: int, out: np.ndarray, at: int) -> int:
    """Writes a plane with bit `bit` (1, 2, 4, ...) of each of n numbers. Returns the index after it."""
    for i in range(0, n, _LANES):
        _store(_nonzero(values, i, bit), out, at + (i >> 3))
    return at + _bytes(n)


@_kernel
def _word(code: np.ndarray, at: int, i: int, n: int) -> np.uint32:
    """Bits i to i + 31 of the plane of n bits at `at`. Reads nothing beyond the plane."""
    at, left = at + (i >> 3), n - i
    if left >= _LANES:
        return _load(code, at)
    word = np.uint32(0)
    for byte in range(_bytes(left)):
        word |= np.uint32(code[at + byte]) << np.uint32(8 * byte)
    return np.uint32(word & np.uint32((1 << left) - 1))


@_kernel
def _add_plane(code: np.ndarray, at: int, n: int, bit: int, values: np.ndarray) -> int:
    """Adds `bit` to each number whose bit is set in the plane. Returns the index after the plane."""
    for i in range(0, n, _LANES):
        _add(values, i, _word(code, at, i, n), bit)
    return at + _bytes(n)


@_kernel
def _set_bits(code: np.ndarray, at: int, n: int) -> int:
    """Number of set bits in a plane."""
    found = _ZERO
    for i in range(0, n, _LANES):
        found += _ones(_word(code, at, i, n))
    return found


@_kernel
def _spread(code: np.ndarray, at: int, n: int, values: np.ndarray, kept: int) -> None:
    """Moves the `kept` values to the plane's set bits, in place, and writes 1 elsewhere. The inverse of compressing.

    From the end backwards: values only move to the right, so none is overwritten before it is read.
    """
    for i in range((n - 1) // _LANES * _LANES, -1, -_LANES):
        bits = _word(code, at, i, n)
        kept -= _ones(bits)
        _expand(values, kept, bits, values, i)


# Lists of numbers. Levels code the numbers shifted by `order`, plus 1, so that a number continues if it is above 1.


@_kernel
def _order(values: np.ndarray, n: int) -> int:
    """The lowest order at which at most 64% of a sample of the numbers continue. The list is within 2% of the shortest."""
    order, more, seen = -1, 1, 1
    while 25 * more > 16 * seen:
        order, more, seen = order + 1, 0, 0
        for i in range(0, n, 8 * _LANES):  # every eighth vector is sample enough
            more += _ones(_nonzero(values, i, ~values.dtype.type((1 << order) - 1)))
            seen += min(_LANES, n - i)
    return order


@_kernel
def _write_numbers(values: np.ndarray, n: int, unary: int, out: np.ndarray, at: int, end: int) -> int:
    """Writes the list of n numbers at `at`. Returns the index after it, or `end` if it may not fit.

    Overwrites the values. _LANES zeros must follow them.
    """
    word = values.dtype.type
    order = _order(values, n)
    if at + 1 + order * _bytes(n) + 4 > end:
        return end
    out[at] = order
    at += 1
    for bit in range(order):
        at = _write_plane(values, n, word(1 << bit), out, at)
    for i in range(n):
        values[i] = (values[i] >> word(order)) + word(1)
    level = 0
    while n:
        if at + 2 * _bytes(n) + 4 > end:
            return end
        kept = _ZERO
        for i in range(0, n, _LANES):
            bits = _nonzero(values, i, ~word(1))
            _store(bits, out, at + (i >> 3))
            _compress(values, i, bits, values, kept)
            kept += _ones(bits)
        at += _bytes(n)
        n = kept
        values[n : n + _LANES] = 0  # what _compress left there is undefined, and the next level reads whole vectors
        if level < unary:
            for i in range(n):
                values[i] -= word(1)
        else:
            at = _write_plane(values, n, word(1), out, at)
            for i in range(n):
                values[i] >>= word(1)
        level += 1
    return at


@_kernel
def _read_numbers(code: np.ndarray, at: int, end: int, n: int, unary: int, values: np.ndarray) -> int:
    """Reads the list of n numbers at `at` into `values`. Returns the index after it, or -1 if it exceeds `end`."""
    word = values.dtype.type
    if not 0 <= at < end or code[at] > 8 * values.itemsize:
        return -1
    order, planes = np.int64(code[at]), at + 1
    at = planes + order * _bytes(n)
    counts, starts, level = np.empty(_LEVELS, np.int64), np.empty(_LEVELS, np.int64), 0
    # Levels have to be undone from the last to the first, but only reading them in order shows where each one starts.
    # First pass: where each level's plane starts, and how many numbers it has. Checks all lengths against `end`.
    kept = n
    while kept:
        counts[level], starts[level] = kept, at
        at += _bytes(kept)
        if at > end or level == _LEVELS - 1:
            return -1
        kept = _set_bits(code, starts[level], kept)
        if level >= unary:
            at += _bytes(kept)
        level += 1
    # Second pass, from the last level to the first: undoes what writing did.
    while level:
        level -= 1
        here, start = counts[level], starts[level]
        if level < unary:
            for i in range(kept):
                values[i] += word(1)
        else:
            for i in range(kept):
                values[i] <<= word(1)
            _add_plane(code, start + _bytes(here), kept, word(1), values)
        _spread(code, start, here, values, kept)
        kept = here
    for i in range(n):
        values[i] = (values[i] - word(1)) << word(order)
    for bit in range(order):
        planes = _add_plane(code, planes, n, word(1 << bit), values)
    return at


# Blocks and tensors.


@_kernel
def _ordered(bits: int, top: int) -> int:
    """Bit patterns of floats <-> integers in the order of the floats (-0.0 just below 0.0). Its own inverse.

    Floats are sign and magnitude: positive patterns are in order already, negative ones are in reverse order, which
    flipping all bits but the sign (bit `top`) corrects.
    """
    return bits ^ ((bits >> top) & ((1 << top) - 1))


@_kernel
def _many(count: int, n: int) -> bool:
    """Whether to code the positions of `count` changes as a plane of n bits: faster than gaps, and about as short."""
    return 5 * count > 2 * n


@_kernel
def _write_block(
    old: np.ndarray, new: np.ndarray, gaps: np.ndarray, steps: np.ndarray, out: np.ndarray, at: int
) -> int:
    """Writes a block at `at`. Returns the index after it, at most `at` + _HEADER + new.nbytes.

    gaps, steps: scratch, with room for one vector more than the block's elements.
    """
    n, top, word = len(old), 8 * old.itemsize - 1, steps.dtype.type
    for i in range(n):
        # The difference wraps around, as integers of this size do; reading wraps back.
        step = _ordered(new[i], top) - _ordered(old[i], top)
        # Zigzag code: steps of both signs become small numbers without a sign.
        steps[i] = word(step << 1) ^ word(-((step >> top) & 1))
    steps[n : n + _LANES] = 0
    start, full, count = at + _HEADER, at + _HEADER + new.nbytes, _ZERO
    for i in range(0, n, _LANES):
        bits = _nonzero(steps, i, ~word(0))
        _store(bits, out, start + (i >> 3))  # the plane of changes; gaps may overwrite it below
        _positions(i, bits, gaps, count)
        _compress(steps, i, bits, steps, count)
        count += _ones(bits)
    last = -1
    for i in range(count):
        position = _ZERO + gaps[i]
        gaps[i] = position - last - 1
        last = position
    for i in range(count):
        steps[i] -= word(1)  # a changed element's step is never 0
    gaps[count : count + _LANES] = 0
    steps[count : count + _LANES] = 0
    end = start
    if count:
        if _many(count, n):
            end += _bytes(n)
        else:
            end = _write_numbers(gaps, count, _GAPS, out, start, full)
        end = _write_numbers(steps, count, _STEPS, out, end, full)
    if end == full:  # the code is not shorter than the elements
        out[start:full] = new.view(np.uint8)
    _store(np.uint32(end - start), out, at)
    _store(np.uint32(count), out, at + 4)
    return end


@_kernel
def _scatter(gaps: np.ndarray, steps: np.ndarray, count: int, moves: np.ndarray) -> bool:
    """Writes each step plus 1 to its position in `moves`, and 0 elsewhere. False: a position is beyond the block."""
    reach, place = count, np.uint64(0)
    for i in range(count):
        reach += gaps[i]
    if reach > len(moves):
        return False
    moves[:] = 0
    for i in range(count):
        place += gaps[i]
        moves[place] = steps[i] + 1
        place += np.uint64(1)
    return True


@_kernel
def _read_block(
    code: np.ndarray, at: int, old: np.ndarray, new: np.ndarray, gaps: np.ndarray, steps: np.ndarray
) -> int:
    """Reads the block at `at` into `new`. Returns the index after it, or -1 if it is damaged."""
    n, top, start = len(old), 8 * old.itemsize - 1, at + _HEADER
    if start > len(code):
        return -1
    end, count = start + _ZERO + _load(code, at), _ZERO + _load(code, at + 4)
    if end > len(code):
        return -1
    if end - start == new.nbytes:
        new.view(np.uint8)[:] = code[start:end]
        return end
    if _many(count, n):  # true also for a damaged count above n, which the plane then contradicts
        at = start + _bytes(n)
        if at > end or _set_bits(code, start, n) != count:
            return -1
        at = _read_numbers(code, at, end, count, _STEPS, steps)
        for i in range(count):
            steps[i] += 2
        _spread(code, start, n, steps, count)
        for i in range(n):
            new[i] = steps[i] - 1
    else:
        at = start
        if count:
            at = _read_numbers(code, at, end, count, _GAPS, gaps)
            at = _read_numbers(code, at, end, count, _STEPS, steps)
        if not _scatter(gaps, steps, count, new):
            return -1
    for i in range(n):
        step = ((new[i] >> 1) & ((1 << top) - 1)) ^ -(new[i] & 1)
        new[i] = _ordered(old[i], top) + step
    for i in range(n):
        new[i] = _ordered(new[i], top)
    return end if at == end else -1


@_cached_kernel
def _write_tensor(old: np.ndarray, new: np.ndarray, gaps: np.ndarray, steps: np.ndarray, out: np.ndarray) -> int:
    """Writes all blocks of a tensor. Returns the number of bytes."""
    at = _ZERO
    for start in range(0, len(old), BLOCK):
        at = _write_block(old[start : start + BLOCK], new[start : start + BLOCK], gaps, steps, out, at)
    return at


@_cached_kernel
def _read_tensor(code: np.ndarray, old: np.ndarray, new: np.ndarray, gaps: np.ndarray, steps: np.ndarray) -> bool:
    """Reads all blocks of a tensor. False: the code is damaged, or has other than `len(old)` elements."""
    at = _ZERO
    for start in range(0, len(old), BLOCK):
        at = _read_block(code, at, old[start : start + BLOCK], new[start : start + BLOCK], gaps, steps)
        if at < 0:
            return False
    return at == len(code)


def _fixed(array: np.ndarray) -> np.ndarray:
    """A read-only view: numba compiles read-only and writable arrays separately, and the object store has read-only ones."""
    view = array.view()
    view.setflags(write=False)
    return view


def _scratch(old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Memory for a block's gaps and steps. New for each call, since calls run in several threads."""
    room = min(len(old), BLOCK) + _LANES
    return np.empty(room, np.uint16), np.empty(room, f"u{old.itemsize}")


def room(nbytes: int) -> int:
    """Bytes of `out` that `encode` needs for a tensor of `nbytes`: tensor, headers, and bytes written beyond a plane."""
    return nbytes + _HEADER * (1 + nbytes // BLOCK) + 4


def encode(old: np.ndarray, new: np.ndarray, out: np.ndarray) -> int:
    """Encodes `new` relative to `old` into `out`. Returns the number of bytes, at most nbytes + 8 for each block.

    old, new: [elements] int16 or int32, bit patterns of floats; read only.
    out: [at least room(new.nbytes)] uint8.
    Releases the GIL. The first call of a process for each dtype compiles (seconds), or loads the result from disk.
    """
    assert old.shape == new.shape and len(out) >= room(new.nbytes)
    return _write_tensor(_fixed(old), _fixed(new), *_scratch(old), out)


def decode(code: np.ndarray, old: np.ndarray, new: np.ndarray) -> bool:
    """Decodes `code` relative to `old` into `new`: the inverse of `encode`. Releases the GIL.

    code: [bytes] uint8. old, new: [elements] int16 or int32; `new` is written to.
    False: `code` is not a code for this number of elements; `new` is then undefined. A code that is damaged but well
    formed decodes to wrong elements, which the checksums of delta.py find.
    """
    assert old.shape == new.shape
    return _read_tensor(_fixed(code), _fixed(old), new, *_scratch(old))
