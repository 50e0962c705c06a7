"""Every private name of Lightning that this folder uses; a test asserts that there are no others."""

PRIVATE = {
    "_batch": "of a data fetcher: the batch that was fetched last",
    "_checkpoint_connector": "of a Trainer: writes the content of a checkpoint",
    "_combined_loader": "of a loop: its loaders",
    "_combined_loader_states_to_load": "of a fit loop: where its loaders go on after a resume",
    "_data_fetcher": "of a fit loop: hands out the batches of an epoch",
    "_ddp_kwargs": "of a DDP strategy: holds the processes that synchronise gradients",
    "_last_train_dl_reload_epoch": "of a fit loop: the epoch in which its loaders were made last",
    "_load_combined_loader_states": "of a fit loop: makes its loaders go on where they were",
    "_load_state_dicts": "of its loaders: makes them go on where they were",
    "_on_before_batch_transfer": "of a module: the hook before a batch is moved, as Lightning calls it",
    "_should_accumulate": "of a fit loop: whether a gradient is kept for a later step",
    "_trainer": "of a module: whether it is in a fit, without the error of `trainer`",
}
"""What each is."""
