"""Optim: methods that define the update itself."""

from lightning_merge.optim._subspace import Subspace

__all__ = ["Subspace"]
