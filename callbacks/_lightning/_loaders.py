"""Where Lightning's training loaders are when a run goes on."""

from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng


def count_reloads(trainer: Any) -> None:
    """Loaders that are reloaded every n epochs are so in the same ones as without the interruption."""
    loop, n = trainer.fit_loop, trainer.reload_dataloaders_every_n_epochs
    if n:
        is_under_way = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
        begun = max(0, loop.epoch_progress.current.processed - (not is_under_way))
        loop._last_train_dl_reload_epoch = begun // n * n


def restore_samplers(loop: Any) -> None:
    """Loaders that remember their position take in where they were at the end of the epoch before.

    Lightning gives it to them in the middle of an epoch only, but their samplers draw from random states of their own.
    """
    if loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        with isolate_rng():
            iter(loop._combined_loader)  # the one that was at its end; the next begins after it
