"""predict(): the seconds of a training step, term by term, with the all-to-alls of one method.

The terms, of one rank and step:

- computing: 2 operations per weight and token forward and 4 backward, 6 with the passes that are
  recomputed, over the achieved FLOPS; the experts of the most loaded rank have `load` times the
  mean rows, and all others wait for them. With a linear network of H columns, FFN 4H and k experts
  that is LSH-MoE's T_compute (Nie et al., NeurIPS 2024, A.2), FLOPS / (24 H^2 (1 + 2k)) per token.
- transfer: of each wire the bytes that the most loaded rank sends or receives over the bandwidth,
  within the node and between nodes at the same time, so that the slower of the two counts; without
  anything else that is the paper's T_a2a, and their ratio its scaling law. A message costs the
  latency once per peer.
- codec: the values that are encoded and decoded over the codec's speed, and a fixed time for each
  message (launches, planning), as benchmarks/bench_codec.py and `--measure` time them.
- overlap (--moe-a2a-chunks=c): the sender encodes piece i + 1 and decodes piece i - 1 while piece i
  is under way, as comm/all_to_all.py does: encode + transfer + decode of one piece, and c - 1 times
  the larger of transfer and encode + decode.
- beside: passes over memory and operations that a method adds at home (clustering, shared rows).
- gradients: all-reduce of the dense weights over the data-parallel ranks and of the experts' over
  their replicas, 2 (n - 1) / n of the bytes through the node's links and, of the part that each
  rank of a node has then, between nodes; less the time of the backward pass with
  --overlap-grad-reduce.
- optimizer: Adam's passes over memory, 28 bytes per parameter.
- the bubble of a pipeline of p stages and m micro-batches: (m + p - 1) / m.

Not in it: communication of tensor and context parallelism and between pipeline stages, the counts
that dispatchers gather, data loading, permuting rows; none of them depends on the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_moe_comp.plan.operations import dense_flops, expert_flops, weights_per_rank
from megatron_moe_comp.plan.shape import Layout, Model

ADAM_BYTES = 28
"""Read: gradient, parameter, two moments; written: the last three; float32 each."""
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Link:
    """What connects two ranks: bytes per second of a rank, each way, and seconds of a message."""

    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class CodecSpeed:
    """Values per second that a rank encodes and decodes, and seconds for each message."""

    encode: float
    decode: float
    message: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a rank achieves."""

    flops: float
    memory_bandwidth: float
    """Bytes per second, read and written."""
    near: Link
    """Within a node."""
    far: Link
    """Between nodes."""
    codecs: Mapping[str, CodecSpeed]


@dataclass(frozen=True)
class WireLoad:
    """One wire of one layer and micro-batch."""

    near_bytes: float
    """Of the most loaded rank, to or from the others of its node."""
    far_bytes: float
    """Of the most loaded rank, to or from other nodes."""
    mean_bytes: float
    """That a rank sends on average."""
    codec: str | None = None
    """What encodes it; None: rows are sent from where they are."""
    encoded: float = 0.0
    """Values, of the sender that all wait for."""
    decoded: float = 0.0
    collectives: int = 1
    passes: int = 1
    """How often it is used: twice if the forward pass is recomputed."""

    def scaled(self, factor: float) -> "WireLoad":
        """Returns the wire with so many times the rows."""
        names = ("near_bytes", "far_bytes", "mean_bytes", "encoded", "decoded")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


@dataclass(frozen=True)
class Traffic:
    """What a method does in an MoE layer of one stack."""

    wires: tuple[WireLoad, ...]
    memory_bytes: float = 0.0
    """Read and written at home besides, per micro-batch."""
    flops: float = 0.0
    """Operations at home besides, per micro-batch."""

    def scaled(self, factor: float) -> "Traffic":
        """Returns the traffic of so many times the rows."""
        wires = tuple(wire.scaled(factor) for wire in self.wires)
        return Traffic(wires, factor * self.memory_bytes, factor * self.flops)


