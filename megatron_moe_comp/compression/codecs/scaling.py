"""What several codecs do to values before they are codes and after."""

import torch


def normalized(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns rows / scales in [-1, 1], float32 [N, H]; zeros where the scale is zero or NaN.

    The quotient of two tiny numbers is as exact as any other, so no row is too small.

    Args:
        rows: [N, H] of any floating-point dtype.
        scales: float32 [N, 1], the largest magnitude of each row, or NaN; see `ops.absmax`.
    """
    usable = scales > 0
    return torch.where(usable, rows.float(), 0.0) / torch.where(usable, scales, 1.0)
