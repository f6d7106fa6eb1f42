import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_comp.cpu_host import patches, replacements, settings, wheel
from megatron_moe_comp.cpu_host.patches import CPU_PATCHES, WHEEL_PATCHES
from megatron_moe_comp.cpu_host.settings import REFUSALS, SETTINGS

ROOT = Path(__file__).parents[2]
TARGETS = [patch.target for patch in CPU_PATCHES + WHEEL_PATCHES]


def parse(monkeypatch, options):
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    return parse_args(settings.add_settings)


@pytest.fixture(scope="module")
def report():
    """What cpu_host_probe.py found in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cpu_host_probe.py"))],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists_and_is_replaced_once(report, target):
    assert target not in report["missing"], f"{target} is not in the installed Megatron or torch"
    assert target not in report["unchanged"], f"enable() does not replace {target}"
    assert target not in report["changed twice"], f"a second enable() replaces {target} again"


def test_each_target_is_named_once():
    assert len(TARGETS) == len(set(TARGETS))
    assert all(patch.why for patch in CPU_PATCHES + WHEEL_PATCHES)


def test_import_changes_nothing(report):
    assert not report["patched on import"]


def test_replaced_names_behave(report):
    assert [finding for finding, holds in report["findings"].items() if not holds] == []


def test_message(report):
    assert report["same message again"]
    assert "\n" not in report["message"]
    assert f"{len(TARGETS)} Megatron and torch names" in report["message"]
    for setting in SETTINGS:
        assert setting.flag in report["message"]


def test_only_the_rng_warning_is_dropped(report):
    assert report["logged"] == ["something else"]


def test_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert not patches.is_needed()
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        patches.enable()
    assert torch.cuda.current_device is before


def test_missing_target_is_named_and_nothing_replaced(monkeypatch):
    first = dataclasses.replace(CPU_PATCHES[1], target="torch.cuda.device_count")
    gone = dataclasses.replace(CPU_PATCHES[1], target="torch.cuda.gone.away")
    monkeypatch.setattr(patches, "WHEEL_PATCHES", (first, gone))
    before = torch.cuda.device_count
    with pytest.raises(RuntimeError, match=r"has no torch\.cuda\.gone\.away"):
        patches.repair_wheel()
    assert torch.cuda.device_count is before


def test_another_version_of_megatron_warns(monkeypatch):
    monkeypatch.setattr(patches, "WHEEL_PATCHES", ())
    monkeypatch.setattr(patches, "TESTED_MEGATRON", "0.0.1")
    with pytest.warns(UserWarning, match=r"tested with megatron-core 0\.0\.1, but"):
        patches.repair_wheel()


def test_settings_are_defaults(monkeypatch):
    args = parse(monkeypatch, "--seed 3")
    assert args.seed == 3
    for setting in SETTINGS:
        assert getattr(args, setting.dest) == setting.value, setting.dest


def test_settings_may_be_given(monkeypatch):
    parse(monkeypatch, " ".join(setting.flag for setting in SETTINGS))


def test_settings_and_refusals_are_options_of_megatron(monkeypatch):
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["train"])
    known = vars(parse_args())
    unknown = [row.dest for row in SETTINGS + REFUSALS if row.dest not in known]
    assert unknown == []
    assert [row.dest for row in REFUSALS if known[row.dest] in row.values] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--distributed-backend nccl", "--distributed-backend nccl needs .*use .* gloo"),
        ("--transformer-impl transformer_engine", "--transformer-impl transformer_engine needs"),
        ("--context-parallel-size 2", "--context-parallel-size 2 needs Transformer Engine"),
        ("--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex needs DeepEP"),
        ("--moe-grouped-gemm", "--moe-grouped-gemm needs .*leave it out"),
        ("--moe-permute-fusion", "--moe-permute-fusion needs"),
        ("--multi-latent-attention", "--multi-latent-attention needs"),
        ("--use-precision-aware-optimizer", "--use-precision-aware-optimizer needs"),
        ("--cuda-graph-impl local", "--cuda-graph-impl local needs CUDA graphs"),
    ],
)
def test_contradiction_is_refused(monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        parse(monkeypatch, options)


def test_cuda_type_names_are_for_the_optimizers_alone():
    tensor_type = replacements.with_cuda_type_names(torch.Tensor.type)
    half = torch.zeros(1, dtype=torch.bfloat16)
    optimizer = {"__name__": "megatron.core.optimizer.clip_grads", "type": tensor_type, "t": half}
    assert eval("type(t)", optimizer) == "torch.cuda.BFloat16Tensor"
    assert tensor_type(half) == "torch.BFloat16Tensor"
    assert tensor_type(half, torch.float32).dtype == torch.float32


def test_splits_become_numpy():
    move = replacements.with_splits_as_numpy(lambda *args: None)
    splits = torch.tensor([3, 4])
    assert move(splits, as_numpy=True).tolist() == [3, 4]
    assert not torch.is_tensor(move(splits, as_numpy=True))
    assert move(splits) is splits
    assert move(None, as_numpy=True) is None


@pytest.mark.parametrize("sizes", [[3, 1, 0, 2], [2, 2], [0, 0]])
def test_gather_of_unequal_parts(sizes):
    parts = [torch.full((size, 2), float(rank)) for rank, size in enumerate(sizes)]

    def original(rows, group, *splits_and_buffer):
        """What a rank that sends `rows` receives: as many rows from every rank, equally many."""
        assert splits_and_buffer == ()
        gathered = rows.new_full((group.size(), *rows.shape), -1)
        for rank, part in enumerate(parts):
            gathered[rank, : len(part)] = part
        return gathered.flatten(0, 1)

    gather = replacements.with_equal_gather_parts(original)
    group = SimpleNamespace(size=lambda: len(sizes))
    for part in parts:
        assert torch.equal(gather(part, group, sizes), torch.cat(parts))


def test_data_loader_draws_from_its_own_generator():
    dataset = torch.arange(4)
    build = replacements.with_own_generator(
        lambda dataset, consumed_samples: torch.utils.data.DataLoader(dataset)
    )
    state = torch.get_rng_state()
    loader = build(dataset, 0)
    assert [batch.item() for batch in loader] == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert replacements.with_own_generator(lambda *args: None)(None, 0) is None


def adam_after_steps(num_steps):
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(params)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return SimpleNamespace(optimizer=optimizer)


def test_fresh_optimizer_is_given_the_state_it_will_load():
    fresh = adam_after_steps(0)

    def original(self, model_sharded_state_dict, is_loading):
        return {k: sorted(v) for k, v in self.optimizer.state_dict()["state"].items()}

    sharded_state_dict = wheel.with_state_before_loading(original)
    assert sharded_state_dict(fresh, {}) == {}
    first_step = adam_after_steps(1).optimizer.state_dict()["state"]
    expected = {k: sorted(v) for k, v in first_step.items()}
    assert sharded_state_dict(fresh, {}, is_loading=True) == expected
    assert all(state["step"] == 0 for state in fresh.optimizer.state.values())


def test_each_parameter_has_its_own_step_after_loading():
    trained = adam_after_steps(2)
    shared = torch.tensor(2.0)

    def original(self, state_dict):
        for state in self.optimizer.state.values():
            state["step"] = shared

    wheel.with_one_step_tensor_each(original)(trained, {})
    steps = [state["step"] for state in trained.optimizer.state.values()]
    assert [step.item() for step in steps] == [2.0, 2.0]
    assert len({step.data_ptr() for step in steps}) == 2


@pytest.mark.parametrize("loaded", [{}, {"step": torch.tensor(0.0)}], ids=["none", "stale"])
def test_step_is_left_alone_when_tensors_are_loaded(loaded):
    trained = adam_after_steps(2)
    param = trained.optimizer.param_groups[0]["params"][0]

    def original(self, model_param, tensors):
        targets = {"param": model_param, **self.optimizer.state[model_param]}
        for key, target in targets.items():
            if isinstance(tensors[key], torch.Tensor):
                target.copy_(tensors[key])

    new = {"param": torch.zeros(3), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    wheel.with_step_left_alone(original)(trained, param, new | loaded)
    state = trained.optimizer.state[param]
    assert state["step"] == 2
    assert not param.any()
    assert not state["exp_avg"].any()


@pytest.mark.parametrize("has_makefile", [False, True])
def test_helpers_are_compiled_where_there_is_a_makefile(tmp_path, has_makefile):
    module = tmp_path / "utils.py"
    calls = []
    scope = {"calls": calls}
    exec(compile("def compile_helpers(): calls.append(1)", str(module), "exec"), scope)
    if has_makefile:
        (tmp_path / "Makefile").touch()
    wheel.without_makefile(scope["compile_helpers"])()
    assert len(calls) == has_makefile
