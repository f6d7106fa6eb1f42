"""The four wires: the all-to-alls of an MoE layer in one training step."""

from typing import Literal, get_args

Wire = Literal["dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd"]
"""Named as Megatron names its hooks."""

WIRES: tuple[Wire, ...] = get_args(Wire)
