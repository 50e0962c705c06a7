"""The check at the first exchange of weights: it catches modules for which an exchange does nothing, or too much."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, batches, differing, read, score, trainer, validation, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, SWA


class Frozen(nn.Module):
    """Uses the weights it had at its first evaluation from then on, as a compiler that freezes them does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.frozen: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.inner(x)
        if self.frozen is None:
            self.frozen = values(self.inner)
        return torch.func.functional_call(self.inner, self.frozen, (x,))


def test_weights_that_are_frozen_in_a_graph_are_noticed(tmp_path: Path) -> None:
    module = Net()
    module.net = Frozen(module.net)
    with pytest.raises(RuntimeError, match=r"weights of `net` differ by .* but its output is the same"):
        trainer(tmp_path, [EMA(decay=0.9)], max_epochs=3).fit(module, batches(8), validation())


@pytest.mark.parametrize("kind", ["merged", "raw"])
def test_a_validation_that_writes_to_weights_is_noticed(kind: str, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)

    class Writing(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            weight = self.net[0].weight.data if kind == "merged" else ema.raw_weights()["net.0.weight"]
            weight.mul_(2)

    with pytest.raises(
        RuntimeError, match=rf"the {kind} weights after validation are not those before it.*`net\.0\.weight`.*max_norm"
    ):
        trainer(tmp_path, [ema], max_epochs=1).fit(Writing(), batches(), validation())


def test_the_canary_leaves_the_metrics_as_they_are(tmp_path: Path) -> None:
    found = []
    for repeats in (1, 2):  # the canary has sung by the second validation
        ema, module = EMA(decay=0.9), Net(norm=True)
        run = trainer(tmp_path, [ema], max_epochs=1, val_check_interval=1 / repeats)
        run.fit(module, batches(4), validation())
        found.append((run.callback_metrics["val/loss"].item(), values(ema.raw_weights())))
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])


@dataclasses.dataclass
class Output:
    values: Tensor


class Child(nn.Module):
    """Uses its weight in training; what it gives in eval mode is up to the form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.weight, self.form, self.calls = nn.Parameter(torch.ones(4, 1)), form, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return x @ self.weight if self.training else self.form(x, self.weight)


SILENT = {
    "nothing": lambda x, w: None,
    "no detections": lambda x, w: [{"boxes": x.new_zeros(0, 4), "labels": torch.zeros(0)} for _ in x],
    "classes": lambda x, w: x.argmax(1),
    "a distribution": lambda x, w: torch.distributions.Normal(x @ w, 1.0),
    "a dataclass": lambda x, w: Output(x @ w),
    "an input": lambda x, w: x,
}


class Beside(Net):  # type: ignore[misc, valid-type]
    """What it logs depends on its weights, whatever its child gives out."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.net = Child(form)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])
        self.log("val/loss", (batch[0] @ self.net.weight).mean())


@pytest.mark.parametrize("form", SILENT)
@pytest.mark.parametrize(
    "average", [lambda: EMA(0.9), lambda: SWA(1, validate="both"), lambda: EMA(0.9, validate="raw")]
)
def test_an_output_that_says_nothing_stops_no_run(form: str, average: Any, tmp_path: Path) -> None:
    module = Beside(SILENT[form])
    trainer(tmp_path, [average()], max_epochs=3).fit(module, batches(8), validation())


def test_metrics_that_are_the_same_on_one_batch_stop_no_run(tmp_path: Path) -> None:
    class Once(Beside):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])
            self.log("val/loss", (batch[0] @ self.net.weight).mean() if batch_idx else batch[0].mean())

    trainer(tmp_path, [EMA(0.9)], max_epochs=3).fit(Once(SILENT["an input"]), batches(8), validation())


def test_under_raw_validation_nothing_is_checked_at_the_end_of_a_fit(tmp_path: Path) -> None:
    module = Net()
    module.net = Frozen(module.net)
    trainer(tmp_path, [EMA(decay=0.9, validate="raw")], max_epochs=3).fit(module, batches(8), validation())


def test_running_a_part_again_leaves_no_trace(tmp_path: Path) -> None:
    calls = []
    for callbacks in ([], [EMA(0.9)]):
        module = Beside(SILENT["a dataclass"])
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, batches(4), validation())
        calls.append(module.net.calls)
    assert calls[0] == calls[1]


