"""A task vector per fit, the merged model after each, and what the next fit starts from."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, read, steps, trainer, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, Anchor, ContinualMerging, RandomState, WeightMerging
from lightning_merge.combiners import Average, Combiner, ExponentialAverage, MagMax, Sum
from lightning_merge.continual import PRESETS, Bank, Split, StreamState, grow_head, masked_cross_entropy
from lightning_merge.recipes import Classifier, Digits, SmallConvNet, TaskData, jointly, split_by_class, split_by_domain
from lightning_merge.rules import Mean
from lightning_merge.selections import Selection


def fit(root: Path, module: Any, *callbacks: Any, epochs: int = 1, n: int = 2, **settings: Any) -> Any:
    run = trainer(root, callbacks, max_epochs=epochs, **settings)
    run.fit(module, steps(n))
    return run


# ---- the state machine, with exact numbers: n steps of a task add n times its growth


@pytest.mark.parametrize(
    ("combiner", "init_from", "ends"),
    [
        # Vectors 2, 6, -10: each task starts at 0.
        (Sum(scale=1.0), "base", [2.0, 8.0, -2.0]),
        (Average(), "base", [2.0, 4.0, -2 / 3]),
        (MagMax(scale=0.5), "base", [1.0, 3.0, -5.0]),
        # Vectors 2, 8, -2: each starts where the one before ended.
        (Sum(scale=1.0), "last", [2.0, 10.0, 8.0]),
        (MagMax(scale=0.5), "last", [1.0, 4.0, 4.0]),
        (ExponentialAverage(alpha=1.0, scale=0.5), "last", [1.0, 4.0, -1.0]),
        # Each starts at the merged model: 2; 2 + 6 = 8 merged to 2 + .5 (8 - 2) = 5; 5 - 10 = -5 merged to 0.
        (ExponentialAverage(alpha=0.5), "merged", [2.0, 5.0, 0.0]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_stream_ends_each_task_at_base_plus_the_merged_vectors(
    combiner: Combiner, init_from: Any, ends: list[float], tmp_path: Path
) -> None:
    module = Walk(start=10.0)
    cl = ContinualMerging(combiner, tmp_path / "bank", init_from=init_from)
    for growth, end in zip((1.0, 3.0, -5.0), ends, strict=True):
        module.growth = (growth,)
        fit(tmp_path, module, cl)
        assert module.w.item() == pytest.approx(10.0 + end, abs=1e-5)
        merged = cl.merged_vector()
        assert merged is not None
        assert merged["w"].item() == pytest.approx(end, abs=1e-6)
    assert cl.tasks == ["task0", "task1", "task2"]
    assert cl.completed == 3


@pytest.mark.parametrize("init_from", ["base", "merged", "last"])
def test_a_new_process_goes_on_from_the_bank_alone(init_from: Any, tmp_path: Path) -> None:
    def stream(folder: str, fresh: bool) -> Walk:
        module, cl = Walk(start=1.0), ContinualMerging("ema", tmp_path / folder, init_from=init_from)
        for growth in (1.0, 3.0, -2.0):
            if fresh:
                module, cl = Walk(start=1.0), ContinualMerging("ema", tmp_path / folder, init_from=init_from)
            module.growth = (growth,)
            fit(tmp_path, module, cl)
        return module

    assert torch.equal(stream("one", fresh=False).w, stream("new", fresh=True).w)
    again = Walk()
    ContinualMerging("ema", tmp_path / "new", init_from=init_from).load_merged(again)
    assert torch.equal(again.w, stream("third", fresh=False).w)


def test_what_is_neither_merged_nor_the_head_goes_on_too_in_a_new_process(tmp_path: Path) -> None:
    def stream(folder: str, fresh: bool) -> Any:
        selection = Selection(include=("net.0.*",), trainable=True)
        module, cl = Net(norm=True), ContinualMerging("average", tmp_path / folder, selection=selection)
        for seed in range(2):
            if fresh:
                module, cl = Net(norm=True), ContinualMerging("average", tmp_path / folder, selection=selection)
            trainer(tmp_path, [cl], max_epochs=1).fit(module, batches(seed=seed))
        return module

    assert not differing(stream("one", fresh=False), stream("new", fresh=True))


def test_validation_measures_raw_weights_during_the_fit_and_merged_ones_after_it(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(Sum(scale=0.5), tmp_path / "bank")
    run = trainer(tmp_path, [cl], max_epochs=1)
    run.fit(module, steps(4), steps(1))
    assert run.callback_metrics["val/w"].item() == 4.0
    assert trainer(tmp_path).validate(module, steps(1), verbose=False)[0]["val/w"] == 2.0


def test_files_hold_the_merged_model_and_load_into_a_plain_module(tmp_path: Path) -> None:
    latest = ModelCheckpoint(tmp_path, filename="latest")
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/w", mode="max")
    module, cl = Walk(), ContinualMerging(Sum(scale=0.5), tmp_path / "bank")
    run = trainer(tmp_path, [cl, best, latest], max_epochs=2)
    run.fit(module, steps(2), steps(1))
    assert read(tmp_path / "latest.ckpt")["state_dict"]["w"].item() == 2.0
    assert read(tmp_path / "task0-merged.ckpt")["state_dict"]["w"].item() == 2.0
    assert read(tmp_path / "best.ckpt")["state_dict"]["w"].item() == 4.0  # what its monitor was measured on
    plain = Walk()
    plain.load_state_dict(read(tmp_path / "latest.ckpt")["state_dict"])
    assert plain.w.item() == 2.0
    assert run.validate(dataloaders=steps(1), ckpt_path=latest.best_model_path, verbose=False)[0]["val/w"] == 2.0


class Killed(Exception):
    pass


class KillInEpoch(pl.Callback):
    """Ends a run in the middle, as far as a test can without ending the process."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed


