import torch


def allocate_bits(num_rows, policy, *, target_bits, min_bits, max_bits):
    return torch.full_like(num_rows, target_bits)


def most_loaded(b):
    b = b.clone().fill_diagonal_(0)
    return int(max(b.sum(0).max(), b.sum(1).max()))
