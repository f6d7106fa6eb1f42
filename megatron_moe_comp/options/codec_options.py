"""CodecOptions: the method, its codecs and their bits in both directions, as CompressionConfig."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

from megatron_moe_comp.compression.bit_allocation import POLICIES
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.options.checks import flag, require_choice

CodecName = Literal[tuple(CODECS)]
Method = Literal[("none", "auto", "birdmoe", "lsh", *CODECS)]
BitPolicy = Literal[tuple(POLICIES)]

DEFAULT_BITS = 6
BITS_RANGE = {name: codec.num_bits_range for name, codec in CODECS.items() if codec.num_bits_range}
"""Fewest and most bits per value of the codecs whose width can be chosen."""

BIRDMOE_CODECS: dict[int, tuple[CodecName, CodecName]] = {
    2: ("gaussian", "dithered"),
    3: ("gaussian", "dithered"),
    4: ("dithered", "dithered"),
}
"""What birdmoe encodes with at some numbers of bits, forward and backward; at others with rq."""


class Coding(NamedTuple):
    """How the rows of the forward, or of the backward, wires are encoded."""

    codec: CodecName
    bits: int
    """Per value on average; this and the next two are 0 where the codec has a fixed width."""
    min_bits: int
    max_bits: int


CHOOSING = ("moe_a2a_compress", "moe_a2a_codec")
"""The options that choose what encodes; all others of `CodecOptions` need a variable width."""


@dataclass(frozen=True)
class CodecOptions:
    """Options that choose what encodes rows, and to how many bits."""

    moe_a2a_compress: Method = "none"
    """How the all-to-alls of the MoE layers are compressed. none: stock Megatron, whatever the
    other options. auto: none, or birdmoe with 8 to 6 bits, whichever a short measurement at the
    start predicts to be faster; a resumed run keeps what was chosen. birdmoe: unbiased random
    quantization with load-aware bits (BirdMoE, DAC 2025), at 2 to 4 bits with finer codecs, see
    --moe-a2a-codec. lsh: similar rows are sent as one centroid (LSH-MoE, NeurIPS 2024; see
    --moe-lsh-*). Any other name: that codec alone, rq being the paper's and identity sending rows
    unchanged."""

    moe_a2a_codec: CodecName | None = None
    """What encodes the rows of birdmoe (default: rq, the paper's; dithered at 4 bits; gaussian
    forward and dithered backward at 2 and 3) or the centroids of lsh (default: identity, which
    changes nothing)."""

    moe_a2a_backward_codec: CodecName | None = None
    """What encodes on the backward wires, combine_bwd and dispatch_bwd, if the method's width can
    be chosen (default: what encodes forward; of birdmoe, see --moe-a2a-codec)."""

    moe_a2a_bits: int | None = None
    """Bits per value on the wire, sign included: 2 to 8 (pwlq: 3 to 8, gaussian: 2 to 4; default:
    6, gaussian: 4). With a bit policy other than uniform, the average. Methods of a fixed width
    take none."""

    moe_a2a_backward_bits: int | None = None
    """The same on the backward wires (default: --moe-a2a-bits)."""

    moe_a2a_bit_policy: BitPolicy | None = None
    """How many bits the rows between two ranks get. uniform: all the same. proportional: inversely
    to the load of the receiver. optimal: the least quantization error for which no rank sends or
    receives more than its share (default: optimal for birdmoe, uniform for others)."""

    moe_a2a_min_bits: int | None = None
    """Fewest bits that a bit policy may give (default: half of --moe-a2a-bits, or the method's
    fewest). The rows with the fewest bits make most of the error."""

    moe_a2a_max_bits: int | None = None
    """Most bits that a bit policy may give (default: the method's most, 8 for most of them)."""

    @property
    def enabled(self) -> bool:
        """Whether a method other than none was chosen."""
        return self.moe_a2a_compress != "none"

    @property
    def forward(self) -> Coding:
        """What encodes on dispatch_fwd and combine_fwd."""
        return self._coding(self._forward_codec, self.moe_a2a_bits)

    @property
    def backward(self) -> Coding:
        """What encodes on combine_bwd and dispatch_bwd."""
        bits = self.moe_a2a_backward_bits or self.moe_a2a_bits
        return self._coding(self._backward_codec, bits)

    @property
    def _forward_codec(self) -> CodecName:
        method = self.moe_a2a_compress
        if method == "none":
            return "identity"
        if method in ("auto", "birdmoe"):
            return self.moe_a2a_codec or _of_birdmoe(self.moe_a2a_bits)[0]
        return (self.moe_a2a_codec or "identity") if method == "lsh" else method

    @property
    def _backward_codec(self) -> CodecName:
        if self.moe_a2a_backward_codec is not None:
            return self.moe_a2a_backward_codec
        if self._is_birdmoes_own:
            return _of_birdmoe(self.moe_a2a_backward_bits or self.moe_a2a_bits)[1]
        return self._forward_codec

    def _coding(self, codec: CodecName, bits: int | None) -> Coding:
        if codec not in BITS_RANGE or bits is None:
            return Coding(codec, 0, 0, 0)
        if self.moe_a2a_bit_policy == "uniform":
            return Coding(codec, bits, bits, bits)
        fewest, most = BITS_RANGE[codec]
        low, high = self.moe_a2a_min_bits, self.moe_a2a_max_bits
        return Coding(codec, bits, low or max(fewest, bits // 2), high or most)

    @property
    def chosen_by(self) -> str:
        """The options that chose the forward codec, with their values."""
        method = f"--moe-a2a-compress={self.moe_a2a_compress}"
        if self.moe_a2a_compress == "lsh" or self.moe_a2a_codec is not None:
            return f"{method} with --moe-a2a-codec={self._forward_codec}"
        return method

    def _name(self, coding: Coding, backward: bool) -> str:
        """Returns the options that chose one direction's codec.

        For birdmoe without --moe-a2a-codec, also names the codec it chose.
        """
        if backward and self.moe_a2a_backward_codec is not None:
            return f"--moe-a2a-backward-codec={self.moe_a2a_backward_codec}"
        if self._is_birdmoes_own and coding.codec != "rq":
            return f"{self.chosen_by} at {coding.bits} bits, {coding.codec},"
        return self.chosen_by

    @property
    def _is_birdmoes_own(self) -> bool:
        """Whether the number of bits chooses the codecs."""
        return self.moe_a2a_compress in ("auto", "birdmoe") and self.moe_a2a_codec is None

    def _check_codecs(self) -> None:
        """Raises ValueError for an unusable value; fills in the bits and the policy not given."""
        require_choice("moe_a2a_compress", self.moe_a2a_compress, get_args(Method))
        for name, kind in (
            ("moe_a2a_codec", CodecName),
            ("moe_a2a_backward_codec", CodecName),
            ("moe_a2a_bit_policy", BitPolicy),
        ):
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), get_args(kind))
        if self.moe_a2a_compress == "auto":
            self._check_auto()
            return
        if not self.enabled:
            return
        self._check_method_codec()
        if self._forward_codec not in BITS_RANGE:
            self._refuse_bits()
            object.__setattr__(self, "moe_a2a_bit_policy", "uniform")
            return
        if self._backward_codec not in BITS_RANGE:
            raise ValueError(
                f"--moe-a2a-backward-codec={self._backward_codec}: has a fixed width, and "
                f"{self.chosen_by} has not. Use one of variable width: {', '.join(BITS_RANGE)}."
            )
        method_policy = "optimal" if self.moe_a2a_compress == "birdmoe" else "uniform"
        policy = self.moe_a2a_bit_policy or method_policy
        object.__setattr__(self, "moe_a2a_bit_policy", policy)
        if self.moe_a2a_bits is None:
            bits = min(DEFAULT_BITS, BITS_RANGE[self._forward_codec][1])
            object.__setattr__(self, "moe_a2a_bits", bits)
        self._check_bits()

    def _check_auto(self) -> None:
        """Refuses what auto would have to choose for."""
        for name in ("moe_a2a_codec", "moe_a2a_backward_codec", "moe_a2a_backward_bits"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{flag(name)}={getattr(self, name)}: --moe-a2a-compress=auto predicts the "
                    "speed of birdmoe as it is. Drop the option, or use birdmoe or lsh."
                )

    def _check_method_codec(self) -> None:
        """Refuses a codec that the method does not take."""
        codec, method = self.moe_a2a_codec, f"--moe-a2a-compress={self.moe_a2a_compress}"
        if codec is None or self.moe_a2a_compress == "lsh":
            return
        if self.moe_a2a_compress != "birdmoe":
            raise ValueError(
                f"--moe-a2a-codec={codec}: {method} names its codec itself. Drop the option, or "
                "use --moe-a2a-compress=lsh or birdmoe."
            )
        if codec not in BITS_RANGE:
            raise ValueError(
                f"--moe-a2a-codec={codec}: has a fixed width, and {method} chooses bits. Use one "
                f"of variable width, {', '.join(BITS_RANGE)}, or --moe-a2a-compress={codec}."
            )

    def _refuse_bits(self) -> None:
        """Refuses what only a method of variable width can use."""
        for field in fields(CodecOptions):
            value = getattr(self, field.name)
            if field.name not in CHOOSING and value not in (None, "uniform"):
                raise ValueError(
                    f"{flag(field.name)}={value}: {self.chosen_by} has a fixed width. Drop the "
                    f"option, or use a method of variable width: {', '.join(BITS_RANGE)}."
                )

    def _check_bits(self) -> None:
        """Refuses bits that a codec does not have, or that contradict each other."""
        for coding, bits_name, method, remedy in self._directions():
            fewest, most = BITS_RANGE[coding.codec]
            for name in (bits_name, "moe_a2a_min_bits", "moe_a2a_max_bits"):
                given = getattr(self, name)
                if given is not None and not fewest <= given <= most:
                    raise ValueError(
                        f"{flag(name)}={given}: a code of {method} has {fewest} to {most} bits, "
                        f"sign included. Use {fewest} to {most}, or {remedy}."
                    )
        for name in ("moe_a2a_min_bits", "moe_a2a_max_bits"):
            given = getattr(self, name)
            if given is not None and self.moe_a2a_bit_policy == "uniform":
                raise ValueError(
                    f"{flag(name)}={given}: with the uniform policy every row has --moe-a2a-bits. "
                    "Drop the option, or use --moe-a2a-bit-policy=optimal or proportional."
                )
        for coding, bits_name, *_ in self._directions():
            if not coding.min_bits <= coding.bits <= coding.max_bits:
                low, high = coding.min_bits, coding.max_bits
                raise ValueError(
                    f"{flag(bits_name)}={coding.bits}: the average must lie between "
                    f"--moe-a2a-min-bits={low} and --moe-a2a-max-bits={high}. Use {low} to {high}, "
                    "or widen the limits."
                )

    def _directions(self) -> Iterator[tuple[Coding, str, str, str]]:
        """Yields of both directions the coding, the options of its bits and codec, and a remedy."""
        uncompressed = "--moe-a2a-compress=none to send rows uncompressed"
        is_narrower = self._is_birdmoes_own and self.forward.codec == "gaussian"
        remedy = "--moe-a2a-codec=rq" if is_narrower else uncompressed
        yield self.forward, "moe_a2a_bits", self._name(self.forward, backward=False), remedy
        method = self._name(self.backward, backward=True)
        if self.moe_a2a_backward_bits is None:
            yield self.backward, "moe_a2a_bits", method, "set --moe-a2a-backward-bits"
        else:
            yield self.backward, "moe_a2a_backward_bits", method, uncompressed


def _of_birdmoe(bits: int | None) -> tuple[CodecName, CodecName]:
    return BIRDMOE_CODECS.get(bits or DEFAULT_BITS, ("rq", "rq"))
