"""Statistics that are measured at the end of a fit, against sums by hand."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from networks import batches
from stream_modules import Base, rows
from tiny import Net, differing, trainer, values
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_merge.callbacks import EMA, ImportanceStatistics
from lightning_merge.importance import Statistics

Kinds = pytest.mark.parametrize("kind", ["fisher", "gram", "adam"])


class Small(Base):
    """A convolution, a linear layer twice, and layers without a Gram matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(3)
        self.twice = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Any:
        features = self.norm(self.conv(images)).mean((2, 3))
        logits = self.head(self.frozen(self.twice(self.twice(features).relu())))
        return self.grouped(logits[:, :, None])[:, :, 0]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3, betas=(0.8, 0.9))


def pictures(count: int = 12, size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(count, 2, 5, 6, generator=generator), torch.arange(count) % 4)
    return DataLoader(data, batch_size=size)


def fit(root: Path, callbacks: Any, module: Any = None, data: Any = None, **settings: Any) -> Any:
    module = Small() if module is None else module
    settings = {"max_epochs": 1, **settings}
    run = trainer(root, [*callbacks, ModelCheckpoint(root / "saved")], **settings)
    run.fit(module, pictures() if data is None else data)
    return module


def by_hand(module: Any, samples: Any) -> dict[str, Tensor]:
    """Mean of squared gradients of the loss of single samples, in eval mode."""
    module.eval()
    held = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in held.items()}
    for image, label in samples:
        loss = module.loss([image[None], label[None]])
        for name, gradient in zip(held, torch.autograd.grad(loss, list(held.values()), allow_unused=True), strict=True):
            total[name] += 0 if gradient is None else gradient.square() / len(samples)
    return total


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fisher_information_is_the_mean_over_the_last_samples(tmp_path: Path, accumulate: int) -> None:
    statistics = ImportanceStatistics("fisher", samples=6)
    module = fit(tmp_path, [statistics], accumulate_grad_batches=accumulate)
    found = Statistics.open(tmp_path / "saved" / "fisher-statistics.safetensors")
    newest = [pictures().dataset[index] for index in (8, 9, 10, 11, 4, 5)]
    expected = by_hand(module, newest)
    assert set(found.tensors) == set(expected)
    assert (found.kind, found.samples, found.labels) == ("fisher", 6, "true")
    for name, tensor in expected.items():
        torch.testing.assert_close(found.tensors[name], tensor, msg=name)


def test_gram_matrices_are_the_mean_over_inputs_and_patches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    statistics = ImportanceStatistics("gram", samples=7)
    with caplog.at_level("INFO"):
        module = fit(tmp_path, [statistics])
    found = Statistics.open(tmp_path / "saved" / "gram-statistics.safetensors")
    assert set(found.tensors) == {"conv.weight", "twice.weight", "head.weight"}
    assert found.samples == 8  # two whole batches
    images = torch.stack([pictures().dataset[index][0] for index in range(4, 12)])
    padded = functional.pad(images, (1, 1, 1, 1), "reflect")
    rows: list[Tensor] = []
    for image in padded:
        for top in range(0, 5, 2):
            rows += [image[:, top : top + 3, left : left + 3].reshape(-1) for left in range(0, 6, 2)]
    patches = torch.stack(rows)
    torch.testing.assert_close(found.tensors["conv.weight"], patches.T @ patches / len(patches))
    with torch.no_grad():
        first = module.eval().norm(module.conv(images)).mean((2, 3))
        second = module.twice(first).relu()
        last = module.frozen(module.twice(second))
    both = torch.cat([first, second])
    torch.testing.assert_close(found.tensors["twice.weight"], both.T @ both / len(both))
    torch.testing.assert_close(found.tensors["head.weight"], last.T @ last / len(last))
    assert found.left_out["grouped.weight"] == "a convolution in 2 groups"
    assert found.left_out["unused.weight"] == "its layer was not called by its own `forward`"
    assert "frozen.weight" not in found.left_out
    assert "gram of 8 samples" in caplog.text
    assert "grouped.weight (a convolution in 2 groups)" in caplog.text


