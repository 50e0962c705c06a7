"""What lightning-merge writes into a checkpoint about itself: the names of its keys, and the label."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from torch import OutOfMemoryError, Tensor

FORMAT = 1
"""The version of the label that files of lightning-merge carry."""

KEY = "lightning_merge"
"""Key of a checkpoint under which everything of ours is, and first part of the names of parts."""

STREAM_KEY = "lightning_merge_continual"
"""Key of the section of ``ContinualMerging``."""

ANCHOR_KEY = "lightning_merge_anchor"
"""Key of the section of ``Anchor``."""

ONLINE_KEY = "lightning_merge.online"
"""Key of the state that online merging adds to that of an optimizer."""


def average_key(name: str) -> str:
    """Key of an average among the callbacks of a checkpoint."""
    return f"{KEY}.{name}"


@final
@dataclass(frozen=True)
class Label:
    """What a file says of the sets in it, every field of the type it must have.

    Args:
        holds: The set in ``state_dict``: the name of an average, or ``raw``.
        measured: Whether that set was measured at this step.
        monitor: The metric that chose it.
        score: Its value.
        metrics: What was measured on it.
        averages: Of each average its class, rule, updates and steps.
        raw: The raw weights that are not in ``state_dict``; ``None`` in a file of weights only.
        states: The state of each average; ``None`` likewise.
        names: The canonical name of each key of ``state_dict`` that is called otherwise: a second name of a tied
            tensor, or one that the module gave.
    """

    holds: str
    measured: bool
    monitor: str | None
    score: float | None
    metrics: Mapping[str, float]
    averages: Mapping[str, Mapping[str, Any]]
    raw: Mapping[str, Any] | None
    states: Mapping[str, Mapping[str, Any]] | None
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Any, where: object) -> "Label | None":
        """The label of a checkpoint; ``None`` if it has none.

        Args:
            checkpoint: The content of a file.
            where: What errors call it: its path.

        Raises:
            ValueError: If a field is missing or of another type than it was written with, or the format is unknown.
        """
        if not isinstance(checkpoint, Mapping) or KEY not in checkpoint:
            return None
        section = checkpoint[KEY]
        if not isinstance(section, Mapping):
            raise ValueError(_wrong(where, KEY, "a dict", section))
        if section.get("format") != FORMAT:
            raise ValueError(
                f"{where} has format {section.get('format')} of lightning-merge; this version reads {FORMAT}."
                " Update it."
            )
        fields = _Fields(section, where)
        label = cls(
            holds=fields.of("holds", str),
            measured=fields.of("measured", bool, default=False),
            monitor=fields.of("monitor", str, default=None),
            score=fields.of("score", (int, float), default=None),
            metrics=fields.by_name("metrics", (int, float), default={}) or {},
            averages=fields.by_name("averages", Mapping, default={}) or {},
            raw=fields.by_name("raw", (Tensor, str), default=None),
            states=fields.by_name("states", Mapping, default=None),
            names=fields.by_name("names", str, default={}) or {},
        )
        for name, about in label.averages.items():
            inner = _Fields(about, where, f"averages.{name}.")
            inner.of("class", str, default="")
            inner.of("rule", str, default="")
            inner.of("updates", int, default=0)
            inner.of("steps", int, default=0)
        for name in label.states or {}:
            if name not in label.averages:
                raise ValueError(_wrong(where, f"averages.{name}", "a dict, as its state is there", None))
        return label


@contextmanager
def as_written(what: str) -> Iterator[None]:
    """What is made of a part of a file fails by that part's name if it is not as it was written.

    Raises:
        ValueError: Instead of an error that says that something of it is missing or of another type.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{what} is not as lightning-merge writes it ({type(error).__name__}: {error}). The file was changed after"
            " it was written, or something else wrote it: use another checkpoint."
        ) from error


@dataclass(frozen=True)
class _Fields:
    """Looks up fields of a section and names those that are wrong."""

    section: Mapping[str, Any]
    where: object
    prefix: str = ""

    def of(self, name: str, kinds: Any, **default: Any) -> Any:
        """One field; the default where it is missing or ``None``."""
        value = self.section.get(name)
        if value is None and "default" in default:
            return default["default"]
        is_flag = isinstance(value, bool) and kinds is not bool  # Python counts it among the numbers
        if not isinstance(value, kinds) or is_flag:
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ValueError(_wrong(self.where, self.prefix + name, wanted.replace("Mapping", "a dict"), value))
        return value

    def by_name(self, name: str, kinds: Any, **default: Any) -> Any:
        """A dict of such fields."""
        found = self.of(name, Mapping, **default)
        for key in found or {}:
            if not isinstance(key, str):
                raise ValueError(_wrong(self.where, self.prefix + name, "a dict with names for keys", found))
            _Fields(found, self.where, f"{self.prefix}{name}.").of(key, kinds)
        return found


def _wrong(where: object, name: str, wanted: str, value: Any) -> str:
    return (
        f"{where}: `{name}` in the label of lightning-merge must be {wanted}, got {type(value).__name__}. The file was"
        " changed after it was written, or something else wrote it: use another checkpoint."
    )
