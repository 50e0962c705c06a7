"""An average in a training loop of your own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge._averaging._elsewhere import Device, checked_device
from lightning_merge._averaging._loop import Loop
from lightning_merge._averaging._unwrapped import plain_module, plain_optimizer
from lightning_merge._checks import function, instance, real, word
from lightning_merge.rules import Rule
from lightning_merge.schedules import EveryNSteps, RunLength, Schedule
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import Weights


@final
class Averager:
    """Averages the weights of a training loop of your own, by any rule: plain PyTorch, Fabric, torchtitan and the like.

    It counts the steps that the optimizer applies, and takes the weights in right after those that the schedule names;
    the loop stays as it is. Batches that only add to a gradient are no steps, and neither is one that a gradient scaler
    skips. Weights that hold a NaN or an infinity are never merged: the average stays as it was, and a warning names the
    tensor. An average that starts with the run is a copy of the weights right before the first step, so they may be
    loaded after this is made.

    Of several optimizers it counts the one it is given: the one that steps last, or one ``Averager`` for each part of
    the model. Under DDP each process makes one. Parameters that FSDP2 or tensor parallelism have sharded are averaged
    where they are, each process its part, and nothing is gathered.

    Args:
        model: What is trained; DDP, Fabric or ``torch.compile`` may be around it. Names are those of the module inside.
        optimizer: The one whose applied steps are counted.
        rule: How weights are merged.
        schedule: When; by default after every applied step. One that counts epochs needs ``end_epoch``.
        selection: Which tensors, and what becomes of buffers; by default all, and floating-point buffers averaged.
        run: How long the run will be, if rule or schedule say something as a share of it or in epochs.
        device: Where the average is: ``None`` for where the weights are, ``"cpu"`` for host memory.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the optimizer steps no parameter that is averaged, the model has no weights yet or is sharded by
            FSDP1 or DeepSpeed, the rule does not work on parts, or the length of the run is needed and not known.

    Example:
        >>> from lightning_merge.rules import Mean
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(0.0)
        tensor([[0.]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> averager = Averager(model, optimizer, Mean())
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 1)).sum().backward()
        ...     optimizer.step()
        >>> with averager.merged():
        ...     model.weight.item()
        -2.0
        >>> model.weight.item()
        -3.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: Rule,
        schedule: Schedule | None = None,
        selection: Selection | None = None,
        *,
        run: RunLength | None = None,
        device: Device = None,
    ) -> None:
        unknown = RunLength(unknown_since="give `run=RunLength(steps=..., epochs=..., steps_per_epoch=...)`")
        self._loop = Loop(
            plain_module(model),
            plain_optimizer(optimizer),
            instance("rule", rule, Rule),
            EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule),
            chosen(selection, Selection()),
            unknown if run is None else instance("run", run, RunLength),
            checked_device(device) is not None,
        )

    @property
    def steps(self) -> int:
        """Applied optimizer steps counted so far."""
        return self._loop.steps

    @property
    def updates(self) -> int:
        """Times that weights were taken in."""
        return self._loop.updates

    @property
    def update_window(self) -> tuple[int, int] | None:
        """First and last applied step whose weights were taken in; ``None`` before the first update."""
        return self._loop.update_window

    @property
    def skipped_nonfinite(self) -> int:
        """Updates left out because the weights held a NaN or an infinity."""
        return self._loop.skipped_nonfinite

    @property
    def ready(self) -> bool:
        """Whether anything has been merged."""
        return self._loop.ready

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the model has the merged weights: to evaluate and to save them. Afterwards the raw ones train on.

        They are back in place whatever happens in the block. As long as nothing has been merged it changes nothing.
        Buffers are averaged over processes, so under DDP all processes enter it if the model has buffers.

        Raises:
            RuntimeError: If the optimizer steps inside, parameters are written to that are the average itself, or
                BatchNorm statistics are to be measured again and were not.
        """
        with self._loop.swapped():
            yield

    def merged_weights(self) -> Weights | None:
        """The merged parameters and buffers by canonical name, in the average's precision; ``None`` if there are none.

        A tensor that has several names is there under each. They are the stored tensors: clone before writing. Of
        sharded ones it is the part that this process holds.
        """
        found = self._loop.merged()
        return None if found is None else self._loop.watched.inventory.under_every_name(found)

    def raw_weights(self) -> Weights:
        """The weights that training works on, of what is merged, by canonical name: live ones, or those set aside."""
        return self._loop.raw()

    def health(self, name: str = "merged") -> dict[str, float]:
        """How the average stands, for a logger: the keys and numbers that the callbacks log.

        ``<name>/updates`` counts the times that weights were taken in; ``<name>/distance`` is the Euclidean distance of
        the merged parameters from the raw ones; ``<name>/start_share`` the share of the average that is still the
        weights it started from; ``<name>/decay`` what the last update kept of it, of a rule that has such a number. It
        takes one pass over both sets and reads one number from the device. Where parameters are sharded, all processes
        call it.

        Args:
            name: What the keys begin with.

        Returns:
            Nothing before the first update; no distance of an average in host memory, which would have to be fetched.

        Raises:
            TypeError: If the name is no text.
            ValueError: If it cannot be part of a key.
        """
        name = word("name", name, other_than=("raw",))
        return {f"{name}/{key}": value for key, value in self._loop.standing().items()}

    def end_epoch(self) -> None:
        """Tells it that an epoch is complete; only schedules that count epochs need to know."""
        self._loop.end_epoch()

    def evaluate(self, score: float) -> bool:
        """Tells a rule that decides by a score how its weights did, lower is better: negate an accuracy.

        Args:
            score: Of the raw weights, or of the merged ones if the rule's ``wants_score`` is ``"own"``; under DDP the
                same in all processes.

        Returns:
            Whether nothing can change the result any more, so that training may stop.

        Raises:
            TypeError: If it is not a number.
            ValueError: If the rule decides by no score.
        """
        score = real("score", score)
        if self._loop.rule.wants_score is None:
            raise ValueError(f"`evaluate` is for rules that decide by a score, as ValleyMean, got {self._loop.rule!r}.")
        return self._loop.evaluate(score)

    def recalibrate(self, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> None:
        """Measures BatchNorm statistics under the merged weights, as ``Selection(buffers="recompute")`` asks for.

        Training notices nothing of it. Under ``torch.distributed`` all processes call it, each with batches of its own.

        Args:
            batches: Training batches, some tens of them; where nothing was merged yet they are not looked at.
            forward: Runs the model on one batch; by default on the batch, or on its first part if that is a list or a
                tuple, moved to the model's device.

        Raises:
            ValueError: If statistics are not to be measured again, or there are no batches.
        """
        if (buffers := self._loop.selection.buffers) != "recompute":
            raise ValueError(
                f"`recalibrate` needs `selection=Selection(buffers='recompute')`, got buffers={buffers!r}."
            )
        instance("batches", batches, Iterable, "batches to iterate over")
        self._loop.calibrate(batches, self._forward if forward is None else function("forward", forward))

    def _forward(self, batch: Any) -> Any:
        first: Tensor = batch[0] if isinstance(batch, (list, tuple)) else batch
        device = next((tensor.device for tensor in self._loop.tensors.values()), torch.device("cpu"))
        return self._loop.watched.module(first.to(device))

    def publish(self) -> Weights:
        """Leaves the merged weights in the model, after the last step, and counts no further ones.

        Returns:
            The raw weights that were there, by canonical name; nothing if nothing was merged.

        Raises:
            RuntimeError: Inside of ``merged()``.
        """
        return self._loop.publish()

    def close(self) -> None:
        """Counts no further steps; the average is kept."""
        self._loop.close()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit, beside the raw weights: tensors, numbers, lists and dicts.

        ``torch.load(weights_only=True)`` reads it. Tensors are those that the average goes on with, so write it at
        once. Of sharded parameters each process has its part, and writes a file of its own.
        """
        return self._loop.save()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with copies of what ``state_dict`` gave; warns if the rule had other settings.

        Args:
            state: From the same model and selection and, where parameters are sharded, the same mesh.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it is of another rule, another model or something else; the average is then what it was.
        """
        self._loop.load(instance("state", state, Mapping, "what `state_dict()` gave"))

    def __getstate__(self) -> Any:
        raise TypeError(
            "an Averager cannot be copied or pickled, since it follows one optimizer's steps. Make one for the copied"
            " model and optimizer, and hand it the state: `copied.load_state_dict(averager.state_dict())`."
        )

    def __repr__(self) -> str:
        loop = self._loop
        return f"Averager({loop.watched.inventory.title}, {loop.rule!r}, {loop.schedule!r}, {loop.selection!r})"
