"""Predicts what compressing the all-to-alls does to the time of a training step, and advises.

python -m megatron_moe_comp.plan --help

cost_model   seconds of a step from a model, a machine and a method's messages
methods      the messages of a method, and which method to recommend
measure      the machine, from a short run on it
"""
