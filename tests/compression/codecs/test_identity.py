import math

import pytest
import torch

from megatron_moe_comp.compression.codecs.identity import Identity
from tests.compression.variants import DTYPES, SEGMENT_ROWS, normal_rows, roundtrip


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_is_exact(dtype):
    rows = normal_rows(dtype)
    rows[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    decoded = roundtrip(Identity(), rows, SEGMENT_ROWS)
    assert torch.equal(decoded.view(torch.uint8), rows.view(torch.uint8))
