"""Averages of this library and of others, each as callbacks of a Trainer."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import lightning.pytorch as pl
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from _device._session import Session
from lightning_merge import callbacks as ours

DECAY = 0.999
Make: TypeAlias = Callable[[], list[pl.Callback]]


class Peer(pl.Callback):
    """An average of another library, updated after every batch.

    Args:
        make: Gives, for the model, what is called after each batch.
    """

    def __init__(self, make: Callable[[nn.Module], Callable[[], Any]]) -> None:
        self.make = make

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.update = self.make(pl_module.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.update()


def timm_update(net: nn.Module) -> Callable[[], Any]:
    """timm's ``ModelEmaV3``."""
    average = ModelEmaV3(net, decay=DECAY)
    return lambda: average.update(net)


def torch_update(net: nn.Module) -> Callable[[], Any]:
    """``swa_utils`` with its function for several tensors."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(net)
    return lambda: average.update_parameters(net)


def lightning_update(net: nn.Module) -> Callable[[], Any]:
    """What Lightning's ``EMAWeightAveraging`` does on the device."""
    average = AveragedModel(net, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
    average.update_parameters(net)
    return lambda: average.update_parameters(net)


def ema_pytorch_update(net: nn.Module) -> Callable[[], Any] | None:
    """ema-pytorch with its foreach path; ``None`` if it is not installed."""
    try:
        library = import_module("ema_pytorch")
    except ImportError:
        return None
    average = library.EMA(net, beta=DECAY, update_every=1, include_online_model=False, use_foreach=True)
    return lambda: average.update_moving_average(average.ema_model, net, DECAY)


def peers(session: Session) -> dict[str, Make]:
    """Those of others that are installed."""
    found: dict[str, Make] = {
        "timm": lambda: [Peer(timm_update)],
        "torch swa_utils": lambda: [Peer(torch_update)],
    }
    lightning = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if lightning is not None:
        found["Lightning"] = lambda: [lightning(device=session.device, decay=DECAY)]
    if ema_pytorch_update(nn.Linear(1, 1)) is not None:
        found["ema-pytorch"] = lambda: [Peer(ema_pytorch_update)]  # type: ignore[arg-type]
    return found


def averages() -> dict[str, Make]:
    """Ours that run on any model."""
    found: dict[str, Make] = {
        "EMA": lambda: [ours.EMA(decay=DECAY)],
        "EMA on the host": lambda: [ours.EMA(decay=DECAY, device="cpu")],
        "SWA": lambda: [ours.SWA(start_epoch=0)],
        "LAWA": lambda: [ours.LAWA(k=5, every_n_steps=5)],
        "SMA": lambda: [ours.SMA(monitor="val/loss", start_step=1)],
        "SWAD": lambda: [ours.SWAD(monitor="val/loss", stop=False)],
        "PostHocEMA": lambda: [ours.PostHocEMA(every=10)],
    }
    return found


def others() -> dict[str, Make]:
    """Ours that do more than average."""
    return {
        "EMA both": lambda: [ours.EMA(decay=DECAY, validate="both")],
        "three EMAs": lambda: [ours.EMA(decay=decay, name=f"ema{decay}") for decay in (0.9, 0.99, 0.999)],
        "ASWA": lambda: [ours.ASWA(monitor="val/loss", start_epoch=0)],
        "BestK": lambda: [ours.BestK(monitor="val/loss", k=2)],
        "Lookaround": lambda: [ours.Lookaround(branches=2, every_n_steps=5)],
        "OnDARE": lambda: [ours.OnlineMerging("ondare", pretrained="zero", density=0.5, alpha=1e-6)],
        "OnTIES": lambda: [ours.OnlineMerging("onties", pretrained="zero", density=0.5, alpha=1e-6)],
    }
