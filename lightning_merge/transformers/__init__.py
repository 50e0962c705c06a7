"""For ``transformers.Trainer``, and the trainers that are made from it, as TRL's: a callback that averages weights."""

try:
    import transformers as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lightning_merge.transformers needs transformers: pip install lightning-merge[transformers]"
    ) from error

from lightning_merge.transformers._callback import MergeCallback

__all__ = ["MergeCallback"]
