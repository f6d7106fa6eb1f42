"""CompressionConfig: every knob of the compressed all-to-all, its default, help and validation.

Each field is one command-line flag of the same name (``moe_a2a_bits`` is ``--moe-a2a-bits``) and
the docstring below a field is the flag's help text; ``mcore/arguments.py`` generates the flags.
A value is refused here and not by argparse, whose messages do not say what to do instead.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megatron_moe_comp.lsh_options import LshOptions, flag, require_choice
from megatron_moe_comp.model_rules import DEDUP_RULES, LSH_RULES, MODEL_RULES

Wire = Literal["dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd"]
"""The four all-to-alls of an MoE layer and training step, named as Megatron names its hooks."""

WIRES: tuple[Wire, ...] = get_args(Wire)

CodecName = Literal[
    "identity",
    "rq",
    "lq",
    "pwlq",
    "shapeshifter",
    "terngrad",
    "topk",
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "mxfp8",
]
Method = Literal["none", "auto", "birdmoe", "lsh", CodecName]
BitPolicy = Literal["uniform", "proportional", "optimal"]
ScalePer = Literal["row", "chunk"]
Scope = Literal["remote", "inter-node"]

DEFAULT_BITS = 6
BITS_RANGE = {
    "rq": (2, 8),
    "lq": (2, 8),
    "pwlq": (3, 8),
    "shapeshifter": (2, 8),
    "topk": (2, 8),
}
"""Fewest and most bits per value of the codecs whose width can be chosen."""

AUTO_MIN_BITS = 5
"""Fewest bits per value that auto chooses by itself: fewer have a cost in quality."""
MAX_CHUNKS = 64
COLUMN_MULTIPLE = 8
"""Rows are packed in groups of 8 values: 8 codes of b bits fill exactly b bytes."""


@dataclass(frozen=True)
class CompressionConfig(LshOptions):
    """Options of the compressed expert all-to-all and of clustering."""

    moe_a2a_compress: Method = "none"
    """How the all-to-alls of the MoE layers are compressed. none: stock Megatron, whatever the
    other options. auto: none, or birdmoe with 8 to 5 bits, whichever a short measurement at the
    start predicts to be faster; a resumed run keeps what was chosen. birdmoe: unbiased random
    quantization with load-aware bits (BirdMoE, DAC 2025). lsh: similar rows are sent as one
    centroid (LSH-MoE, NeurIPS 2024; see --moe-lsh-*). Any other name: that codec alone, rq being
    birdmoe's and identity sending rows unchanged."""

    moe_a2a_codec: CodecName | None = None
    """What encodes the centroids of lsh (default: identity, unchanged)."""

    moe_a2a_bits: int | None = None
    """Bits per value on the wire, sign included: 2 to 8 (pwlq: 3 to 8; default: 6). With a bit
    policy other than uniform, the average. Methods of a fixed width take none."""

    moe_a2a_bit_policy: BitPolicy | None = None
    """How many bits the rows between two ranks get. uniform: all the same. proportional: inversely
    to the load of the receiver. optimal: the least quantization error for which no rank sends or
    receives more than its share (default: optimal for birdmoe, uniform for others)."""

    moe_a2a_min_bits: int | None = None
    """Fewest bits that a bit policy may give (default: half of --moe-a2a-bits, or the method's
    fewest). The rows with the fewest bits make most of the error."""

    moe_a2a_max_bits: int | None = None
    """Most bits that a bit policy may give (default: 8)."""

    moe_a2a_scale_per: ScalePer = "row"
    """What shares one quantization scale of birdmoe and rq: row, every row its own (4 bytes per
    row, robust to outliers); chunk, all rows sent to one rank (as in the BirdMoE authors'
    snapshot)."""

    moe_a2a_wires: tuple[Wire, ...] = WIRES
    """Which wires are compressed, separated by spaces or commas: dispatch_fwd, combine_fwd,
    combine_bwd, dispatch_bwd (default: all four; nothing after the flag: none of them). The
    others carry their rows unchanged."""

    moe_a2a_scope: Scope = "remote"
    """Which rows are compressed: remote, all that leave their rank; inter-node, those that leave
    their node, while rows between ranks of one node travel unchanged in the same message."""

    moe_a2a_ranks_per_node: int | None = None
    """Consecutive ranks that share a node, for inter-node (default: LOCAL_WORLD_SIZE)."""

    moe_a2a_dedup: bool = False
    """Send a token that has several experts on one rank once to that rank, and add up the experts'
    outputs there. Exact up to the order of additions."""

    moe_a2a_chunks: int = 1
    """Pieces that each message is cut into, so that a piece is encoded and another decoded while
    one is under way. Changes no result; 1: off."""

    moe_a2a_seed: int | None = None
    """Seed of the random rounding, 0 to 4294967295 (default: Megatron's --seed)."""

    moe_a2a_stats_json: str | None = None
    """File that rank 0 writes at the end with the bytes before and after compression and the
    error of every wire and layer, as JSON."""

    def __post_init__(self) -> None:
        """Raise ValueError where an option has a value that no run could use."""
        for name, choices in (
            ("moe_a2a_compress", get_args(Method)),
            ("moe_a2a_scale_per", get_args(ScalePer)),
            ("moe_a2a_scope", get_args(Scope)),
        ):
            require_choice(name, getattr(self, name), choices)
        for name, kind in (("moe_a2a_bit_policy", BitPolicy), ("moe_a2a_codec", CodecName)):
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), get_args(kind))
        wires = tuple(name for item in self.moe_a2a_wires for name in item.split(",") if name)
        for name in wires:
            require_choice("moe_a2a_wires", name, WIRES)
        object.__setattr__(self, "moe_a2a_wires", tuple(w for w in WIRES if w in wires))
        for name, low, high in (
            ("moe_a2a_seed", 0, 2**32 - 1),
            ("moe_a2a_chunks", 1, MAX_CHUNKS),
            ("moe_a2a_ranks_per_node", 1, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{flag(name)}={value}: out of range. Use a value from {low} to {high}."
                )
        self._check_lsh(self.moe_a2a_compress)
        if self.moe_a2a_compress == "auto":
            self.resolved(self.moe_a2a_bits or DEFAULT_BITS)
        elif self.enabled:
            self._resolve_bits()
            self._check_method()

    def _resolve_bits(self) -> None:
        """Fills in the bits and the policy that were not given, and refuses unusable ones."""
        method = self._chosen_by
        if self.codec not in BITS_RANGE:
            for name in ("bits", "bit_policy", "min_bits", "max_bits"):
                value = getattr(self, f"moe_a2a_{name}")
                if value not in (None, "uniform"):
                    raise ValueError(
                        f"{flag(f'moe_a2a_{name}')}={value}: {method} has a fixed width. Drop the "
                        f"option, or use a method of variable width: {', '.join(BITS_RANGE)}."
                    )
            object.__setattr__(self, "moe_a2a_bit_policy", "uniform")
            return
        method_policy = "optimal" if self.moe_a2a_compress == "birdmoe" else "uniform"
        policy = self.moe_a2a_bit_policy or method_policy
        object.__setattr__(self, "moe_a2a_bit_policy", policy)
        fewest, most = BITS_RANGE[self.codec]
        if self.moe_a2a_bits is None:
            object.__setattr__(self, "moe_a2a_bits", DEFAULT_BITS)
        for name in ("moe_a2a_bits", "moe_a2a_min_bits", "moe_a2a_max_bits"):
            given = getattr(self, name)
            if given is not None and not fewest <= given <= most:
                raise ValueError(
                    f"{flag(name)}={given}: a code of {method} has {fewest} to {most} bits, sign "
                    f"included. Use {fewest} to {most}, or --moe-a2a-compress=none to send rows "
                    "uncompressed."
                )
        defaults = (max(fewest, self.moe_a2a_bits // 2), most)
        for name, default in zip(("moe_a2a_min_bits", "moe_a2a_max_bits"), defaults, strict=True):
            given = getattr(self, name)
            if given is not None and policy == "uniform":
                raise ValueError(
                    f"{flag(name)}={given}: with the uniform policy every row has --moe-a2a-bits. "
                    "Drop the option, or use --moe-a2a-bit-policy=optimal or proportional."
                )
            if given is None and policy != "uniform":
                object.__setattr__(self, name, default)
        if policy == "uniform":
            return
        low, bits, high = self.moe_a2a_min_bits, self.moe_a2a_bits, self.moe_a2a_max_bits
        if not low <= bits <= high:
            raise ValueError(
                f"--moe-a2a-bits={bits}: the average must lie between --moe-a2a-min-bits={low} and "
                f"--moe-a2a-max-bits={high}. Use {low} to {high}, or widen the limits."
            )

    def _check_method(self) -> None:
        """Refuses options that the chosen method does not have."""
        method = self._chosen_by
        if self.moe_a2a_codec is not None and self.moe_a2a_compress != "lsh":
            raise ValueError(
                f"--moe-a2a-codec={self.moe_a2a_codec}: {method} names its codec itself. Drop the "
                "option, or use --moe-a2a-compress=lsh."
            )
        if self.moe_a2a_dedup and self.moe_a2a_compress == "lsh":
            raise ValueError(
                f"--moe-a2a-dedup: {method} sends the centroids of each expert's rows, so no two "
                "experts share a row. Drop the option, or use another method."
            )
        per_chunk = self.moe_a2a_scale_per == "chunk"
        if per_chunk and self.codec != "rq":
            raise ValueError(
                f"--moe-a2a-scale-per=chunk: {method} does not choose what shares a scale. Drop "
                "the option, or use --moe-a2a-compress=birdmoe or rq."
            )
        if self.moe_a2a_chunks > 1 and (per_chunk or self.codec == "lq"):
            cause = "--moe-a2a-scale-per=chunk" if per_chunk else method
            remedy = "--moe-a2a-scale-per=row" if per_chunk else "another method"
            raise ValueError(
                f"--moe-a2a-chunks={self.moe_a2a_chunks}: {cause} has one scale for all rows sent "
                f"to a rank, so a message cannot be cut. Use --moe-a2a-chunks=1, or {remedy}."
            )
        scope = self.inter_node_option
        if scope and self.moe_a2a_ranks_per_node is None:
            raise ValueError(
                f"{scope}: which ranks share a node is not known, as "
                "LOCAL_WORLD_SIZE is not set. Set --moe-a2a-ranks-per-node, or start with torchrun."
            )
        if not scope and self.moe_a2a_ranks_per_node is not None:
            raise ValueError(
                f"--moe-a2a-ranks-per-node={self.moe_a2a_ranks_per_node}: rows are compressed "
                "within a node, too. Drop the option, or use --moe-a2a-scope=inter-node."
            )

    @property
    def enabled(self) -> bool:
        """Whether a method other than none was chosen."""
        return self.moe_a2a_compress != "none"

    def resolved(self, bits: int | None) -> "CompressionConfig":
        """Returns what auto stands for if it chooses birdmoe with these bits, or none (None).

        Raises:
            ValueError: an option that birdmoe cannot be used with.
        """
        if bits is None:
            return replace(self, moe_a2a_compress="none")
        policy, fewest = self.moe_a2a_bit_policy or "uniform", self.moe_a2a_min_bits
        if policy != "uniform" and fewest is None:
            fewest = min(bits, AUTO_MIN_BITS)
        return replace(
            self,
            moe_a2a_compress="birdmoe",
            moe_a2a_bits=bits,
            moe_a2a_bit_policy=policy,
            moe_a2a_min_bits=fewest,
        )

    @property
    def codec(self) -> CodecName:
        """The name of what encodes rows on the compressed wires."""
        if self.moe_a2a_compress == "lsh":
            return self.moe_a2a_codec or "identity"
        of_method = {"birdmoe": "rq", "auto": "rq", "none": "identity"}
        return of_method.get(self.moe_a2a_compress, self.moe_a2a_compress)

    @property
    def _chosen_by(self) -> str:
        """The option that chose the codec."""
        if self.moe_a2a_compress == "lsh":
            return f"--moe-a2a-compress=lsh with --moe-a2a-codec={self.codec}"
        return f"--moe-a2a-compress={self.moe_a2a_compress}"

    @property
    def inter_node_option(self) -> str | None:
        """The option, with its value, that makes a difference between nodes; None if none does."""
        for name in ("moe_a2a_scope", "moe_lsh_scope"):
            if getattr(self, name) == "inter-node":
                return f"{flag(name)}=inter-node"
        return None

    def check_model(self, options: Any) -> None:  # noqa: ANN401 (argparse.Namespace or config)
        """Refuse Megatron options that cannot work with compression.

        Args:
            options: Megatron's parsed arguments or its TransformerConfig; the options looked at
                have the same names in both.

        Raises:
            ValueError: naming the option, its value, what is required and the remedy.
        """
        if not self.enabled:
            return
        method = f"--moe-a2a-compress={self.moe_a2a_compress}"
        clusters = self.moe_a2a_compress == "lsh"
        further = (DEDUP_RULES if self.moe_a2a_dedup else ()) + (LSH_RULES if clusters else ())
        for rule in MODEL_RULES + further:
            value = getattr(options, rule.option, rule.allowed[0])
            if value not in rule.allowed:
                given = flag(rule.option) + ("" if value is True else f"={value}")
                raise ValueError(f"{given}: {method} {rule.why}. {rule.remedy}.")
        world_size, per_node = getattr(options, "world_size", None), self.moe_a2a_ranks_per_node
        if world_size and per_node and world_size % per_node:
            raise ValueError(
                f"--moe-a2a-ranks-per-node={per_node}: {world_size} ranks cannot be divided into "
                f"nodes of {per_node}. Use a divisor of {world_size}."
            )
        latent = getattr(options, "moe_latent_size", None)
        option, size = (
            ("--moe-latent-size", latent) if latent else ("--hidden-size", options.hidden_size)
        )
        if size % COLUMN_MULTIPLE:
            raise ValueError(
                f"{option}={size}: {method} packs each row in groups of {COLUMN_MULTIPLE} values "
                f"({COLUMN_MULTIPLE} codes of b bits in b bytes), so the size must be a multiple "
                f"of {COLUMN_MULTIPLE}. Use {option}={size + -size % COLUMN_MULTIPLE}."
            )
        if clusters and self.moe_lsh_hash_dim > size:
            raise ValueError(
                f"--moe-lsh-hash-dim={self.moe_lsh_hash_dim}: a row of {option}={size} has no more "
                f"than {size} independent coordinates. Use 1 to {size}."
            )
