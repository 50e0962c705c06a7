"""What statistics are measured by, and the files that hold them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_merge.importance import Statistics
from lightning_merge.importance._grams import _patches
from lightning_merge.importance._model_labels import ModelLabels
from lightning_merge.importance._squared import squared_gradients


def test_squared_gradients_are_a_mean_over_samples_and_what_fails_is_left_out() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)

    def loss(batch: Tensor) -> Tensor:
        if batch[0, 0] == 3:
            raise RuntimeError("a sample without a box")
        return (batch * weight).sum()

    batches = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 4.0], [5.0, 5.0]])]
    found = squared_gradients(
        {"w": weight, "u": unused}, [partial(Tensor.clone, each) for each in batches], loss, samples=2
    )
    assert found.means["w"].tolist() == [2.5, 8.0]
    assert found.means["u"].tolist() == [0.0]
    assert (found.samples, found.left_out, str(found.first)) == (2, 1, "a sample without a box")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 2, "dilation": 2}, {"padding": "same"}])
def test_a_convolution_is_the_product_of_its_weight_with_the_patches(kind: Any, settings: Any) -> None:
    layer = kind(3, 5, 3, bias=False, **settings).double()
    images = torch.randn(2, 3, *[9, 8][: 1 if kind is nn.Conv1d else 2], dtype=torch.float64)
    expected = layer(images)
    found = layer.weight.flatten(1) @ _patches(layer, images)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_drawn_labels_keep_what_is_ignored_and_have_the_shares_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, torch.tensor(3.0).log()]]).expand(4000, 2).T[None].clone()  # (1, 2, 4000)
    target = torch.zeros(1, 4000, dtype=torch.long)
    target[0, 2000:] = -100
    with ModelLabels() as mode:
        losses = nn.CrossEntropyLoss(reduction="none")(logits, target)
        flags = functional.binary_cross_entropy_with_logits(torch.full((9,), 80.0), torch.zeros(9))
        functional.nll_loss(logits.log_softmax(1), target)
    assert mode.drawn == 3
    assert not losses[0, 2000:].any()
    share = (losses[0, :2000] < 1.0).float().mean()
    assert float(share) == pytest.approx(0.75, abs=0.04)
    assert float(flags) < 1e-30  # all were drawn as true


def test_a_file_holds_what_was_written_and_is_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    module: Any = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    tensors = {"0.weight": torch.rand(3, 3), "0.bias": torch.rand(3)}
    written = Statistics.of(module, "fisher", tensors, samples=5, labels="true", left_out={"x": "why"})
    written.write(tmp_path / "s")
    found = Statistics.open(tmp_path / "s")
    assert (found.kind, found.samples, found.labels) == ("fisher", 5, "true")
    assert dict(found.left_out) == {"x": "why"}
    assert found.norm == pytest.approx(written.norm, rel=1e-12)
    assert found.names == frozenset({"0.weight", "0.bias", "1.weight", "1.bias"})
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    assert torch.equal(found.find("1.weight"), tensors["0.weight"])  # type: ignore[arg-type]
    assert found.find("1.bias") is None
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found.refuse_other_weights({name: p.to(dtype) for name, p in module.named_parameters()}, "it")
    with pytest.raises(ValueError, match=r"are of other weights than it: `1.bias` differs"):
        found.refuse_other_weights({"1.bias": module[1].bias + 1e-3}, "it")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_a_module_adds_to_its_files_is_no_other_model() -> None:
    module = nn.Linear(2, 2)
    module.register_state_dict_post_hook(lambda *given: given[1].update({"measured": torch.ones(1)}))
    found = Statistics.of(module, "fisher", {"weight": torch.ones(2, 2)})
    assert found.find("measured") is None
    with pytest.raises(ValueError, match="are of another model: it has no `head`"):
        found.find("head")


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors holds no statistics: `ImportanceStatistics` writes"):
        Statistics.open(tmp_path / "weights.safetensors")
