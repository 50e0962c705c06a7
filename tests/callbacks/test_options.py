"""Options that callbacks hand on: each reaches what takes it, from Python, a config, and the command line."""

import inspect
from typing import Any

import jsonargparse
import pytest
from hostile import arguments_of, options
from lightning.pytorch import Callback

from lightning_merge import callbacks
from lightning_merge.callbacks import ForkMerge, Published, WeightMerging

OTHER = {
    "final_validation": False,
    "device": "cpu",
    "final_checkpoint": False,
    "log_health": False,
    "optimizer_state": "average",
    "inactive": "cpu",
    "schedulers": "step",
    "validate": "raw",
    "optimizer": 1,
}
"""A value of each option that is no default."""
NEEDED: dict[str, dict[str, Any]] = {
    "ASWA": {"monitor": "val/loss"},
    "BestK": {"monitor": "val/loss"},
    "Branching": {"policy": {"class_path": "lightning_merge.branches.Average"}},
    "ForkMerge": {"branches": {"one": {"task": 1.0}}},
    "SMA": {"monitor": "val/loss"},
    "SWAD": {"monitor": "val/loss"},
    "WeightMerging": {"rule": {"class_path": "lightning_merge.rules.Mean"}},
}


def options_of(cls: type) -> list[str]:
    """What it takes beside the arguments in its signature, if it hands options on."""
    parameters = inspect.signature(cls).parameters
    return list(options(parameters["options"].annotation)) if "options" in parameters else []


CLASSES = {
    name: cls
    for name in callbacks.__all__
    if isinstance(cls := getattr(callbacks, name), type) and cls is not Published and options_of(cls)
}


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    return parser


def test_the_table_knows_every_option() -> None:
    assert len(CLASSES) > 12
    assert {option for cls in CLASSES.values() for option in options_of(cls)} == set(OTHER)


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_arrives_from_a_config(name: str, parser: jsonargparse.ArgumentParser) -> None:
    chosen = {option: OTHER[option] for option in options_of(CLASSES[name])}
    given = {"class_path": f"lightning_merge.callbacks.{name}", "init_args": {**NEEDED.get(name, {}), **chosen}}
    callback = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert type(callback) is CLASSES[name]
    assert {option: getattr(callback, option) for option in chosen} == chosen


def test_an_option_arrives_from_the_command_line(parser: jsonargparse.ArgumentParser) -> None:
    config = parser.parse_args(["--callback=lightning_merge.callbacks.WARP", "--callback.inactive=cpu"])
    callback = parser.instantiate_classes(config).callback
    assert (callback.inactive, callback.optimizer_state, callback.buffers) == ("cpu", "reset", "average")


@pytest.mark.parametrize("name", CLASSES)
def test_help_says_what_every_option_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(CLASSES[name], "callback")
    parser.print_help()
    entries = capsys.readouterr().out.split("--callback.")
    found = {entry.split(" ")[0]: len(entry.split()) for entry in entries}
    assert [option for option in options_of(CLASSES[name]) if found[option] < 8] == []


@pytest.mark.parametrize("name", CLASSES)
def test_what_it_does_not_take_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} takes no `rules`.*`final_checkpoint`"):
        CLASSES[name](**arguments_of(name, CLASSES[name]), rules=1)


@pytest.mark.parametrize(
    ("cls", "needed", "argument"),
    [
        (callbacks.EMA, (), "stop_when_finished"),
        (callbacks.EMA, (), "monitor"),
        (callbacks.PAPA, (), "score"),
        (callbacks.PAPA, (), "policy"),
        (ForkMerge, ({"one": {"task": 1.0}},), "selection"),
        (ForkMerge, ({"one": {"task": 1.0}},), "augmentations"),
    ],
)
def test_an_argument_of_the_base_class_is_none_of_the_named_callbacks(cls: Any, needed: Any, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} takes no `{argument}`"):
        cls(*needed, **{argument: None})


def test_a_callback_of_the_users_own_hands_on_what_its_base_takes() -> None:
    class Late(WeightMerging):
        def __init__(self, **settings: Any) -> None:
            super().__init__(callbacks.EMA().rule, **settings)

    assert Late(final_validation=False, name="late").final_validation is False
