"""ForkMerge: branches with other task weights, merged by what scores best."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge._checks import instance, names, number, whole
from lightning_merge.branches import BestMix
from lightning_merge.callbacks._branch_run._settings import Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._lightning._measure import Score
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import EveryNSteps
from lightning_merge.search import Method
from lightning_merge.selections import Selection


class ForkMerge(Branching):
    """Branches train on other mixtures of tasks; every k steps all go on from the mean with the shares that score best.

    ``w <- sum over b of a_b w_b`` with ``a`` at least 0, one in sum, and the highest score of the target task; branch
    ``b`` has trained on ``sum over t of weight[b][t] * loss_t``. So an auxiliary task that helps takes part, and one
    that hurts is left out, without training again for every weight.

    ``training_step`` returns the losses of its tasks: ``{"losses": {"digit": loss, "rotation": lambda: ...}}``. A loss
    may be a function without arguments, which is called only for branches that weight its task; so others neither pay
    for it nor have its inputs in their BatchNorm statistics. ``score_step(self, batch)`` returns the sum of the
    target's score over a validation batch, higher is better, and a count. Validation, files and the final model hold
    the last merge. The shares of each merge are in ``history`` and go to the loggers as ``forkmerge/<branch>``.

    Args:
        branches: The weight of each task's loss, by the name of the branch and of the task, as ``{"target": {"digit":
            1.0}, "joint": {"digit": 1.0, "rotation": 1.0}}``; at least 0, one of them more than 0.
        every_n_steps: Steps that each branch takes between merges; at least 1.
        search: How shares are searched; by default along the whole line in steps of a tenth for two branches, greedily
            for more.
        score: ``score(module, batch)`` in the place of the module's ``score_step``.
        heads: Glob patterns of parameters that are no part of the merge, the heads of auxiliary tasks: there is one
            of each, which the branches that have its task train. With a branch per process each has its own; then the
            module that files hold has those of the first branch.
        previous: Whether the last merge is a candidate. It is measured again: BatchNorm statistics come from newer
            batches.
        min_gain: The last merge is kept unless a mixture scores higher by so much; at least 0, in units of the score.
        budget: Most candidates that are measured at a merge; needed for search methods without an end.
        batches: ``"same"`` batch for all branches, ``"turns"`` or ``"own"``; see ``Branching``.
        buffers: ``"recompute"``: BatchNorm statistics are measured for every candidate, on the tasks of the first
            branch. ``"average"``: each branch has its own, which are pooled. ``"shared"``: all update one set.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state``, ``inactive``, ``schedulers``, ``validate``, ``optimizer``,
            ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``Branching``.

    Attributes:
        history: One entry per merge: ``shares`` by name of the branch, ``previous`` (whether the last merge was kept,
            so that all shares are 0), ``score``, ``evaluations``, ``rejected``, ``ties``.

    Raises:
        ValueError: If an argument is out of range, or the module returns no such losses.

    Example:
        >>> fork = ForkMerge({"target": {"digit": 1.0}, "joint": {"digit": 1.0, "rotation": 1.0}}, every_n_steps=50)
        >>> fork.policy
        BestMix(method=None, previous=True, budget=None, seed=0, min_gain=0.0)

    References:
        Jiang et al., "ForkMerge: Mitigating negative transfer in auxiliary-task learning", NeurIPS 2023, algorithm 1.
    """

    others = "own"  # heads: of most tasks one branch trains the only one that matters

    def __init__(
        self,
        branches: Mapping[str, Mapping[str, float]],
        every_n_steps: int = 100,
        search: Method | None = None,
        score: Score | None = None,
        *,
        heads: tuple[str, ...] | list[str] = (),
        previous: bool = True,
        min_gain: float = 0.0,
        budget: int | None = None,
        batches: Batches = "same",
        buffers: Buffers = "recompute",
        name: str = "forkmerge",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        _check_tasks(branches)
        if search is not None:
            instance("search", search, Method, "a method of `lightning_merge.search`")
        heads = names("heads", heads)
        super().__init__(
            BestMix(search, previous, budget, min_gain=min_gain),
            EveryNSteps(every_n_steps),
            len(branches),
            score=score,
            batches=batches,
            buffers=buffers,
            selection=Selection(exclude=heads, trainable=True),
            name=name,
            **known(options, BranchingOptions, self),
        )
        self.task_weights = {
            branch: {task: float(w) for task, w in tasks.items()} for branch, tasks in branches.items()
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """The shares and the score of every merge so far."""
        rows = (self._policy_state or {}).get("history", [])
        return [{**row, "shares": dict(zip(self.task_weights, row["shares"], strict=True))} for row in rows]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weighting of tasks between ``training_step`` and the Trainer."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{self.title} weights the losses that `training_step` returns, and under manual optimization the"
                " module uses them itself. Use automatic optimization."
            )
        super().on_fit_start(trainer, pl_module)
        self._running.publisher.patches.replace(pl_module, "training_step", self._weighted)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on after the last merge that was logged."""
        super().on_train_start(trainer, pl_module)
        if self._progress.logged is None:  # a new run, or the file of a version that did not keep it
            self._progress.logged = len(self.history)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the shares of a new merge."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        history = self.history
        if len(history) > (self._progress.logged or 0):
            self._progress.logged = len(history)
            metrics = {f"{self.name}/{branch}": share for branch, share in history[-1]["shares"].items()}
            for logger in trainer.loggers:
                logger.log_metrics({**metrics, f"{self.name}/score": history[-1]["score"]}, step=trainer.global_step)

    def _weighted(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """What ``training_step`` returns, with the sum of its losses under the branch's weights as the loss."""
        output = original(*args, **kwargs)
        if output is None:
            return None  # this batch is skipped
        fit = self._running
        losses = output.get("losses") if isinstance(output, Mapping) else None
        if not isinstance(losses, Mapping):
            raise ValueError(
                f"{self.title} needs the losses by task: `training_step` must return"
                f" {{'losses': {{task: loss, ...}}}}, got {type(output).__name__}."
            )
        known = {task for tasks in self.task_weights.values() for task in tasks}
        if unknown := sorted(known - losses.keys()):
            raise ValueError(
                f"`branches` of {self.title} weights the task {unknown[0]!r}, and `training_step` returned losses of"
                f" {', '.join(map(repr, losses)) or 'none'}. Name its tasks alike in both."
            )
        # In eval mode BatchNorm statistics are being measured, whichever branch has its turn.
        branch = fit.branches.active if fit.publisher.module.training else 0
        weighted = list(self.task_weights.values())[branch]
        total: Any = sum(w * _value(losses[task]) for task, w in weighted.items() if w)
        return {**{key: value for key, value in output.items() if key != "losses"}, "loss": total}

    @property
    def own(self) -> set[str]:
        """Heads, with a branch in each process."""
        return set() if self._strategy is None else set(self.shared)

    def note_the_end(self) -> None:
        super().note_the_end()
        if self.merges and not self.equal:
            rank_zero_info(
                f"{self.title} publishes merge {self.merges}; what the branches have trained since is not in it. Choose"
                " `every_n_steps` so that the last step merges."
            )


def _value(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    return loss() if callable(loss) else loss


def _check_tasks(branches: Mapping[str, Mapping[str, float]]) -> None:
    if not isinstance(branches, Mapping) or not branches:
        raise ValueError(f"`branches` must name at least one branch and its tasks, got {branches!r}.")
    for name, tasks in branches.items():
        says = "give each branch task weights of at least 0, one of them more than 0"
        given = f"got {tasks!r} for {name!r}"
        if not isinstance(name, str) or not isinstance(tasks, Mapping):
            raise TypeError(f"`branches` must {says}, by name, {given}.")
        try:
            weights = [number("branches", weight, "[0, inf)") for weight in tasks.values()]
        except (TypeError, ValueError) as error:
            raise type(error)(f"`branches` must {says}, {given}.") from None
        if not any(weights):
            raise ValueError(f"`branches` must {says}, {given}.")
