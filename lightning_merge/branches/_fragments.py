"""A model divided into fragments, which merge in turn."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def layer_of(name: str) -> str:
    """What has its parameters and buffers under one name."""
    return name.rpartition(".")[0]


def divided(live: Mapping[str, Tensor], count: int, before: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Names of tensors in ``count`` fragments of whole layers, of as equal size as the largest layer allows.

    Layers go, the largest first, to the fragment that has the fewest numbers so far. What one sends at once is then
    about ``1 / count`` of the model, which neither successive layers nor every ``count``-th one give: embeddings are
    large and norms are small.

    Args:
        live: The tensors that are branched, by canonical name.
        count: Number of fragments; at least 1.
        before: Fragments as they are; new tensors join their layer's, others the smallest.

    Raises:
        ValueError: If there are fewer layers with parameters than fragments.
    """
    layers: dict[str, list[str]] = {}
    for name in live:
        layers.setdefault(layer_of(name), []).append(name)
    sizes = {
        layer: sum(live[name].numel() for name in names if isinstance(live[name], nn.Parameter))
        for layer, names in layers.items()
    }
    if not before and count > (trained := sum(map(bool, sizes.values()))):
        raise ValueError(
            f"`fragments` must be at most the number of layers whose parameters are branched, which is {trained}, got"
            f" {count}."
        )
    homes = {layer_of(name): number for number, names in enumerate(before) for name in names}
    filled = [0] * count
    found: list[list[str]] = [[] for _ in range(count)]
    for layer in sorted(layers, key=lambda layer: (layer not in homes, -sizes[layer])):
        number = homes.get(layer, min(range(count), key=filled.__getitem__))
        filled[number] += sizes[layer]
        found[number] += layers[layer]
    return found
