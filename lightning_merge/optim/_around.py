"""An optimizer around another one, whose parameter groups and state it shares."""

from typing import Any

from torch.optim import Optimizer


class Around(Optimizer):
    """Shares groups and state with ``base``, also when they are assigned anew on either.

    Attributes:
        base: The wrapped optimizer; set before ``_ready``.
    """

    base: Optimizer
    _ready = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.base.param_groups if self._ready else self._own_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:
            self.base.param_groups = groups
        else:
            self._own_groups = groups

    @property
    def state(self) -> Any:
        """That of the wrapped optimizer."""
        return self.base.state if self._ready else self._own_state

    @state.setter
    def state(self, state: Any) -> None:
        if self._ready:
            self.base.state = state
        else:
            self._own_state = state
