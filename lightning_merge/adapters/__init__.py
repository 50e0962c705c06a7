"""Adapters of peft: their vectors, merged by any combiner, and written as adapters again."""

from lightning_merge.adapters._adapter import Adapter
from lightning_merge.adapters._combine import combine_adapters
from lightning_merge.adapters._factored import factored
from lightning_merge.adapters._negated import negated
from lightning_merge.adapters._products import products

__all__ = ["Adapter", "combine_adapters", "factored", "negated", "products"]
