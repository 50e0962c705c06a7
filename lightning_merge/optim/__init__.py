"""Methods that define the update itself, in plain torch.

``Lookaround``, ``OnDARE`` and ``OnTIES`` wrap the optimizer you have.
"""

from lightning_merge.optim._lookaround import Lookaround
from lightning_merge.optim._ondare import OnDARE
from lightning_merge.optim._onties import OnTIES
from lightning_merge.optim._subspace import Subspace

__all__ = ["Lookaround", "OnDARE", "OnTIES", "Subspace"]
