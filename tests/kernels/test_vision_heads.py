"""Vision-aware head divergence and reinforcement."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    ShapeError,
    reinforce_heads,
    select_vision_heads,
    vision_aware_head_divergence,
)


def test_divergence_by_hand():
    without = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    seen = without + torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert vision_aware_head_divergence(seen, without).tolist() == [5.0, 0.0]
    both = vision_aware_head_divergence(seen.expand(3, 2, 2, 2), without.expand(3, 2, 2, 2))
    assert both.shape == (3, 2, 2) and bool((both == torch.tensor([5.0, 0.0])).all())
    half = vision_aware_head_divergence(seen.bfloat16(), without.bfloat16())
    assert half.dtype == torch.float32 and half.tolist() == [5.0, 0.0]


def test_selection():
    divergence = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 0.0, 0.0, 5.0], [7.0, 7.0, 7.0, 7.0]])
    expected = [[False, True, False, True], [True, False, False, True], [False] * 4]
    assert select_vision_heads(divergence).tolist() == expected
    late = select_vision_heads(divergence, last_layers=2)
    assert late.tolist() == [[False] * 4, *expected[1:]]
    assert not select_vision_heads(divergence, last_layers=0).any()
    # Within each layer: the unit of a layer does not matter.
    scaled = divergence * torch.tensor([[1e3], [1.0], [1e-3]])
    assert torch.equal(select_vision_heads(scaled), select_vision_heads(divergence))
    assert select_vision_heads(divergence.expand(2, 3, 4)).tolist() == [expected, expected]


def test_reinforcement():
    outputs = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    heads = torch.tensor([True, False, True])
    made = reinforce_heads(outputs, heads, factor=2.0)
    assert torch.equal(made[:, [0, 2]], 2.0 * outputs[:, [0, 2]])
    assert torch.equal(made[:, 1], outputs[:, 1])
    assert torch.equal(reinforce_heads(outputs, heads, factor=1.0), outputs)
    assert torch.equal(reinforce_heads(outputs, ~heads & heads), outputs)
    per_sample = torch.tensor([[True, False, False], [False, False, True]])
    made = reinforce_heads(outputs, per_sample, factor=3.0)
    assert torch.equal(made[0, 0], 3.0 * outputs[0, 0]) and torch.equal(made[1, 0], outputs[1, 0])
    tokens_first = reinforce_heads(outputs.transpose(1, 2), per_sample, factor=3.0, head_axis=-2)
    assert torch.equal(tokens_first.transpose(1, 2), made)
    assert torch.autograd.gradcheck(lambda x: reinforce_heads(x, per_sample), (outputs,))


def test_reinforcement_keeps_the_divergence_of_the_chosen_heads_in_proportion():
    make = torch.Generator().manual_seed(0)
    seen, without = (torch.randn(2, 6, 1, 8, generator=make) for _ in range(2))
    heads = torch.tensor([True, False, True, False, False, True])
    before = vision_aware_head_divergence(seen, without)[..., 0]
    after = vision_aware_head_divergence(
        reinforce_heads(seen, heads, factor=2.0), reinforce_heads(without, heads, factor=2.0)
    )[..., 0]
    torch.testing.assert_close(after / before, (1.0 + heads.float()).expand(2, 6))


def test_refuses():
    outputs = torch.zeros(2, 3, 5, 4)
    with pytest.raises(ShapeError, match="one shape"):
        vision_aware_head_divergence(outputs, outputs[:1])
    with pytest.raises(ShapeError, match="layers, heads"):
        select_vision_heads(torch.zeros(4))
    with pytest.raises(ShapeError, match="expected 0 to 3"):
        select_vision_heads(torch.zeros(3, 4), last_layers=4)
    with pytest.raises(ShapeError, match="heads must be bool"):
        reinforce_heads(outputs, torch.ones(3))
    with pytest.raises(ShapeError, match="heads must be bool"):
        reinforce_heads(outputs, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ShapeError, match="head_axis"):
        reinforce_heads(outputs, torch.ones(3, dtype=torch.bool), head_axis=0)


def test_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, seen, without):
            heads = select_vision_heads(
                vision_aware_head_divergence(seen[:, :, 0], without[:, :, 0])
            )
            return reinforce_heads(seen, heads)

    make = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(2, 6, 3, 8, generator=make) for _ in range(2))
    expected = Model()(*args)
    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(torch.export.export(Model(), args).module()(*args), expected)
