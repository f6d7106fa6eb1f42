"""Result files as the benchmarks write them, of a made-up machine."""

import json
import math
import random

RATIOS = {"none": 1.0, "bf16": 2.0, "mxfp8": 3.9, "birdmoe": 5.2, "birdmoe-4": 7.7, "lsh-20": 4.9}
RATES = {"200mbit": 200, "1gbit": 1000, "10gbit": 10_000, "none": math.inf}
WIRES = ("dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd")


def network_row(rate, ranks, routing, method):
    # 100 MB per rank and step; a millisecond of codec for each 10 MB that it saves.
    megabytes, ratio = 100 * (ranks - 1), RATIOS[method]
    coding = 0.0 if method == "none" else 40 + 10 * ranks + 2 * ratio
    transfer = 8000 * megabytes / ratio / RATES[rate] + 5
    experts = 700 * (0.4 if method == "lsh-20" else 1.0)
    phases = {"encode": 0.6 * coding, "decode": 0.4 * coding, "transfer": transfer}
    phases |= {"experts": experts, "rest": 800.0}
    return phases, sum(phases.values()), megabytes * 1e6


def network_rows(methods=tuple(RATIOS), rates=tuple(RATES), ranks=(2, 4), routings=("real",)):
    rows = []
    for routing, count, rate in [(r, n, t) for r in routings for n in ranks for t in rates]:
        _, stock, _ = network_row(rate, count, routing, "none")
        _, free, _ = network_row("none", count, routing, "none")
        for index, method in enumerate(methods):
            order = index % 2
            phases, step_ms, float32_bytes = network_row(rate, count, routing, method)
            gain = None if rate == "none" else (stock - step_ms) / (stock - free)
            rows.append(
                {
                    "rate": rate,
                    "ranks": count,
                    "method": method,
                    "routing": routing,
                    "step_ms": step_ms,
                    "step_ms_min": 0.97 * step_ms,
                    "step_ms_max": 1.05 * step_ms,
                    # Fast and slow repeats are others for each method.
                    "step_ms_repeats": [f * step_ms for f in (1, 0.97, 1.05, 1)[order : order + 3]],
                    "speedup": stock / step_ms,
                    "speedup_min": 0.96 * stock / step_ms,
                    "speedup_max": 1.03 * stock / step_ms,
                    "share_of_gain": gain,
                    "wire_bytes": float32_bytes / RATIOS[method],
                    "interface_bytes": 1.04 * float32_bytes / RATIOS[method],
                    "float32_bytes": float32_bytes,
                    "ratio": RATIOS[method],
                    "most_loaded_bytes": 4.2e6 / RATIOS[method],
                    "phases": phases,
                    "versions": {"torch": "2.13.0", "megatron-core": "0.19.2"},
                    "model": {"num_layers": 4, "hidden_size": 512},
                    "cpu": "2 x sample",
                    "command": "python benchmarks/network.py --rates 200mbit,1gbit,10gbit,none",
                    "date": "2026-11-22",
                }
            )
    return rows


def statistics(method, ratio, layers=4):
    def wires(megabytes):
        raw = int(megabytes * 1e6)
        # Dispatch carries the probabilities, too.
        sqnr = 28.1 if ratio > 1 else None
        sent = {wire: int(raw / ratio * (1.03 if "disp" in wire else 0.98)) for wire in WIRES}
        return {
            wire: {"raw_bytes": raw, "wire_bytes": sent[wire], "sqnr_db": sqnr} for wire in WIRES
        }

    load = {"float32_bytes": 2.2e6, "uniform_bytes": 2.5e6 / ratio, "bytes": 2.2e6 / ratio}
    numbered = [
        {"layer": n, "name": f"layer {n}", "ratio_fp32": ratio, "wires": wires(50 + n)}
        for n in range(1, layers + 1)
    ]
    return {
        "method": method,
        "bits": 6 if method == "birdmoe" else None,
        "ratio_fp32": ratio,
        "most_loaded_rank": None if method == "none" else load,
        "wires": wires(210),
        "layers": numbered,
    }


def quality_runs(settings=tuple(RATIOS), seeds=(1, 2, 3), points=60):
    runs = []
    for seed, setting in [(seed, setting) for seed in seeds for setting in settings]:
        noise = random.Random(f"{seed} {setting}")
        shared = random.Random(seed)
        cost = 0.02 * math.log2(RATIOS[setting])
        curve = [
            [10 * n, 3.4 + cost + 4 * n**-0.6 + shared.gauss(0, 0.05) + noise.gauss(0, 0.01)]
            for n in range(1, points + 1)
        ]
        loss = 3.5 + cost + shared.gauss(0, 0.02) + noise.gauss(0, 0.004)
        runs.append(
            {
                "setting": setting,
                "seed": seed,
                "flags": [f"--seed={seed}", f"--moe-a2a-compress={setting}"],
                "validation_loss": loss,
                "validation_perplexity": math.exp(loss),
                "test_loss": loss - 0.1,
                "iterations": 10 * points,
                "seconds": 90.0,
                "curve": curve,
                "stats": statistics(setting, RATIOS[setting]),
            }
        )
    return runs


def write_samples(directory):
    """Writes a file of every kind and returns the directory."""
    (directory / "quality").mkdir(parents=True)
    (directory / "network.json").write_text(json.dumps(network_rows()))
    for run in quality_runs():
        path = directory / "quality" / f"{run['setting']}-seed{run['seed']}.json"
        path.write_text(json.dumps(run))
    (directory / "a2a.json").write_text(json.dumps(statistics("birdmoe", 5.2)))
    return directory
