"""``lightning-merge fit``, ``validate``, ``test`` and ``predict``: LightningCLI with any model and data class."""

from lightning_merge._commands._needs import CLI_MODULES, need


def main(arguments: list[str]) -> int:
    """Runs it with the command and all that was given after it, and gives the exit code."""
    need(CLI_MODULES)
    from lightning_merge.recipes._lightning_cli import run

    run(arguments)
    return 0
