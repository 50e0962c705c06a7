"""The table of callbacks that publish an average: a new one gets a line here, and the tests that read it try it.

Of those in ``golden.runs`` there are files of an earlier version; further ones come here.
"""

from collections.abc import Callable
from typing import Any

from golden import runs
from golden.runs import averages as averages

from lightning_merge import callbacks as merging


def rows(batch: Any) -> int:
    """How many a batch has."""
    return len(batch[0])


METHODS: dict[str, Callable[[], list[Any]]] = {
    **runs.METHODS,
    "anneal": lambda: [
        merging.Anneal("1-sqrt", 4, validate="both"),
        merging.Anneal("cosine", 4, memory=3, name="now"),
        merging.Anneal("exponential", 14, 2, memory=3, tokens=rows, name="tokens"),
    ],
    "bema": lambda: [merging.BEMA(0.7, validate="both")],
    "best-k": lambda: [merging.BestK("val/loss", 2, validate="both")],
    "evaluation-weights": lambda: [
        merging.EvaluationWeights(
            lambda module: {
                name: (0.9 if each.requires_grad else 1.0) * each.detach()
                for name, each in module.named_parameters(remove_duplicate=False)
            }
        )
    ],
    "league": lambda: [  # whose contestants are among the callbacks where a test looks for them
        *(contestants := [merging.EMA(0.8, validate="both"), merging.LAWA(k=2, every_n_steps=2, validate="raw")]),
        merging.League(contestants, "val/loss"),
    ],
}
PUBLISHING = {name: make for name, make in METHODS.items() if averages(make())}
