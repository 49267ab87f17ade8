"""The long convolution of more tokens than a tile has, by Triton kernels launched one by one.

See `archs.ops.long_conv_kernel`. The signal is taken as a matrix (M, P) of N = M P >= T tokens. A
transform of length N is one of length M along its columns, twiddles, and one of length P along its
rows, which is again two products, of P = P1 P2. Between these steps a row of the batch, its slot,
lies in memory as complex numbers: of float16 where the products take no more, each block of columns
or each row brought to at most 1, else of float32. As many channels go together as keep this memory
in the GPU's second-level cache; more do not run faster, and the memory does not grow with B or D.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from archs.ops.long_conv_columns_kernel import (
    long_conv_from_columns_kernel,
    long_conv_to_columns_kernel,
)
from archs.ops.long_conv_rows_kernel import (
    long_conv_backward_rows_kernel,
    long_conv_filter_rows_kernel,
    long_conv_rows_kernel,
    long_conv_signal_rows_kernel,
)
from archs.ops.long_conv_short_kernel import SHORT_TOKENS, long_conv_short_backward_kernel
from archs.ops.long_conv_tables import inner_tables, outer_tables

INNER = {512: (32, 16, 4), 1024: (64, 16, 4), 2048: (64, 32, 4), 4096: (128, 32, 8)}
FEWEST_ROWS = 16  # M, for tensor cores
COLUMN_TILE = 4096  # numbers of a block of columns
FEWEST_COLUMNS = 32  # of a block: a sector of bfloat16 and more
PRODUCT_ROWS = 64  # of an outer transform, at a time
EACH = 4  # rows that a program takes, for one set of tables
SLOT_BYTES = 32 * 2**20  # of all slots; the second-level cache of an H100 has 50 MB
POST, PRE, U = 0, 1, 2  # which short convolution a signal goes through


class Signal(NamedTuple):
    """What a kernel reads or writes, (B, D, T), tokens side by side."""

    tensor: Tensor | None
    batch: int
    channel: int
    short: int | None = None  # which short convolution it goes through


def signal(x: Tensor | None, short: int | None = None) -> Signal:
    """A tensor (B, D, T) with its strides."""
    return Signal(None, 0, 0) if x is None else Signal(x, x.stride(0), x.stride(1), short)


class Shape(NamedTuple):
    """Sizes of transforms and tiles."""

    M: int
    P1: int
    P2: int
    warps: int

    @property
    def row(self) -> int:
        """P."""
        return self.P1 * self.P2

    @property
    def columns(self) -> int:
        """Of a block."""
        return max(FEWEST_COLUMNS, COLUMN_TILE // self.M)


def shape_of(T: int) -> Shape:
    """The shortest transform for T tokens."""
    N = triton.next_power_of_2(T)
    P = min(N // FEWEST_ROWS, max(INNER))
    return Shape(N // P, *INNER[P])


class Slots:
    """Complex numbers (slots, 2, M, P), and what brings each block of columns and row to 1."""

    def __init__(self, slots: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        def scales(each: int) -> Tensor:
            return torch.empty(slots, each, dtype=torch.float32, device=device)

        self.values = torch.empty(slots, 2, shape.M, shape.row, dtype=dtype, device=device)
        self.of_blocks, self.of_rows = scales(shape.row // shape.columns), scales(shape.M)


class Launches:
    """The kernels of one call, on some channels and rows of the batch at a time."""

    def __init__(
        self,
        u: Tensor,
        skip: Tensor | None,
        short_filters: Tensor | None,
        short_bias: Tensor | None,
        accurate: bool,
    ) -> None:
        self.B, self.D, self.T = u.shape
        self.device = u.device
        self.shape = shape_of(self.T)
        self.skip, self.short = skip, (short_filters, short_bias)
        self.dtype = torch.float32 if accurate else torch.float16
        M, P1, P2, _ = self.shape
        self.outer = outer_tables(M, self.shape.row, self.shape.columns, accurate, u.device)
        self.inner = inner_tables(P1, P2, 0.0, accurate, u.device)
        self.parts = 2 if accurate else 1
        slot_bytes = 2 * M * self.shape.row * self.dtype.itemsize
        slots = max(1, SLOT_BYTES // slot_bytes)
        self.rows = min(self.B, slots)
        self.channels = min(self.D, max(1, slots // self.rows))

    def slots(self, count: int, dtype: torch.dtype | None = None) -> Slots:
        """Memory, of this call's type if no other is given."""
        return Slots(count, self.shape, dtype or self.dtype, self.device)

    def channel_groups(self) -> Iterator[tuple[int, int]]:
        """First channel, and how many."""
        for first in range(0, self.D, self.channels):
            yield first, min(self.channels, self.D - first)

    def row_groups(self) -> Iterator[tuple[int, int]]:
        """First row of the batch, and how many."""
        for first in range(0, self.B, self.rows):
            yield first, min(self.rows, self.B - first)

    def to_columns(
        self,
        x: Signal,
        gate: Signal,
        slots: Slots,
        channels: tuple[int, int],
        rows: tuple[int, int],
        skip: Tensor | None = None,
    ) -> None:
        """The transforms of the columns of x times its gate."""
        blocks = self.shape.row // self.shape.columns
        long_conv_to_columns_kernel[(channels[1] * rows[1] * blocks,)](
            x.tensor,
            gate.tensor,
            skip,
            *self.short,
            *self.outer,
            slots.values,
            slots.of_blocks,
            self.T,
            self.D,
            rows[0],
            channels[0],
            rows[1],
            x.batch,
            x.channel,
            gate.batch,
            gate.channel,
            X_SHORT=self._short(x),
            GATE_SHORT=self._short(gate),
            **self._column_sizes(),
        )

    def from_columns(
        self,
        slots: Slots,
        channels: tuple[int, int],
        rows: tuple[int, int],
        gate: Signal,
        y: Signal,
        second: Signal | None = None,
        second_y: Tensor | None = None,
        first_y: tuple[int, int] | None = None,
    ) -> None:
        """The signals of columns, times a gate to y; times a second gate to second_y.

        `first_y` is the row and channel of y where the group starts; None: as in the signals.
        """
        blocks = self.shape.row // self.shape.columns
        second = second or signal(None)
        long_conv_from_columns_kernel[(channels[1] * rows[1] * blocks,)](
            slots.values,
            slots.of_rows,
            gate.tensor,
            second.tensor,
            *self.short,
            *self.outer,
            y.tensor,
            second_y,
            self.T,
            self.D,
            rows[0],
            channels[0],
            *((rows[0], channels[0]) if first_y is None else first_y),
            rows[1],
            gate.batch,
            gate.channel,
            second.batch,
            second.channel,
            y.batch,
            y.channel,
            GATE_SHORT=self._short(gate),
            SECOND_SHORT=self._short(second),
            **self._column_sizes(),
        )

    def filter(self, filter: Tensor, slots: Slots, channels: tuple[int, int]) -> None:
        """The transforms of filters (D, T), the skip in the first tap."""
        taps = Signal(filter, 0, filter.stride(0))
        self.to_columns(taps, signal(None), slots, channels, (0, 1), self.skip)
        long_conv_filter_rows_kernel[(channels[1] * self.shape.M // EACH,)](
            slots.values,
            slots.of_blocks,
            slots.of_rows,
            *self.inner,
            EACH=EACH,
            COLUMNS=self.shape.columns,
            **self._row_sizes(),
        )

    def convolve(self, slots: Slots, filters: Slots, channels: int, rows: int) -> None:
        """The rows of slots by the filters' transforms."""
        long_conv_rows_kernel[(channels * rows * self.shape.M // EACH,)](
            slots.values,
            slots.of_blocks,
            slots.of_rows,
            filters.values,
            filters.of_rows,
            *self.inner,
            rows,
            EACH=EACH,
            COLUMNS=self.shape.columns,
            **self._row_sizes(),
        )

    def differentiate(
        self,
        inputs: Slots,
        gradients: Slots,
        filters: Slots,
        d_filters: Slots,
        channels: int,
        rows: tuple[int, int],
        output: bool,
    ) -> None:
        """Input and gradient of rows to output, if asked for, and input's gradient; d_filters."""
        long_conv_backward_rows_kernel[(channels * self.shape.M,)](
            inputs.values,
            gradients.values,
            inputs.of_blocks,
            gradients.of_blocks,
            inputs.of_rows,
            gradients.of_rows,
            filters.values,
            filters.of_rows,
            d_filters.values,
            *self.inner,
            rows[1],
            int(rows[0] > 0),
            OUTPUT=output,
            COLUMNS=self.shape.columns,
            **self._row_sizes(),
        )

    def taps(
        self, d_filters: Slots, slots: Slots, channels: tuple[int, int], d_taps: Tensor
    ) -> None:
        """The filters' gradients from those of their transforms."""
        long_conv_signal_rows_kernel[(channels[1] * self.shape.M // EACH,)](
            d_filters.values,
            slots.values,
            slots.of_rows,
            *self.inner,
            EACH=EACH,
            **self._row_sizes(),
        )
        taps = Signal(d_taps, 0, d_taps.stride(0))
        self.from_columns(slots, channels, (0, 1), signal(None), taps)

    def short_backward(
        self,
        x: Signal,
        d: Tensor,
        dx: Tensor,
        sums: Tensor,
        channels: tuple[int, int],
        rows: tuple[int, int],
    ) -> None:
        """Of a short convolution: d (slots, T) is the gradient of its output."""
        chunks = triton.cdiv(self.T, SHORT_TOKENS)
        long_conv_short_backward_kernel[(channels[1] * rows[1] * chunks,)](
            x.tensor,
            d,
            dx,
            self.short[0],
            sums,
            self.T,
            self.D,
            self.B,
            rows[0],
            channels[0],
            rows[1],
            x.batch,
            x.channel,
            dx.stride(0),
            dx.stride(1),
            SHORT=x.short,
            BLOCK=SHORT_TOKENS,
            num_warps=4,
        )

    def _short(self, x: Signal) -> int | None:
        return None if self.short[0] is None else x.short

    def _column_sizes(self) -> dict[str, Any]:
        M, P = self.shape.M, self.shape.row
        return {
            "M": M,
            "P": P,
            "COLUMNS": self.shape.columns,
            "ROWS": min(M, PRODUCT_ROWS),
            "PARTS": self.parts,
            "num_warps": 8,
            "num_stages": 1,
        }

    def _row_sizes(self) -> dict[str, Any]:
        M, P1, P2, warps = self.shape
        return {
            "M": M,
            "P1": P1,
            "P2": P2,
            "PARTS": self.parts,
            "num_warps": warps,
            "num_stages": 1,
        }


def split_forward(
    u: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    y: Tensor,
    accurate: bool,
) -> None:
    """Writes y. Tokens of all signals lie side by side."""
    launch = Launches(u, skip, short_filters, short_bias, accurate)
    slots, filters = launch.slots(launch.channels * launch.rows), launch.slots(launch.channels)
    for channels in launch.channel_groups():
        launch.filter(filter, filters, channels)
        for rows in launch.row_groups():
            launch.to_columns(signal(u, U), signal(pre, PRE), slots, channels, rows)
            launch.convolve(slots, filters, channels[1], rows[1])
            launch.from_columns(slots, channels, rows, signal(post, POST), signal(y))


def split_backward(
    dy: Tensor,
    u: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    d_u: Tensor,
    d_pre: Tensor | None,
    d_post: Tensor | None,
    accurate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Writes d_u, d_pre and d_post.

    Returns:
        The gradients of the taps (D, T), and of short filters and bias (3, D, 4).
    """
    launch = Launches(u, skip, short_filters, short_bias, accurate)
    B, D, T = u.shape
    count = launch.channels * launch.rows
    inputs, gradients, filters = (launch.slots(n) for n in (count, count, launch.channels))
    d_filters = launch.slots(launch.channels, torch.float32)
    d_taps = torch.empty(D, T, dtype=torch.float32, device=u.device)
    has_short = short_filters is not None
    if has_short:
        chunks = triton.cdiv(T, SHORT_TOKENS)
        shape = (3, D, B, chunks, 4)
        sums = torch.empty(shape, dtype=torch.float32, device=u.device)
        before = torch.empty(3, count, T, dtype=torch.float32, device=u.device)

    def to(x: Tensor | None, short: int, rows: int) -> tuple[Signal, Any]:
        """Where a gradient goes: where it is asked for, or to what is before `short_backward`."""
        if not has_short:
            return signal(x), None
        return Signal(before[short], T, rows * T), (0, 0)

    for channels in launch.channel_groups():
        launch.filter(filter, filters, channels)
        for rows in launch.row_groups():
            launch.to_columns(signal(u, U), signal(pre, PRE), inputs, channels, rows)
            launch.to_columns(signal(dy), signal(post, POST), gradients, channels, rows)
            launch.differentiate(
                inputs, gradients, filters, d_filters, channels[1], rows, post is not None
            )
            if post is not None:
                y, first = to(d_post, POST, rows[1])
                launch.from_columns(inputs, channels, rows, signal(dy), y, first_y=first)
            y, first = to(d_u, U, rows[1])
            second_y = None if pre is None else to(d_pre, PRE, rows[1])[0].tensor
            second = None if pre is None else signal(u, U)
            launch.from_columns(
                gradients, channels, rows, signal(pre, PRE), y, second, second_y, first
            )
            if has_short:
                for x, dx, short in ((post, d_post, POST), (pre, d_pre, PRE), (u, d_u, U)):
                    launch.short_backward(
                        signal(x, short), before[short], dx, sums[short], channels, rows
                    )
        launch.taps(d_filters, gradients, channels, d_taps)
    return d_taps, sums.sum((2, 3)) if has_short else None
