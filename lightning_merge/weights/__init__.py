"""Weights: the named tensors of a module, and the few operations that merging needs on them.

Everything that touches many tensors at once lives here, so the rules read like their formulas. Names are canonical:
the prefixes that ``torch.compile`` and wrappers insert are removed, so a name means the same in every run and file.
"""

from lightning_merge.weights._arithmetic import add_ as add_
from lightning_merge.weights._arithmetic import compensated_lerp_ as compensated_lerp_
from lightning_merge.weights._arithmetic import copy_ as copy_
from lightning_merge.weights._arithmetic import lerp_ as lerp_
from lightning_merge.weights._arithmetic import made_anew as made_anew
from lightning_merge.weights._arithmetic import scale_ as scale_
from lightning_merge.weights._arithmetic import scaled as scaled
from lightning_merge.weights._arithmetic import zero_ as zero_
from lightning_merge.weights._chunks import array as array
from lightning_merge.weights._chunks import flatten as flatten
from lightning_merge.weights._chunks import in_threads as in_threads
from lightning_merge.weights._chunks import joined as joined
from lightning_merge.weights._chunks import on_host as on_host
from lightning_merge.weights._chunks import part as part
from lightning_merge.weights._chunks import parts as parts
from lightning_merge.weights._chunks import rows as rows
from lightning_merge.weights._chunks import side_by_side as side_by_side
from lightning_merge.weights._chunks import stacked as stacked
from lightning_merge.weights._chunks import unflatten as unflatten
from lightning_merge.weights._chunks import unstacked as unstacked
from lightning_merge.weights._chunks import worth_it as worth_it
from lightning_merge.weights._exchange import exchange as exchange
from lightning_merge.weights._exchange import put_back as put_back
from lightning_merge.weights._inventory import Inventory as Inventory
from lightning_merge.weights._inventory import named_buffers as named_buffers
from lightning_merge.weights._inventory import named_parameters as named_parameters
from lightning_merge.weights._inventory import named_tensors as named_tensors
from lightning_merge.weights._inventory import state_dict_names as state_dict_names
from lightning_merge.weights._magnitudes import keep_larger_ as keep_larger_
from lightning_merge.weights._means import mix_ as mix_
from lightning_merge.weights._means import weighted_mean as weighted_mean
from lightning_merge.weights._memory import laid_out_as as laid_out_as
from lightning_merge.weights._memory import region as region
from lightning_merge.weights._memory import view as view
from lightning_merge.weights._names import State as State
from lightning_merge.weights._names import Weights as Weights
from lightning_merge.weights._names import canonical as canonical
from lightning_merge.weights._names import first_mismatch as first_mismatch
from lightning_merge.weights._names import is_metric as is_metric
from lightning_merge.weights._names import submodules as submodules
from lightning_merge.weights._nonfinite import Finding as Finding
from lightning_merge.weights._nonfinite import find_nonfinite as find_nonfinite
from lightning_merge.weights._nonfinite import nonfinite as nonfinite
from lightning_merge.weights._over_ranks import mean_over_ranks_ as mean_over_ranks_
from lightning_merge.weights._over_ranks import of_first_rank as of_first_rank
from lightning_merge.weights._precision import average_dtype as average_dtype
from lightning_merge.weights._precision import clone as clone
from lightning_merge.weights._precision import copies as copies
from lightning_merge.weights._precision import empty as empty
from lightning_merge.weights._precision import is_averaged as is_averaged
from lightning_merge.weights._precision import like as like
from lightning_merge.weights._precision import to_devices as to_devices
from lightning_merge.weights._precision import zeros as zeros
from lightning_merge.weights._shards import as_sharded as as_sharded
from lightning_merge.weights._shards import is_sharded as is_sharded
from lightning_merge.weights._shards import local as local
from lightning_merge.weights._shards import map_named as map_named
from lightning_merge.weights._shards import part_of as part_of
from lightning_merge.weights._shards import reshard as reshard
from lightning_merge.weights._shards import sharded_tensors as sharded_tensors
from lightning_merge.weights._sizes import all_below as all_below
from lightning_merge.weights._sizes import largest as largest
