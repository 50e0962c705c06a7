"""A forward pass that is linear in the weights, in the place of a module's own."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, final

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from lightning_merge.tangent._leaving import leaving
from lightning_merge.weights import Weights, first_mismatch

_CHECKPOINTED = "activations are checkpointed inside, and computed again where weights are not linear: switch it off"
_SIGNS = ("forward AD", "forward mode AD", "jvp", "setup_context", _CHECKPOINTED)  # of operations without a rule


@final
class LinearForward:
    """``f(x; w0) + J(x; w0) (w - w0)``: stands in ``module.forward``, where it is found before the class's own."""

    def __init__(self, module: nn.Module, start: Weights, name: str) -> None:
        self.start, self.is_used = start, False
        self._module, self._name = module, name
        self._before: Callable[..., Any] | None = vars(module).get("forward")

    def install(self) -> None:
        """Takes the place."""
        vars(self._module)["forward"] = self

    def remove(self) -> None:
        """Gives it back."""
        if vars(self._module).get("forward") is self:
            del vars(self._module)["forward"]
            if self._before is not None:
                vars(self._module)["forward"] = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass that carries values and what they change by, in the direction of ``w - w0``."""
        if not self.is_used:
            self._warn_of_hooks()
        self.is_used = True
        live = dict(self._module.named_parameters())
        if difference := first_mismatch(self.start, live):
            raise ValueError(
                f"{self._title} is not what was linearised: {difference}. Linearise it after its layers were replaced."
            )
        try:
            return self._linear(live, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not any(sign in str(error) for sign in _SIGNS):
                raise
            raise NotImplementedError(
                f"{self._title} cannot be linearised: `{self._culprit(live, args, kwargs)}` has no forward-mode rule"
                f" ({str(error).splitlines()[0]}). Leave it out: `only=` the submodules that have one."
            ) from error

    @property
    def _title(self) -> str:
        return f"`{self._name}`" if self._name else type(self._module).__name__

    def _warn_of_hooks(self) -> None:
        hooked = [name for name, part in self._module.named_modules() if name and part._forward_hooks]
        if hooked:
            warnings.warn(
                f"{self._title} is linearised, and `{hooked[0]}` in it has a forward hook: what it keeps or logs is"
                " taken at w0, without a gradient. What the forward pass returns or keeps in attributes is whole.",
                stacklevel=2,
            )

    def _linear(self, live: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # in which changes are dropped, without a word
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                args, kwargs = tree_map(_ordinary, (args, kwargs))
            stack.enter_context(forward_mode.dual_level())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_composed_attention())
            with suppress(RuntimeError):  # hooks are in use outside, which is well
                stack.enter_context(disable_saved_tensors_hooks(_CHECKPOINTED))
            duals = {}
            for name, parameter in live.items():
                start = self.start[name] = self.start[name].to(parameter)
                duals[f"module.{name}"] = forward_mode.make_dual(start, parameter - start)  # type: ignore[no-untyped-call]
            versions = {name: start._version for name, start in self.start.items()}
            result = functional_call(_Original(self._module, self._before), duals, args, kwargs)
            if written := [name for name, start in self.start.items() if start._version != versions[name]]:
                raise ValueError(
                    f"{self._title} cannot be linearised: its forward pass writes to `{written[0]}`, as `max_norm` of"
                    " an embedding does."
                )
            return leaving(result, self._module)

    def _culprit(self, live: Mapping[str, Tensor], args: Any, kwargs: Any) -> str:
        """Where the pass ends, run once more."""
        inside: list[nn.Module] = []
        names = {part: name for name, part in self._module.named_modules()}
        hooks = [
            register_module_forward_pre_hook(lambda part, _: inside.append(part)),
            register_module_forward_hook(lambda *_: inside.__delitem__(-1)),
        ]
        try:
            self._linear(live, args, kwargs)
        except (NotImplementedError, RuntimeError):
            pass
        finally:
            for hook in hooks:
                hook.remove()
        found = next((part for part in reversed(inside) if names.get(part)), self._module)
        path = ".".join(filter(None, (self._name, names[found])))
        return f"{path}: {type(found).__name__}" if path else type(found).__name__


class _Original(nn.Module):
    """The module with the forward pass that it had, and without its own hooks, which run around ours."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any] | None) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward is not None:
            return self._forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


@final
class _composed_attention:
    """Layers of attention in eval mode take the operations that they are composed of, which have rules."""

    def __enter__(self) -> None:
        self._enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._enabled)


def _ordinary(leaf: Any) -> Any:
    """A tensor that layers may write to."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
