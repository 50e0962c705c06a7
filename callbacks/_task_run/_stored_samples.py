"""A few samples of each class, stored to train the shared head on once its rows come from several tasks."""

from collections import defaultdict
from collections.abc import Container
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_merge.callbacks._lightning._user_step import outside_training
from lightning_merge.continual import masked_cross_entropy
from lightning_merge.weights import Weights

_STEPS, _RATE = 100, 1e-3  # as little as moves rows against each other: the samples are few


@final
class StoredSamples:
    """The first samples of each class that a fit trains on, as the training step gets them.

    Args:
        per_class: How many of each class; at least 1.
        kept: Those of this fit that are kept already, by class.

    Attributes:
        by_class: What is kept, of shape ``(n, ...)`` by class, in host memory.
    """

    def __init__(self, per_class: int, kept: dict[int, Tensor] | None = None) -> None:
        self.per_class = per_class
        self.by_class: dict[int, Tensor] = dict(kept or {})
        self._said = False

    def take(self, batch: Any, wanted: Container[int]) -> None:
        """Copies the samples that are still wanted, before the step can change them.

        Args:
            batch: Inputs and class numbers.
            wanted: Classes of the task. Samples of others, or of none (-1, say), are left out, which is said once.

        Raises:
            ValueError: If the batch is not a pair of inputs and class numbers.
        """
        if not _is_labelled(batch):
            raise ValueError(
                "`store_samples_per_class` takes batches of two tensors, inputs and one class number for each; the"
                f" training loader gave {type(batch).__name__}. Leave it at 0, or let the data module give such pairs."
            )
        inputs, labels = batch
        fresh: dict[int, list[Tensor]] = defaultdict(list)
        for number, label in enumerate(labels.tolist()):
            if label not in wanted:
                self._say_left_out(label, wanted)
            elif len(self.by_class.get(label, ())) + len(fresh[label]) < self.per_class:
                fresh[label].append(inputs[number].detach().to("cpu", copy=True))
        for label, samples in fresh.items():
            if samples:
                new = torch.stack(samples)
                self.by_class[label] = torch.cat([self.by_class[label], new]) if label in self.by_class else new

    def _say_left_out(self, label: int, wanted: Container[int]) -> None:
        if not self._said:
            self._said = True
            rank_zero_warn(
                f"No sample of label {label} is stored: `store_samples_per_class` keeps those of the classes of the"
                f" task, {wanted}."
            )


def calibrated_head(trainer: Any, module: LightningModule, layer: nn.Linear, by_class: dict[int, Tensor]) -> Weights:
    """Weight and bias of the head after a short training on what reaches it of the samples; all else is as it is.

    ``_STEPS`` steps of Adam on all samples at once, by the cross-entropy among the classes that there are samples of.

    Args:
        trainer: For its device and precision.
        module: Called on the samples, in evaluation mode.
        layer: The head: class ``c`` is its row ``c``.
        by_class: Samples by class; each class counts alike.

    Raises:
        ValueError: If the head is not called once per pass, on one row of features for each sample.

    References:
        Chitale et al., "Task arithmetic with LoRA for continual learning", 2023, section 3.
    """
    parameters = {name: p.detach().float().clone().requires_grad_() for name, p in layer.named_parameters()}
    features = torch.cat([reaching(trainer, module, layer, samples) for samples in by_class.values()])
    counts = [len(samples) for samples in by_class.values()]
    labels = torch.tensor(list(by_class)).repeat_interleave(torch.tensor(counts)).to(features.device)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(parameters.values(), lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            logits = torch.nn.functional.linear(features, parameters["weight"], parameters.get("bias"))
            loss = masked_cross_entropy(logits, labels, sorted(by_class))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def reaching(trainer: Any, module: LightningModule, layer: nn.Linear, samples: Tensor) -> Tensor:
    """What the head is called on, of shape (N, in_features); the module is in evaluation mode, and stays as it was.

    Raises:
        ValueError: If it is called on something else, or not once.
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float()))
    try:
        with outside_training(trainer, module), trainer.precision_plugin.forward_context():
            module(samples.to(trainer.strategy.root_device))
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape != (len(samples), layer.in_features):
        shapes = [tuple(each.shape) for each in seen]
        raise ValueError(
            f"`store_samples_per_class` takes a head that is called once, on features of shape ({len(samples)},"
            f" {layer.in_features}); it was called on {shapes}. Leave it at 0."
        )
    return seen[0]


def _is_labelled(batch: Any) -> bool:
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(each, Tensor) for each in batch)):
        return False
    inputs, labels = batch
    is_whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype is not torch.bool
    return bool(labels.shape == inputs.shape[:1]) and is_whole
