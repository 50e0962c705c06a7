"""Weights on their way into host memory: the same numbers, laid out as they were, in a few launches."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_counts import fake_cuda

from lightning_merge import _to_host
from lightning_merge._averaging._elsewhere import Taken
from lightning_merge._to_host import ToHost


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as to and from a device, without one."""
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: SimpleNamespace(synchronize=int))
    monkeypatch.setattr(_to_host, "_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


KINDS = {
    "large": lambda: torch.randn(50, 7),
    "bfloat16": lambda: torch.randn(9).bfloat16(),
    "turned": lambda: torch.randn(3, 5).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "a part": lambda: torch.randn(9, 9)[2:4],
    "every other": lambda: torch.randn(10)[::2],
    "number": lambda: torch.tensor(3),
    "none": lambda: torch.zeros(0, 2),
    "parameter": lambda: torch.nn.Parameter(torch.randn(4)),
    "small": lambda: torch.randn(3),
}


@pytest.mark.parametrize("together", [1, 20, 2**24])
def test_copies_of_many_are_those_of_each(together: int, monkeypatch: pytest.MonkeyPatch, no_streams: None) -> None:
    monkeypatch.setattr(_to_host, "_is_on_a_device", lambda tensor: True)
    monkeypatch.setattr(_to_host, "_TOGETHER", together)
    live = {name: make() for name, make in KINDS.items()}
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    way = ToHost()
    copied = way.copies(live)
    way.sent()
    for tensor in live.values():
        tensor.data.add_(1)
    way.wait()
    assert list(copied) == list(live)
    for name, tensor in copied.items():
        assert torch.equal(tensor, before[name]), name
        assert (tensor.dtype, tensor.stride()) == (live[name].dtype, before[name].stride()), name
        assert not tensor.requires_grad


def test_weights_go_to_host_memory_in_two_launches_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch, no_streams: None
) -> None:
    monkeypatch.setattr(_to_host, "_is_on_a_device", lambda tensor: tensor.device.type == "cuda")
    with fake_cuda() as counts:
        live = {f"{i}": torch.empty(64, 64, device="cuda") for i in range(160)}
        statistics: dict[str, Any] = {f"{i}.mean": torch.empty(64, device="cuda") for i in range(53)}
        counts.restart()
        Taken.to_host(live, statistics)
    assert counts.launches == ["cat", "cat"]  # and a copy each, for which the host does not wait
    assert counts.reads == ["_to_copy", "_to_copy"]
