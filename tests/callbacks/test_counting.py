"""What counts as a step and when weights are taken in: exact values through a real Trainer."""

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from tiny import Net, Walk, WalkParts, batches, of, steps, trainer
from torch import Tensor

from lightning_merge.callbacks import EMA, SWA, WeightMerging
from lightning_merge.rules import ExponentialMean, Mean
from lightning_merge.schedules import EveryNEpochs, EveryNSteps


class TwoParts(WalkParts):
    """Two optimizers by hand: the discriminator ``d`` steps at every batch, the generator ``w`` at every second."""

    def __init__(self, wrapped: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.d = torch.nn.Parameter(torch.zeros(1))
        self.wrapped = wrapped

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, discriminator = self.optimizers(use_pl_optimizer=self.wrapped)
        due = [(discriminator, self.d)] + [(generator, self.w)] * (batch_idx % 2)
        for optimizer, weight in due:
            optimizer.zero_grad()
            self.manual_backward(-weight.sum())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([weight], lr=1.0) for weight in (self.w, self.d)]


def test_ema_in_a_trainer_equals_its_closed_form_in_float64(package: ModuleType, tmp_path: Path) -> None:
    values = []

    class Reading(EMA):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            if self.updates:
                values.append(self.merged_weights()["w"].item())

    ema = Reading(decay=0.9, start_step=1)
    module = of(WalkParts, package)()
    run = trainer(tmp_path, [ema], package=package, max_epochs=1, precision="64-true")
    run.fit(module, steps(6))
    # The weights after each step are 1 ... 6; the average starts as the first.
    assert values == pytest.approx([1.1, 1.29, 1.561, 1.9049, 2.31441], abs=1e-12)
    assert module.w.dtype is torch.float64
    assert module.w.item() == values[-1]


@pytest.mark.parametrize(
    ("warmup", "decays"),
    [
        ("timm", [1 - s ** (-2 / 3) for s in range(1, 7)]),
        ("diffusers", [0.0, *(s / (9 + s) for s in range(2, 7))]),
    ],
)
def test_warm_ups_in_a_trainer_equal_their_closed_form_in_float64(
    warmup: Any, decays: list[float], tmp_path: Path
) -> None:
    ema = EMA(decay=0.9999, warmup=warmup)
    trainer(tmp_path, [ema], max_epochs=1, precision="64-true").fit(Walk(), steps(6))
    expected = 0.0
    for step, decay in enumerate(decays, start=1):
        expected = decay * expected + (1 - decay) * step
    assert ema.merged_weights()["w"].item() == pytest.approx(expected, abs=1e-12)


