"""CompressionConfig: every knob of the compressed all-to-all, its default, help and validation.

Each field is one command-line flag of the same name (``moe_a2a_bits`` is ``--moe-a2a-bits``) and
the docstring below a field is the flag's help text; ``mcore/arguments.py`` generates the flags.
A value is refused here and not by argparse, whose messages do not say what to do instead.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Wire = Literal["dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd"]
"""The four all-to-alls of an MoE layer and training step, named as Megatron names its hooks."""

WIRES: tuple[Wire, ...] = get_args(Wire)

Method = Literal["none", "birdmoe"]
ScalePer = Literal["row", "chunk"]

MIN_BITS, MAX_BITS = 2, 8
COLUMN_MULTIPLE = 8
"""Rows are packed in groups of 8 values: 8 codes of b bits fill exactly b bytes."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class CompressionConfig:
    """Options of the compressed expert all-to-all."""

    moe_a2a_compress: Method = "none"
    """How the all-to-alls of the MoE layers are compressed. none: stock Megatron. birdmoe:
    unbiased random quantization of all four wires (BirdMoE, DAC 2025)."""

    moe_a2a_bits: int = 6
    """Bits per value on the wire, sign included: 2 to 8."""

    moe_a2a_scale_per: ScalePer = "row"
    """What shares one quantization scale: row, every row its own (4 bytes per row, robust to
    outliers); chunk, all rows sent to one rank (as in the BirdMoE authors' snapshot)."""

    moe_a2a_wires: tuple[Wire, ...] = WIRES
    """Which wires are compressed, separated by spaces or commas: dispatch_fwd, combine_fwd,
    combine_bwd, dispatch_bwd (default: all four; nothing after the flag: none of them). The
    others carry their rows unchanged."""

    moe_a2a_seed: int | None = None
    """Seed of the random rounding, 0 to 4294967295 (default: Megatron's --seed)."""

    moe_a2a_stats_json: str | None = None
    """File that rank 0 writes at the end with the bytes before and after compression and the
    error of every wire and layer, as JSON."""

    def __post_init__(self) -> None:
        """Raise ValueError where an option has a value that no run could use."""
        _require_choice("moe_a2a_compress", self.moe_a2a_compress, get_args(Method))
        _require_choice("moe_a2a_scale_per", self.moe_a2a_scale_per, get_args(ScalePer))
        if not MIN_BITS <= self.moe_a2a_bits <= MAX_BITS:
            raise ValueError(
                f"--moe-a2a-bits={self.moe_a2a_bits}: a code has {MIN_BITS} to {MAX_BITS} bits, "
                f"sign included. Use {MIN_BITS} to {MAX_BITS}, or --moe-a2a-compress=none to send "
                "rows uncompressed."
            )
        if self.moe_a2a_seed is not None and not 0 <= self.moe_a2a_seed < 2**32:
            raise ValueError(
                f"--moe-a2a-seed={self.moe_a2a_seed}: the seed is a 32-bit unsigned number. "
                "Use a value from 0 to 4294967295."
            )
        wires = tuple(name for item in self.moe_a2a_wires for name in item.split(",") if name)
        for name in wires:
            _require_choice("moe_a2a_wires", name, WIRES)
        object.__setattr__(self, "moe_a2a_wires", tuple(w for w in WIRES if w in wires))

    @property
    def enabled(self) -> bool:
        """Whether a method other than none was chosen."""
        return self.moe_a2a_compress != "none"

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
        for rule in _MODEL_RULES:
            value = getattr(options, rule.option, rule.allowed[0])
            if value not in rule.allowed:
                flag = _flag(rule.option) if value is True else f"{_flag(rule.option)}={value}"
                raise ValueError(f"{flag}: {method} {rule.why}. {rule.remedy}.")
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


@dataclass(frozen=True)
class _ModelRule:
    """One Megatron option that must have one of the allowed values for compression to work."""

    option: str
    allowed: tuple[Any, ...]
    why: str
    remedy: str


_MODEL_RULES = (
    _ModelRule(
        "moe_token_dispatcher_type",
        ("alltoall",),
        "compresses the alltoall dispatcher's messages and no other's",
        "Use --moe-token-dispatcher-type=alltoall",
    ),
    _ModelRule(
        "moe_shared_expert_overlap",
        (False,),
        "replaces the communicating steps that shared experts would be interleaved with",
        "Drop the option; shared experts then run beside the routed ones",
    ),
    _ModelRule(
        "cuda_graph_impl",
        ("none",),
        "sizes its messages on the host in every step, which a CUDA graph cannot capture",
        "Use --cuda-graph-impl=none",
    ),
    _ModelRule(
        "overlap_moe_expert_parallel_comm",
        (False,),
        "does not take part in the 1F1B schedule that splits a layer at its all-to-alls",
        "Drop the option",
    ),
    _ModelRule(
        "overlap_dispatch_backward_with_experts_wgrad",
        (False,),
        "runs the backward dispatch itself and cannot be overlapped by Megatron's schedule",
        "Drop the option",
    ),
    _ModelRule(
        "transformer_impl",
        ("transformer_engine", "local"),
        "compresses training's dispatcher, which the inference stack replaces",
        "Use --transformer-impl=transformer_engine or local",
    ),
    _ModelRule(
        "mtp_num_layers",
        (None,),
        "does not reach the layers of multi-token prediction, whose spec Megatron makes itself",
        "Drop the option",
    ),
    _ModelRule(
        "moe_expert_rank_capacity_factor",
        (None,),
        "needs the row counts that a rank capacity of the fused dispatchers hides",
        "Drop the option, or bound the load with --moe-expert-capacity-factor",
    ),
)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{_flag(name)}={value}: not one of {', '.join(choices)}. Choose one of these."
        )