def test_a_task_resumed_from_a_file_ends_as_if_uninterrupted(tmp_path: Path) -> None:
    def task(index: int, module: Any, place: Path, *callbacks: Any, ckpt_path: Path | None = None) -> Any:
        cl = ContinualMerging("magmax", place / "bank")
        run = trainer(place, [cl, RandomState(), ModelCheckpoint(place, f"{index}"), *callbacks], max_epochs=2)
        run.fit(module, batches(4, seed=index), ckpt_path=ckpt_path)
        return cl

    torch.manual_seed(3)
    whole = Net(norm=True)
    task(0, whole, tmp_path / "whole")
    expected = task(1, whole, tmp_path / "whole")

    torch.manual_seed(3)
    killed, place = Net(norm=True), tmp_path / "killed"
    task(0, killed, place)
    with pytest.raises(Killed):
        task(1, killed, place, KillInEpoch(1))
    torch.manual_seed(99)  # in a new process
    resumed = Net(norm=True)
    cl = task(1, resumed, place, ckpt_path=place / "1.ckpt")
    assert not differing(whole, resumed)
    assert not differing(expected.merged_vector(), cl.merged_vector())


def test_a_task_fully_trained_in_its_file_is_taken_in_without_training(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(Sum(scale=0.5), tmp_path / "bank")
    file = ModelCheckpoint(tmp_path, "end", save_top_k=-1)

    class Kill(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, module, Kill(), cl, file)
    assert cl.completed == 0
    again, other = Walk(), ContinualMerging(Sum(scale=0.5), tmp_path / "bank")
    trainer(tmp_path, [other], max_epochs=1).fit(again, steps(2), ckpt_path=tmp_path / "end.ckpt")
    assert other.tasks == ["task0"]
    assert again.w.item() == 1.0


def test_an_interrupted_task_leaves_the_bank_and_can_be_started_again(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(Sum(scale=1.0), tmp_path / "bank")
    fit(tmp_path, module, cl)

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module, cl, Stop())
    assert module.w.item() == 1.0  # raw: one step from the base
    assert cl.completed == 1
    fit(tmp_path, module, cl)
    assert module.w.item() == 4.0


def test_a_first_task_that_failed_binds_no_later_model(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, Net(), ContinualMerging("sum", tmp_path / "bank"), KillInEpoch(0))
    module, cl = Walk(start=3.0), ContinualMerging(Sum(scale=1.0), tmp_path / "bank")
    with pytest.raises(Killed):
        fit(tmp_path, module, cl, KillInEpoch(1), epochs=2)
    assert module.w.item() == 5.0
    fit(tmp_path, module, cl)  # the same callback starts the task again, from the base
    assert module.w.item() == 5.0
    assert cl.merged_vector() == {"w": torch.tensor([2.0])}


def test_an_average_before_it_in_the_list_gives_the_vector(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(Sum(scale=1.0), tmp_path / "bank")
    fit(tmp_path, module, EMA(decay=0.5), cl)
    assert module.w.item() == 1.25  # of 0, 1, 2
    vector = cl.merged_vector()
    assert vector is not None
    assert vector["w"].item() == 1.25
    with pytest.raises(ValueError, match=r"EMA must come before ContinualMerging"):
        fit(tmp_path, Walk(), ContinualMerging(bank=tmp_path / "b2"), EMA())


def test_half_precision_adds_no_rounding_of_its_own_to_a_vector(tmp_path: Path) -> None:
    module = Walk(start=1.001)  # not a number that bfloat16 has
    module.extra = nn.Parameter(torch.full((3,), 0.1003))
    cl = ContinualMerging(Sum(scale=1.0), tmp_path / "bank")
    fit(tmp_path, module, cl, precision="bf16-true")
    vector = cl.merged_vector()
    assert vector is not None
    assert vector["extra"].abs().max() == 0
    assert vector["w"].dtype == torch.float32


# ---- heads and buffers


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        SmallConvNet(width=4), 10, optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01)
    )