class Cached(nn.Module):
    """Keeps what it derives from its weight in eval mode until ``train()``, as GPyTorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(4, 1)), None

    def train(self, mode: bool = True) -> "Cached":
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.weight
        self.kept = self.weight.detach().clone() if self.kept is None else self.kept
        return x @ self.kept


@pytest.mark.parametrize("validate", ["merged", "raw", "both"])
def test_what_eval_mode_keeps_of_weights_is_made_anew_for_each_set(validate: Any, tmp_path: Path) -> None:
    ema, module = EMA(0.9, validate=validate), Net()
    module.net = nn.Sequential(Cached())
    run = trainer(tmp_path, [ema], max_epochs=2, num_sanity_val_steps=1 if validate != "raw" else 0)
    run.fit(module, batches(4), validation())

    def loss(weights: Any) -> float:
        inputs, targets = (torch.cat(each) for each in zip(*validation(), strict=True))
        return float(nn.functional.mse_loss(inputs @ weights["net.0.weight"], targets))

    if validate != "raw":
        assert float(run.callback_metrics["val/loss"]) == pytest.approx(loss(ema.merged_weights()), rel=1e-5)
    if validate == "both":
        assert float(run.callback_metrics["raw/val/loss"]) == pytest.approx(loss(ema.raw_weights()), rel=1e-5)
    assert ema.final_metrics["val/loss"] == pytest.approx(loss(ema.merged_weights()), rel=1e-5)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_shortens_its_rows_is_averaged(kind: Any, tmp_path: Path) -> None:
    class Table(Net):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.table = kind(8, 4, max_norm=0.5)

        def loss(self, batch: Any) -> Tensor:
            rows = batch[0].argsort(1)
            looked_up = self.table(rows) if kind is nn.EmbeddingBag else self.table(rows[:, 0])
            return nn.functional.mse_loss(self(looked_up), batch[1])

    ema, saved = EMA(0.8, validate="both"), ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer(tmp_path, [ema, saved], max_epochs=3).fit(Table(), batches(4), validation())
    again = Table()
    again.load_state_dict(read(saved.best_model_path)["state_dict"])
    losses = [again.eval().loss(batch) for batch in validation()]
    assert float(torch.stack(losses).mean()) == pytest.approx(float(saved.best_model_score), rel=1e-5)


def test_a_scripted_part_is_averaged_like_any_other(tmp_path: Path) -> None:
    module, saved = Net(norm=True), ModelCheckpoint(tmp_path, monitor="val/loss")
    module.net = torch.jit.script(module.net)
    trainer(tmp_path, [EMA(0.8), saved], max_epochs=2).fit(module, batches(4), validation())
    assert score(read(saved.best_model_path)["state_dict"], norm=True) == pytest.approx(float(saved.best_model_score))


def test_validation_by_an_iterator_is_not_run_twice(tmp_path: Path) -> None:
    class Fetching(Beside):
        def validation_step(self, dataloader_iter: Any) -> None:
            batch, _, _ = next(dataloader_iter)
            seen.append(len(batch[0]))
            self.net(batch[0])
            self.log("val/loss", batch[0].mean(), batch_size=8)

    seen: list[int] = []
    trainer(tmp_path, [EMA(0.5)], max_epochs=1).fit(Fetching(SILENT["an input"]), batches(8), validation())
    assert seen == [8, 8]


def test_statistics_that_eval_mode_does_not_use_stop_no_run(tmp_path: Path) -> None:
    class BatchStatistics(nn.BatchNorm1d):
        def forward(self, x: Any) -> Any:
            kept = (self.running_mean, self.running_var) if self.training else (None, None)
            return nn.functional.batch_norm(x, *kept, self.weight, self.bias, training=True)

    module = Net()
    module.net = nn.Sequential(nn.Linear(4, 8), BatchStatistics(8), nn.Linear(8, 1))
    swa = SWA(start_epoch=1)  # at its first point parameters are the raw ones, and statistics are not
    trainer(tmp_path, [swa], max_epochs=2).fit(module, batches(4), validation())
    assert swa.updates > 0
