"""Trains a tiny GPT-MoE in combinations of parallel layouts, all in processes of this machine.

    python -m tests.end_to_end.layouts          # a subset in which every pair of values occurs
    python -m tests.end_to_end.layouts --all    # every combination: 2 to 32 processes

One line per layout; exit code 1 if any fails.
"""

import argparse
import itertools
import math
import os
import sys
import time
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from functools import partial

import torch

from tests.end_to_end.tiny_training import SEED, Outcome, initialize, train
from tests.gloo import GlooPool

FACTORS = {
    "tensor": ("", "TP2-SP", "TP2-ETP2-SP"),
    "pipeline": ("", "PP2"),
    "expert": ("EP2", "EP4"),
    "data": ("", "DP2"),
    "recompute": ("", "recompute-moe", "recompute-full"),
    "optimizer": ("", "distributed-optimizer"),
    "precision": ("", "bf16"),
}
MAX_RANKS_OF_PAIRS = 8
NONE = {"moe_a2a_compress": "none"}
NO_WIRES = {"moe_a2a_compress": "birdmoe", "moe_a2a_wires": ()}
LSH = {"moe_a2a_compress": "lsh", "moe_a2a_seed": SEED}
SINGLE = "single rows"
METHODS = {
    "6 bits": {"moe_a2a_compress": "birdmoe", "moe_a2a_bits": 6, "moe_a2a_seed": SEED},
    "clusters": LSH | {"moe_lsh_target_rate": 0.5, "moe_lsh_residual": "identity"},
    SINGLE: LSH | {"moe_lsh_num_hashes": 64},
}
TOLERANCES = {
    "6 bits": {"": (0.05, 0.2), "bf16": (0.05, 0.2)},
    "clusters": {"": (0.2, 1.0), "bf16": (0.2, 1.0)},
    SINGLE: {"": (1e-5, 1e-4), "bf16": (0.02, 0.1)},
}
"""Largest relative distance of losses and gradient norms from none's, in float32 and bfloat16."""


@dataclass(frozen=True)
class Layout:
    """One value of each factor. DP2: two copies of every expert, and so of everything."""

    tensor: str = ""
    pipeline: str = ""
    expert: str = "EP2"
    data: str = ""
    recompute: str = ""
    optimizer: str = ""
    precision: str = ""

    def __str__(self):
        return " ".join(filter(None, astuple(self)))

    def groups(self):
        """Arguments of Megatron's initialize_model_parallel and TransformerConfig alike."""
        return {
            "tensor_model_parallel_size": 2 if self.tensor else 1,
            "expert_tensor_parallel_size": 2 if "ETP2" in self.tensor else 1,
            "pipeline_model_parallel_size": 2 if self.pipeline else 1,
            "expert_model_parallel_size": int(self.expert[2:]),
        }

    def ranks(self):
        _, *expert = self.groups().values()
        return math.prod(expert) * (2 if self.data else 1)

    def pairs(self):
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return set(itertools.combinations(values, 2))


def all_layouts():
    layouts = itertools.starmap(Layout, itertools.product(*FACTORS.values()))
    return sorted(layouts, key=Layout.ranks)


def pairwise_layouts():
    """Few layouts in which every pair of values occurs: greedy, of equals the one of least ranks.

    Pairs are the most that need 8 ranks; what needs 16 and 32 are triples and more.
    """
    candidates = [layout for layout in all_layouts() if layout.ranks() <= MAX_RANKS_OF_PAIRS]
    missing, chosen = set().union(*map(Layout.pairs, candidates)), []
    while missing:
        chosen.append(max(candidates, key=lambda layout: len(layout.pairs() & missing)))
        missing -= chosen[-1].pairs()
    return chosen


def check(layout):
    """Returns what is wrong with a layout, and how far methods are from none, as sentences."""
    stored = replace(layout, recompute="")
    with closing(GlooPool(layout.ranks(), partial(initialize, groups=layout.groups()))) as pool:
        none, no_wires, *ours = (
            pool.run(train, layout, options) for options in (NONE, NO_WIRES, *METHODS.values())
        )
        without_recompute = ours
        if layout.recompute:
            # Single rows are clusters, too; what they add is the distance from none.
            compared = [options for name, options in METHODS.items() if name != SINGLE]
            without_recompute = [pool.run(train, stored, options) for options in compared]
            without_recompute.append(ours[-1])
    wrong = [f"no wires are not none: {text}" for text in differences(no_wires, none)]
    wrong += drifted("none", none, layout)
    distances = []
    for name, outcomes, other in zip(METHODS, ours, without_recompute, strict=True):
        wrong += [f"recomputation changes {name}: {text}" for text in differences(outcomes, other)]
        wrong += drifted(name, outcomes, layout)
        for rank, (a, b) in enumerate(zip(outcomes, none, strict=True)):
            if a.parameters == b.parameters:
                wrong.append(f"rank {rank}: {name} changes no parameter")
        history, reference = mean_losses(outcomes), mean_losses(none)
        loss = furthest(history, reference)
        norm = furthest(outcomes[0].gradient_norms, none[0].gradient_norms)
        loss_tolerance, norm_tolerance = TOLERANCES[name][layout.precision]
        if not loss < loss_tolerance or not norm < norm_tolerance:
            wrong.append(f"{name} is far from none: {outcomes[0]} instead of {none[0]}")
        if not history[-1] < history[0]:
            wrong.append(f"the loss of {name} does not fall: {history}")
        distances.append(f"{name}: loss within {loss:.2%}, gradient norm within {norm:.1%}")
    return wrong, "; ".join(distances) + " of none"


def drifted(name, outcomes, layout):
    """Yields a sentence for each rank whose replicated parameters differ within its stage."""
    # Stages are the outermost division of the ranks.
    per_stage = layout.ranks() // layout.groups()["pipeline_model_parallel_size"]
    for rank, outcome in enumerate(outcomes):
        if outcome.replicated != outcomes[rank - rank % per_stage].replicated:
            yield f"{name}: rank {rank} has drifted from the others of its stage"


def differences(ours, theirs):
    for rank, pair in enumerate(zip(ours, theirs, strict=True)):
        for field in fields(Outcome):
            a, b = (getattr(outcome, field.name) for outcome in pair)
            if a != b:
                yield f"rank {rank}: {field.name} {a} instead of {b}"


def mean_losses(outcomes):
    """Mean loss of each step over ranks of the last stage and micro-batches."""
    steps = zip(*(outcome.losses for outcome in outcomes), strict=True)
    return [float(torch.tensor(list(itertools.chain(*step))).mean()) for step in steps]


def furthest(values, references):
    """Largest relative distance; NaN where there is one."""
    values, references = torch.tensor(values), torch.tensor(references)
    return float(((values - references) / references).abs().max())


def main():
    parser = argparse.ArgumentParser(description="Check parallel layouts; fails if one does.")
    parser.add_argument("--all", action="store_true", help="every combination")
    layouts = all_layouts() if parser.parse_args().all else pairwise_layouts()
    os.environ["PYTHONWARNINGS"] = "ignore"
    failed = 0
    for layout in layouts:
        start = time.monotonic()
        try:
            wrong, summary = check(layout)
        except (AssertionError, TimeoutError) as error:
            wrong, summary = [str(error)], "did not finish"
        failed += bool(wrong)
        columns = ["FAILED" if wrong else "passed", f"{layout.ranks()} ranks", str(layout)]
        columns += [f"{time.monotonic() - start:.1f} s", summary]
        print(" | ".join(columns), *wrong, sep="\n    ", flush=True)
    print(f"{len(layouts) - failed} of {len(layouts)} layouts passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
