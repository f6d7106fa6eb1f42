"""CompressionConfig: every knob of the compressed all-to-all, its default, help and validation.

Each field is one command-line flag of the same name (``moe_a2a_bits`` is ``--moe-a2a-bits``) and
the docstring below a field is the flag's help text; ``training/arguments.py`` generates the flags.
A value is refused here and not by argparse, whose messages do not say what to do instead.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import ScalePer
from megatron_moe_comp.compression.wires import WIRES, Wire
from megatron_moe_comp.options.checks import flag, require_choice
from megatron_moe_comp.options.codec_options import DEFAULT_BITS, CodecOptions, Coding
from megatron_moe_comp.options.lsh_options import LshOptions
from megatron_moe_comp.options.model_rules import DEDUP_RULES, LSH_RULES, MODEL_RULES

Scope = Literal["remote", "inter-node"]

AUTO_MIN_BITS = 6
"""Fewest bits per value that auto chooses by itself: fewer have a cost in quality."""
MAX_CHUNKS = 64
COLUMN_MULTIPLE = 8
"""Rows are packed in groups of 8 values: 8 codes of b bits fill exactly b bytes."""


@dataclass(frozen=True)
class CompressionConfig(CodecOptions, LshOptions):
    """Options of the compressed expert all-to-all and of clustering."""

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
    """Consecutive ranks that share a node, for inter-node and for the load of nodes in the
    statistics (default: LOCAL_WORLD_SIZE)."""

    moe_a2a_dedup: bool = False
    """Send a token that has several experts on one rank once to that rank, and add up the experts'
    outputs there. Exact up to the order of additions."""

    moe_a2a_chunks: int = 1
    """Pieces that each message is cut into, 1 to 64, so that a piece is encoded and another decoded
    while one is under way. Changes no result; 1: off."""

    moe_a2a_seed: int | None = None
    """Seed of the random rounding, 0 to 4294967295 (default: Megatron's --seed)."""

    moe_a2a_stats_jsonl: str | None = None
    """File that rank 0 adds a line of JSON to at each log interval: progress, loss, traffic, error,
    times of phases. python -m megatron_moe_comp.watch shows it."""

    moe_a2a_stats_json: str | None = None
    """File that rank 0 writes at the end with the bytes before and after compression, the bits, the
    load and the error of every wire and layer, as JSON."""

    def __post_init__(self) -> None:
        """Raise ValueError where an option has a value that no run could use."""
        for name, choices in (
            ("moe_a2a_scale_per", get_args(ScalePer)),
            ("moe_a2a_scope", get_args(Scope)),
        ):
            require_choice(name, getattr(self, name), choices)
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
        self._check_codecs()
        self._check_lsh(self.moe_a2a_compress)
        if self.moe_a2a_compress == "auto":
            self.resolved(self.moe_a2a_bits or DEFAULT_BITS)
        elif self.enabled:
            self._check_method()

    def _check_method(self) -> None:
        """Refuses options that the chosen method does not have."""
        method, codecs = self.chosen_by, {self.forward.codec, self.backward.codec}
        if self.moe_a2a_dedup and self.moe_a2a_compress == "lsh":
            raise ValueError(
                f"--moe-a2a-dedup: {method} sends the centroids of each expert's rows, so no two "
                "experts share a row. Drop the option, or use another method."
            )
        per_chunk = self.moe_a2a_scale_per == "chunk"
        others = [name for name in sorted(codecs) if "scale_per" not in CODECS[name].options]
        is_segment_wide = any(CODECS[name]().is_segment_wide for name in codecs)
        if per_chunk and others:
            other = others[0]
            is_birdmoe = self.moe_a2a_compress == "birdmoe"
            remedy = "--moe-a2a-codec=rq" if is_birdmoe else "--moe-a2a-compress=birdmoe or rq"
            raise ValueError(
                f"--moe-a2a-scale-per=chunk: {method}, which encodes with {other}, does not choose "
                f"what shares a scale. Drop the option, or use {remedy}."
            )
        if self.moe_a2a_chunks > 1 and (per_chunk or is_segment_wide):
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

    def coding(self, wire: Wire) -> Coding:
        """Returns what encodes on a wire, if it is one of `moe_a2a_wires`."""
        return self.backward if wire.endswith("bwd") else self.forward

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
        if self.inter_node_option and world_size and world_size % per_node:
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


def codec_of(config: CompressionConfig, wire: Wire) -> Codec:
    """Returns what encodes the rows of a wire."""
    if wire not in config.moe_a2a_wires:
        return Identity()
    codec = CODECS[config.coding(wire).codec]
    return codec(**{option: getattr(config, f"moe_a2a_{option}") for option in codec.options})
