"""What a command needs that may not be installed."""

from collections.abc import Sequence
from importlib.util import find_spec

CLI_MODULES = ("jsonargparse", "docstring_parser", "typeshed_client")
RECIPE_MODULES = (*CLI_MODULES, "torchvision", "sklearn", "matplotlib", "rich")


def need(modules: Sequence[str]) -> None:
    """Raises ``ImportError`` with the line that installs what is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'not installed: {", ".join(missing)}. They come with the recipes:\npip install "lightning-merge[recipes]"'
        )
