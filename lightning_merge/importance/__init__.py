"""What merging knows of a trained model beside its weights: how much each of them matters."""

from lightning_merge.importance._statistics import Statistics

__all__ = ["Statistics"]