def test_the_warm_up_of_ema_pytorch_in_a_trainer_equals_its_published_run(tmp_path: Path) -> None:
    ema = EMA(decay=0.9999, warmup="ema_pytorch", start_step=101, every_n_steps=10)
    # Its call c comes after optimizer step c + 1 and sees weights of c.
    trainer(tmp_path, [ema], max_epochs=1, precision="64-true").fit(Walk(start=-1.0), steps(151))
    expected = 100.0
    for call in range(110, 151, 10):
        decay = 1 - (1 + call - 100) ** (-2 / 3)
        expected = decay * expected + (1 - decay) * call
    assert expected == pytest.approx(112.682938, abs=1e-4)
    assert ema.merged_weights()["w"].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_update_every_few_steps_keeps_the_decay_of_as_many(every: int, tmp_path: Path) -> None:
    ema = EMA(decay=0.9, every_n_steps=every)
    trainer(tmp_path, [ema], max_epochs=1, precision="64-true").fit(Walk(), steps(7))
    expected = 0.0
    for step in range(every, 8, every):
        expected = 0.9**every * expected + (1 - 0.9**every) * step
    assert ema.merged_weights()["w"].item() == pytest.approx(expected, abs=1e-12)
    assert (ema.steps, ema.updates) == (7, 7 // every)


def test_the_mean_of_epoch_ends_in_float64(tmp_path: Path) -> None:
    swa, merging = SWA(start_epoch=1), WeightMerging(Mean(), EveryNEpochs(2, start=1), name="every second")
    module = Walk(growth=(4.0, -2.0, 7.0, -8.0, 4.0))
    trainer(tmp_path, [swa, merging], max_epochs=5, precision="64-true").fit(module, steps(1))
    # The epochs end at 4, 2, 9, 1, 5.
    assert module.w.item() == pytest.approx(4.2, abs=1e-12)
    assert merging.merged_weights()["w"].item() == pytest.approx(6.0, abs=1e-12)
    assert swa.raw_weights()["w"].item() == 5.0


@pytest.mark.parametrize(
    ("swa", "expected"),
    [
        (SWA(start_epoch=3, swa_lr=0.5, anneal_epochs=2), 7.875),
        (SWA(start_epoch=3, swa_lr=0.5, anneal_epochs=2, anneal_strategy="linear"), 7.875),
        # The rates of the tail are 0.875, 0.75, 0.625, 0.5: the epochs end at 4, 5.75, 7.25, 8.5, 9.5.
        (SWA(start_epoch=2, swa_lr=0.5, anneal_epochs=4, anneal_strategy="linear"), 7.0),
        (SWA(start_epoch=4), 10.0),
        (SWA(start_epoch=0.5), 9.0),
        (SWA(start_epoch=2, every_n_epochs=2), 8.0),
        (SWA(start_epoch=0), 7.0),
    ],
)
def test_swa_averages_as_its_paper_says(swa: SWA, expected: float, tmp_path: Path) -> None:
    module = Walk(growth=(2.0,))
    run = trainer(tmp_path, [swa], max_epochs=6, precision="64-true")
    run.fit(module, steps(1))
    assert module.w.item() == pytest.approx(expected, abs=1e-12)
    assert run.global_step == swa.steps == 6


def test_the_learning_rate_of_the_tail_goes_on_after_a_resume(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[float, float]:
        swa = SWA(start_epoch=2, swa_lr=0.5, anneal_epochs=4, anneal_strategy="linear")
        files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        module = Walk(growth=(2.0,))
        trainer(tmp_path, [swa, files], max_epochs=epochs).fit(module, steps(1), ckpt_path=ckpt_path)
        return module.w.item(), swa.raw_weights()["w"].item()

    run(4)
    assert run(6, tmp_path / "epoch=3.ckpt") == run(6) == (7.0, 9.5)


def test_swa_leaves_the_schedule_of_the_module_in_place(tmp_path: Path) -> None:
    class Scheduled(Walk):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]

        def on_train_epoch_end(self) -> None:
            self.ends = [*getattr(self, "ends", []), self.w.item()]

    def ends(*callbacks: SWA) -> list[float]:
        module = Scheduled()
        run = trainer(tmp_path, callbacks, max_epochs=6)
        run.fit(module, steps(1))
        assert [type(config.scheduler).__name__ for config in run.lr_scheduler_configs] == ["StepLR"]
        return module.ends

    assert ends(SWA(start_epoch=3)) == ends() == [1.0, 2.0, 2.5, 3.0, 3.25, 3.5]


def test_validations_leave_the_float32_average_of_a_bfloat16_model_as_it_is(tmp_path: Path) -> None:
    def average(precision: str, **settings: Any) -> Tensor:
        ema = EMA(decay=0.999)
        module = Walk(growth=(0.0, 1.0, 0.0), start=1.0)
        run = trainer(tmp_path, [ema], precision=precision, max_epochs=20, **settings)
        run.fit(module, steps(1), steps(1))
        return ema.merged_weights()["w"]

    never = average("bf16-true", limit_val_batches=0)
    assert never.dtype is torch.float32
    assert torch.equal(average("bf16-true"), never)
    assert torch.equal(average("32-true"), never)
    assert never.item() == pytest.approx(2 - 0.999**19)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("optimizer", "applied"), [(0, 12), (1, 24)])
