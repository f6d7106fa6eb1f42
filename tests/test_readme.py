"""README and the pages of docs/ tell what the code does: flags, defaults, files, figures of codecs.

The page of all flags is made from the code: tests/docs/test_site.py.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.packet import Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.options.codec_options import BITS_RANGE
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.options.t5_options import T5Options

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs/methods.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in PAGES)]


def test_the_flags_in_short_are_flags_with_their_defaults():
    rows = re.findall(r"^\| `--(moe-[a-z0-9-]+)` \| [^|]*\| ([^|]*) \|", README, flags=re.MULTILINE)
    defaults = {f.name.replace("_", "-"): f.default for f in fields(CompressionConfig)}
    assert len(rows) >= 8
    for name, default in rows:
        if defaults[name] not in (None, False):
            assert default.strip("`") == str(defaults[name])


def test_every_flag_of_t5_has_a_row_and_no_row_is_stale():
    text = (ROOT / "docs/t5_moe.md").read_text()
    rows = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| [^|]*\| ([^|]*) \|", text, flags=re.MULTILINE))
    defaults = {"--" + f.name.replace("_", "-"): f.default for f in fields(T5Options)}
    assert list(rows) == [*defaults, "--upcycle-from"]
    for name, default in defaults.items():
        if default not in (None, False):
            assert rows[name].strip("`") == str(default)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    for path in re.findall(r"\b(?:scripts|tests)/[\w/.]+\.(?:sh|py)\b", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<!tests/)\b(?:mcore|comm|compression|data|ops)/[\w/]+\.py\b", text):
        if "NAME" not in path:
            assert (ROOT / "megatron_moe_comp" / path).exists(), path


def table_row(name):
    cells = re.search(rf"^\| {name}[^|]*\|(.*)\|$", METHODS, flags=re.MULTILINE)[1]
    return [float(cell.strip(" x")) for cell in cells.split("|")]


def test_ratios_and_errors_of_the_table():
    bits = [int(b) for b in table_row("bits ")]
    assert bits == list(range(2, 9))
    rows = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    for b, ratio, sqnr in zip(
        bits, table_row("ratio to float32"), table_row("SQNR of normal rows"), strict=True
    ):
        code_bytes = ops.packed_bytes(256, b)
        sent = 2 * (code_bytes + 8) + 2 * (code_bytes + 4)
        assert ratio == round((2 * (1024 + 4) + 2 * 1024) / sent, 1)
        message, decoded = torch.empty(2048 * (code_bytes + 4), dtype=torch.uint8), rows.clone()
        segments = ops.flatten([ops.OpSegment(0, 2048, b, 0, 2048 * code_bytes)])
        ops.quantize_pack(rows, None, message, segments, key=1, offset=2, stream=3)
        ops.unpack_dequantize(message, None, decoded, segments)
        measured = 10 * torch.log10(rows.square().sum() / (rows - decoded).square().sum())
        assert abs(sqnr - measured) < 0.15


def test_the_table_of_codecs():
    cells = r"^\| `(\w+)` \| ([\d.]+) \| ([-\d.]+|exact) \| (?:yes|no) \|"
    table = {name: values for name, *values in re.findall(cells, METHODS, flags=re.MULTILINE)}
    assert set(table) == set(CODECS)
    rows = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    for name, (bits_per_value, sqnr) in table.items():
        codec, random = CODECS[name](), RandomStream(1, 2, 3)
        num_bits = min(6, BITS_RANGE.get(name, (6, 6))[1])
        packet = Packet.plan([Peer(0, num_bits, codec), Peer(512, num_bits, codec)], 0, rows)
        message, decoded = packet.encode(rows, (), random), rows.clone()
        packet.decode(message, decoded, (), random)
        assert float(bits_per_value) == pytest.approx(8 * len(message) / rows.numel(), abs=5e-4)
        noise = (rows - decoded).square().sum()
        if sqnr == "exact":
            assert noise == 0
        else:
            assert float(sqnr) == pytest.approx(
                10 * torch.log10(rows.square().sum() / noise).item(), abs=0.15
            )
