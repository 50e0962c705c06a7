"""The tangent space: a network replaced by its first-order expansion around the weights that it starts from.

In it outputs are linear in the weights, so that task vectors add up exactly where in a network they roughly do.
"""

from lightning_merge.tangent._linearize import Tangent, linearize

__all__ = ["Tangent", "linearize"]
