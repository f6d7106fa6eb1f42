"""What codecs hand to the ops that encode or decode all of their segments at once."""

from collections.abc import Sequence

from megatron_moe_comp import ops
from megatron_moe_comp.compression.payload import Segment


def filled(segments: Sequence[Segment]) -> list[Segment]:
    """Returns the segments that have rows."""
    return [s for s in segments if s.num_rows]


def flat(segments: Sequence[Segment]) -> list[int]:
    """Returns the segments, whose two sections are codes and scales, as an op takes them."""
    return ops.flatten(
        [ops.OpSegment(s.first_row, s.num_rows, s.num_bits, *s.offsets) for s in filled(segments)]
    )
