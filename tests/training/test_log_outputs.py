"""What TensorBoard and W&B read back."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from megatron_moe_comp.training import log_outputs

BLOCK = 32768
COUNTS = {3: 10, 4: 0, 6: 30}


@pytest.fixture
def only(monkeypatch):
    """Sets the writers of this rank."""

    def set_writers(tensorboard=None, wandb=None):
        monkeypatch.setattr(log_outputs, "get_tensorboard_writer", lambda: tensorboard)
        monkeypatch.setattr(log_outputs, "get_wandb_writer", lambda: wandb)

    return set_writers


def test_tensorboard(only, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        only(tensorboard=writer)
        log_outputs.write_scalars({"moe-a2a/wire-MB": 1.5}, 7)
        log_outputs.write_histogram("moe-a2a/bits", COUNTS, 7)
        log_outputs.write_histogram("moe-a2a/nothing", {}, 7)
        log_outputs.write_panels("all-to-all", {"bytes": ["moe-a2a/.*-MB"]})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (scalar,) = events.Scalars("moe-a2a/wire-MB")
    assert (scalar.step, scalar.value) == (7, 1.5)
    assert events.Tags()["histograms"] == ["moe-a2a/bits"]
    (histogram,) = events.Histograms("moe-a2a/bits")
    value = histogram.histogram_value
    assert (value.num, value.sum, value.sum_squares) == (40, 210, 1170)
    assert list(zip(value.bucket_limit, value.bucket, strict=True)) == [
        (3.5, 10),
        (4.5, 0),
        (5.5, 0),
        (6.5, 30),
    ]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def records_of(log):
    """Yields the records of an offline run: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, data = 7, b""
    while place < len(log):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", log[place : place + 7])
        data += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(data)
            data = b""


def write_offline(directory):
    import wandb

    run = wandb.init(project="test", dir=directory, mode="offline")
    log_outputs.get_tensorboard_writer = lambda: None
    log_outputs.get_wandb_writer = lambda: wandb
    log_outputs.write_scalars({"moe-a2a/wire-MB": 1.5}, 7)
    log_outputs.write_histogram("moe-a2a/bits", COUNTS, 7)
    log_outputs.write_panels("all-to-all", {"bytes": ["moe-a2a/.*-MB"]})
    run.finish()


def test_wandb_offline(tmp_path, monkeypatch):
    """The file of an offline run, which `wandb sync` would send, holds all of it."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # A process of its own, as a training is: wandb shares its service among all runs of a process.
    code = f"from tests.training.test_log_outputs import write_offline as w; w({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record in records_of(path.read_bytes()):
        for item in record.history.item:
            found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert found["moe-a2a/wire-MB"] == 1.5
    assert found["_step"] == 7
    assert found["moe-a2a/bits/values"] == [10, 0, 0, 30]
    assert found["moe-a2a/bits/bins"] == [2.5, 3.5, 4.5, 5.5, 6.5]


def test_a_line_that_was_cut_off_is_ended_before_others_follow(tmp_path):
    path = tmp_path / "new/a2a.jsonl"
    log_outputs.require_writable("--option", str(path))
    assert path.read_text() == ""
    path.write_text('{}\n{"iter')
    for _ in range(2):
        log_outputs.require_writable("--option", str(path))
        assert path.read_text() == '{}\n{"iter\n'


def test_ranks_without_writers_write_nothing(only):
    only()
    log_outputs.write_scalars({"a": 1.0}, 1)
    log_outputs.write_histogram("a", COUNTS, 1)
    log_outputs.write_panels("a", {"b": ["c"]})