def test_each_optimizer_of_a_gan_is_counted_by_its_own_steps(
    n: int, optimizer: int, applied: int, package: ModuleType, tmp_path: Path
) -> None:
    ema = EMA(decay=0.5, every_n_steps=n, optimizer=optimizer)
    trainer(tmp_path, [ema], package=package, max_epochs=2).fit(of(TwoParts, package)(), steps(12))
    assert (ema.steps, ema.updates) == (applied, applied // n)


def test_steps_of_optimizers_that_lightning_does_not_wrap_are_counted(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    module = of(TwoParts)(wrapped=False)
    run = trainer(tmp_path, [ema], max_epochs=1)
    run.fit(module, steps(8))
    assert run.global_step == 0
    assert (ema.steps, ema.updates) == (4, 4)
    assert module.w.item() == 3.0625  # 0, then halfway to 1, 2, 3, 4


def test_a_step_is_counted_once_per_accumulated_window(tmp_path: Path) -> None:
    def run(accumulate: int) -> tuple[float, int, int]:
        ema = EMA(decay=0.5)
        settings = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
        trainer(tmp_path, [ema], **settings).fit(Walk(), steps(4 * accumulate))
        return ema.merged_weights()["w"].item(), ema.steps, ema.updates

    assert run(accumulate=1) == run(accumulate=4) == (3.0625, 4, 4)


def test_the_last_window_of_an_epoch_counts_even_if_it_is_short(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    trainer(tmp_path, [ema], max_epochs=1, accumulate_grad_batches=3).fit(Walk(), steps(8))
    assert ema.steps == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_not_counted(fused: bool, tmp_path: Path) -> None:
    class Overflowing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 3 else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)
            optimizer.register_step_post_hook(lambda *args: self.path.append(self.net[0].weight.detach().clone()))
            return optimizer

    ema = EMA(decay=0.5)
    module = Overflowing()
    module.path = [module.net[0].weight.detach().clone()]
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    run = trainer(tmp_path, [ema], plugins=[scaled], max_epochs=1)
    run.fit(module, batches(8))
    assert run.global_step == 8
    assert scaled.scaler.get_scale() == 2.0  # halved once: one step was skipped
    assert ema.steps == ema.updates == 7
    # A fused optimizer is called all the same, and leaves the weights alone by itself.
    assert len(module.path) == (9 if fused else 8)
    moves = [not torch.equal(before, after) for before, after in pairwise(module.path)]
    assert sum(moves) == 7
    assert all(tensor.isfinite().all() for tensor in ema.merged_weights().values())


def test_a_training_step_without_a_loss_is_counted_as_the_optimizer_counts_it(tmp_path: Path) -> None:
    class Silent(Walk):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *args: self.applied.append(1))
            return optimizer

    ema = EMA(decay=0.5)
    module = Silent()
    module.applied = []
    trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(4))
    assert ema.steps == ema.updates == len(module.applied) == 4


def test_weights_that_are_not_finite_never_enter_an_average(tmp_path: Path) -> None:
    class Exploding(Walk):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    ema = EMA(decay=0.5)
    module = Exploding()
    with pytest.warns(UserWarning, match=r"`w` holds a NaN or an infinity"):
        trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(6))
    assert (ema.steps, ema.updates, ema.skipped_nonfinite) == (6, 2, 4)
    assert module.w.item() == 1.25  # 0, then halfway to 1 and 2: the last good one
    assert ema.raw_weights()["w"].isnan()


def test_weight_merging_takes_any_rule_and_schedule(tmp_path: Path) -> None:
    merging = WeightMerging(ExponentialMean(decay=0.5), EveryNSteps(2, start=2), name="mine")
    module = Walk()
    trainer(tmp_path, [merging], max_epochs=1).fit(module, steps(6))
    assert module.w.item() == 4.5  # starts as 2, takes in 4 and 6
    assert merging.update_window == (4, 6)


@pytest.mark.parametrize("arguments", [(Mean,), (EMA(),), (Mean(), Mean())])
def test_arguments_in_the_wrong_place_are_type_errors_that_name_them(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"`(rule|schedule)` must be a (Rule|Schedule)"):
        WeightMerging(*arguments)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: EMA(decay=1.0), "decay"),
        (lambda: EMA(decay=-0.1), "decay"),
        (lambda: EMA(every_n_steps=0), "every_n_steps|steps_per_update"),
        (lambda: EMA(start_step=-1), "start"),
        (lambda: EMA(validate="average"), "validate"),
        (lambda: SWA(start_epoch=1.5), "start"),
        (lambda: SWA(swa_lr=0.0), "swa_lr"),
        (lambda: SWA(anneal_epochs=-1), "anneal_epochs"),
    ],
)
def test_an_argument_out_of_range_is_a_value_error_that_names_it(make: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make()
