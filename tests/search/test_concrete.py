"""Concrete masks: the official code step by step, and a run that was killed.

``MaskModel`` of fusion_bench at 54c9e8c and the lines of its training loops, in float64 on the network and inputs of
``test_objectives``, with the same uniform numbers.
"""

import math

import pytest
import torch
from test_objectives import double, objective

from lightning_merge.search import CrossEntropy, concrete_mask

OFFICIAL = [
    (
        0.0,
        [1.5239977991911084, 1.3452954825427859, 1.40846681552908, 1.623291252283593],
        {
            "0.weight": [
                [0.18687237313899838, 0.2248593120667616, 0.7832131053248294],
                [2.3265647357197903, 2.243892152080844, 0.234598321668776],
            ],
            "0.bias": [1.9809541277772227, 0.019045872222777375],
        },
    ),
    (
        0.1,
        [1.3135477634793657, 1.1292516804217134, 1.2284836918224649, 1.442028432781409],
        {
            "0.weight": [
                [0.18975513910106176, 0.22798310405858854, 0.7963182608553723],
                [2.363585962708041, 2.2772444966971883, 0.14511303657974745],
            ],
            "0.bias": [1.9811958613842202, 0.018804138615779894],
        },
    ),
]
FAST = {"rate": 0.05, "seed": 7}


@pytest.mark.parametrize(("inner", "losses", "expected"), OFFICIAL)
def test_masks_are_those_of_the_official_code(inner, losses, expected):
    told = []
    mask = concrete_mask(
        objective(), [0.3, 0.3], 4, inner_rate=inner, on_step=lambda step, loss: told.append(loss), **FAST
    )
    assert told == pytest.approx(losses, abs=1e-9)
    assert list(mask) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(mask[name], double(values), atol=1e-9, rtol=0)


class Stop(Exception):
    """The process ends here."""


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_stopped_run_goes_on_bit_for_bit(stop_at, tmp_path):
    def stop(step, loss):
        if step == stop_at:
            raise Stop

    torch.manual_seed(0)
    batches = [[torch.randn(4, 3, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    given = {"coefficients": [0.3] * 4, "steps": 6, "inner_rate": 0.1, **FAST}
    whole = concrete_mask(objective(per="tensor", data=batches), **given)
    with pytest.raises(Stop):
        concrete_mask(objective(per="tensor", data=batches), **given, log=tmp_path / "mask.pt", every=2, on_step=stop)
    steps = []
    again = concrete_mask(
        objective(per="tensor", data=batches),
        **given,
        log=tmp_path / "mask.pt",
        on_step=lambda step, loss: steps.append(step),
    )
    assert steps == list(range(1 + stop_at // 2 * 2, 7))
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())
    with pytest.raises(ValueError, match="log of another mask: `seed`"):
        concrete_mask(objective(per="tensor", data=batches), **{**given, "seed": 8}, log=tmp_path / "mask.pt")
    batches[0][0] = batches[0][0] + 1
    with pytest.raises(ValueError, match="log of another mask: `subject`"):
        concrete_mask(objective(per="tensor", data=batches), **given, log=tmp_path / "mask.pt")


def test_a_mask_lowers_the_loss_of_few_examples_and_draws_from_its_own_generator():
    data = [[(double([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]]), torch.tensor([0, 2]))]]
    score, told = objective(CrossEntropy, data=data, heads=False), []
    before = torch.get_rng_state()
    mask = concrete_mask(
        score,
        [0.3, 0.3],
        150,
        rate=0.1,
        on_step=lambda step, loss: told.append(loss),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(told[-20:]) < 0.8 * sum(told[:20])
    for m in mask.values():
        assert float(m.mean()) == pytest.approx(1)
        assert float(m.min()) >= 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score": lambda a: 0.0}, TypeError, "`score` must be"),
        ({"coefficients": [0.3]}, ValueError, "`coefficients` must be 2 numbers, got 1"),
        ({"coefficients": [math.nan, 0.3]}, ValueError, "`coefficients`"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be more than 0"),
        ({"rate": 0.0}, ValueError, "`rate` must be more than 0"),
        ({"inner_rate": -1.0}, ValueError, "`inner_rate` must be at least 0"),
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"score": objective(data=[[double([[math.nan] * 3])]] * 2)}, ValueError, "the loss at step 0 is nan"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        concrete_mask(**({"score": objective(), "coefficients": [0.3, 0.3], "steps": 1} | change))


def test_a_file_that_is_no_log_is_refused(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="is not the log of a mask"):
        concrete_mask(objective(), [0.3, 0.3], 1, log=tmp_path / "mask.pt")
