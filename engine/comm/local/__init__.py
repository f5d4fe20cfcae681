"""Shared memory between the ranks of one machine without GPUs."""