@dataclass(frozen=True)
class Method:
    """A setting of the all-to-alls, as far as it costs time."""

    name: str
    flags: tuple[str, ...]
    traffic: tuple[Traffic, ...]
    """For each stack."""
    chunks: int = 1
    expert_rows: float = 1.0
    """Rows that experts compute over those that are routed."""
    alters_training: bool = False
    """Whether README reports a cost in quality."""

    def scaled(self, factor: float) -> "Method":
        """Returns the method on so many times the rows."""
        return replace(self, traffic=tuple(t.scaled(factor) for t in self.traffic))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and bytes that a rank sends through the four wires in it."""

    dense: float
    experts: float
    all_to_all: float
    """Until the last row is decoded: transfer and codec, less what overlaps."""
    transfer: float
    codec: float
    beside: float
    gradients: float
    optimizer: float
    wire_bytes: float

    @property
    def compute(self) -> float:
        """Seconds that are spent without any all-to-all."""
        return self.dense + self.experts + self.beside + self.gradients + self.optimizer

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return self.compute + self.all_to_all

    @property
    def share(self) -> float:
        """The part of the step that the all-to-alls take."""
        return self.all_to_all / self.step


def predict(model: Model, layout: Layout, machine: Machine, method: Method) -> Prediction:
    """Returns the cost of a step with a method; see the module for the terms."""
    stages, batches = layout.pipeline_parallel, model.num_microbatches
    # Micro-batches' worth of time on one stage, whose part of the layers is 1 / stages.
    turns = (batches + stages - 1) / stages
    dense = turns * dense_flops(model, layout) / machine.flops
    experts = turns * method.expert_rows * expert_flops(model, layout) / machine.flops
    total = transfer = codec = beside = 0.0
    for stack, traffic in zip(model.stacks, method.traffic, strict=True):
        layers = stack.num_moe_layers
        for wire in traffic.wires:
            times = [wire.passes * layers * t for t in _wire_seconds(wire, method, layout, machine)]
            total, transfer, codec = total + times[0], transfer + times[1], codec + times[2]
        at_home = traffic.memory_bytes / machine.memory_bandwidth + traffic.flops / machine.flops
        beside += layers * at_home
    passes = 4 if model.recompute == "full" else 3
    return Prediction(
        dense=dense,
        experts=experts,
        all_to_all=turns * total,
        transfer=turns * transfer,
        codec=turns * codec,
        beside=turns * beside,
        gradients=_gradient_seconds(
            model, layout, machine, hidden=(passes - 1) / passes * (dense + experts)
        ),
        optimizer=_optimizer_seconds(model, layout, machine),
        wire_bytes=wire_bytes(model, layout, method),
    )


def wire_bytes(model: Model, layout: Layout, method: Method) -> float:
    """Returns the bytes that a rank sends through the four wires in a step, on average."""
    of_layers = sum(
        stack.num_moe_layers * wire.passes * wire.mean_bytes
        for stack, traffic in zip(model.stacks, method.traffic, strict=True)
        for wire in traffic.wires
    )
    return model.num_microbatches / layout.pipeline_parallel * of_layers


def _wire_seconds(
    wire: WireLoad, method: Method, layout: Layout, machine: Machine
) -> tuple[float, float, float]:
    """Returns the seconds of a wire, and those of its transfer and of its codec alone."""
    latency = wire.collectives * (
        layout.near_peers * machine.near.latency + layout.far_peers * machine.far.latency
    )
    transfer = max(wire.near_bytes / machine.near.bandwidth, wire.far_bytes / machine.far.bandwidth)
    if wire.codec is None or not layout.near_peers + layout.far_peers:
        return latency + transfer, latency + transfer, 0.0
    speed, pieces = machine.codecs[wire.codec], method.chunks
    encode = wire.encoded / speed.encode / pieces + speed.message
    decode = wire.decoded / speed.decode / pieces + speed.message
    transfer = transfer / pieces + latency
    total = encode + transfer + decode + (pieces - 1) * max(transfer, encode + decode)
    return total, pieces * transfer, pieces * (encode + decode)


def _gradient_seconds(model: Model, layout: Layout, machine: Machine, hidden: float) -> float:
    """Returns the time of summing gradients that the backward pass's `hidden` does not cover."""
    of_stage = layout.ranks // layout.pipeline_parallel
    shards = (layout.tensor_parallel, layout.expert_parallel * layout.expert_tensor_parallel)
    total = sum(
        _all_reduce_seconds(GRADIENT_BYTES * weights, of_stage // shard, shard, layout, machine)
        for weights, shard in zip(weights_per_rank(model, layout), shards, strict=True)
    )
    return max(0.0, total - hidden) if layout.overlap_gradients else total


def _all_reduce_seconds(
    num_bytes: float, members: int, stride: int, layout: Layout, machine: Machine
) -> float:
    """Returns the time of summing over so many ranks, `stride` apart: in the nodes, then between.

    A rank of a node sends the part that it has summed up within the node.
    """
    local = min(members, max(1, layout.ranks_per_node // stride))
    nodes = -(-members // local)
    seconds = 0.0
    for size, link, part in ((local, machine.near, 1), (nodes, machine.far, local)):
        volume = 2 * (size - 1) / size * num_bytes / part
        seconds += volume / link.bandwidth + 2 * (size - 1) * link.latency
    return seconds


def _optimizer_seconds(model: Model, layout: Layout, machine: Machine) -> float:
    dense, expert = weights_per_rank(model, layout)
    if layout.sharded_optimizer:
        of_stage = layout.ranks // layout.pipeline_parallel
        dense /= of_stage // layout.tensor_parallel
        expert /= of_stage // (layout.expert_parallel * layout.expert_tensor_parallel)
    return ADAM_BYTES * (dense + expert) / machine.memory_bandwidth
