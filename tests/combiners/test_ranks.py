"""Ranks by magnitude are those of a sort, whatever a sample says about where to look."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.combiners import _trim
from lightning_merge.combiners._trim import ALL, kth_largest

N = 60_000


def drawn(seed: int = 0) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "normal": lambda: [drawn()],
    "sorted": lambda: [drawn().sort().values],
    "few values": lambda: [drawn().mul(2).round()],
    "one value": lambda: [torch.full((N,), -3.0)],
    "zeros": lambda: [torch.zeros(N)],
    "mostly zeros": lambda: [drawn() * (drawn(1) > 2)],
    "rows of other sizes": lambda: [(drawn().view(60, 1000) * torch.logspace(-6, 6, 60)[:, None]).view(-1)],
    "larger where no sample looks": lambda: [torch.where(torch.arange(N) % (16 * 61) < 16, 1e-3 * drawn(), drawn())],
    "subnormal": lambda: [drawn() * 1e-40],
    "several": lambda: [drawn()[:7], drawn(1), drawn(2)[:20_000] * 10, torch.zeros(3)],
    "several of two dtypes": lambda: [drawn(), drawn(1).double()],
    "bfloat16": lambda: [drawn().bfloat16()],
    "strided": lambda: [drawn().view(200, 300).T],
}


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_the_kth_largest_is_that_of_a_sort(case: str, share: float) -> None:
    tensors = CASES[case]()
    sizes = torch.cat([tensor.reshape(-1).double() for tensor in tensors]).abs().sort(descending=True).values
    k = max(1, int(share * len(sizes)))
    level, room = kth_largest(tensors, k)
    assert level == sizes[k - 1]
    equal, above = int((sizes == level).sum()), int((sizes > level).sum())
    assert room == (k - above if equal > k - above else ALL)


def test_most_numbers_are_not_selected_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    around = _trim._around
    monkeypatch.setattr(_trim, "_around", lambda *arguments: found.append(around(*arguments)) or found[-1])
    kth_largest([drawn()], N // 5)
    assert len(found[0][1]) < 0.2 * N
