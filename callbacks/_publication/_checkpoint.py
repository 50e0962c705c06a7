"""What a checkpoint holds, and how a fit goes on from one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_merge import weights
from lightning_merge._ranks import gathered
from lightning_merge.callbacks._lightning._internals import SAVE, checkpoint_connector, monitoring_savers
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._publication._arrival import Arrival, storage
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._exchange import Exchange
from lightning_merge.callbacks._publication._ledger import RAW
from lightning_merge.callbacks._publication._migration import Migration
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.callbacks._publication._resumable import description, refuse_unresumable, refuse_weights_only
from lightning_merge.callbacks._publication._sharded import make_room, pack, unpack
from lightning_merge.files._check import check
from lightning_merge.files._label import FORMAT, KEY, Label, as_written
from lightning_merge.files._layouts import of_lightning
from lightning_merge.files._sets import WeightFile
from lightning_merge.files._sharded import together
from lightning_merge.files._write import is_remote, join
from lightning_merge.shards import sharded_tensors
from lightning_merge.weights import Weights


class Checkpoints:
    """Puts, for the length of every save, the weights in place that the file's metric was measured on.

    So the module makes its own file of them, under whatever names, and what other code saves at the same time holds
    them too. ``state_dict`` is that set and loads into a plain module. Under ``KEY`` every file has a label; a full
    file also has the raw weights and the states of all averages, to go on bit for bit.
    """

    def __init__(self, publisher: Exchange, validation: Validation) -> None:
        self._publisher = publisher
        self._validation = validation
        self._writer: Any = None  # the ModelCheckpoint that is writing
        self._asked: tuple[Average | None] | None = None  # the set that a file is asked to hold, `None` in it: raw
        self._raw: Weights = {}  # raw weights of a file that have no key in its `state_dict`
        self.path = "the checkpoint"  # that the fit goes on from

    def wrap(self, patches: Patches) -> None:
        """Takes hold of the save and load paths."""
        trainer, module = self._publisher.trainer, self._publisher.module
        patches.replace(checkpoint_connector(trainer), "dump_checkpoint", self._dump)
        patches.replace(trainer.strategy, "lightning_module_state_dict", self._state_dict)
        patches.replace(trainer.strategy, "load_checkpoint", self._load_checkpoint)
        patches.replace(trainer.strategy, "load_model_state_dict", self._load_model)
        patches.replace(module, "on_load_checkpoint", self._on_load_checkpoint)

    def wrap_writers(self, patches: Patches) -> None:
        """Learns which ModelCheckpoint writes, so that its monitor chooses the set."""
        for callback in monitoring_savers(self._publisher.trainer):
            patches.replace(callback, SAVE, self._writes(callback))

    def write_final(self, average: Average) -> str | None:
        """Writes ``<name>-final.ckpt`` beside the other checkpoints; ``None`` if checkpointing is off."""
        trainer = self._publisher.trainer
        directory = getattr(trainer.checkpoint_callback, "dirpath", None)
        if directory is None or trainer.fast_dev_run:
            return None
        return self.write(join(directory, f"{average.name}-final.ckpt"), average, weights_only=False)

    def write(self, path: str, holds: Average | None, weights_only: bool) -> str:
        """Writes a file of one set, ``None`` for the raw weights; gives its path."""
        make_room(path, self._publisher.trainer.strategy)
        self._asked = (holds,)
        try:
            self._publisher.trainer.save_checkpoint(path, weights_only=weights_only)
        finally:
            self._asked = None
        return path

    # ---- saving

    def _writes(self, callback: Any) -> Callable[..., Any]:
        def save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._writer = callback
            try:
                return original(*args, **kwargs)
            finally:
                self._writer = None

        return save

    @property
    def _monitor(self) -> str | None:
        return getattr(self._writer, "monitor", None)

    def _choose(self) -> Average | None:
        """Whose weights the file is to hold; ``None``: the raw ones."""
        if self._asked is not None:
            return self._asked[0]
        publisher = self._publisher
        running = self._validation.running
        if self._writer is None and running is not None:
            return running.average  # other code that saves while a set is measured means that set
        name = publisher.primary.name if self._monitor is None else self._validation.set_of(self._monitor)
        if not publisher.interrupted:
            (name, *_) = gathered(name)  # the first process writes the file, and may log what others do not
        return next((average for average in publisher.averages if average.name == name and average.ready), None)

    def _dump(self, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        publisher = self._publisher
        publisher.look()
        holds = self._choose()
        for average in publisher.averages:
            publisher.apart.make_one(average)  # also those that a run goes on with
        merged = {} if holds is None else publisher.set_of(holds)
        busy, publisher.busy = publisher.busy, True
        try:
            with publisher.in_place(publisher.set_aside):
                is_full = not (args[0] if args else kwargs.get("weights_only"))
                states = {average.name: average.save() for average in publisher.averages} if is_full else None
            placed = {**publisher.set_aside, **merged}
            with publisher.in_place(placed) as before:
                checkpoint = original(*args, **kwargs)
                arrival = Arrival.of(checkpoint["state_dict"], publisher.inventory, placed, before)
                arrival.check("the raw weights" if holds is None else holds.title)
                self._label(checkpoint, holds, arrival, states)
        finally:
            publisher.busy = busy
        return checkpoint if self._writes_at_once else _with_memory_of_its_own(checkpoint)

    @property
    def _writes_at_once(self) -> bool:
        """Whether a file is whole when the save call returns; what is written later must not change until then."""
        kind = type(self._publisher.trainer.strategy.checkpoint_io)
        return kind.__name__ == "TorchCheckpointIO" and ".plugins.io." in kind.__module__

    def _state_dict(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What of it shares memory with shards is copied: those are put back by value before the file is written."""
        saved = original()
        shards = {storage(t) for t in weights.local(sharded_tensors(self._publisher.module)).values()}
        if not shards:
            return saved
        parts = weights.local({key: t for key, t in saved.items() if isinstance(t, Tensor)})
        return {k: t.clone() if k in parts and storage(parts[k]) in shards else t for k, t in saved.items()}

    def label_after_fit(self, checkpoint: dict[str, Any]) -> None:
        """Completes a full file that is saved after the fit, when its ``state_dict`` is what the module holds."""
        publisher = self._publisher
        ending = publisher.ending
        holds = ending.primary if ending is not None and ending.is_live(publisher.module) else None
        published = {} if holds is None else {**publisher.set_of(holds)}
        arrival = Arrival.of(checkpoint["state_dict"], publisher.inventory, published, {})
        states = {average.name: average.save() for average in publisher.averages}
        self._label(checkpoint, holds, arrival, states if "callbacks" in checkpoint else None)

    def _label(
        self, checkpoint: dict[str, Any], holds: Average | None, arrival: Arrival, states: dict[str, Any] | None
    ) -> None:
        publisher = self._publisher
        name = RAW if holds is None else holds.name
        measured = self._validation.is_measured(holds, self._monitor)
        score = publisher.trainer.callback_metrics.get(self._monitor) if measured and self._monitor else None
        if self._monitor and not measured:
            self._validation.say_outdated(self._monitor, name)
        section: dict[str, Any] = {
            "format": FORMAT,
            "holds": name,
            "measured": measured,
            "monitor": self._monitor,
            "score": None if score is None else float(score),
            "metrics": self._validation.metrics_of(name) if measured else {},
            "averages": {average.name: _about(average) for average in publisher.averages},
            **arrival.notes(),
        }
        if states is not None:  # a full file, not a weights-only one
            section["raw"] = {} if holds is None else publisher.raw(holds)
            section["states"] = states
            # An entry here makes Lightning warn who resumes without the callback. It is not written by `state_dict()`,
            # which would make Lightning refuse two averages of one name before they can say what is wrong.
            checkpoint["callbacks"] |= {average.state_key: average.label() for average in publisher.averages}
            pack(section, sharded_tensors(publisher.module), checkpoint)
        checkpoint[KEY] = section

    # ---- loading

    def _load_checkpoint(self, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(checkpoint_path)
        self.path = str(checkpoint_path)
        shards_parameters = self._publisher.trainer.strategy.restore_checkpoint_after_setup
        if is_remote(checkpoint_path) or path.exists():
            check(checkpoint_path)
        if path.is_dir() and not shards_parameters:
            raise ValueError(
                f"{path} is a sharded checkpoint, which a run under ModelParallelStrategy goes on from. For the"
                f" merged weights in a plain file: lightning-merge export {path} merged.pt"
            )
        if shards_parameters and path.exists():  # the strategy would look for optimizer states at once
            refuse_unresumable(description(path), path)
        busy, self._publisher.busy = self._publisher.busy, True
        try:
            checkpoint = together(original(checkpoint_path, *args, **kwargs))
        finally:
            self._publisher.busy = busy
        refuse_unresumable(checkpoint, path)
        if shards_parameters and KEY in checkpoint:
            unpack(checkpoint[KEY], sharded_tensors(self._publisher.module), path)
        return checkpoint

    def _on_load_checkpoint(self, original: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
        Label.of(checkpoint, self.path)  # refuses what is not as it was written
        section = checkpoint.get(KEY)
        if section is None and "averaging_state" in checkpoint and "state_dict" not in checkpoint:
            raise ValueError(
                "this checkpoint is of Lightning's WeightAveraging, and the strategy has loaded its average for the raw"
                " weights. Go on from it on a single device or under DDP, and from a file of that run under"
                f" {type(self._publisher.trainer.strategy).__name__}."
            )
        for average in self._publisher.averages:
            average.ending = None  # what an earlier fit set aside is of no use any more
        if section is None and (theirs := of_lightning(checkpoint)) is not None and "average" in theirs.sets:
            self._adopt(theirs, checkpoint)
        elif section is None:
            rank_zero_info("The checkpoint was made without lightning-merge: averages start empty, from its weights.")
        else:
            refuse_weights_only(section)
            self._restore(section, checkpoint, original)
        original(checkpoint)

    def _adopt(self, theirs: WeightFile, checkpoint: dict[str, Any]) -> None:
        """Goes on from a file of Lightning's own callbacks: its raw weights, and its average for the primary."""
        names = self._publisher.inventory.keys
        stored = theirs.sets["average"]
        average = {names[key]: tensor for key, tensor in stored.as_saved.items() if key in names}
        if difference := weights.first_mismatch(self._publisher.inventory.tensors, average):
            raise ValueError(f"this checkpoint is of another model: {difference}. Resume with the model that wrote it.")
        primary = self._publisher.primary
        checkpoint["state_dict"] = theirs.sets["raw"].as_saved
        if primary.adopt(average, stored.updates or 1, checkpoint["global_step"], checkpoint["epoch"]):
            rank_zero_info(f"{primary.title} goes on with the average of {stored.updates} updates in {theirs.kind}.")
        else:
            rank_zero_warn(f"{primary.title} starts empty: it cannot go on with the average in {theirs.kind}.")

    def _restore(self, section: dict[str, Any], checkpoint: dict[str, Any], hook: Callable[[Any], None]) -> None:
        """Puts the raw weights in the place of the merged ones before Lightning loads them, and the averages back."""
        if section["format"] != FORMAT:
            raise ValueError(
                f"this checkpoint has format {section['format']} of lightning-merge, and this version reads {FORMAT}."
                " Resume with the version that wrote it."
            )
        inventory = self._publisher.inventory
        if "state_dict" in checkpoint:
            migration = Migration(self._publisher.module, inventory, checkpoint, section, hook)
            section["states"] = migration.of_states(section["states"])
            checkpoint["state_dict"] = migration.file_of(section["raw"])
            self._raw = migration.unplaced(section["raw"])
        else:  # the strategy has loaded the merged weights into the module already
            live = weights.local(inventory.tensors)
            weights.copy_({name: live[name] for name in section["raw"]}, section["raw"])
        ours = {average.name: average for average in self._publisher.averages}
        for name, average in ours.items():
            if name in section["states"]:
                with as_written(f"{self.path}: the state of the average `{name}`"):
                    average.load(section["states"][name], section["averages"][name])
                average.accepted = section["averages"][name].get("accepted")
            else:
                saved = ", ".join(section["states"])
                rank_zero_warn(
                    f"{average.title} starts empty: the checkpoint has no average of that name, but {saved}."
                )
        if dropped := [name for name in section["states"] if name not in ours]:
            rank_zero_warn(f"The checkpoint has averages that this Trainer has not, and drops: {', '.join(dropped)}.")

    def _load_model(self, original: Callable[..., None], checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        """Loads what the module's own hooks have made of the file, and says what is missing in our words."""
        module, raw = self._publisher.module, self._raw
        self._raw = {}
        try:
            original(checkpoint, *args, **kwargs)
        except (RuntimeError, KeyError) as error:
            expected, found = module.state_dict(), checkpoint.get("state_dict", {})
            tensors = ({k: t for k, t in each.items() if isinstance(t, Tensor)} for each in (expected, found))
            if difference := weights.first_mismatch(*tensors):
                raise ValueError(
                    f"this checkpoint is of another model: {difference}. Resume with the model that wrote it."
                ) from error
            raise
        self._publisher.inventory.refresh()
        live = self._publisher.inventory.tensors
        fitting = {n: t for n, t in raw.items() if n in live and live[n].shape == t.shape}
        weights.copy_({name: live[name] for name in fitting}, fitting)


def _with_memory_of_its_own(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with copies of its weights, which are those that go on to be averaged and trained."""

    def copy(nested: Any) -> Any:
        return apply_to_collection(nested, Tensor, lambda tensor: tensor.detach().clone())

    return {**checkpoint, "state_dict": copy(checkpoint["state_dict"]), KEY: copy(checkpoint[KEY])}


def _about(average: Average) -> dict[str, Any]:
    """Its label, and what was accepted in its place."""
    return average.label() | ({} if average.accepted is None else {"accepted": average.accepted})
