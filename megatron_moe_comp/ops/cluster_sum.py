"""cluster_sum and cluster_broadcast: clusters of rows to one row each, and back.

Each is the other's gradient. Rows are added to zero in their order within the cluster, in float32
(float64 for float64 rows), and rounded once, so every kernel gives the same bytes and, unlike sums
by atomic additions, every run does.

Four rows of one column in three clusters, {0, 2, 3}, {} and {1}:

    rows     [[1.0], [2.0], [3.0], [8.0]]
    order    [0, 2, 3, 1]
    offsets  [0, 3, 3, 4]
    cluster_sum, mean        [[4.0], [0.0], [2.0]]
    cluster_broadcast of it  [[4.0], [2.0], [4.0], [4.0]]

The mean of equal rows is that row as long as every partial sum is exact: up to 2^16 bfloat16 or
2^13 float16 rows that do not overflow float32, but only 1, 2 or 4 rows of float32 or float64, where
already 3 may miss by the last bit. A -0 becomes +0.

Shapes: N rows, C clusters, H columns.
"""

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ARGUMENTS = "Tensor order, Tensor offsets, bool mean) -> Tensor"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(name: str, rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> None:
    """Raises ValueError unless the tensors have the right form.

    Args:
        name: "rows": `order` holds one entry per row; "values": one entry per cluster.
        rows: the tensor of that name.
        order: see `cluster_sum`.
        offsets: see `cluster_sum`.
    """
    if rows.dim() != 2 or not rows.is_contiguous() or rows.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be contiguous float32, bfloat16, float16 or float64 of two dimensions, "
            f"not {rows.dtype} {list(rows.shape)} with strides {rows.stride()}"
        )
    for index_name, index in (("order", order), ("offsets", offsets)):
        right = index.dim() == 1 and index.is_contiguous() and index.dtype == torch.int64
        if not right or index.device != rows.device:
            raise ValueError(
                f"{index_name} must be contiguous int64 of one dimension on {rows.device}, not "
                f"{index.dtype} {list(index.shape)} on {index.device}"
            )
    if name == "rows" and len(order) != len(rows):
        raise ValueError(f"order must have one entry for each of the {len(rows)} rows: {order}")
    if len(offsets) != len(rows) + 1 if name == "values" else len(offsets) == 0:
        raise ValueError(f"offsets must be one more than there are clusters, not {len(offsets)}")
    if rows.device.type == "cpu":  # elsewhere that would mean waiting for the contents
        _check_contents(order, offsets)


def _check_contents(order: torch.Tensor, offsets: torch.Tensor) -> None:
    """Raises ValueError unless every row is in one cluster."""
    ends = offsets[[0, -1]].tolist()
    if ends != [0, len(order)] or (offsets.diff() < 0).any():
        raise ValueError(f"offsets must be from 0 to {len(order)} and not fall: {offsets}")
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"order must be a permutation of 0 to {len(order) - 1}: {order}")


def _sum_reference(
    rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
    _check("rows", rows, order, offsets)
    wide = rows.index_select(0, order).to(_wide(rows.dtype))
    # For two dimensions it adds one row after the other to zero, on every device.
    sums = torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True)
    if mean:
        sums = sums / offsets.diff().clamp(min=1).to(sums.dtype)[:, None]
    return sums.to(rows.dtype)


def _broadcast_reference(
    values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
    _check("values", values, order, offsets)
    counts = offsets.diff()
    if mean:
        divisors = counts.clamp(min=1).to(_wide(values.dtype))[:, None]
        values = (values.to(divisors.dtype) / divisors).to(values.dtype)
    spread = values.repeat_interleave(counts, dim=0, output_size=len(order))
    return torch.empty_like(spread).index_copy_(0, order, spread)


def _sum_fake(
    rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1])


def _broadcast_fake(
    values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
    return values.new_empty(order.shape[0], values.shape[1])


def _keep_clusters(ctx, inputs, output) -> None:  # noqa: ANN001
    _, order, offsets, ctx.mean = inputs
    ctx.save_for_backward(order, offsets)


for _name, _first, _reference, _fake, _adjoint in (
    ("cluster_sum", "rows", _sum_reference, _sum_fake, "cluster_broadcast"),
    ("cluster_broadcast", "values", _broadcast_reference, _broadcast_fake, "cluster_sum"),
):

    def _backward(ctx, grad, adjoint=_adjoint):  # noqa: ANN001, ANN202
        op = getattr(torch.ops.megatron_moe_comp, adjoint)
        return op(grad.contiguous(), *ctx.saved_tensors, ctx.mean), None, None, None

    torch.library.define(f"megatron_moe_comp::{_name}", f"(Tensor {_first}, {_ARGUMENTS}")
    torch.library.impl(f"megatron_moe_comp::{_name}", "CompositeExplicitAutograd")(_reference)
    torch.library.register_fake(f"megatron_moe_comp::{_name}")(_fake)
    torch.library.register_autograd(
        f"megatron_moe_comp::{_name}", _backward, setup_context=_keep_clusters
    )


def cluster_sum(
    rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, *, mean: bool
) -> torch.Tensor:
    """Returns the sum or the mean of each cluster's rows, [C, H]; differentiable.

    The mean divides the sum once; a cluster without rows is zero.

    Args:
        rows: float32, bfloat16, float16 or float64 [N, H].
        order: int64 [N], a permutation: rows order[offsets[c]] to order[offsets[c + 1] - 1] are
            cluster c.
        offsets: int64 [C + 1], from 0 to N, not falling.
        mean: whether the sum is divided by the cluster's number of rows.

    Raises:
        ValueError: a tensor has not the right form. What order and offsets hold is checked on the
            CPU alone: on a GPU anything else reads or writes out of bounds.
    """
    return torch.ops.megatron_moe_comp.cluster_sum(rows.contiguous(), order, offsets, mean)


def cluster_broadcast(
    values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, *, mean: bool = False
) -> torch.Tensor:
    """Returns for each row the value of its cluster, [N, H]; differentiable.

    Args:
        values: float32, bfloat16, float16 or float64 [C, H].
        order: see `cluster_sum`.
        offsets: see `cluster_sum`.
        mean: whether the value is divided by the cluster's number of rows.
    """
    return torch.ops.megatron_moe_comp.cluster_broadcast(values.contiguous(), order, offsets, mean)
