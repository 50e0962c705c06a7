"""What modules do on entering eval mode, and what they write to in it."""

from torch import nn

from lightning_merge.weights import canonical, submodules


def extends_train(module: nn.Module) -> bool:
    """Whether something happens at ``train()`` or ``eval()`` beside the flags: a cache is forgotten, for one."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def forget_what_eval_mode_kept(module: nn.Module) -> None:
    """Calls ``train()`` and ``eval()``, so that what is derived from weights in eval mode is made anew.

    To be called while the same weights are in place as when it was made, or before others are used in eval mode. The
    modes are what they were, and modules that do not extend ``train`` are not touched.
    """
    if not any(map(extends_train, module.modules())):
        return
    modes = {each: each.training for each in module.modules()}
    module.train()
    module.eval()
    for each, mode in modes.items():
        each.training = mode


class Derived:
    """What a module in eval mode derives from its weights, as LoRA layers that merge theirs, around an exchange.

    A module whose submodules are all in training mode, or do not extend ``train``, is not touched.

    Args:
        module: Any.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modes: dict[nn.Module, bool] = {}

    def let_go(self) -> None:
        """Calls ``train()`` while the weights are in place that it was derived from."""
        modes = {each: each.training for each in self._module.modules()}
        if not all(modes.values()) and any(map(extends_train, modes)):
            self._modes = modes
            self._module.train()

    def make_anew(self) -> None:
        """Calls ``eval()`` if that was let go of, with the flags as they were."""
        if self._modes:
            self._module.eval()
        for each, mode in self._modes.items():
            each.training = mode
        self._modes = {}


def written_in_eval(module: nn.Module) -> set[str]:
    """Names of parameters that a forward pass writes to: an embedding with ``max_norm`` shortens the rows it reads."""
    return {
        canonical(f"{name}.weight" if name else "weight")
        for name, each in submodules(module)
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.max_norm is not None
    }
