"""The names that `lightning_merge.weights` has of a module's tensors, as imported before they moved there."""

from lightning_merge.weights import Inventory as Inventory
from lightning_merge.weights import canonical as canonical
from lightning_merge.weights import is_metric as is_metric
from lightning_merge.weights import laid_out_as as laid_out_as
from lightning_merge.weights import named_buffers as named_buffers
from lightning_merge.weights import named_parameters as named_parameters
from lightning_merge.weights import named_tensors as named_tensors
from lightning_merge.weights import region as region
from lightning_merge.weights import state_dict_names as state_dict_names
from lightning_merge.weights import submodules as submodules
from lightning_merge.weights import view as view
from lightning_merge.weights._places import Kind as Kind
from lightning_merge.weights._places import Place as Place
