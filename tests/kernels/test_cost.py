"""What a mechanism costs on paper, against what it does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brainalign_kernels import ShapeError, UnsupportedError
from brainalign_kernels.adapters import attention_cost, parse
from brainalign_kernels.patterns import effective_attention

SHAPE, PREFIX, HEADS, DIM = (6, 6), 1, 2, 4


@pytest.mark.parametrize(
    "spec", ["softmax", "neighborhood:k=3", "neighborhood:k=2,d=2", "clear:r=2.5"]
)
def test_pairs_are_those_that_get_any_weight(spec):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, 37, DIM, generator=generator)
    attend = parse(spec)
    weights = effective_attention(
        lambda v: attend(q, k, v, shape=SHAPE, mask=None, is_causal=False, scale=None), v
    )
    cost = attention_cost(spec, shape=SHAPE, prefix=PREFIX, heads=HEADS, dim=DIM)
    assert cost.scores == int((weights != 0).sum())
    assert cost.multiply_adds == cost.scores * 2 * DIM


def test_dense_products_are_what_pytorch_counts():
    q, k, v = torch.randn(3, 1, HEADS, 37, DIM)
    agents = torch.randn(1, HEADS, 9, DIM)
    with FlopCounterMode(display=False) as counted:
        (q @ k.mT).softmax(-1) @ v
    cost = attention_cost("softmax", shape=SHAPE, prefix=PREFIX, heads=HEADS, dim=DIM)
    assert 2 * cost.multiply_adds == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        (q @ agents.mT).softmax(-1) @ ((agents @ k.mT).softmax(-1) @ v)
    cost = attention_cost("agent:m=9", shape=SHAPE, prefix=PREFIX, heads=HEADS, dim=DIM)
    assert 2 * cost.multiply_adds == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)
    cost = attention_cost("linear", shape=SHAPE, prefix=PREFIX, heads=HEADS, dim=DIM)
    # The sum of the keys has no products; the formula counts it as one with ones.
    assert 2 * (cost.multiply_adds - HEADS * 37 * DIM) == counted.get_total_flops()


def test_cost_grows_as_the_mechanism_says():
    def work(spec: str, side: int) -> int:
        return attention_cost(spec, shape=(side, side), heads=1, dim=8).multiply_adds

    assert work("softmax", 16) == 16 * work("softmax", 8)
    for spec in ("neighborhood:k=3", "halo:block=4,halo=1", "linear", "flow", "agent:m=9"):
        assert work(spec, 16) == 4 * work(spec, 8), spec
    # Keys of the padding count: every query of a block sees a whole window.
    halo = attention_cost("halo:block=4,halo=1", shape=(8, 8), heads=1, dim=8)
    assert halo.scores == 64 * 36


def test_what_has_no_formula_is_refused():
    with pytest.raises(UnsupportedError, match="hip"):
        attention_cost("hip", shape=(8, 8), heads=1, dim=8)
    with pytest.raises(ShapeError, match="heads"):
        attention_cost("softmax", shape=(8, 8), heads=0, dim=8)
    with pytest.raises(ShapeError, match="Known"):
        attention_cost("sofmax", shape=(8, 8), heads=1, dim=8)
