"""Triax: a 3D-parallel engine in which every layout computes the same run."""

__version__ = "0.1.0"
