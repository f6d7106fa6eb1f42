"""What a codec is: float rows <-> their bytes in a message."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar

import torch

from megatron_moe_comp.compression.payload import Section, Segment, read_bytes, write_bytes
from megatron_moe_comp.compression.random_stream import RandomStream

_BLOCK_VALUES = 1 << 16


class Codec(ABC):
    """One format of rows on the wire; a pure function of rows, bits and random stream.

    A codec keeps no state and never communicates. Shapes: N rows, H columns.
    """

    name: ClassVar[str]
    num_bits_range: ClassVar[tuple[int, int] | None] = None
    """The fewest and most bits per value; None: fixed by the format, whatever is asked for."""
    kernels: ClassVar[tuple[str, ...]] = ()
    """The ops that encode and decode; none: operations of torch."""
    options: ClassVar[tuple[str, ...]] = ()
    """The codec's fields that the flags --moe-a2a-FIELD set."""

    @abstractmethod
    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the sections of a segment whose rows have these sizes, dtype and bits."""

    @abstractmethod
    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes the sections of some segments' rows into the message.

        A row with NaN or infinity must not decode to finite values.

        Args:
            rows: [N, H], any floating-point dtype, contiguous.
            segments: which rows, and where in the message.
            message: uint8.
            random: which random numbers to use; a row's own are chosen by its index in `rows`, so
                the division into segments and calls changes nothing.
        """

    @abstractmethod
    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes the rows of some segments, as `encode` left them.

        Args:
            message: uint8.
            segments: where in the message, and where to write to.
            rows: [N, H], any floating-point dtype, contiguous.
            random: of the message; a segment's sender used `random.of_rank(segment.sender)`.
        """

    @property
    def is_segment_wide(self) -> bool:
        """Whether rows of one segment share anything, so that it cannot be sent in pieces."""
        return any(s.segment_bytes for s in self.sections(8, torch.float32, 8))


class TensorCodec(Codec):
    """A codec in plain torch operations, on whole tensors with the bytes of one section each."""

    @abstractmethod
    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns one tensor per section, of any dtype: [N, ...], or [1, ...] of a segment.

        Args:
            rows: [N, H]; of a single segment if the codec has sections per segment.
            row_numbers: int64 [N], which rows of the random stream they are.
            num_bits: bits per value.
            random: which random numbers to use.
        """

    @abstractmethod
    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns the rows [N, H] in `dtype`.

        Args:
            parts: one per section: uint8 [N, row_bytes] or [1, segment_bytes].
            num_bits: bits per value.
            hidden_size: H.
            dtype: of the rows.
        """

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Encodes some rows at a time; see `_groups`."""
        for num_bits, group in self._groups(segments, rows):
            slices = [slice(s.first_row, s.first_row + s.num_rows) for s in group]
            row_numbers = torch.cat(
                [torch.arange(s.start, s.stop, device=rows.device) for s in slices]
            )
            parts = self.encode_rows(
                torch.cat([rows[s] for s in slices]), row_numbers, num_bits, random
            )
            sections = self.sections(rows.shape[1], rows.dtype, num_bits)
            first = 0
            for segment in group:
                for section, part, offset in zip(sections, parts, segment.offsets, strict=True):
                    own = part[first : first + segment.num_rows] if section.row_bytes else part
                    write_bytes(message, offset, own)
                first += segment.num_rows

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Decodes some rows at a time; see `_groups`."""
        hidden_size, dtype = rows.shape[1], rows.dtype
        for num_bits, group in self._groups(segments, rows):
            parts = []
            for i, section in enumerate(self.sections(hidden_size, dtype, num_bits)):
                width = section.row_bytes or section.segment_bytes
                pieces = [
                    read_bytes(
                        message,
                        s.offsets[i],
                        (s.num_rows if section.row_bytes else 1, width),
                        torch.uint8,
                    )
                    for s in group
                ]
                parts.append(torch.cat(pieces))
            decoded = self.decode_rows(parts, num_bits, hidden_size, dtype)
            first = 0
            for s in group:
                rows[s.first_row : s.first_row + s.num_rows] = decoded[first : first + s.num_rows]
                first += s.num_rows

    def _groups(
        self, segments: Sequence[Segment], rows: torch.Tensor
    ) -> Iterator[tuple[int, list[Segment]]]:
        """Yields bits and the segments with rows to work on at once.

        A segment at a time where its rows share anything. Otherwise on a CPU a block of rows whose
        temporaries stay in the cache, elsewhere all rows of equal bits: few launches.
        """
        filled = [s for s in segments if s.num_rows]
        if self.is_segment_wide:
            yield from ((s.num_bits, [s]) for s in filled)
        elif rows.device.type == "cpu":
            for s in filled:
                yield from ((s.num_bits, [block]) for block in self._blocks(s, rows))
        else:
            filled.sort(key=lambda s: s.num_bits)
            for num_bits, group in groupby(filled, key=lambda s: s.num_bits):
                yield num_bits, list(group)

    def _blocks(self, segment: Segment, rows: torch.Tensor) -> Iterator[Segment]:
        """Yields the segment in blocks of about `_BLOCK_VALUES` values."""
        hidden_size = rows.shape[1]
        sections = self.sections(hidden_size, rows.dtype, segment.num_bits)
        block_rows = max(1, _BLOCK_VALUES // hidden_size)
        for start in range(0, segment.num_rows, block_rows):
            offsets = (
                offset + start * section.row_bytes
                for section, offset in zip(sections, segment.offsets, strict=True)
            )
            yield segment._replace(
                first_row=segment.first_row + start,
                num_rows=min(block_rows, segment.num_rows - start),
                offsets=tuple(offsets),
                sender_row=segment.sender_row + start,
            )
