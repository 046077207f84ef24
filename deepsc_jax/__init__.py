"""Networks for chest CT in JAX and Flax: one engine, with DeepSC-COVID and comparators.

Research software, not for clinical use.
"""

__version__ = "0.1.0"
