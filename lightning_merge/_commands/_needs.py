"""What a command needs that may not be installed."""

from collections.abc import Sequence
from importlib.util import find_spec

CLI_MODULES = ("jsonargparse", "docstring_parser", "typeshed_client")
RECIPE_MODULES = (*CLI_MODULES, "torchvision", "sklearn", "matplotlib", "rich")
PREFERENCE_MODULES = ("transformers",)


def need(modules: Sequence[str], extra: str = "recipes") -> None:
    """Raises ``ImportError`` with the line that installs what is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"not installed: {', '.join(missing)}. Type this to install what is needed:\n"
            f'pip install "lightning-merge[{extra}]"'
        )
