"""Fits of networks that are linear in their weights."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from networks import batches
from tiny import Net, differing, trainer, values
from torch import nn

from lightning_merge.callbacks import EMA, Linearize
from lightning_merge.tangent import linearize


def trains(*callbacks: Any, folder: Path | None = None, **settings: Any) -> Any:
    settings = {"max_epochs": 2, "enable_checkpointing": folder is not None, **settings}
    return trainer(folder or Path("unused"), callbacks, **settings)


def by_hand(module: Net, steps: int) -> Net:
    """The same steps, with the gradient of the linear network from ``torch.func``."""
    tangent = linearize(module)
    optimizer = module.configure_optimizers()
    for step, batch in enumerate(batch for _ in range(10) for batch in batches()):
        if step == steps:
            break
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    tangent.remove()
    return module


def test_it_trains_the_linear_network() -> None:
    module, callback = Net(), Linearize()
    start = values(module.state_dict())
    trains(callback).fit(module, batches())
    expected = by_hand(Net(), 8)
    assert not differing(module.state_dict(), expected.state_dict())
    assert callback.tangent is not None
    assert not differing(callback.tangent.start, start)
    plain = Net()
    trains().fit(plain, batches())
    assert differing(module.state_dict(), plain.state_dict())


def test_the_start_is_what_hooks_loaded_before_the_first_step() -> None:
    class Loads(Net):
        def on_train_start(self) -> None:
            with torch.no_grad():
                for each in self.parameters():
                    each.fill_(0.25)

    module, callback = Loads(), Linearize()
    trains(callback).fit(module, batches())
    assert all(bool((each == 0.25).all()) for each in callback.tangent.start.values())


def test_validation_measures_it_and_files_bring_it_back(tmp_path: Path) -> None:
    module = Net()
    first = trains(Linearize(only="net"), folder=tmp_path)
    first.fit(module, batches(), batches(seed=2))
    scored = first.callback_metrics["val/loss"].item()
    file = first.checkpoint_callback.best_model_path
    again = trains(Linearize(only="net")).validate(Net(), batches(seed=2), ckpt_path=file, verbose=False)
    assert again[0]["val/loss"] == scored
    saved = torch.load(file, weights_only=True)
    alone = Net()
    alone.load_state_dict(saved["state_dict"])
    curved = alone.loss(next(iter(batches(seed=2)))).item()
    linearize(alone, "net", saved["lightning_merge_linearize"]["start"])
    assert alone.loss(next(iter(batches(seed=2)))).item() != curved
    assert trains().validate(alone, batches(seed=2), verbose=False)[0]["val/loss"] == scored


def test_a_resumed_fit_equals_one_that_went_on(tmp_path: Path) -> None:
    whole, part, rest = Net(), Net(), Net()
    trains(Linearize(), EMA(0.5), max_epochs=3).fit(whole, batches())
    first = trains(Linearize(), EMA(0.5), folder=tmp_path, max_epochs=1)
    first.fit(part, batches())
    trains(Linearize(), EMA(0.5), max_epochs=3).fit(
        rest, batches(), ckpt_path=first.checkpoint_callback.best_model_path
    )
    assert not differing(rest.state_dict(), whole.state_dict())


def test_a_second_fit_goes_on_around_the_first_start_and_another_model_begins_anew(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module, callback = Net(), Linearize()
    start = copy.deepcopy(module.state_dict())
    trains(callback).fit(module, batches())
    caplog.set_level("INFO")
    trains(callback).fit(module, batches())
    assert not differing(callback.tangent.start, start)
    assert (
        any("goes on around" in record.getMessage() for record in caplog.records)
        or "goes on" in capsys.readouterr().err
    )
    other = Net()
    with torch.no_grad():
        other.net[0].bias.fill_(1.0)
    trains(callback).fit(other, batches())
    assert bool((callback.tangent.start["net.0.bias"] == 1.0).all())
    assert "forward" not in vars(module)


def test_weights_of_a_file_that_is_not_linear_are_not_made_so(tmp_path: Path) -> None:
    plain = trains(folder=tmp_path)
    plain.fit(Net(), batches(), batches(seed=2))
    scored = plain.callback_metrics["val/loss"].item()
    callback, module = Linearize(), Net()
    trains(callback).fit(module, batches())
    found = trains(callback).validate(
        module, batches(seed=2), ckpt_path=plain.checkpoint_callback.best_model_path, verbose=False
    )
    assert found[0]["val/loss"] == scored


def test_what_training_does_not_call_is_named() -> None:
    class Around(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"Linearize made its own `forward` linear, .* with `only=` .*`net`"):
        trains(Linearize()).fit(Around(), batches())
    trains(Linearize(only="net")).fit(Around(), batches())


def test_a_pattern_without_a_match_is_refused_at_fit_start() -> None:
    with pytest.raises(ValueError, match=r"`only` must match .* 'encoder' matches none; there are: .*`net`"):
        trains(Linearize(only="encoder")).fit(Net(), batches())


def test_files_without_the_start_are_warned_of(tmp_path: Path) -> None:
    light = pl.callbacks.ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="hold no w0"):
        trains(Linearize(), light, folder=tmp_path).fit(Net(), batches())


def test_a_second_one_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one Linearize in a Trainer"):
        trains(Linearize("net.0"), Linearize("net.2")).fit(Net(), batches())
