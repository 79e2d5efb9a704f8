"""Linearised relative position encoding."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import LRPE, MDLRPE, ShapeError, lrpe, md_lrpe


def random(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


@pytest.mark.parametrize("kind", ["cosine", "rotate"])
def test_products_depend_on_the_distance(kind):
    theta = random(2, 6 if kind == "cosine" else 3, seed=1)
    q, k = random(1, 2, 1, 6).expand(1, 2, 9, 6), random(1, 2, 1, 6, seed=2).expand(1, 2, 9, 6)
    near = lrpe(q, theta, kind=kind) @ lrpe(k, theta, kind=kind).transpose(-1, -2)
    far = lrpe(q, theta, kind=kind, offset=5) @ lrpe(k, theta, kind=kind, offset=5).mT
    torch.testing.assert_close(near, far)
    for shift in range(1, 8):
        diagonal = near.diagonal(shift, dim1=2, dim2=3)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))
    assert not torch.allclose(near[..., 0, 0], near[..., 0, 5])


def test_rotation_keeps_lengths_and_cosine_too():
    x, theta = random(2, 3, 7, 4), random(1, 2, seed=1)
    turned = lrpe(x, theta, kind="rotate")
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    wide = lrpe(x, random(3, 4, seed=2))
    assert wide.shape == (2, 3, 7, 8)
    torch.testing.assert_close(wide.norm(dim=-1), x.norm(dim=-1))


def test_axes_share_the_angles():
    x, theta = random(1, 2, 2 + 6, 5), random(2, 3, seed=1)
    out = md_lrpe(x, theta, (2, 3), text_tokens=2)
    torch.testing.assert_close(out[:, :, :2], torch.cat([x, 0 * x], dim=-1)[:, :, :2])
    for row in range(2):
        for column in range(3):
            angle = torch.cat([row * theta, column * theta], dim=-1)[:, :5]
            token = 2 + 3 * row + column
            expected = [x[:, :, token] * angle.cos(), x[:, :, token] * angle.sin()]
            torch.testing.assert_close(out[:, :, token], torch.cat(expected, dim=-1))


def test_one_axis_is_the_plain_encoding():
    x, theta = random(2, 2, 9, 4), random(2, 4, seed=1)
    torch.testing.assert_close(md_lrpe(x, theta, [9]), lrpe(x, theta))


def test_activations():
    x, theta = random(1, 2, 6, 4), random(1, 4, seed=1)
    torch.testing.assert_close(lrpe(x, theta, act="softmax"), lrpe(x.softmax(-1), theta))
    torch.testing.assert_close(
        md_lrpe(x, theta, (2, 3), act="softmax", act_dim=2), md_lrpe(x.softmax(2), theta, (2, 3))
    )
    torch.testing.assert_close(lrpe(x, theta, act="relu2"), lrpe(x.relu() ** 2, theta))


def test_gradcheck():
    x, theta = random(1, 2, 4, 4), random(2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda *a: lrpe(*a, kind="rotate", act="silu"), (x, theta))
    assert torch.autograd.gradcheck(lambda *a: md_lrpe(*a, (3, 1), text_tokens=1), (x, theta))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)])
def test_half_precision_keeps_far_angles(dtype, bound):
    x, theta = random(1, 1, 600, 4).to(dtype), random(1, 4, seed=1).to(dtype)
    out = lrpe(x, theta)
    assert out.dtype == dtype
    assert float((out.double() - lrpe(x.double(), theta.double())).detach().abs().max()) < bound


def test_modules_and_empty():
    layer = MDLRPE(2, 6, 2)
    assert layer.theta.shape == (2, 3) and layer.theta.requires_grad
    x = torch.randn(1, 2, 12, 6)
    torch.testing.assert_close(layer(x, (3, 4)), md_lrpe(x, layer.theta, (3, 4)))
    turned = LRPE(1, 6, kind="rotate")
    torch.testing.assert_close(turned(x, offset=2), lrpe(x, turned.theta, kind="rotate", offset=2))
    assert layer(x[:, :, :0], (0, 4)).shape == (1, 2, 0, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, (3, 4)), layer(x, (3, 4)))
    exported = torch.export.export(turned, (x,)).module()
    torch.testing.assert_close(exported(x), turned(x))


def test_errors():
    x, theta = random(1, 2, 6, 4), random(2, 4)
    for run, message in (
        (lambda: lrpe(x, theta, kind="rotate"), "2 angles per head"),
        (lambda: lrpe(x, theta, kind="spiral"), "kind must be one of"),
        (lambda: lrpe(x[..., :3], theta[:, :1], kind="rotate"), "an odd number"),
        (lambda: lrpe(x[0], theta), "batch, heads, tokens, channels"),
        (lambda: lrpe(x, random(3, 4)), "heads or 1"),
        (lambda: lrpe(x, theta, act="telepathy"), "act must be one of"),
        (lambda: md_lrpe(x, theta, (2, 4)), "text_tokens \\+ product of shape"),
        (lambda: md_lrpe(x, theta[:, :1], (2, 3)), "at least 2 angles"),
        (lambda: MDLRPE(2, 4, 2)(x, (6,)), "Expected 2 axes"),
    ):
        with pytest.raises(ShapeError, match=message):
            run()
