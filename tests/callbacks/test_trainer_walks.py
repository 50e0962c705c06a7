"""Whatever one does with Trainers, one after the other, the same holds after each step.

A walk is a random sequence of operations on one module and its averages, drawn from a seed. A spy that knows nothing of
averages writes down which weights trained; files, scores, the module and ``raw_weights`` are held against that.
"""

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from tiny import NetParts, batches, differing, of, read, trainer, validation, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, LAWA, SWA
from lightning_merge.compat import read_weights

AVERAGES: dict[str, Callable[[], list[Any]]] = {
    "EMA": lambda: [EMA(0.7, validate="both")],
    "SWA": lambda: [SWA(start_epoch=0)],
    "LAWA": lambda: [LAWA(k=2, every_n_steps=2)],
    "two": lambda: [EMA(0.5), LAWA(k=2, every_n_epochs=1, validate="both")],
}
SEEDS = [(seed, name) for seed in range(5) for name in AVERAGES]
STEPS = 5


class FragileParts(NetParts):
    """BatchNorm, a layer that is there under two names, and a step at which it fails if told to.

    It knows which weights trained last, whatever averages do around it.
    """

    def __init__(self) -> None:
        super().__init__(norm=True, lr=0.05)
        self.view = self.net[0]
        self.left: dict[str, int] = {}
        self.error: type[BaseException] = RuntimeError
        self.started: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        self.started = self.trained = values(self)

    def optimizer_step(self, *args: Any) -> None:
        super().optimizer_step(*args)
        self.trained = values(self)

    def _count(self, kind: str) -> None:
        if kind in self.left:
            self.left[kind] -= 1
            if self.left[kind] < 0:
                self.left = {}
                raise self.error("as told")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self._count("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._count("validation")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


Fragile = of(FragileParts)


class Spy(Checkpoint):
    """Looks at each file as soon as it was written. The last of the callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[Path, int] = {}
        self.problems: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(pl_module.trained)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module.trained)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module.trained)

    def look(self, trained: dict[str, Tensor]) -> None:
        """Compares files that are new."""
        for path in sorted(self.folder.glob("*.ckpt")):
            written = path.stat().st_mtime_ns
            if self.seen.get(path) == written:
                continue
            self.seen[path] = written
            content = read(path)
            label = content["lightning_merge"]
            if "raw" in label and (found := differing(dict(read_weights(path, "raw")), trained)):
                self.problems.append(f"the raw weights in {path.name} are not those that trained: {found}")
            if label["holds"] == "raw" and (found := differing(content["state_dict"], trained)):
                self.problems.append(f"`state_dict` of {path.name} should be raw: {found}")
            if label["score"] is not None and abs(score(content["state_dict"]) - label["score"]) > 1e-5:
                self.problems.append(f"{path.name} scores {score(content['state_dict'])}, not {label['score']}")


def score(weights: dict[str, Tensor]) -> float:
    """``val/loss`` of a fresh module with these weights, by a plain loop."""
    module = Fragile()
    module.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        return sum(module.loss(batch).item() for batch in validation()) / 2


def aliases(module: nn.Module) -> list[list[str]]:
    """Names that stand for the same memory."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict().items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(groups.values())


class Walk:
    """A module, its averages and what was done with them."""

    def __init__(self, folder: Path, name: str, draw: random.Random) -> None:
        self.folder = folder
        self.averages = AVERAGES[name]
        self.draw = draw
        self.module = Fragile()
        self.callbacks = self.averages()
        self.spy = Spy(folder)
        self.trainer: Any = None
        self.aliases = aliases(self.module)
        self.history: list[str] = []
        self.fits = 0

    OPERATIONS = (
        "fit", "fit_more", "resume", "resume_anew", "validate", "test", "predict", "find_a_rate", "fit_after_a_search",
        "fail_in_training", "fail_in_validation", "interrupt_training", "interrupt_validation",
    )  # fmt: skip

    def go(self) -> None:
        """One operation after a first fit."""
        possible = [name for name in self.OPERATIONS if name not in ("resume", "resume_anew") or self.full_files()]
        name = self.draw.choice(possible) if self.history else "fit"
        self.history.append(name)
        getattr(self, name)()
        assert aliases(self.module) == self.aliases, self.said("names stand for other memory than before")
        assert not self.spy.problems, self.said(*self.spy.problems)

    def said(self, *problems: str) -> str:
        return f"after {', '.join(self.history)}: {'; '.join(problems)}"

    def same(self, what: str, left: Any, right: Any) -> None:
        found = differing(dict(left), dict(right))
        assert not found, self.said(f"{what}: {found}")

    def full_files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.ckpt")) if "callbacks" in read(path)]

    # ---- fits

    def new_trainer(self, epochs: int, *more: Any) -> Any:
        self.fits += 1
        files = [
            ModelCheckpoint(self.folder, f"best{self.fits}-{{step}}", monitor="val/loss", save_top_k=-1),
            ModelCheckpoint(self.folder, f"step{self.fits}-{{step}}", every_n_train_steps=3, save_top_k=-1),
            ModelCheckpoint(self.folder, f"weights{self.fits}", "val/loss", mode="max", save_weights_only=True),
        ]
        self.trainer = trainer(self.folder, [*more, *self.callbacks, *files, self.spy], max_epochs=epochs)
        return self.trainer

    def run(self, ckpt_path: Path | None = None) -> None:
        before = self.module.trained
        self.trainer.fit(self.module, batches(), validation(), ckpt_path=ckpt_path)
        if before and ckpt_path is None:
            self.same("what training went on with", self.module.started, before)
        self.check_the_end()

    def check_the_end(self) -> None:
        trained = self.module.trained
        self.spy.look(trained)  # at the final files
        primary = self.callbacks[0]
        published = primary.published_weights() if primary.ready else {}
        self.same("the module after the fit", self.module.state_dict(), self.in_place_of(trained, published))
        for average in self.callbacks:
            raw = average.raw_weights()
            self.same(f"raw weights of {average.name}", raw, {name: trained[name] for name in raw})
            if average.final_path is not None and average.ready:
                held = read(average.final_path)["state_dict"]
                expected = self.in_place_of(trained, average.published_weights())
                self.same(f"the final file of {average.name}", held, expected)

    def in_place_of(self, weights: dict[str, Tensor], merged: dict[str, Tensor]) -> dict[str, Tensor]:
        """The merged weights under all names."""
        first = {name: group[0] for group in self.aliases for name in group}
        chosen = {first[name]: tensor for name, tensor in merged.items()}
        return {n: chosen[first[n]].to(t.dtype) if first[n] in chosen else t for n, t in weights.items()}

    def fit(self) -> None:
        self.new_trainer(self.draw.choice([1, 2]))
        self.run()

    def fit_more(self) -> None:
        if self.trainer is None or self.trainer.fit_loop.max_epochs is None:
            self.new_trainer(1)
        else:
            self.trainer.fit_loop.max_epochs = self.trainer.current_epoch + 1
        self.run()

    def resume(self) -> None:
        path = self.draw.choice(self.full_files())
        raw = values(read_weights(path, "raw"))
        self.new_trainer(read(path)["epoch"] + 2)
        self.run(path)
        self.same(f"what training went on with from {path.name}", self.module.started, raw)

    def resume_anew(self) -> None:
        self.module, self.callbacks = Fragile(), self.averages()
        self.resume()

    def fit_after_a_search(self) -> None:
        self.new_trainer(1, LearningRateFinder(num_training_steps=2, early_stop_threshold=None, update_attr=False))
        self.run()

    # ---- what must change nothing

    def unchanged(self, work: Callable[[], Any]) -> Any:
        before = values(self.module)
        found = work()
        self.same("the module", self.module.state_dict(), before)
        return found

    def at_hand(self) -> Any:
        return self.draw.choice([self.trainer, trainer(self.folder, self.callbacks), trainer(self.folder)])

    def validate(self) -> None:
        run = self.at_hand()
        found = self.unchanged(lambda: run.validate(self.module, validation(), verbose=False))
        measured = score(values(self.module))
        assert found[0]["val/loss"] == pytest.approx(measured, abs=1e-5), self.said("validation measured other weights")

    def test(self) -> None:
        run = self.at_hand()
        found = self.unchanged(lambda: run.test(self.module, validation(), verbose=False))
        measured = score(values(self.module))
        assert found[0]["test/loss"] == pytest.approx(measured, abs=1e-5), self.said("the test measured other weights")

    def predict(self) -> None:
        run = self.at_hand()
        found = self.unchanged(lambda: run.predict(self.module, validation()))
        plain = Fragile().eval()
        plain.load_state_dict(values(self.module))
        expected = [plain(batch[0]) for batch in validation()]
        assert all(map(torch.equal, found, expected)), self.said("other weights predicted")

    def find_a_rate(self) -> None:
        """A search is a fit that is undone, so it may leave what trained in place of what was published."""
        module, trained = self.module, self.module.trained
        published, counts = values(module), [(average.updates, average.steps) for average in self.callbacks]
        settings: dict[str, Any] = {"num_training": 2, "early_stop_threshold": None, "update_attr": False}
        Tuner(trainer(self.folder, self.callbacks, max_epochs=1)).lr_find(module, batches(), validation(), **settings)
        if differing(module, trained):
            self.same("the module after a search", module.state_dict(), published)
        module.trained = trained
        found = [(average.updates, average.steps) for average in self.callbacks]
        assert found == counts, self.said(f"updates and steps were {counts}, are {found}")

    # ---- what goes wrong

    def fails(self, kind: str, error: type[BaseException], raised: type[BaseException]) -> None:
        self.new_trainer(2)
        self.module.left, self.module.error = {kind: self.draw.randrange(7 if kind == "training" else 3)}, error
        with pytest.raises(raised):
            self.trainer.fit(self.module, batches(), validation())
        self.module.left = {}
        self.spy.look(self.module.trained)
        self.same("the module after the error", self.module.state_dict(), self.module.trained)
        for average in self.callbacks:
            raw = average.raw_weights()
            self.same(f"raw weights of {average.name}", raw, {name: self.module.trained[name] for name in raw})

    def fail_in_training(self) -> None:
        self.fails("training", RuntimeError, RuntimeError)

    def fail_in_validation(self) -> None:
        self.fails("validation", RuntimeError, RuntimeError)

    def interrupt_training(self) -> None:
        self.fails("training", KeyboardInterrupt, SystemExit)

    def interrupt_validation(self) -> None:
        self.fails("validation", KeyboardInterrupt, SystemExit)


@pytest.mark.parametrize(("seed", "name"), SEEDS)
def test_files_scores_and_modules_hold_what_they_say_wherever_one_walks(seed: int, name: str, tmp_path: Path) -> None:
    walk = Walk(tmp_path, name, random.Random(f"{name} {seed}"))
    for _ in range(STEPS):
        walk.go()


@pytest.mark.parametrize("averages", [list, *AVERAGES.values()], ids=["none", *AVERAGES])
def test_a_trainer_and_its_module_are_let_go_of_after_a_fit(averages: Callable[[], list[Any]], tmp_path: Path) -> None:
    run, module = trainer(tmp_path, averages(), max_epochs=1), Fragile()
    run.fit(module, batches(), validation())
    left = [weakref.ref(run), weakref.ref(module)]
    del run, module
    gc.collect()
    assert [reference() for reference in left] == [None, None]
