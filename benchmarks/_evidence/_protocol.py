"""What a protocol is: data, contestants, budgets. The bench adds seeds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Scores = Mapping[str, Mapping[str, float]]
"""What each contestant reached, by view: accuracies in percent, other figures as they are."""


@dataclass(frozen=True)
class Place:
    """Where a protocol runs, and how large.

    Args:
        size: ``"small"`` for a processor core, ``"full"`` for a GPU.
        device: As torch names it.
        data: Folder that holds ``cifar10/``.
        cache: Folder for what is computed once: activations, decoded images.
    """

    size: Literal["small", "full"] = "small"
    device: str = "cpu"
    data: Path = field(default=Path("data"))
    cache: Path = field(default=Path("data") / "evidence")


class Protocol(ABC):
    """One comparison. All contestants of a seed share the start, and the batches as far as they train alike.

    A subclass is a dataclass of its setting: every field is written into the file of results, and results are added to
    a file of the same setting only.
    """

    claim: str
    """The paper's, with its budget."""
    beside: str
    """The contestant that the others are compared with, seed by seed."""
    by_budget = False
    """Whether views are budgets, so that the figure has them along its axis."""

    def setting(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # see the class: it is one

    @abstractmethod
    def prepare(self, place: Place) -> None:
        """Reads the data and computes what all seeds share.

        Raises:
            FileNotFoundError: If data are not there.
            ImportError: If a package is not installed.
        """

    def choose(self) -> dict[str, Any]:
        """What is searched, alike for all contestants, on validation data and a seed that is not reported."""
        return {}

    @abstractmethod
    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        """The scores of one seed.

        Args:
            seed: Everything random follows from it.
            chosen: What ``choose`` returned.
        """
