"""Rows in Triton: R rows of a norm, or a tile of rows of a gate, in registers at a time.

The formulas are those of `mosaic_gpu/kernels.py`. A program takes every NUM_PROGRAMS-th step of R
rows; a backward program adds up its gradients of vectors and writes one partial sum of each. A
norm's next rows are on their way while it sums the present ones, backward with PREFETCH alone.
"""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine as add

from pallas_kernels.common.triton import device_function


@device_function
def row_sums(values):
    """Sums over columns, (R, 1)."""
    return tl.reduce(values, 1, add)[:, None]


@device_function
def load_vector(pointer, columns, in_row, HAS: tl.constexpr):
    """(1, BLOCK) of a vector, or 0."""
    values = tl.full([1, columns.shape[0]], 0.0, tl.float32)
    if HAS:
        values = tl.load(pointer + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return values


@device_function
def locate_rows(start, columns, num_rows, R: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of R rows, where they are in memory, and which of them exist, (R, BLOCK)."""
    rows = start + tl.arange(0, R)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return rows, rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask


@device_function
def load_rows(pointer, at, mask, HAS: tl.constexpr = True):
    """(R, BLOCK), zero outside of the rows; a single zero if there is no such operand."""
    if HAS:
        return tl.load(pointer + at, mask=mask, other=0.0)
    else:
        return tl.full([1, 1], 0.0, tl.float32)


@device_function
def store_sums(pointer, columns, in_row, sums, WIDTH: tl.constexpr, HAS: tl.constexpr):
    """This program's partial sum over its rows."""
    if HAS:
        at = pointer + tl.program_id(0) * WIDTH + columns
        tl.store(at, tl.reduce(sums, 0, add), mask=in_row)


@device_function
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def rowwise_norm_forward(
    x, added, offset, scale, bias, num_rows, y, means, rstds,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
    EPS: tl.constexpr, CENTERED: tl.constexpr, ADDED: tl.constexpr, OFFSET: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """RMSNorm, or LayerNorm if CENTERED, of x + added + offset."""
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    offsets = load_vector(offset, columns, in_row, OFFSET)
    scales = load_vector(scale, columns, in_row, SCALE)
    biases = load_vector(bias, columns, in_row, BIAS)
    first = tl.program_id(0) * R
    rows, at, mask = locate_rows(first, columns, num_rows, R, WIDTH)
    xs = load_rows(x, at, mask)
    addeds = load_rows(added, at, mask, ADDED)
    for start in range(first, num_rows, NUM_PROGRAMS * R):
        z = xs.to(tl.float32)
        if ADDED:
            z += addeds.to(tl.float32)
        here, here_at, here_mask = rows, at, mask
        rows, at, mask = locate_rows(start + NUM_PROGRAMS * R, columns, num_rows, R, WIDTH)
        xs = load_rows(x, at, mask)
        addeds = load_rows(added, at, mask, ADDED)
        if OFFSET:
            z += offsets
        if CENTERED:
            mean = row_sums(z) / WIDTH
            z = tl.where(in_row[None, :], z - mean, 0.0)
            tl.store(means + here[:, None], mean, mask=(here < num_rows)[:, None])
        r = tl.rsqrt(row_sums(z * z) / WIDTH + EPS)
        tl.store(rstds + here[:, None], r, mask=(here < num_rows)[:, None])
        z *= r
        if SCALE:
            z *= scales
        if BIAS:
            z += biases
        tl.store(y + here_at, z.to(y.dtype.element_ty), mask=here_mask)


@triton.jit
def rowwise_norm_backward(
    x, added, dy, offset, scale, means, rstds, num_rows, dx, d_offset, d_scale, d_bias,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
    CENTERED: tl.constexpr, ADDED: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """dx, which is also the gradient of `added`, and partial sums of the vectors' gradients."""
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    offsets = load_vector(offset, columns, in_row, OFFSET)
    scales = load_vector(scale, columns, in_row, SCALE)
    offset_sums = tl.full([R, BLOCK], 0.0, tl.float32)
    scale_sums = tl.full([R, BLOCK], 0.0, tl.float32)
    bias_sums = tl.full([R, BLOCK], 0.0, tl.float32)
    first = tl.program_id(0) * R
    rows, at, mask = locate_rows(first, columns, num_rows, R, WIDTH)
    xs = load_rows(x, at, mask)
    dys = load_rows(dy, at, mask)
    addeds = load_rows(added, at, mask, ADDED)
    for start in range(first, num_rows, NUM_PROGRAMS * R):
        z = xs.to(tl.float32)
        g = dys.to(tl.float32)
        if ADDED:
            z += addeds.to(tl.float32)
        here, here_at, here_mask = rows, at, mask
        rows, at, mask = locate_rows(start + NUM_PROGRAMS * R, columns, num_rows, R, WIDTH)
        if PREFETCH:
            xs = load_rows(x, at, mask)
            dys = load_rows(dy, at, mask)
            addeds = load_rows(added, at, mask, ADDED)
        if OFFSET:
            z += offsets
        r = tl.load(rstds + here[:, None], mask=(here < num_rows)[:, None], other=0.0)
        if CENTERED:
            z -= tl.load(means + here[:, None], mask=(here < num_rows)[:, None], other=0.0)
        z = tl.where(in_row[None, :], z * r, 0.0)
        if SCALE:
            scale_sums += g * z
        if BIAS:
            bias_sums += g
        if SCALE:
            g *= scales
        dz = g - z * (row_sums(g * z) / WIDTH)
        if CENTERED:
            dz -= row_sums(g) / WIDTH
        dz = tl.where(in_row[None, :], dz * r, 0.0)
        if OFFSET:
            offset_sums += dz
        tl.store(dx + here_at, dz.to(dx.dtype.element_ty), mask=here_mask)
        if not PREFETCH:
            xs = load_rows(x, at, mask)
            dys = load_rows(dy, at, mask)
            addeds = load_rows(added, at, mask, ADDED)
    store_sums(d_offset, columns, in_row, offset_sums, WIDTH, OFFSET)
    store_sums(d_scale, columns, in_row, scale_sums, WIDTH, SCALE)
    store_sums(d_bias, columns, in_row, bias_sums, WIDTH, BIAS)


@triton.jit
def rowwise_gate_forward(
    x, y, bias, num_rows, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """silu(x + bias), times y if GATE, of BLOCK columns."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    biases = load_vector(bias, columns, in_row, BIAS)
    for start in range(tl.program_id(0) * R, num_rows, NUM_PROGRAMS * R):
        _, at, mask = locate_rows(start, columns, num_rows, R, WIDTH)
        z = load_rows(x, at, mask).to(tl.float32)
        if BIAS:
            z += biases
        value = z * sigmoid(z)
        if GATE:
            value *= load_rows(y, at, mask).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rowwise_gate_backward(
    x, y, d_out, bias, num_rows, dx, dy, d_bias, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    R: tl.constexpr, NUM_PROGRAMS: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dx, dy if GATE, and a partial sum of the bias's gradient."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    biases = load_vector(bias, columns, in_row, BIAS)
    bias_sums = tl.full([R, BLOCK], 0.0, tl.float32)
    for start in range(tl.program_id(0) * R, num_rows, NUM_PROGRAMS * R):
        _, at, mask = locate_rows(start, columns, num_rows, R, WIDTH)
        z = load_rows(x, at, mask).to(tl.float32)
        g = load_rows(d_out, at, mask).to(tl.float32)
        if BIAS:
            z += biases
        s = sigmoid(z)
        if GATE:
            tl.store(dy + at, (g * (z * s)).to(dy.dtype.element_ty), mask=mask)
            g *= load_rows(y, at, mask).to(tl.float32)
        dz = g * (s * (1.0 + z * (1.0 - s)))
        if BIAS:
            bias_sums += dz
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=mask)
    store_sums(d_bias, columns, in_row, bias_sums, WIDTH, BIAS)
