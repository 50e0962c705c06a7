"""Every private name of Lightning that this folder uses; a test asserts that there are no others."""

PRIVATE = {
    "_batch": "of a data fetcher: the batch that was fetched last",
    "_batches_that_stepped": "of an epoch loop: the step that loggers get",
    "_callback_metrics": "of a logger connector: the entries of `callback_metrics` as they are",
    "_can_stop_early": "of a fit loop: whether it may stop before its planned end",
    "_checkpoint_connector": "of a Trainer: writes the content of a checkpoint",
    "_combined_loader": "of a loop: its loaders",
    "_combined_loader_states_to_load": "of a fit loop: where its loaders go on after a resume",
    "_compiler_ctx": "of a module: what `torch.compile` made of it",
    "_data_fetcher": "of a fit loop: hands out the batches of an epoch",
    "_ddp_kwargs": "of a DDP strategy: holds the processes that synchronise gradients",
    "_first_loop_iter": "of a logger connector: whether a loop is at its first batch",
    "_last_train_dl_reload_epoch": "of a fit loop: the epoch in which its loaders were made last",
    "_load_combined_loader_states": "of a fit loop: makes its loaders go on where they were",
    "_load_state_dicts": "of its loaders: makes them go on where they were",
    "_loaded_checkpoint": "of a checkpoint connector: the file that is being restored",
    "_logged_metrics": "of a logger connector: what loggers were given",
    "_logger_connector": "of a Trainer: holds its metrics",
    "_on_before_batch_transfer": "of a module: the hook before a batch is moved, as Lightning calls it",
    "_progress_bar_metrics": "of a logger connector: what the progress bar shows",
    "_results": "of a loop: what is logged in it",
    "_save_checkpoint": "of a ModelCheckpoint: writes a file",
    "_should_accumulate": "of a fit loop: whether a gradient is kept for a later step",
    "_start_method": "of a launcher: how it starts processes",
    "_trainer": "of a module: whether it is in a fit, without the error of `trainer`",
}
"""What each is."""
