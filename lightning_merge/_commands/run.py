"""``lightning-merge run``: training with a recipe, or with a stream of tasks."""

import re

from lightning_merge._commands import fit
from lightning_merge._commands._mistakes import users_mistake
from lightning_merge._commands._needs import PREFERENCE_MODULES, RECIPE_MODULES, need


def main(arguments: list[str]) -> int:
    """Runs it with all that was given after ``run``, and gives the exit code."""
    from lightning_merge.recipes._catalog import recipes, whole

    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: lightning-merge run NAME [--option value]\n\nNAME is one of: {', '.join(recipes())}")
        print("The settings of one: lightning-merge run NAME --help")
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(
            "`run` needs the name of a recipe first. Type: lightning-merge run digits/swa\n"
            "`lightning-merge recipes` lists all of them."
        )
    config = whole(arguments[0])  # `--config` takes a text as well as a file
    need(RECIPE_MODULES)
    if arguments[0].startswith("preference/"):
        need(PREFERENCE_MODULES, "preference")
    if arguments[1:] in (["--help"], ["-h"]):
        from lightning_merge.recipes._help import recipe_help

        print(recipe_help(arguments[0]))
        return 0
    if arguments[1:] == ["--help", "all"]:
        arguments = arguments[:2]
    if "--league" in arguments:
        from lightning_merge.recipes._league import with_league

        arguments = [argument for argument in arguments if argument != "--league"]
        config = with_league(arguments[0], config)
    if arguments[0].startswith("continual/"):
        from lightning_merge.recipes.streams._command import run as run_stream

        run_stream(["--config", config, *arguments[1:]])
        return 0
    try:
        return fit.main(["fit", "--config", config, *arguments[1:]])
    except Exception as error:
        first = re.search(r"there is no file (?:\S*/)?runs/(\w+/[\w-]+)/", users_mistake(error) or "")
        if first is None or first[1] not in recipes():
            raise
        data = {"preference": " --data.pairs FILE", "preference/base": " --data.text FILE"}
        given = data.get(first[1], data.get(first[1].partition("/")[0], ""))
        cure = f"Another recipe writes it. Type this first: lightning-merge run {first[1]}{given}"
        raise ValueError(f"{users_mistake(error)} {cure}") from error
