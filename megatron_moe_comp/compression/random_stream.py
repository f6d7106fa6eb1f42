"""Which random numbers a message uses: a pure function of where in the training it is sent.

Everything that a counter-based generator needs is derived from the seed and the position of the
message (iteration, micro-batch, layer, wire, sending rank), and nothing is drawn from a stateful
generator. So activation recomputation, a resumed run and every kernel repeat the same bits, and no
two messages of one run share a random number.
"""

from dataclasses import dataclass, replace

import torch

from megatron_moe_comp.compression.wires import WIRES, Wire
from megatron_moe_comp.ops.philox import philox4x32

_LAYER_BITS, _WIRE_BITS, _PASS_BITS = 13, 2, 16
MAX_LAYERS = 1 << _LAYER_BITS


@dataclass(frozen=True)
class TrainingStep:
    """Where training is: the iteration (from 0) and its number of micro-batches."""

    iteration: int
    num_microbatches: int


@dataclass(frozen=True)
class RandomStream:
    """Key and the two constant counter words of Philox4x32 for one message.

    The other two counter words are the row and the group of eight columns, so a stream holds
    2^32 rows of 2^32 groups.
    """

    key: int
    """64 bits: the user's seed and the global rank of the sender."""
    offset: int
    """32 bits: the iteration."""
    stream: int
    """32 bits: evaluation or training, layer, wire and the number of the pass."""

    def of_rank(self, rank: int) -> "RandomStream":
        """Returns the stream of the same wire and pass with which a global rank sends."""
        return replace(self, key=rank << 32 | self.key % (1 << 32))


@dataclass(frozen=True)
class ForwardPass:
    """One passage of rows through one MoE layer; its backward is part of the same passage."""

    iteration: int
    index: int
    """Which forward pass of this layer in this iteration: the micro-batch."""
    training: bool
    recomputed: bool = False
    """Whether the same rows already passed, without gradients."""

    def stream(self, *, seed: int, rank: int, layer: int, wire: Wire) -> RandomStream:
        """Returns the random stream of one wire of this pass.

        Args:
            seed: 32-bit seed of the run.
            rank: global rank of the sender, below 2^31.
            layer: the layer's number, below `MAX_LAYERS`.
            wire: one of `WIRES`.
        """
        word = int(self.training)
        for value, bits in (
            (layer, _LAYER_BITS),
            (WIRES.index(wire), _WIRE_BITS),
            (self.index, _PASS_BITS),
        ):
            word = word << bits | value % (1 << bits)
        return RandomStream(key=rank << 32 | seed, offset=self.iteration % (1 << 32), stream=word)


def random_words(stream: RandomStream, num_words: int, device: torch.device) -> torch.Tensor:
    """Returns random integers below 2^32 that no message of the stream uses, int64 [num_words]."""
    words = torch.arange(num_words, device=device)
    counter = (
        words,
        *(torch.full_like(words, w) for w in (2**32 - 1, stream.offset, stream.stream)),
    )
    return philox4x32(counter, stream.key)[0]


class ForwardPassCounter:
    """Numbers the forward passes of one layer; a recomputed pass gets its first number again.

    Activation recomputation runs a layer's forward twice: once without gradients, and again with
    them when the backward arrives. Backwards arrive in the order of the micro-batches, so the
    passes still to be recomputed are a queue.
    """

    def __init__(self) -> None:
        self._iteration = -1
        self._count = {True: 0, False: 0}
        self._to_recompute: list[int] = []

    def next(self, step: TrainingStep, *, training: bool, with_grad: bool) -> ForwardPass:
        """Returns the pass that starts now.

        Args:
            step: the current iteration. Training passes are numbered modulo its micro-batches, so
                an iteration that Megatron runs again repeats its numbers.
            training: False in evaluation, whose passes are numbered separately.
            with_grad: whether gradients are being recorded.
        """
        if step.iteration != self._iteration:
            self._iteration = step.iteration
            self._count = {True: 0, False: 0}
            self._to_recompute.clear()
        if training and with_grad and self._to_recompute:
            index = self._to_recompute.pop(0)
            return ForwardPass(step.iteration, index, training, recomputed=True)
        index = self._count[training]
        self._count[training] += 1
        if training:
            index %= step.num_microbatches
            if not with_grad:
                self._to_recompute.append(index)
        return ForwardPass(step.iteration, index, training)
