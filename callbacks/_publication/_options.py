"""The options that every callback that publishes an average takes."""

from typing import TypedDict, TypeVar

from lightning_merge._averaging._elsewhere import Device


class AverageOptions(TypedDict, total=False):
    """What every callback that publishes an average takes beside its own arguments.

    Args:
        final_validation: Whether the final weights are measured at the end of a fit, if no validation has seen them;
            by default they are.
        final_checkpoint: Whether ``<name>-final.ckpt`` is written then, if checkpointing is on; by default it is.
        log_health: Whether loggers get ``<name>/updates``, ``/distance``, ``/start_share`` and ``/decay`` every
            ``log_every_n_steps`` of the Trainer; by default they do.
    """

    final_validation: bool
    final_checkpoint: bool
    log_health: bool


class RuleOptions(AverageOptions, total=False):
    """What every callback that averages by a rule takes beside its own arguments.

    Args:
        final_validation: Whether the final weights are measured at the end of a fit, if no validation has seen them;
            by default they are.
        final_checkpoint: Whether ``<name>-final.ckpt`` is written then, if checkpointing is on; by default it is.
        log_health: Whether loggers get ``<name>/updates``, ``/distance``, ``/start_share`` and ``/decay`` every
            ``log_every_n_steps`` of the Trainer; by default they do.
        device: Where the average is: ``None`` for where the weights are, ``"cpu"`` for host memory. Weights on a device
            are then copied beside what it computes, and taken in while it goes on.
    """

    device: Device


Options = TypeVar("Options", bound=AverageOptions)


def known(options: Options, kind: type[Options], owner: object) -> Options:
    """Options that a callback hands on, all of them its own: not what only the class behind it takes.

    Args:
        options: What was given beside the arguments in the signature.
        kind: Which options there are.
        owner: The callback, for the message.

    Raises:
        TypeError: If one is not among them.
    """
    if others := [name for name in options if name not in kind.__annotations__]:
        raise TypeError(
            f"{type(owner).__name__} takes no `{others[0]}`. Beside the arguments in its signature it takes"
            f" {', '.join(f'`{name}`' for name in kind.__annotations__)}."
        )
    return options
