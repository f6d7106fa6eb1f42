"""Mixture-of-Experts training on Megatron with a compressed expert all-to-all."""