def digits(tasks: int = 5, **settings: Any) -> list[TaskData]:
    return split_by_class(Digits(batch_size=16), Split.of(10, tasks=tasks, seed=None, **settings))


QUICK = {"limit_train_batches": 3, "limit_val_batches": 1}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_runs_a_stream_and_keeps_the_head_out_of_its_vectors(preset: str, tmp_path: Path) -> None:
    module, cl = classifier(), ContinualMerging(preset, tmp_path / "bank")
    module.to(memory_format=torch.channels_last)  # makes weights of convolutions non-contiguous
    before = values(module)
    for task in digits()[:2]:
        trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=task)
    vector = cl.merged_vector()
    assert vector is not None
    assert not [name for name in vector if name.startswith("model.6") or "running" in name]
    assert len(vector) == (3 if preset == "lora-arithmetic" else 9)
    assert set(values(module)) == set(before)  # no adapter is left
    assert all(parameter.requires_grad for parameter in module.parameters())
    changed = set(differing(before, module))
    assert changed >= set(vector)
    expected = {name: before[name] + vector[name] for name in vector}
    for name in vector:
        torch.testing.assert_close(module.state_dict()[name], expected[name])


def test_rows_of_a_grown_head_are_those_of_the_task_that_trained_them(tmp_path: Path) -> None:
    module, cl = classifier(), ContinualMerging("average", tmp_path / "bank")
    rows = module.model[6].weight
    start = rows.detach().clone()
    for index, task in enumerate(digits()[:2]):
        before = rows.detach().clone()
        trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=task)
        own = list(task.classes or ())
        others = [row for row in range(10) if row not in own]
        assert torch.equal(rows[others], before[others])
        assert not torch.equal(rows[own], start[own]), index


def test_each_task_has_a_head_that_starts_as_the_bases(tmp_path: Path) -> None:
    module, cl = classifier(), ContinualMerging("average", tmp_path / "bank", heads="per_task")
    ends = []
    for task in digits()[:2]:
        trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=task)
        ends.append(values({"w": module.model[6].weight}))
    assert torch.equal(cl.head_of(0)["model.6.weight"], ends[0]["w"])
    assert torch.equal(cl.head_of(1)["model.6.weight"], ends[1]["w"])
    assert not torch.equal(ends[0]["w"], ends[1]["w"])
    with pytest.raises(ValueError, match=r"`task` must be in \[0, 2\)"):
        cl.head_of(2)


def test_a_frozen_head_stays_the_bases_and_trains_again_after_the_fit(tmp_path: Path) -> None:
    module, cl = classifier(), ContinualMerging("average", tmp_path / "bank", heads="freeze")
    before = values({"w": module.model[6].weight})
    trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=digits()[0])
    assert torch.equal(module.model[6].weight, before["w"])
    assert module.model[6].weight.requires_grad


