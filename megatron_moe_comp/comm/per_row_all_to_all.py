"""The all-to-all of clustered rows that get gradients of their own.

Shapes: N rows of this rank, M rows received, H columns.
"""

from collections.abc import Callable

import torch

from megatron_moe_comp.comm.all_to_all import Message, send
from megatron_moe_comp.comm.routes import Route
from megatron_moe_comp.stats.comm_stats import CommStats

Resize = Callable[..., torch.Tensor]
"""Makes other rows of some rows."""


def per_row_all_to_all(
    rows: torch.Tensor,
    resize: tuple[Resize, Resize],
    masks: torch.Tensor | None,
    routes: tuple[Route, Route],
    messages: tuple[Message, Message],
    stats: CommStats,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns rows [M, H] of which fewer crossed the wire, and the masks that came with them.

    The gradient of each of the M rows takes the way back on its own, and is what the N rows get: it
    is not the derivative of the forward, whose rows shared others' way.

    Args:
        rows: [N, H].
        resize: the rows to send, from `rows`; and the M rows, from those that arrived and the masks
            with them.
        masks: uint8 [rows to send, bytes], or None.
        routes: of the rows to send; and of all N, in the same direction.
        messages: encoding of the forward and of the backward wire.
        stats: counts both.
    """
    return _PerRowAllToAll.apply(rows, resize, masks, routes, messages, stats)


class _PerRowAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, resize, masks, routes, messages, stats):  # noqa: ANN001, ANN205
        ctx.route, ctx.message, ctx.stats = routes[1], messages[1], stats
        fewer, all_again = resize
        sent = send(fewer(rows), None, masks, routes[0], messages[0], stats)
        arrived, _, masks = sent
        if masks is not None:
            ctx.mark_non_differentiable(masks)
        return all_again(arrived, masks), masks

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, _):  # noqa: ANN001, ANN205
        grads = send(grad_rows, None, None, ctx.route.reversed(), ctx.message, ctx.stats)
        return grads[0], None, None, None, None, None
