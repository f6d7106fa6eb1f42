"""Philox4x32-10, the counter-based random number generator of all kernels.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Only
32-bit integer arithmetic is used, so every device and compiler gives the same numbers.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns four 32-bit random words per counter, as int64 tensors.

    Args:
        counter: four int64 tensors of values in [0, 2^32), broadcastable against each other.
        key: 64-bit key; its low half is the first key word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(ROUNDS):
        # The products wrap around in int64; the low 64 bits, all that is used, are right.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 & _MASK) ^ c1 ^ k0
        c1 = product1 & _MASK
        c2 = (product0 >> 32 & _MASK) ^ c3 ^ k1
        c3 = product0 & _MASK
        k0, k1 = k0 + KEY_INCREMENTS[0] & _MASK, k1 + KEY_INCREMENTS[1] & _MASK
    return c0, c1, c2, c3


def random_halves(
    rows: torch.Tensor, num_groups: int, *, key: int, offset: int, stream: int
) -> torch.Tensor:
    """Returns sixteen random bits for every value of some rows: int32 [R, num_groups, 8].

    One Philox call, with counter (group, row, offset, stream), serves a group of eight columns:
    column 8g + 2j takes the low half of word j and column 8g + 2j + 1 its high half.

    Args:
        rows: int64 [R], numbers of the rows, below 2^32.
        num_groups: number of groups of eight columns in a row.
        key: 64-bit key.
        offset: 32-bit counter word.
        stream: 32-bit counter word.
    """
    groups = torch.arange(num_groups, device=rows.device)
    shape = (rows.numel(), num_groups)
    words = philox4x32(
        (
            groups.expand(shape),
            rows[:, None].expand(shape),
            torch.full((1, 1), offset, device=rows.device),
            torch.full((1, 1), stream, device=rows.device),
        ),
        key,
    )
    words_32 = torch.stack(words, dim=-1)  # [R, num_groups, 4]
    halves = torch.stack((words_32 & 0xFFFF, words_32 >> 16), dim=-1)
    return halves.flatten(-2).to(torch.int32)
