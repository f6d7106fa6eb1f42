"""cluster_sum and cluster_broadcast: clusters of rows to one row each, and back.

Each is the other's gradient. Rows are added in their order within the cluster, in float32 (float64
for float64 rows), and rounded once, so every kernel gives the same bytes and, unlike sums by atomic
additions, every run does.

Shapes: N rows, C clusters, H columns.
"""

import torch

_ARGUMENTS = "Tensor order, Tensor offsets, bool mean) -> Tensor"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_reference(
    rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
    wide = rows.index_select(0, order).to(_wide(rows.dtype))
    sums = torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True)
    if mean:
        sums = sums / offsets.diff().clamp(min=1).to(sums.dtype)[:, None]
    return sums.to(rows.dtype)


def _broadcast_reference(
    values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, mean: bool
) -> torch.Tensor:
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
        rows: [N, H].
        order: int64 [N], a permutation: rows order[offsets[c]] to order[offsets[c + 1] - 1] are
            cluster c.
        offsets: int64 [C + 1], from 0 to N, not falling.
        mean: whether the sum is divided by the cluster's number of rows.
    """
    return torch.ops.megatron_moe_comp.cluster_sum(rows.contiguous(), order, offsets, mean)


def cluster_broadcast(
    values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, *, mean: bool = False
) -> torch.Tensor:
    """Returns for each row the value of its cluster, [N, H]; differentiable.

    Args:
        values: [C, H].
        order: see `cluster_sum`.
        offsets: see `cluster_sum`.
        mean: whether the value is divided by the cluster's number of rows.
    """
    return torch.ops.megatron_moe_comp.cluster_broadcast(values.contiguous(), order, offsets, mean)
