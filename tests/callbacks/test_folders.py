"""Folders of sharded checkpoints on their way elsewhere: made one file, read by name, refused where nothing goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from ranks import ddp, fsdp2, together
from tiny import trainer
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader

from lightning_merge.callbacks import EMA, LAWA
from lightning_merge.callbacks._publication import _checkpoint
from lightning_merge.compat import read_weights
from lightning_merge.files._label import KEY

pytestmark = pytest.mark.multiprocess

SETS = ("ema", "lawa", "raw")


class Words(nn.Module):
    """Its output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(5, 5), nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.tanh(self.mix(self.words(words))))
        return scores


class Language(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Words()

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not hasattr(self.net.mix.weight, "to_local"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch), (batch + 1) % 5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def fit(root: Path, strategy: Any, epochs: int, path: Path | None = None, **file: Any) -> EMA:
    ema, window = EMA(0.9), LAWA(k=2, every_n_steps=1)
    files = ModelCheckpoint(root, f"after{epochs}", save_top_k=-1, **file)
    run = trainer(root, [ema, window, files], strategy=strategy, devices=2, max_epochs=epochs)
    run.fit(Language(), DataLoader(torch.arange(20) % 5, batch_size=5), ckpt_path=path)
    return ema


def sets_after(ema: EMA) -> dict[str, dict[str, Tensor]]:
    window = ema._session.averages[1]
    kept = {"ema": ema.merged_weights(), "lawa": window.merged(), "raw": ema.raw_weights()}
    return {
        name: together(ema, {n: t for n, t in (each or {}).items() if "out" not in n}) for name, each in kept.items()
    }


def pack_as_before(section: Any, sharded: Any, checkpoint: Any) -> None:
    """Parts among those of the model, as earlier versions put them."""
    pack(section, sharded, checkpoint)
    checkpoint["state_dict"] |= checkpoint["optimizer_states"].pop()


pack = _checkpoint.pack


def work(root: Path) -> dict[str, Any]:
    ema = fit(root / "new", fsdp2(), 1)
    found: dict[str, Any] = {"first": sets_after(ema), "final": ema.final_path}
    found["whole"] = sets_after(fit(root / "whole", fsdp2(), 2))
    found["again"] = sets_after(fit(root / "again", fsdp2(), 2, root / "new" / "after1.ckpt"))
    _checkpoint.pack = pack_as_before
    fit(root / "old", fsdp2(), 1)
    _checkpoint.pack = pack
    found["from old"] = sets_after(fit(root / "again", fsdp2(), 2, root / "old" / "after1.ckpt"))
    fit(root / "slim", fsdp2(), 1, save_weights_only=True)
    (root / "one").mkdir(exist_ok=True)
    if torch.distributed.get_rank() == 0:
        torch.save(_load_distributed_checkpoint(root / "new" / "after1.ckpt"), root / "one" / "after1.ckpt")
    torch.distributed.barrier()
    for name in ("slim", "one"):
        for how, strategy in {"fsdp2": fsdp2, "ddp": ddp}.items():
            try:
                fit(root / "again", strategy(), 2, root / name / "after1.ckpt")
            except ValueError as error:
                found[f"{name} {how}"] = str(error)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("folders")
    return root, launch(2, work, root)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("how", ["folder", "lightning"])
def test_every_set_loads_by_name_also_where_tensors_are_tied(
    how: str, layout: str, name: str, folders: Any, tmp_path: Path
) -> None:
    root, (found, _) = folders
    path = root / layout / "after1.ckpt"
    if how == "lightning":
        torch.save(_load_distributed_checkpoint(path), tmp_path / "whole.ckpt")
        path = tmp_path / "whole.ckpt"
    module = Language()
    module.load_state_dict(read_weights(path, name))
    assert module.net.out.weight is module.net.words.weight
    for key, tensor in found["first"][name].items():
        torch.testing.assert_close(module.state_dict()[key], tensor, rtol=0, atol=0)
    assert not torch.equal(found["first"]["raw"]["net.words.weight"], found["first"]["ema"]["net.words.weight"])


@pytest.mark.parametrize("how", ["lightning", "torch"])
def test_a_folder_that_a_converter_made_one_file_loads_into_a_plain_module(
    how: str, folders: Any, tmp_path: Path
) -> None:
    root, (found, _) = folders
    if how == "lightning":
        torch.save(_load_distributed_checkpoint(root / "new" / "after1.ckpt"), tmp_path / "whole.ckpt")
        module = Language.load_from_checkpoint(tmp_path / "whole.ckpt", map_location="cpu")
    else:
        dcp_to_torch_save(root / "new" / "after1.ckpt", tmp_path / "whole.ckpt")
        module = Language()
        module.load_state_dict(torch.load(tmp_path / "whole.ckpt", weights_only=False)["state_dict"])
    assert not [key for key in read_weights(tmp_path / "whole.ckpt") if key.startswith(KEY)]
    for key, tensor in found["first"]["ema"].items():
        torch.testing.assert_close(module.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["again", "from old"])
def test_a_run_goes_on_from_folders_of_both_layouts(key: str, folders: Any) -> None:
    for each in folders[1]:
        for name in SETS:
            torch.testing.assert_close(each[key][name], each["whole"][name], rtol=0, atol=0)


def test_what_no_run_goes_on_from_says_what_to_take(folders: Any) -> None:
    for each in folders[1]:
        assert "holds weights only (the set 'ema'), and a fit cannot be resumed" in each["slim fsdp2"]
        assert "is a sharded checkpoint, which a run under ModelParallelStrategy goes on from" in each["slim ddp"]
        for how in ("fsdp2", "ddp"):
            assert "put together from a sharded checkpoint, and a fit cannot be resumed from it" in each[f"one {how}"]
