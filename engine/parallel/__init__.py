"""Tensor, sequence and pipeline parallelism, and the sharded optimizer."""
