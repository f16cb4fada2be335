"""Measure what ShadowKV costs in accuracy and buys in throughput."""

__version__ = "0.1.0"