@pytest.mark.parametrize("registered", ["tied", "twice"])
def test_a_weight_of_several_layers_has_one_matrix_over_what_all_are_called_on(tmp_path: Path, registered: str) -> None:
    class Shared(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            if registered == "tied":
                self.b.weight = self.a.weight
            self.net = nn.Sequential(self.a, self.b)

        def forward(self, inputs: Tensor) -> Any:
            return self.head(self.b(self.a(inputs)))

    statistics = ImportanceStatistics("gram", samples=4)
    data = rows(torch.arange(16) % 3)
    module = fit(tmp_path, [statistics], Shared(), data)
    assert statistics.statistics is not None
    found = statistics.statistics.tensors
    inputs = torch.cat([batch[0] for batch in data])[-4:]
    if registered == "tied":
        assert set(found) == {"a.weight", "head.weight"}
        assert not torch.allclose(found["a.weight"], inputs.T @ inputs / 4)  # half of the rows are of the other layer
    else:
        assert set(found) == {"a.weight", "b.weight", "head.weight"}
    with torch.no_grad():
        hidden = module.a(inputs)
    expected = torch.cat([inputs, hidden]) if registered == "tied" else inputs
    torch.testing.assert_close(found["a.weight"], expected.T @ expected / len(expected))


def test_layers_with_too_many_inputs_are_left_out(tmp_path: Path) -> None:
    statistics = ImportanceStatistics("gram", most_inputs=17)
    fit(tmp_path, [statistics])
    assert statistics.statistics is not None
    assert statistics.statistics.left_out["conv.weight"] == "18 inputs, more than 17"
    assert set(statistics.statistics.tensors) == {"twice.weight", "head.weight"}


class TwoOptimizers(Small):
    """One of Adam's kind and one without moments, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.squares: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and parameter.requires_grad:
                old = self.squares.get(name, torch.zeros_like(parameter))
                self.squares[name] = 0.9 * old + 0.1 * parameter.grad.detach().square()
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = [*self.conv.parameters(), *self.twice.parameters(), *self.unused.parameters()]
        return [torch.optim.Adam(body, lr=1e-3, betas=(0.8, 0.9)), torch.optim.SGD(self.head.parameters(), lr=0.1)]


def test_adams_moments_are_taken_with_their_bias_corrected(tmp_path: Path) -> None:
    statistics = ImportanceStatistics("adam")
    module = fit(tmp_path, [statistics], TwoOptimizers())
    found = Statistics.open(tmp_path / "saved" / "adam-statistics.safetensors")
    assert set(found.tensors) == {"conv.weight", "conv.bias", "twice.weight", "twice.bias"}
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, module.squares[name] / (1 - 0.9**3))
    assert found.left_out["head.weight"] == "SGD keeps no `exp_avg_sq` of it"
    assert found.left_out["unused.weight"] == "Adam has not stepped it"
    assert found.left_out["norm.weight"] == "in no optimizer"


@Kinds
def test_training_is_the_same_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    class Drops(Small):
        def forward(self, images: Tensor) -> Any:
            return super().forward(functional.dropout(images, training=self.training))

    torch.manual_seed(3)
    plain = fit(tmp_path / "plain", [], Drops(), max_epochs=2)
    torch.manual_seed(3)
    measured = fit(tmp_path / "measured", [ImportanceStatistics(kind)], Drops(), max_epochs=2)
    assert not differing(values(plain), values(measured))


@Kinds
def test_without_checkpoints_they_are_kept_by_the_callback(tmp_path: Path, kind: Any) -> None:
    statistics = ImportanceStatistics(kind)
    trainer(tmp_path, [statistics], max_epochs=1).fit(Small(), pictures())
    assert statistics.path is None
    assert statistics.statistics is not None
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:.* will be of the raw weights")
def test_after_an_average_they_are_of_the_published_weights_and_before_it_of_the_raw_ones(tmp_path: Path) -> None:
    raw, merged = ImportanceStatistics("fisher", name="raw"), ImportanceStatistics("fisher", name="merged")
    average = EMA(0.5)
    module = fit(tmp_path, [raw, average, merged])
    assert raw.statistics is not None
    assert merged.statistics is not None
    merged.statistics.refuse_other_weights(dict(module.named_parameters()), "the module")
    raw.statistics.refuse_other_weights(average.raw_weights(), "the raw ones")
    with pytest.raises(ValueError, match=r"are of other weights than the module: `conv.weight` differs"):
        raw.statistics.refuse_other_weights(dict(module.named_parameters()), "the module")


def test_of_raw_weights_beside_an_average_is_said_at_the_start(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def told(callbacks: list[Any]) -> list[str]:
        recwarn.clear()
        fit(tmp_path, callbacks, max_steps=1)
        return [str(each.message) for each in recwarn if "raw weights" in str(each.message)]

    (message,) = told([ImportanceStatistics("adam"), EMA(0.5)])
    assert "give ImportanceStatistics after EMA 'ema' in the list" in message
    assert not told([EMA(0.5), ImportanceStatistics("adam")])


class FailsLate(Small):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step >= 2:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [RuntimeError("as planned"), KeyError("as planned"), torch.OutOfMemoryError("full")])
def test_a_step_that_fails_when_training_is_over_takes_nothing_with_it(error: Exception, tmp_path: Path) -> None:
    statistics, after = ImportanceStatistics("gram"), EMA(0.5)
    with pytest.warns(UserWarning, match=f"no gram-statistics were written: {type(error).__name__}: "):
        module = fit(tmp_path, [statistics, after], FailsLate(error), max_steps=2)
    assert statistics.statistics is statistics.path is None
    assert after.updates == 2
    assert not differing(after.merged(), {name: values(module)[name] for name in after.merged()})


def test_labels_of_the_model_are_drawn_from_what_it_predicts(tmp_path: Path) -> None:
    class Sure(Base):
        """Predicts class 1 whatever it is given, where the label is 0."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def loss(self, batch: Any) -> Tensor:
            return functional.cross_entropy(self.layer(batch[0]) + torch.tensor([0.0, 200.0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def norm(labels: Any) -> float:
        statistics = ImportanceStatistics("fisher", labels=labels)
        fit(tmp_path / labels, [statistics], Sure(), rows(torch.zeros(16, dtype=torch.long)))
        return 0.0 if statistics.statistics is None else statistics.statistics.norm

    assert norm("true") > 0.1
    with pytest.warns(UserWarning, match=r"no fisher-statistics were written: ValueError: .* are all zero"):
        assert norm("model") == 0.0


class Detached(Base):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def loss(self, batch: Any) -> Tensor:
        return self.w.sum()


class Skips(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None  # as a step that skips its batch


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        ("adam", Net, r"`kind='adam'` takes the second moments .*the run has SGD. Choose `kind='fisher'`"),
        ("fisher", Manual, r"`kind='fisher'` .*`training_step`, which steps optimizers .*Choose `kind='gram'`"),
        ("fisher", Skips, r"`kind='fisher'` .*does not give it outside training: .*no loss, but NoneType"),
        ("gram", Manual, r"`kind='gram'` .*steps optimizers.* Define `calibration_step\(self, batch\)` on Manual"),
        ("gram", Detached, r"`kind='gram'` measures .* and Detached has none: `w` is no weight of a linear layer"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, kind: Any, module: Any, message: str
) -> None:
    data = batches() if module is Net else pictures()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [ImportanceStatistics(kind)], module(), data)


def test_labels_of_the_model_without_a_loss_of_classes_are_refused_in_the_first_second(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`labels='model'` draws the targets .* take `labels='true'`"):
        fit(tmp_path, [ImportanceStatistics("fisher", labels="model")], Net(), batches())


def test_a_forward_pass_by_calibration_step_does_under_manual_optimisation(tmp_path: Path) -> None:
    class Calibrated(TwoOptimizers):
        def calibration_step(self, batch: Any) -> None:
            self(batch[0])

    statistics = ImportanceStatistics("gram", samples=4)
    fit(tmp_path, [statistics], Calibrated())
    assert statistics.statistics is not None
    assert statistics.statistics.samples == 4


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`name` must be another for each ImportanceStatistics"):
        fit(tmp_path, [ImportanceStatistics("fisher"), ImportanceStatistics("fisher", samples=4)])


def test_bf16_measures_what_float32_does_nearly(tmp_path: Path) -> None:
    norms = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        statistics = ImportanceStatistics("fisher")
        fit(tmp_path / precision, [statistics], precision=precision)
        assert statistics.statistics is not None
        assert {tensor.dtype for tensor in statistics.statistics.tensors.values()} == {torch.float32}
        norms.append(statistics.statistics.norm)
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=0.1)


def test_gradients_of_single_samples_do_not_vanish_in_float16(tmp_path: Path) -> None:
    class Faint(Small):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * 1e-7

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.conv.parameters(), lr=0.0)

    found = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        statistics = ImportanceStatistics("fisher")
        fit(tmp_path / str(len(found)), [statistics], Faint(), plugins=plugins)
        assert statistics.statistics is not None
        found.append(statistics.statistics.norm)
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=0)


class Doubled(pl.LightningDataModule):
    """Twelve samples: each step takes the same four, in one process or in two."""

    def __init__(self) -> None:
        super().__init__()
        data: Any = pictures().dataset
        images, labels = data.tensors
        self.data = TensorDataset(images.double(), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        world = self.trainer.world_size
        sampler: Any = DistributedSampler(self.data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(self.data, batch_size=4 // world, sampler=sampler)


def shared(root: Path, kind: Any, world: int) -> Statistics:
    module: Any = Small()
    module.norm = nn.Identity()  # statistics of a batch would differ
    del module.unused  # DDP waits for its gradient
    settings: dict[str, Any] = {"use_distributed_sampler": False, "devices": world}
    if world > 1:
        settings["strategy"] = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(root, [ImportanceStatistics(kind, samples=8)], module.double(), Doubled(), **settings)
    return Statistics.open(root / "saved" / f"{kind}-statistics.safetensors")


@pytest.mark.multiprocess
@Kinds
def test_two_processes_measure_what_one_does(tmp_path: Path, kind: Any) -> None:
    one, two = (shared(tmp_path / str(world), kind, world) for world in (1, 2))
    assert two.samples == one.samples == (0 if kind == "adam" else 8)
    assert set(one.tensors) == set(two.tensors)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-6, atol=1e-12, msg=name)