def test_a_head_may_grow_between_tasks(tmp_path: Path) -> None:
    module, cl = Net(), ContinualMerging("average", tmp_path / "bank")
    trainer(tmp_path, [cl], max_epochs=1).fit(module, batches())
    module.net[2] = grow_head(module.net[2], 3)
    module.loss = lambda batch: nn.functional.mse_loss(module(batch[0]).sum(1, keepdim=True), batch[1])
    trainer(tmp_path, [cl], max_epochs=1).fit(module, batches())
    assert module.net[2].out_features == 3
    assert cl.completed == 2
    other = Net()
    other.net[2] = grow_head(other.net[2], 3)
    ContinualMerging("average", tmp_path / "bank").load_merged(other)
    assert not differing(other, module)


@pytest.mark.parametrize("policy", ["recompute", "average", "copy"])
def test_statistics_of_batchnorm_follow_the_policy(policy: Any, tmp_path: Path) -> None:
    module = Net(norm=True)
    cl = ContinualMerging("average", tmp_path / "bank", selection=Selection(trainable=True, buffers=policy))

    raw: list[Tensor] = []

    class Witness(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raw.append(pl_module.net[1].running_mean.clone())

    for seed in (1, 2):
        trainer(tmp_path, [cl, Witness()], max_epochs=1).fit(module, batches(4, seed=seed))
    first, second = raw
    found = module.net[1].running_mean
    if policy == "copy":
        assert torch.equal(found, second)
    elif policy == "average":
        torch.testing.assert_close(found, (first + second) / 2)
    else:
        inputs = torch.cat([batch[0] for batch in batches(4, seed=2)])
        torch.testing.assert_close(found, module.net[0](inputs).detach().mean(0), atol=1e-5, rtol=1e-5)


# ---- the script of README


def test_the_script_of_the_readme_forgets_less_than_training_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = digits(2, scenario="task")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    def accuracy(module: Classifier) -> float:
        return float(pl.Trainer(**quiet).test(module, tasks[0], verbose=False)[0]["test/acc_in_task"])

    def Trainer(**settings: Any) -> pl.Trainer:
        return pl.Trainer(**settings, **quiet)

    model, all_tasks = classifier(), jointly(tasks)
    cl = ContinualMerging("magmax", bank="bank/")
    for task in tasks:
        Trainer(max_epochs=5, callbacks=[cl]).fit(model, task)
    Trainer().test(model, all_tasks)

    plain = classifier()
    for task in tasks:
        Trainer(max_epochs=5).fit(plain, task)
    assert accuracy(model) > accuracy(plain)
    assert (tmp_path / "bank" / "bank.json").is_file()


def test_a_domain_stream_trains_all_classes_on_changed_inputs(tmp_path: Path) -> None:
    domains = {"upright": torch.clone, "turned": lambda x: x.rot90(1, (-2, -1))}
    tasks = split_by_domain(Digits(), domains, seed=None)
    module, cl = classifier(), ContinualMerging("average", tmp_path / "bank")
    for task in tasks:
        trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=task)
    assert cl.tasks == ["upright", "turned"]
    upright, turned = (next(iter(task.test_dataloader()))[0] for task in (tasks[0], tasks[1]) if not task.setup("test"))
    assert torch.equal(upright.rot90(1, (-2, -1)), turned)


# ---- the anchor


