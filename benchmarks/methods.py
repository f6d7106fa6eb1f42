"""METHODS: the settings of the all-to-all that benchmarks compare, by name, and their flags."""

LSH = "--moe-a2a-compress=lsh"
UNIFORM = "--moe-a2a-bit-policy=uniform"

METHODS: dict[str, tuple[str, ...]] = {
    "none": ("--moe-a2a-compress=none",),
    # Nothing is encoded: what our way of moving bytes gains alone.
    "identity": ("--moe-a2a-compress=identity",),
    "bf16": ("--moe-a2a-compress=bf16",),
    "fp8": ("--moe-a2a-compress=fp8",),
    "mxfp8": ("--moe-a2a-compress=mxfp8",),
    "birdmoe": ("--moe-a2a-compress=birdmoe",),
    # All links alike: with few ranks there is no load to even out, and a width is what it says.
    **{
        f"birdmoe-{bits}": ("--moe-a2a-compress=birdmoe", f"--moe-a2a-bits={bits}", UNIFORM)
        for bits in (8, 6, 5, 4, 3)
    },
    **{f"rq-{bits}": ("--moe-a2a-compress=rq", f"--moe-a2a-bits={bits}") for bits in (4, 3)},
    "lsh": (LSH,),
    "lsh-20": (LSH, "--moe-lsh-target-rate=0.20"),
    "lsh-10": (LSH, "--moe-lsh-target-rate=0.10"),
    "lsh-20-rq4": (LSH, "--moe-lsh-target-rate=0.20", "--moe-a2a-codec=rq", "--moe-a2a-bits=4"),
}

# What matters in clustering: all combinations of residual, warm-up and refinement, and controls.
_WARMUP = "--moe-lsh-warmup-iters=200"
_RESIDUALS = ("none", "identity")
METHODS |= {
    f"lsh-{residual}{warmup and '-warmup'}{'-refine' if refine else ''}": tuple(
        flag
        for flag in (
            METHODS["lsh-20"]
            + (f"--moe-lsh-residual={residual}", warmup, f"--moe-lsh-refine={refine}")
        )
        if flag
    )
    for residual in _RESIDUALS
    for warmup in ("", _WARMUP)
    for refine in (0, 1)
}
METHODS |= {
    # The control: clusters of the same sizes, of random rows.
    "lsh-none-random": (*METHODS["lsh-none"], "--moe-lsh-hash=random"),
    "lsh-none-warmup-random": (*METHODS["lsh-none-warmup"], "--moe-lsh-hash=random"),
    "lsh-none-center": (*METHODS["lsh-none"], "--moe-lsh-center"),
}

WARMS_UP = tuple(name for name, flags in METHODS.items() if _WARMUP in flags)
"""Settings whose first iterations differ."""
