"""Policies of branches through a real Trainer: published numbers, what they keep, and resuming."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, batches, differing, steps, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.branches import Combine, Nova, Pairs, Policy, Shuffle, SoftmaxOfScores, WeightedAverage, _shuffle
from lightning_merge.callbacks import DART, PAPA, WASH, Branching, DiLoCo, LocalSGD
from lightning_merge.combiners import SLERP, ModelStock
from lightning_merge.schedules import EveryNSteps

A, B, E, W0 = (1.0, 2.0, -1.0, 0.5), (0.5, -1.0, 2.0, 1.0), (0.9, 0.3, 0.2, -0.5), (0.2, 0.1, -0.3, 0.4)


class Ends(pl.LightningModule):
    """One step leads every branch to an end of its own: ``ends[batch][branch]``."""

    def __init__(self, *ends: Sequence[Sequence[float]], start: Sequence[float] = W0, lr: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.ends, self.lr = ends, lr

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        return (self.w * (self.w.detach() - torch.tensor(self.ends[batch_idx][batch], dtype=torch.float64))).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / self.lr)  # the rate is always 1
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def which(count: int) -> list[Callable[[Any], int]]:
    """Augmentations that turn the batch into the number of the branch."""
    return [lambda batch, branch=branch: branch for branch in range(count)]


def ways(policy: Policy, count: int, **settings: Any) -> Branching:
    return Branching(policy, EveryNSteps(1), count, augmentations=which(count), **settings)


def run(module: pl.LightningModule, branching: Branching, root: Path, groups: int = 1, **settings: Any) -> None:
    trainer(root, [branching], max_epochs=1, precision="64-true", **settings).fit(module, steps(groups))


def branches_of(callback: Branching) -> list[dict[str, Tensor]]:
    own, raw = callback._running.branches, callback.raw_weights()
    return [{name: raw[name] for name in own.live} if j == own.active else own.weights(j) for j in own.own]


def rows(callback: Branching) -> list[list[float]]:
    return [own["w"].tolist() for own in branches_of(callback)]


def test_papa_pulls_as_far_as_the_learning_rate_says(tmp_path: Path) -> None:
    papa = PAPA(3, 1, pull=0.01, augmentations=which(3))
    module = Ends((A, B, E), lr=2.0)
    run(module, papa, tmp_path)
    expected = [
        (0.999, 1.9921666667, -0.993, 0.4991666667),
        (0.5015, -0.9928333333, 1.992, 0.9966666667),
        (0.8995, 0.3006666667, 0.201, -0.4958333333),
    ]
    for found, row in zip(rows(papa), expected, strict=True):
        assert found == pytest.approx(row, abs=1e-10)
    assert module.w.tolist() == pytest.approx([sum(each) / 3 for each in zip(A, B, E, strict=True)], abs=1e-10)


def test_pairs_are_means_of_two_branches_and_differ_from_merge_to_merge(tmp_path: Path) -> None:
    ends = [[2.0**branch] for branch in range(4)]
    seen = []
    for groups in (1, 2):
        pairs = ways(Pairs(seed=1), 4)
        run(Ends(*[ends] * groups, start=(0.0,)), pairs, tmp_path, groups)
        (found,) = zip(*rows(pairs), strict=True)
        allowed = {(a + b) / 2 for (a,) in ends for (b,) in ends if a != b}
        assert set(found) <= allowed
        seen.append(found)
    assert seen[0] != seen[1]


def test_shuffle_permutes_chosen_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shuffle, "drawn_places", lambda *args: torch.tensor([0, 2, 5]))
    monkeypatch.setattr(_shuffle, "drawn_orders", lambda *args: torch.tensor([[2, 0, 3, 1]] * 3).T)
    wash = WASH(4, augmentations=which(4))
    run(Ends(torch.arange(24.0).view(4, 6).tolist(), start=(0.0,) * 6), wash, tmp_path)
    assert rows(wash) == [
        [12, 1, 14, 3, 4, 17],
        [0, 7, 2, 9, 10, 5],
        [18, 13, 20, 15, 16, 23],
        [6, 19, 8, 21, 22, 11],
    ]


@pytest.mark.parametrize("inactive", ["device", "cpu"])
def test_shuffle_keeps_mean_and_spread_of_every_coordinate(inactive: Any, tmp_path: Path) -> None:
    class Flat(Ends):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.w.data = self.w.data.view(20, 10).T  # strides as of channels_last
            self.ends = (torch.tensor(self.ends[0]).view(-1, 20, 10).transpose(1, 2).tolist(),)

    ends = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).tolist()
    wash = WASH(3, share=0.5, augmentations=which(3), inactive=inactive)
    run(Flat(ends, start=(0.0,) * 200), wash, tmp_path)
    before = torch.tensor(ends, dtype=torch.float64).view(3, 20, 10).transpose(1, 2)
    after = torch.tensor(rows(wash), dtype=torch.float64)
    assert torch.equal(before.sort(0).values, after.sort(0).values)
    moved = (before != after).any(0).double().mean().item()
    assert 0.2 < moved < 0.6  # half are chosen, and a sixth of the permutations moves nothing


def test_every_shuffle_draws_anew(tmp_path: Path) -> None:
    ends = torch.arange(60.0).view(3, 20).tolist()
    seen = []
    for groups in (1, 2):  # every group leads to the same ends again
        wash = WASH(3, share=0.5, augmentations=which(3))
        run(Ends(*[ends] * groups, start=(0.0,) * 20), wash, tmp_path, groups)
        seen.append(rows(wash))
    assert seen[0] != seen[1]


def test_places_are_drawn_with_their_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(40)
    for _ in range(4000):
        counts[_shuffle.drawn_places(40, 0.05, generator)] += 1
    error = (counts / 4000 - 0.05) / math.sqrt(0.05 * 0.95 / 4000)
    assert error.abs().max() < 4
    assert _shuffle.drawn_places(7, 1.0, generator).tolist() == list(range(7))
    assert not len(_shuffle.drawn_places(7, 0.0, generator))


def test_the_last_layer_is_not_shuffled(tmp_path: Path) -> None:
    wash = WASH(2, share=1.0, augmentations=[lambda b: b, lambda b: [-b[0], b[1]]], every_n_steps=2)
    apart = Branching(Shuffle(0.0), EveryNSteps(2), 2, augmentations=wash.augmentations)
    for callback in (wash, apart):
        trainer(tmp_path, [callback], max_epochs=1).fit(Net(), batches(2))
    shuffled, unshuffled = branches_of(wash)[0], branches_of(apart)[0]
    assert set(differing(shuffled, unshuffled)) == {"net.0.weight", "net.0.bias"}


def test_dart_and_post_local_sgd_train_as_one_and_then_apart(tmp_path: Path) -> None:
    expected, alone = Net(), Net().double()
    optimizer = alone.configure_optimizers()
    halves = list(batches(4))
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        optimizer.zero_grad()
        ((alone.loss([t.double() for t in first]) + alone.loss([t.double() for t in second])) / 2).backward()
        optimizer.step()
    expected = Net()
    local = LocalSGD(2, 3, start=2)
    trainer(tmp_path, [local], max_epochs=1, precision="64-true").fit(expected, batches(4))
    for name, tensor in alone.named_parameters():
        torch.testing.assert_close(dict(expected.named_parameters())[name].double(), tensor, atol=1e-10, rtol=0)
    dart = DART(2, 3, start=0.25, augmentations=[lambda b: b, lambda b: [-b[0], b[1]]])
    trainer(tmp_path, [dart], max_epochs=1).fit(Net(), batches(8))
    assert dart.merges == 4  # after steps 1, 2, 5 and 8


def test_diloco_follows_the_published_steps(tmp_path: Path) -> None:
    half = [[x / 2 for x in each] for each in (A, B)]
    for groups, expected in ((1, (0.9315, 0.632, 0.764, 0.8655)), (2, (0.503205, 0.35074, 0.53398, 0.411585))):
        module, diloco = Ends((A, B), half), DiLoCo(2, 1, augmentations=which(2), batches="same")
        run(module, diloco, tmp_path, groups)
        assert module.w.tolist() == pytest.approx(expected, abs=1e-10)
        anchor = diloco._policy_state["anchor"]["w"]
        assert anchor.tolist() == pytest.approx(expected, abs=1e-10)
        assert anchor.device.type == "cpu"


def test_an_outer_step_of_one_without_momentum_is_the_mean(tmp_path: Path) -> None:
    module = Ends((A, B))
    run(module, DiLoCo(2, 1, lr=1.0, momentum=0.0, augmentations=which(2), batches="same"), tmp_path)
    assert module.w.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(A, B, strict=True)], abs=1e-12)


def test_diloco_of_one_branch_is_lookahead_with_momentum(tmp_path: Path) -> None:
    module, ends = Ends(*[[A]] * 3), torch.tensor(A, dtype=torch.float64)
    anchor, velocity = torch.tensor(W0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    run(module, DiLoCo(1, 1, lr=0.5, momentum=0.5, augmentations=which(1)), tmp_path, 3)
    for _ in range(3):
        velocity = 0.5 * velocity + anchor - ends
        anchor = anchor - 0.5 * (anchor - ends + 0.5 * velocity)
    assert module.w.tolist() == pytest.approx(anchor.tolist(), abs=1e-12)


def test_warp_goes_a_part_of_the_spherical_way(tmp_path: Path) -> None:
    module = Ends((A, B))
    run(module, ways(Combine(SLERP(t=0.25)), 2), tmp_path)
    assert module.w.tolist() == pytest.approx((1.3838940469, 1.7345966339, 0.3283417031, 0.9133097058), abs=1e-10)
    module, warp = Ends((A, B)), ways(Combine(SLERP(scale=0.3)), 2, optimizer_state="reset")
    run(module, warp, tmp_path)
    assert module.w.tolist() == pytest.approx((0.5652051485, 0.3656037444, 0.2312074887, 0.6324032763), abs=1e-10)
    assert warp._policy_state["base"]["w"].tolist() == pytest.approx(module.w.tolist(), abs=0)  # the next start


def test_model_stock_pulls_back_to_the_start_of_the_run(tmp_path: Path) -> None:
    module = Ends((A, B, E))
    run(module, ways(Combine(ModelStock(), base="start"), 3), tmp_path)
    assert module.w.tolist() == pytest.approx(W0, abs=1e-10)  # their mean cosine is negative
    start, near, far = (torch.tensor(each, dtype=torch.float64) for each in (W0, A, E))
    cosine = torch.nn.functional.cosine_similarity(near - start, far - start, dim=0)
    module = Ends((A, E), (A, E))
    run(module, ways(Combine(ModelStock(), base="start"), 2), tmp_path, 2)
    share = 2 * cosine / (1 + cosine) if cosine > 0 else torch.zeros(())
    assert module.w.tolist() == pytest.approx((start + share * ((near + far) / 2 - start)).tolist(), abs=1e-10)


def test_shares_are_the_softmax_of_the_scores(tmp_path: Path) -> None:
    module = Ends([[2.0], [1.0], [3.0]], start=(0.0,))
    cocktail = ways(SoftmaxOfScores(), 3, score=lambda own, batch: (-own.w.sum(), 1))
    data = trainer(tmp_path, [cocktail], max_epochs=1, precision="64-true")
    module.merge_dataloader = lambda: steps(1)  # type: ignore[assignment]
    data.fit(module, steps(1))
    odds = [math.exp(-loss / 5) for loss in (2, 1, 3)]
    expected = [each / sum(odds) for each in odds]
    assert expected == pytest.approx((0.3289329223, 0.4017595783, 0.2693074992), abs=1e-9)
    assert cocktail._policy_state["history"][0]["shares"] == pytest.approx(expected, abs=1e-10)
    assert module.w.item() == pytest.approx(2 * expected[0] + expected[1] + 3 * expected[2], abs=1e-9)


def test_a_branch_whose_score_is_nan_is_left_out(tmp_path: Path) -> None:
    module = Ends([[2.0], [1.0], [3.0]], start=(0.0,))
    module.merge_dataloader = lambda: steps(1)  # type: ignore[assignment]
    score = lambda own, batch: (float("nan") if own.w.item() == 3 else 1.0, 1)  # noqa: E731
    with pytest.warns(UserWarning, match=r"branches \[2\] are left out: their score was a NaN"):
        run(module, ways(SoftmaxOfScores(), 3, score=score), tmp_path)
    assert module.w.item() == pytest.approx(1.5)


def test_federated_averaging_weights_by_amounts(tmp_path: Path) -> None:
    module = Ends((A, B))
    run(module, ways(WeightedAverage((1, 3)), 2), tmp_path)
    assert module.w.tolist() == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(A, B, strict=True)], abs=1e-12)


class Uneven(Ends):
    """Two steps in one branch, five in the other."""

    def __init__(self) -> None:
        super().__init__((A, B))
        self.automatic_optimization = False

    def training_step(self, batch: int, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        start, steps = self.w.detach().clone(), (2, 5)[batch]
        for _ in range(steps):
            optimizer.zero_grad()
            way = torch.tensor(self.ends[0][batch], dtype=torch.float64) - start
            self.manual_backward(-(self.w * way / steps).sum())
            optimizer.step()


def test_fednova_divides_by_the_work_that_was_done(tmp_path: Path) -> None:
    module = Uneven()
    run(module, ways(Nova((1, 3), momentum=0.9), 2), tmp_path)
    assert module.w.tolist() == pytest.approx((1.1110277526, 1.1691794906, 0.4502634162, 0.8535544276), abs=1e-10)
    module, even = Ends((A, B)), ways(Nova((1, 3), momentum=0.9), 2)
    run(module, even, tmp_path)
    assert module.w.tolist() == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(A, B, strict=True)], abs=1e-12)
    assert even._running.branches.work() == [0, 0]


# ---- resuming

BENDS = [lambda batch, by=by: [batch[0] + by * batch[0].square(), batch[1]] for by in (0.0, 0.3, 0.6)]
POLICIES: dict[str, Callable[[], Branching]] = {
    "papa": lambda: PAPA(3, 2, augmentations=BENDS),
    "wash": lambda: WASH(3, share=0.5, augmentations=BENDS),
    "dart": lambda: DART(3, 2, start=2, augmentations=BENDS),
    "diloco": lambda: DiLoCo(3, 2, augmentations=BENDS, batches="same"),
    "streaming diloco": lambda: DiLoCo(
        3, 2, augmentations=BENDS, batches="same", fragments=2, delay=1, mix=0.5, bits=4
    ),
    "pairs": lambda: Branching(Pairs(), EveryNSteps(2), 3, augmentations=BENDS),
    "warp": lambda: Branching(Combine(SLERP(scale=0.3)), EveryNSteps(2), 3, augmentations=BENDS),
    "nova": lambda: Branching(Nova((1, 2, 3), 0.9), EveryNSteps(2), 3, augmentations=BENDS, batches="turns"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Any, Branching]:
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        branching, module = POLICIES[policy](), Net(norm=True)
        data = DataLoader([next(iter(batches(1)))] * 7, batch_size=None)
        trainer(tmp_path, [branching, checkpoint], max_epochs=1).fit(module, data, ckpt_path=ckpt_path)
        return module, branching

    whole, first = fit("whole")
    assert first.merges
    for step in (1, 4):
        again, second = fit(f"from-{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert not differing(whole, again)
        for one, other in zip(branches_of(first), branches_of(second), strict=True):
            assert not differing(one, other)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAPA(pull=1.5), r"`pull` must be in \[0, 1\], got 1.5"),
        (lambda: PAPA(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
        (lambda: PAPA(branches=0), "`branches` must be at least 1, got 0"),
        (lambda: WASH(share=-0.1), r"`share` must be in \[0, 1\], got -0.1"),
        (lambda: DART(start=1.0), "`start` must be a whole number of at least 0 or a share"),
        (lambda: LocalSGD(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
        (lambda: DiLoCo(lr=0.0), "`lr` must be more than 0, got 0.0"),
        (lambda: DiLoCo(momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
        (lambda: Combine(SLERP(), base="first"), "`base` must be 'last' or 'start', got 'first'"),
        (lambda: SoftmaxOfScores(0.0), "`temperature` must be more than 0, got 0.0"),
        (lambda: WeightedAverage((1, -1)), r"`amounts` must be numbers of at least 0, .* got \(1, -1\)"),
        (lambda: Nova(momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
    ],
)
def test_an_argument_of_a_policy_out_of_range_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_amounts_that_do_not_match_the_branches_and_pairs_of_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`amounts` must have one entry for each of the 2 branches, got 3"):
        run(Ends((A, B)), ways(WeightedAverage((1, 1, 1)), 2), tmp_path)
    with pytest.raises(ValueError, match="`Pairs` needs at least 2 branches, got 1"):
        run(Ends((A,)), ways(Pairs(), 1), tmp_path)