def test_identity_anchor_pulls_towards_the_base(tmp_path: Path) -> None:
    module = Walk(lr=0.1)  # gradient -1, then the pull to 0: w <- (w + .1) / 1.2
    anchor, average = Anchor(strength=2.0), WeightMerging(Mean(), name="mean")
    run = fit(tmp_path, module, average, anchor, n=2)
    assert average.raw_weights()["w"].item() == pytest.approx((0.1 / 1.2 + 0.1) / 1.2, abs=1e-7)
    assert module.w.item() == pytest.approx((0.1 / 1.2 + (0.1 / 1.2 + 0.1) / 1.2) / 2, abs=1e-7)  # of pulled weights
    assert len(run.optimizers[0]._optimizer_step_post_hooks) == 0
    with torch.no_grad():
        module.w.fill_(0.3)
    fit(tmp_path, module, anchor, n=1)
    assert module.w.item() == pytest.approx(0.4 / 1.2, abs=1e-7)  # still to where the first task began


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_anchored_training_rests_where_loss_and_penalty_are_least(momentum: float, tmp_path: Path) -> None:
    class Spring(Walk):  # 3/2 (w - 1)^2 + 2/2 w^2 is least at 3/5
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 1.5 * (self.w - 1).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=momentum)

    module = Spring()
    fit(tmp_path, module, Anchor(strength=2.0), n=200)
    assert module.w.item() == pytest.approx(0.6, abs=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_strength_overshoots_and_a_huge_one_leaves_the_base(optimizer: Any, tmp_path: Path) -> None:
    class Chosen(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer(self.parameters(), 0.05, weight_decay=0.1, **momentum)

    for strength in (10.0, 1e4, 1e30, 3e38):
        module = Chosen()
        base = values(module)
        trainer(tmp_path, [Anchor(strength)], max_epochs=2).fit(module, batches(8))
        for name in ("net.0.weight", "net.0.bias"):
            away = (values(module)[name] - base[name]).abs().max().item()
            assert away < 20 / strength, (name, strength)


def test_weights_without_importance_are_free(tmp_path: Path) -> None:
    anchor = Anchor(3e38, "fisher", at="last")
    module = Walk(lr=0.1)
    fit(tmp_path, module, anchor, n=1)
    anchor._fisher = {"w": torch.zeros(1)}
    fit(tmp_path, module, anchor, n=1)
    assert module.w.item() == pytest.approx(0.2, abs=1e-7)


def test_fisher_information_is_the_mean_of_squared_gradients_of_samples(tmp_path: Path) -> None:
    module, anchor = Net(), Anchor(1.0, "fisher", at="last", samples=8)
    head = {"net.2.weight", "net.2.bias"}
    trainer(tmp_path, [anchor], max_epochs=1).fit(module, batches(4, size=4))
    inputs, targets = zip(*list(batches(4, size=4))[2:], strict=True)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x, y in zip(torch.cat(inputs), torch.cat(targets), strict=True):
        module.zero_grad()
        module.loss([x[None], y[None]]).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad.square() / 8
    assert set(anchor._fisher) == set(expected) - head
    for name, tensor in anchor._fisher.items():
        torch.testing.assert_close(tensor, expected[name])


def test_an_anchor_with_a_file_goes_on_in_a_new_process(tmp_path: Path) -> None:
    def second(anchor: Anchor) -> Any:
        module = Net()
        trainer(tmp_path, [anchor], max_epochs=1).fit(module, batches(seed=5))
        return module

    kept = Anchor(10.0, "fisher", at="last", file=tmp_path / "anchor.pt")
    trainer(tmp_path, [kept], max_epochs=1).fit(Net(), batches())
    file = (tmp_path / "anchor.pt").read_bytes()
    held = second(kept)
    (tmp_path / "anchor.pt").write_bytes(file)
    assert not differing(held, second(Anchor(10.0, "fisher", at="last", file=tmp_path / "anchor.pt")))
    assert differing(held, second(Anchor(0.0)))


# ---- samples, if told to


def test_stored_samples_train_the_head_alone_and_each_class_alike(tmp_path: Path) -> None:
    def stream(count: int) -> tuple[Any, ContinualMerging]:
        module = classifier()
        cl = ContinualMerging("average", tmp_path / f"bank{count}", store_samples_per_class=count)
        for task in digits()[:2]:
            trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=task)
        return module, cl

    (plain, _), (module, cl) = stream(0), stream(3)
    assert set(differing(values(plain), module)) == {"model.6.weight", "model.6.bias"}
    seen = sorted(label for task in digits()[:2] for label in task.classes or ())
    unseen = [row for row in range(10) if row not in seen]
    assert torch.equal(plain.model[6].weight[unseen], module.model[6].weight[unseen])
    stored = StreamState(cl.folder).load(2)["samples"]
    assert sorted(map(int, stored)) == seen
    assert {len(samples) for samples in stored.values()} == {3}
    assert "samples" not in StreamState(tmp_path / "bank0").load(2)
    assert "3 samples of a class stored" in cl.describe()

    def loss(of: Any) -> float:
        of.eval()
        labels = torch.tensor([int(label) for label in stored]).repeat_interleave(3)
        return masked_cross_entropy(of(torch.cat(list(stored.values()))), labels, seen).item()

    assert loss(module) < loss(plain)


def test_a_task_resumed_from_a_file_stores_the_same_samples(tmp_path: Path) -> None:
    def run(folder: str, stop: int | None) -> Any:
        module, cl = classifier(), ContinualMerging("average", tmp_path / folder, store_samples_per_class=9)
        callbacks = [RandomState(), cl, ModelCheckpoint(tmp_path / folder, every_n_epochs=1)]
        task = digits()[0]
        if stop is None:
            trainer(tmp_path, callbacks, max_epochs=2, **QUICK).fit(module, datamodule=task)
            return module
        with pytest.raises(Killed):
            trainer(tmp_path, [*callbacks, KillInEpoch(stop)], max_epochs=2, **QUICK).fit(module, datamodule=task)
        file = next((tmp_path / folder).glob("*.ckpt"))
        module, cl = classifier(), ContinualMerging("average", tmp_path / folder, store_samples_per_class=9)
        callbacks = [RandomState(), cl, ModelCheckpoint(tmp_path / folder, every_n_epochs=1)]
        trainer(tmp_path, callbacks, max_epochs=2, **QUICK).fit(module, datamodule=task, ckpt_path=file)
        return module

    assert not differing(values(run("whole", None)), run("killed", 1))
    whole, killed = (StreamState(tmp_path / folder).load(1)["samples"] for folder in ("whole", "killed"))
    assert all(torch.equal(whole[label], killed[label]) for label in whole)


def test_a_head_or_batches_that_samples_cannot_train_are_refused_before_a_step(tmp_path: Path) -> None:
    def fit_storing(module: Any, data: Any, **settings: Any) -> None:
        cl = ContinualMerging("average", tmp_path / type(module).__name__, store_samples_per_class=1, **settings)
        trainer(tmp_path, [cl], max_epochs=1).fit(module, data)

    with pytest.raises(ValueError, match="must be 0 here: the head must be one linear layer"):
        fit_storing(classifier(), digits()[0], head=["model.6.*", "model.0.*"])
    with pytest.raises(ValueError, match=r"takes batches of two tensors.*gave list"):
        fit_storing(Net(), batches())

    class Twice(Classifier):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images) + super().forward(images)

    module = Twice(SmallConvNet(), num_classes=10)
    before = values(module)
    with pytest.raises(ValueError, match=r"takes a head that is called once, on features of shape"):
        fit_storing(module, digits()[0])
    assert not differing(before, module)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContinualMerging("magmin"), r"`preset` must be a combiner or one of 'average'.*got 'magmin'"),
        (lambda: ContinualMerging(init_from="first"), r"`init_from` must be 'base', 'merged' or 'last', got 'first'"),
        (lambda: ContinualMerging(heads="merge"), r"`heads` must be 'freeze', 'per_task' or 'grow', got 'merge'"),
        (lambda: ContinualMerging("sum", scale=-1.0), r"`scale` must be a number in \(0, 10\].*got -1.0"),
        (lambda: ContinualMerging("average", scale=0.5), r"`scale` must be left out for Average\(\)"),
        (lambda: ContinualMerging("lora-arithmetic", lora_rank=0), r"`lora_rank` must be at least 1, got 0"),
        (
            lambda: ContinualMerging(heads="freeze", store_samples_per_class=10),
            r"`store_samples_per_class` must be at least 0, and 0 unless `heads` is 'grow'.*got 10 and 'freeze'",
        ),
        (lambda: ContinualMerging(store_samples_per_class=-1), r"`store_samples_per_class`.*got -1 and 'grow'"),
        (lambda: Anchor(-1.0), r"`strength` must be at least 0 and finite, got -1.0"),
        (lambda: Anchor(1.0, "hessian"), r"`importance` must be 'identity' or 'fisher', got 'hessian'"),
        (lambda: Anchor(1.0, at="first"), r"`at` must be 'base' or 'last', got 'first'"),
        (lambda: Anchor(1.0, samples=0), r"`samples` must be at least 1, got 0"),
        (lambda: split_by_domain(Digits(), {}), r"`domains` must hold at least one"),
        (lambda: jointly(split_by_domain(Digits(), {"a": torch.clone})), r"`tasks` must each have `classes`"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trainer_with_nothing_left_to_train_is_refused(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(bank=tmp_path / "bank")
    run = fit(tmp_path, module, cl)
    with pytest.raises(ValueError, match=r"`max_epochs` of this Trainer must be more than the 1 epochs.*new Trainer"):
        run.fit(module, steps(2))
    with pytest.raises(ValueError, match="trained nothing"):
        fit(tmp_path, module, cl, limit_train_batches=0)
    module.training_step = lambda batch, batch_idx: None  # Lightning skips the step
    with pytest.raises(ValueError, match="empty task vector"):
        fit(tmp_path, module, cl)
    assert cl.completed == 1


def test_a_bank_of_another_base_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Walk(), ContinualMerging(bank=tmp_path / "bank"))
    with pytest.raises(ValueError, match=r"of another base: `w` .*hash [0-9a-f]{12}.*new folder"):
        fit(tmp_path, Walk(start=0.5), ContinualMerging(bank=tmp_path / "bank"))


def test_a_file_of_another_base_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name, start in (("bank", 0.0), ("other", 0.5)):
        fit(tmp_path, Walk(start=start), ContinualMerging(bank=tmp_path / name))
    (file,) = (tmp_path / "bank").glob("base-*")
    file.unlink()
    cl, module = ContinualMerging(bank=tmp_path / "bank"), Walk(start=0.5)
    with pytest.raises(ValueError, match=r"has no file base-\*.safetensors: it was removed"):
        fit(tmp_path, module, cl)
    (other,) = (tmp_path / "other").glob("base-*")
    (tmp_path / "bank" / other.name).write_bytes(other.read_bytes())
    for use in (lambda: fit(tmp_path, module, cl), lambda: cl.load_merged(module)):
        with pytest.raises(ValueError, match=r"bank .* is of another base: `w` has hash"):
            use()
    assert module.w.item() == 0.5


def test_another_backbone_and_a_merged_head_that_grew_are_refused(tmp_path: Path) -> None:
    cl = ContinualMerging("average", tmp_path / "bank", head="net.0.*")  # the wrong layer
    module = Net()
    trainer(tmp_path, [cl], max_epochs=1).fit(module, batches())
    module.net[2] = grow_head(module.net[2], 3)
    with pytest.raises(ValueError, match=r"`net.2.weight` has shape \(3, 8\) instead of \(1, 8\).*a head that grew"):
        trainer(tmp_path, [cl], max_epochs=1).fit(module, batches())
    module.net[2] = nn.Linear(9, 1)
    with pytest.raises(ValueError, match="the backbone changed between tasks"):
        trainer(tmp_path, [cl], max_epochs=1).fit(module, batches())


def test_a_class_of_an_earlier_task_is_refused(tmp_path: Path) -> None:
    module, cl = classifier(), ContinualMerging(bank=tmp_path / "bank")
    data = Digits(batch_size=16)
    trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=TaskData(data, "a", (0, 1)))
    with pytest.raises(ValueError, match="class 1 was in a already"):
        trainer(tmp_path, [cl], max_epochs=1, **QUICK).fit(module, datamodule=TaskData(data, "b", (1, 2)))


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(bank=tmp_path / "bank")
    fit(tmp_path, module, cl, ModelCheckpoint(tmp_path, "end"))
    with pytest.raises(ValueError, match=r"this checkpoint is of task0, task 0 of a stream.*goes on with task 1"):
        trainer(tmp_path, [cl], max_epochs=2).fit(module, steps(2), ckpt_path=tmp_path / "end.ckpt")


def test_weights_that_are_not_finite_are_named_and_leave_the_bank(tmp_path: Path) -> None:
    module, cl = Walk(growth=(float("inf"),)), ContinualMerging(bank=tmp_path / "bank")
    with pytest.raises(ValueError, match=r"`w`.*NaN or an infinity"):
        fit(tmp_path, module, cl)
    assert cl.completed == 0


def test_a_damaged_file_of_the_stream_is_named_and_the_bank_stays_readable(tmp_path: Path) -> None:
    module, cl = Walk(), ContinualMerging(bank=tmp_path / "bank")
    fit(tmp_path, module, cl)
    path = next((tmp_path / "bank").glob("after-1-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        fit(tmp_path, module, cl)
    assert Bank(tmp_path / "bank").result() is not None
    path.unlink()
    with pytest.raises(ValueError, match="no file after-1"):
        StreamState(tmp_path / "bank").load(1)
