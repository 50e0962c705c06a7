"""A league in two processes, that hold the same weights or parts of them: one table, one winner, one file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from ranks import Even, Sharded, Wide, ddp, fit, fsdp2, loaders, whole
from tiny import differing, trainer
from torch import Tensor

from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, League, PostHocEMA
from lightning_merge.files._layouts import open_file

pytestmark = pytest.mark.multiprocess

MESHES: dict[str, tuple[int, type, Any]] = {
    "ddp": (2, Wide, ddp),
    "fsdp": (2, Sharded, fsdp2),
    "one file": (2, Sharded, lambda: fsdp2(whole_files=True)),
    "tensor": (2, Even, lambda: fsdp2(tensor=2)),
    "both": (4, Even, lambda: fsdp2(tensor=2)),
}


class WithTest:
    """Logs its loss in a test too."""

    def test_step(self: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


def with_test(kind: type) -> Any:
    return type(kind.__name__, (WithTest, kind), {})()


def contestants() -> list[Any]:
    return [
        EMA(decay=0.8, validate="raw"),
        SWA(start_epoch=0, validate="raw"),
        LAWA(k=2, every_n_steps=1, validate="both"),
        SWAD("val/loss", n_converge=1, n_tolerance=2, stop=False, validate="raw"),
        PostHocEMA(every=3, validate="raw"),
    ]


def one_league(root: Path, mesh: str) -> dict[str, Any]:
    _, kind, how = MESHES[mesh]
    place = root / mesh.replace(" ", "-")
    league, module = League(contestants(), "val/loss"), with_test(kind)
    run = fit(place, [league, ModelCheckpoint(place / "files", "last")], module, how(), max_epochs=3)
    held = whole(module)
    run.test(module, loaders(2, 0)[1], ckpt_path=league.path, verbose=False)
    return {
        "scores": {name: each.score for name, each in league.standings.items()},
        "errors": [each.standard_error for each in league.standings.values()],
        "winner": league.winner,
        "path": league.path,
        "held": held,
        "first": league.contestants[0].final_path,
        "tested": league.test_metrics,
    }


def leagues(root: Path, world: int) -> dict[str, Any]:
    return {mesh: one_league(root, mesh) for mesh, (processes, *_) in MESHES.items() if processes == world}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process found, by mesh."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("leagues")
    ranks = {world: launch(world, leagues, root / str(world), world) for world in (2, 4)}
    return {mesh: [each[mesh] for each in ranks[world]] for mesh, (world, *_) in MESHES.items()}


def plain(mesh: str) -> type:
    return Even if MESHES[mesh][1] is Even else Wide


@pytest.mark.parametrize("mesh", MESHES)
def test_all_processes_rank_alike_and_as_one_process_does(mesh: str, found: Any, tmp_path: Path) -> None:
    first = found[mesh][0]
    for each in found[mesh]:
        assert (each["scores"], each["winner"], each["path"]) == (first["scores"], first["winner"], first["path"])
    assert first["winner"] == min(first["scores"], key=first["scores"].__getitem__)
    alone = League(contestants(), "val/loss")
    trainer(tmp_path, [alone], max_epochs=3).fit(plain(mesh)(), *loaders())
    assert first["scores"] == pytest.approx({name: each.score for name, each in alone.standings.items()}, rel=1e-4)
    assert alone.winner == first["winner"]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_winners_file_holds_what_was_measured_and_a_plain_module_takes_it(mesh: str, found: Any) -> None:
    first = found[mesh][0]
    for path, name in ((first["path"], first["winner"]), (first["first"], "ema")):
        file = open_file(path)
        assert file.default == name
        module = plain(mesh)()
        module.load_state_dict(file.sets[name].weights, strict=True)
        module.eval()
        with torch.no_grad():
            measured = torch.stack([module.loss(batch) for batch in loaders()[1]]).mean().item()
        assert measured == pytest.approx(first["scores"][name], rel=1e-5)
    assert differing(open_file(first["first"]).sets["ema"].weights, first["held"]) == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_test_of_the_winner_is_kept_in_every_process(mesh: str, found: Any) -> None:
    for each in found[mesh]:
        assert set(each["tested"]) == {"test/loss"}
        assert each["errors"] == [None] * 6
