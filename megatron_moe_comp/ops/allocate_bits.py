"""allocate_bits: bits for the rows of every link between ranks, so that traffic evens out.

P ranks, S as senders, D as receivers. A link (s, d) carries the rows that rank s sends to rank d.
Budgets and traffic are counted in rows times bits.
"""

from collections.abc import Sequence

import torch

from megatron_moe_comp.ops.segments import MAX_BITS, MIN_BITS

SCHEMA = "(Tensor num_rows, int target_bits, int min_bits, int max_bits) -> Tensor"

EXCHANGE_RANKS = 16
"""With more ranks a link is a small part of its nodes' traffic, and exchanges gain less than 1%."""

SHARE_BITS = 10
MANTISSA_BITS = 7
VARIANCE_BITS = 20

VARIANCES = [0] * MIN_BITS + [
    (1 << VARIANCE_BITS) // ((1 << num_bits - 1) - 1) ** 2
    for num_bits in range(MIN_BITS, MAX_BITS + 1)
]
"""Variance of a value of so many bits, 1 / (2^(b-1) - 1)^2, in fixed point."""


class _Allocation:
    """The bits of every link, and what they leave of the budgets."""

    def __init__(
        self, num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int
    ) -> None:
        self.ranks = len(num_rows)
        self.min_bits, self.max_bits = min_bits, max_bits
        rows_SD = num_rows - num_rows.diagonal().diag()
        self.rows: list[int] = rows_SD.flatten().tolist()
        # Links are numbered row by row.
        links = range(self.ranks * self.ranks)
        self.links_of_sender = [links[s * self.ranks :][: self.ranks] for s in range(self.ranks)]
        self.links_of_receiver = [links[d :: self.ranks] for d in range(self.ranks)]
        # Two nodes over their budgets, one sending and one receiving, can leave the others more
        # than the target on average.
        for most in range(max_bits, min_bits - 1, -1):
            self._fill(rows_SD, target_bits, most)
            if self.all_left >= 0:
                break
        # Only its changes matter.
        self.variance = 0

    def _fill(self, rows_SD: torch.Tensor, target_bits: int, most: int) -> None:
        """Gives every link what both its nodes could afford on all of theirs, at most `most`."""
        total = int(rows_SD.sum())
        budget = target_bits * total // self.ranks

        def limits(load: torch.Tensor) -> torch.Tensor:
            affordable = (budget // load.clamp(min=1)).clamp(self.min_bits, most)
            return torch.where(load > 0, affordable, most)

        bits_SD = torch.minimum(limits(rows_SD.sum(dim=1))[:, None], limits(rows_SD.sum(dim=0)))
        spent_SD = rows_SD * bits_SD
        self.senders_left: list[int] = (budget - spent_SD.sum(dim=1)).tolist()
        self.receivers_left: list[int] = (budget - spent_SD.sum(dim=0)).tolist()
        self.all_left = target_bits * total - int(spent_SD.sum())
        self.bits: list[int] = torch.where(rows_SD > 0, bits_SD, self.max_bits).flatten().tolist()

    def _change(self, link: int, by: int) -> None:
        s, d = divmod(link, self.ranks)
        n = self.rows[link]
        self.senders_left[s] -= n * by
        self.receivers_left[d] -= n * by
        self.all_left -= n * by
        self.variance += self._variance(link, by)
        self.bits[link] += by

    def _variance(self, link: int, by: int) -> int:
        """Returns what changing a link's bits adds to the variance."""
        bits = self.bits[link]
        return self.rows[link] * (VARIANCES[bits + by] - VARIANCES[bits])

    def _fits(self, link: int) -> bool:
        s, d = divmod(link, self.ranks)
        left = min(self.senders_left[s], self.receivers_left[d], self.all_left)
        return self.rows[link] <= left

    def raise_level(self, level: int) -> None:
        """Gives links of `level` bits one more, as far as the budgets go."""
        links = [i for i, b in enumerate(self.bits) if b == level and self._fits(i)]
        sent, received = [0] * self.ranks, [0] * self.ranks
        for link in links:
            sent[link // self.ranks] += self.rows[link]
            received[link % self.ranks] += self.rows[link]
        sender_shares = _squared_shares(sent, self.senders_left)
        receiver_shares = _squared_shares(received, self.receivers_left)

        def priority(link: int) -> int:
            s, d = divmod(link, self.ranks)
            return _leading_digits(self.rows[link] * sender_shares[s] * receiver_shares[d])

        for link in sorted(links, key=priority, reverse=True):
            if self._fits(link):
                self._change(link, 1)

    def exchange(self, link: int) -> None:
        """Gives a link one more bit and takes some from others for it, if that lowers variance."""
        if self.bits[link] == self.max_bits:
            return
        variance = self.variance
        before = self.bits[:], self.senders_left[:], self.receivers_left[:], self.all_left, variance
        self._change(link, 1)
        touched = self._make_room(link)
        while touched and self._spend(touched):
            pass
        if not touched or self.variance >= variance:
            self.bits, self.senders_left, self.receivers_left, self.all_left, self.variance = before

    def _make_room(self, link: int) -> list[range]:
        """Brings a link's nodes back into their budgets.

        Returns the rows and columns of links that were touched, or nothing if it cannot be done.
        """
        s, d = divmod(link, self.ranks)
        touched = [self.links_of_sender[s], self.links_of_receiver[d]]
        if self.senders_left[s] < 0:
            lowered = self._lower_cheapest(touched[0], link, -self.senders_left[s])
            if lowered is None:
                return []
            touched.append(self.links_of_receiver[lowered % self.ranks])
        if self.receivers_left[d] < 0:
            lowered = self._lower_cheapest(touched[1], link, -self.receivers_left[d])
            if lowered is None:
                return []
            touched.append(self.links_of_sender[lowered // self.ranks])
        return touched if self.all_left >= 0 else []

    def _lower_cheapest(self, links: range, spared: int, needed: int) -> int | None:
        """Takes what is needed from the link that loses least by it; returns the link."""
        options = []
        for link in links:
            if link == spared or self.rows[link] == 0:
                continue
            by = -(-needed // self.rows[link])
            if self.bits[link] - by >= self.min_bits:
                options.append((self._variance(link, -by), link, by))
        if not options:
            return None
        _, link, by = min(options)
        self._change(link, -by)
        return link

    def _spend(self, touched: Sequence[range]) -> bool:
        """Raises the link that gains most; returns False if none can be raised."""
        links = [
            link
            for links in touched
            for link in links
            if self.bits[link] < self.max_bits and self._fits(link)
        ]
        if links:
            self._change(min(links, key=lambda link: self._variance(link, 1)), 1)
        return bool(links)


def _squared_shares(rows: Sequence[int], left: Sequence[int]) -> list[int]:
    """Returns, in fixed point, the squares of the shares of its rows that each node can raise."""
    whole = 1 << SHARE_BITS
    shares = [
        (budget << SHARE_BITS) // n if n > max(budget, 0) else whole
        for n, budget in zip(rows, left, strict=True)
    ]
    return [share * share >> SHARE_BITS for share in shares]


def _leading_digits(weight: int) -> int:
    """Returns a number's bit length and its bits after the first, ordered like the number.

    Thirteen bits in all are sorted in one pass.
    """
    length = weight.bit_length()
    return length << MANTISSA_BITS | (weight << MANTISSA_BITS + 1 >> length) % (1 << MANTISSA_BITS)


def _reference(
    num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int
) -> torch.Tensor:
    if num_rows.dtype != torch.int64 or num_rows.dim() != 2 or len(set(num_rows.shape)) != 1:
        raise ValueError("num_rows must be int64 [P, P]")
    if not MIN_BITS <= min_bits <= max_bits <= MAX_BITS:
        raise ValueError(
            f"min_bits and max_bits must satisfy {MIN_BITS} <= min_bits <= max_bits <= {MAX_BITS}, "
            f"not {min_bits} and {max_bits}"
        )
    if not num_rows.numel():
        return num_rows.clone()
    allocation = _Allocation(num_rows, target_bits, min_bits, max_bits)
    for level in range(min_bits, max_bits):
        allocation.raise_level(level)
    if allocation.ranks <= EXCHANGE_RANKS:
        for link in range(num_rows.numel()):
            allocation.exchange(link)
    return torch.tensor(allocation.bits, dtype=torch.int64).view(num_rows.shape)


def _fake(num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int) -> torch.Tensor:
    return num_rows.new_empty(num_rows.shape)


torch.library.define("megatron_moe_comp::allocate_bits", SCHEMA)
torch.library.impl("megatron_moe_comp::allocate_bits", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::allocate_bits")(_fake)


def allocate_bits(
    num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int
) -> torch.Tensor:
    """Returns bits that nearly minimise the quantization variance of even traffic, int64 [P, P].

    The variance is the sum of n / (2^(b-1) - 1)^2 over links of n rows and b bits. Each sender and
    each receiver has a budget of target_bits * (all rows / P), and all of them together
    target_bits * (all rows). A node that `min_bits` overdraw gets no more than them on any link.

     1. Every link gets what both its nodes could afford on all of theirs.
     2. Level by level from min_bits upwards, links of that level get one more bit where the budgets
        allow it. A bit saves at least four times as much as the next one, so low levels come first.
        Within a level the order is by n * a^2 * b^2, highest first. n is the link's number of rows;
        a and b are the shares of their rows that its sender and its receiver can raise. Large links
        first, because small ones fill the gaps that they leave.
     3. With at most `EXCHANGE_RANKS` ranks, one pass over the links. It gives a link one more bit,
        takes the missing bytes from the links that lose least, and spends what is left over. The
        change is kept if the variance falls.

    Only integers are used, so that all machines agree. For example, with 4 bits out of 2 to 8, if
    the first rank receives twice the mean, all ranks send and receive 128 in the end:

        rows  0  8  8    bits  8  8  8
             32  0  8          2  8  8
             32  8  0          2  8  8

    Args:
        num_rows: int64 [P, P] on the CPU, rows of each link: below 2^40, and below 2^50 in all. The
            diagonal, rows that stay on their rank, does not count.
        target_bits: bits of a value that the budgets allow for.
        min_bits: at least 2.
        max_bits: at most 8; what links without rows get.

    Raises:
        ValueError: wrong dtype or shape of num_rows, or min_bits or max_bits out of range.
    """
    return torch.ops.megatron_moe_comp.allocate_bits(num_rows, target_bits, min_bits, max_bits)
