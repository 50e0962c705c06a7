"""Ranks by magnitude are those of a sort, whatever a sample says about where to look."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.combiners import _select
from lightning_merge.combiners._select import ALL, kth_largest

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
    [(level, room)] = kth_largest(tensors, k)
    assert level == sizes[k - 1]
    equal, above = int((sizes == level).sum()), int((sizes > level).sum())
    assert room == (k - above if equal > k - above else ALL)


def test_several_ranks_are_found_in_one_look() -> None:
    ks = [1, N // 10, N // 3, N]
    assert kth_largest([drawn()], *ks) == [found for k in ks for found in kth_largest([drawn()], k)]


def test_few_numbers_are_selected_from(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    partitioned = _select._partitioned
    monkeypatch.setattr(_select, "_partitioned", lambda x, k: sizes.append(len(x)) or partitioned(x, k))
    kth_largest([drawn()], N // 10, N // 3)
    assert len(sizes) == 2
    assert max(sizes) < 0.2 * N
