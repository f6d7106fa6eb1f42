"""METHODS: the settings of the all-to-all that benchmarks compare, by name, and their flags."""

LSH = "--moe-a2a-compress=lsh"
UNIFORM = "--moe-a2a-bit-policy=uniform"

METHODS: dict[str, tuple[str, ...]] = {
    "none": ("--moe-a2a-compress=none",),
    "bf16": ("--moe-a2a-compress=bf16",),
    "fp8": ("--moe-a2a-compress=fp8",),
    "mxfp8": ("--moe-a2a-compress=mxfp8",),
    "birdmoe": ("--moe-a2a-compress=birdmoe",),
    # All links alike: with few ranks there is no load to even out, and a width is what it says.
    **{
        f"birdmoe-{bits}": ("--moe-a2a-compress=birdmoe", f"--moe-a2a-bits={bits}", UNIFORM)
        for bits in (8, 6, 5, 4, 3)
    },
    "lsh": (LSH,),
    "lsh-20": (LSH, "--moe-lsh-target-rate=0.20"),
    "lsh-10": (LSH, "--moe-lsh-target-rate=0.10"),
    "lsh-20-rq4": (LSH, "--moe-lsh-target-rate=0.20", "--moe-a2a-codec=rq", "--moe-a2a-bits=4"),
}
