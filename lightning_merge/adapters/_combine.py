"""Several adapters of one base, merged."""

from collections.abc import Sequence

import torch

from lightning_merge._checks import instance, sequence
from lightning_merge.adapters._adapter import Adapter
from lightning_merge.adapters._products import layers_of
from lightning_merge.combiners import Combiner
from lightning_merge.weights import Weights, first_mismatch


@torch.no_grad()
def combine_adapters(combiner: Combiner, adapters: Sequence[Adapter], rank: int | None = None) -> tuple[Adapter, float]:
    """What a combiner makes of the adapters' vectors, as an adapter again, and what its rank leaves out.

    Of LoRA those are products, ``scale_t * B_t A_t``: the mean of factors is not the factors of the mean. One vector
    is held at a time, and the combiner's state. With ``Average()`` it is AdapterSoup, DynaMMo's merge and the mean of
    multi-task PEFT merging.

    Args:
        combiner: Of task vectors; none that weighs by statistics of whole weights.
        adapters: Of one base and the same layers, at least one.
        rank: Of the result; by default that of the adapters, which have to agree then.

    Returns:
        The adapter, with the settings of the first, and the relative error in the Frobenius norm over all layers.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no adapter; kinds, bases, layers, shapes, or without ``rank`` ranks differ; or what is
            trained beside the adapters does.

    Example:
        >>> from lightning_merge.combiners import Average
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        >>> def adapter(a, b):
        ...     factors = {"q.lora_A.weight": torch.tensor([a]), "q.lora_B.weight": torch.tensor(b)[:, None]}
        ...     return Adapter(factors, config)
        >>> one, two = adapter([1.0, 0.0], [2.0, 0.0]), adapter([0.0, 1.0], [0.0, 4.0])
        >>> merged, lost = combine_adapters(Average(), [one, two], rank=2)
        >>> merged.vector(), round(lost, 6)
        ({'q.weight': tensor([[1.0000, 0.0000],
                [0.0000, 2.0000]])}, 0.0)

    References:
        Chronopoulou et al., "AdapterSoup", Findings of EACL 2023. Qazi et al., "DynaMMo", MIUA 2024. Tang et al.,
        "Parameter-efficient multi-task model fusion with partial linearization", ICLR 2024.
    """
    instance("combiner", combiner, Combiner)
    several: list[Adapter] = [
        instance("adapters", each, Adapter) for each in sequence("adapters", adapters, "several adapters")
    ]
    if not several:
        raise ValueError("`adapters` must be at least one adapter, got none.")
    for other in several[1:]:
        if difference := _difference(several[0], other, rank):
            raise ValueError(f"{other.name} cannot be merged with {several[0].name}: {difference}.")
    return several[0].with_vector(combiner.combine(each.vector() for each in several), rank)


def _difference(first: Adapter, other: Adapter, rank: int | None) -> str | None:
    """Why they are no adapters of one kind, or nothing."""
    if first.kind != other.kind:
        return f"it is of kind {other.kind}, not {first.kind}"
    if first.base != other.base:
        return f"its base is {other.base or 'not named'}, not {first.base or 'named'}"
    if rank is None and first.rank != other.rank:
        return f"its rank is {other.rank}, not {first.rank}; name the rank of the result to merge them"
    if difference := first_mismatch(_outline(first), _outline(other)):
        return f"it is of other layers: {difference}"
    before, after = first.beside(), other.beside()
    if difference := first_mismatch(before, after):
        return f"what was trained beside the layers differs: {difference}"
    if name := next((name for name in before if not torch.equal(before[name], after[name])), None):
        return f"`{name}`, which was trained beside the layers, differs, and is in no vector"
    return None


def _outline(adapter: Adapter) -> Weights:
    """Names and shapes of its vector, without the products."""
    if adapter.kind != "LORA":
        return adapter.vector()
    pairs = {weight: (adapter.weights[a], adapter.weights[b]) for weight, (a, b) in layers_of(adapter.weights).items()}
    return {weight: torch.empty(len(b), *a.shape[1:], device="meta") for weight, (a, b) in pairs.items()}
