"""Where the branches of a Trainer are: in turn in its one module, or one in each process."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_merge import weights
from lightning_merge._said import is_of_another_class, is_said
from lightning_merge.branches import Branches, InTurn, OnePerRank, Policy
from lightning_merge.callbacks._branch_run._settings import Settings
from lightning_merge.callbacks._branch_strategy import BranchStrategy
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.weights import State


def strategy_of(settings: Settings, trainer: Any, stage: str) -> BranchStrategy | None:
    """The strategy that has a branch in each process, if the Trainer has that; for a fit they are placed.

    Raises:
        ValueError: If the strategy cannot exchange weights, or an argument of the callback does not go with it.
    """
    strategy = trainer.strategy
    alternative = "Use a single device, `strategy='ddp'`, or `BranchStrategy()` for a branch in each process."
    refuse_sharding(strategy, settings.title, alternative)
    if not isinstance(strategy, BranchStrategy):
        return None
    if settings.buffers == "shared":
        raise ValueError(
            "`buffers='shared'` is one set for branches in turn, and branches in several processes have one each:"
            " use 'recompute' or 'average'."
        )
    if settings.inactive == "cpu":
        raise ValueError("`inactive='cpu'` is for branches in turn; in a process of its own each is always active.")
    if stage == "fit":
        strategy.place(settings.branches, whole=settings.batches != "turns")
    return strategy


def made(settings: Settings, trainer: Any, module: LightningModule, apart: bool) -> Branches:
    """The branches of a fit, all as the module is.

    Args:
        settings: Say how many there are and what is branched.
        trainer: Its strategy says where they are.
        module: The module.
        apart: Whether processes go on with the weights they have, instead of those of the first one.
    """
    buffers: Any = "average" if settings.buffers == "average" else "shared"
    optimizers, count, selection = trainer.optimizers, settings.branches, settings.selection
    if isinstance(trainer.strategy, BranchStrategy):
        return OnePerRank(
            module,
            optimizers,
            count,
            selection=selection,
            buffers=buffers,
            others=settings.others,
            placement=trainer.strategy.placement,
            broadcast=not apart,
        )
    return InTurn(
        module, optimizers, settings.branches, selection=selection, buffers=buffers, inactive=settings.inactive
    )


def check_saved(title: str, branches: Branches, saved: State) -> None:
    """Checks that branches from before belong to this model.

    Raises:
        ValueError: If they do not.
    """
    tensors = branches.inventory.tensors
    live = {name for name, tensor in branches.live.items() if not isinstance(tensor, nn.Parameter)}
    for branch, found in saved["weights"].items():
        known = {name: tensors[name] for name in found if name in tensors}
        if missing := next((name for name in live if name not in found), None):
            known[missing] = tensors[missing]
        difference = weights.first_mismatch(known, found)
        others = [name for name in known if not branches.could_be(name)]
        difference = difference or (f"`{others[0]}` is not branched" if others else None)
        if difference:
            raise ValueError(
                f"{title} holds branch {branch} of another model: {difference}. Use a fresh callback, or the model and"
                " the selection that it was started with."
            )
    if len(saved["optimizers"]) not in (0, branches.count - 1):
        raise ValueError(
            f"{title} goes on with {len(saved['optimizers']) + 1} branches, and `branches` is {branches.count}. Keep"
            " the number."
        )


def check_policy(title: str, policy: Policy, rule: str, state: State | None) -> None:
    """Checks that what a policy of a file remembers is of this kind of policy, and says if its settings were others.

    Args:
        title: What messages call the branches.
        policy: The policy that goes on.
        rule: ``repr`` of the one that the file was written with.
        state: What that remembered.

    Raises:
        ValueError: If it is of another class, and remembers something.
    """
    if state and is_of_another_class(rule, policy):
        raise ValueError(
            f"{title} goes on from a file that was written with {rule}, whose state ({', '.join(map(repr, state))}) is"
            f" nothing to {policy!r}. Keep the settings, or load the weights alone and start anew."
        )
    if not is_said(rule, policy):
        rank_zero_warn(f"{title} goes on from a file that was written with {rule}.")
