"""The names that `lightning_merge.weights` has of sharded tensors, as imported before they moved there."""

from lightning_merge.weights import as_sharded as as_sharded
from lightning_merge.weights import map_named as map_named
from lightning_merge.weights import part_of as part_of
from lightning_merge.weights import reshard as reshard
from lightning_merge.weights import sharded_tensors as sharded_tensors
