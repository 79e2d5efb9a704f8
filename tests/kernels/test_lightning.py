"""Lightning attention and its kin: paths against each other, states, decays at their limits."""

from __future__ import annotations

import pytest
import torch
from builds import EVERY, run_builds

from brainalign_kernels import (
    LightningAttention,
    ShapeError,
    UnsupportedError,
    count_calls,
    fla_slopes,
    gated_linear_attention,
    lightning_attention,
    lightning_slopes,
    linear_attention,
)

SHAPES = [(2, 3, 70, 5, 7), (1, 2, 64, 8, 4), (1, 1, 1, 3, 2), (2, 2, 33, 4, 4)]
KINDS = ["head", "step", "channel", "channel and value"]


def make(b, h, n, d, e, kind="head", dtype=torch.float64, seed=0, decay=0.3):
    """q, k, v, state and the decays of a kind."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    x = {"q": draw(b, h, n, d), "k": draw(b, h, n, d), "v": draw(b, h, n, e)}
    x["state"] = draw(b, h, d, e)
    shape = {"head": (h,), "step": (b, h, n)}.get(kind, (b, h, n, d))
    x["log_decay"] = -decay * draw(*shape).abs()
    if kind == "channel and value":
        x["log_decay_value"] = -decay * draw(b, h, n, e).abs()
    return {name: t.to(dtype).requires_grad_() for name, t in x.items()}


def attend(x, **options):
    """Output and state of the function that takes these decays."""
    call = lightning_attention if x["log_decay"].ndim == 1 else gated_linear_attention
    return call(**x, return_state=True, **options)


def gradients(x, made, allow_unused=False):
    source = torch.Generator().manual_seed(1)
    total = sum(
        (y.double() * torch.randn(y.shape, generator=source, dtype=torch.float64)).sum()
        for y in made
    )
    found = torch.autograd.grad(total, list(x.values()), allow_unused=allow_unused)
    return [g for g in found if g is not None]


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        size = max(float(b.detach().abs().max()), 1.0) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * size, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 16, 23, 64, 200])
def test_chunked_is_the_reference(shape, kind, chunk):
    x = make(*shape, kind)
    expected = attend(x, impl="reference", scale=0.7)
    made = attend(x, impl="compiled", scale=0.7, chunk_size=chunk)
    assert_close(made, expected, 1e-12)
    assert_close(gradients(x, made), gradients(x, expected), 1e-11)


def test_lightning_is_the_recurrence():
    x = make(2, 3, 21, 4, 5)
    expected = attend(x, impl="reference")
    steps = x["log_decay"].view(1, 3, 1).expand(2, 3, 21)
    made = attend({**x, "log_decay": steps}, impl="reference")
    assert_close(made, expected, 1e-13)


def test_a_decay_per_channel_that_is_equal_is_one_per_head():
    x = make(2, 3, 40, 4, 5, "step")
    channels = {**x, "log_decay": x["log_decay"][..., None].expand(2, 3, 40, 4)}
    assert_close(attend(channels, chunk_size=16), attend(x, chunk_size=16), 1e-13)
    value = {**x, "log_decay": torch.zeros(2, 3, 40).double()}
    value["log_decay_value"] = x["log_decay"][..., None].expand(2, 3, 40, 5)
    assert_close(attend(value, chunk_size=16), attend(x, chunk_size=16), 1e-13)


@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_no_decay_is_plain_linear_attention(impl):
    x = make(2, 2, 50, 4, 6)
    scores = (x["q"] @ x["k"].transpose(-1, -2)).tril()
    expected = scores @ x["v"]
    for rates in (None, torch.zeros(2)):
        out = lightning_attention(x["q"], x["k"], x["v"], rates, chunk_size=16, impl=impl)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    out = linear_attention(x["q"], x["k"], x["v"], is_causal=True, impl=impl)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_normalised_linear_attention(impl, is_causal):
    x = make(1, 2, 9, 4, 6)
    q, k = (torch.nn.functional.elu(x[name]) + 1 for name in "qk")
    out = linear_attention(q, k, x["v"], is_causal=is_causal, eps=0.0, impl=impl)
    weights = q @ k.transpose(-1, -2)
    weights = weights.tril() if is_causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out, weights @ x["v"], atol=1e-12, rtol=0)
    assert linear_attention(q, k[:, :, :0], x["v"][:, :, :0], impl=impl).abs().max() == 0


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_single_tokens_chain(impl, kind):
    x = make(2, 2, 37, 4, 5, kind)
    expected = attend(x, impl=impl)
    for lengths in ([1] * 37, [16, 0, 20, 1]):
        state, outs, start = x["state"], [], 0
        for length in lengths:
            piece = {
                name: t if name == "state" or t.ndim == 1 else t[:, :, start : start + length]
                for name, t in x.items()
            }
            out, state = attend({**piece, "state": state}, impl=impl, chunk_size=16)
            outs.append(out)
            start += length
        assert_close((torch.cat(outs, 2), state), expected, 1e-12)


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_causal(impl, kind):
    x = make(1, 2, 30, 4, 4, kind)
    before = attend(x, impl=impl, chunk_size=8)[0]
    later = {}
    for name, t in x.items():
        later[name] = t.detach().clone()
        if name != "state" and t.ndim > 1:
            later[name][:, :, 17:] -= 3.0
    after = attend(later, impl=impl, chunk_size=8)[0]
    assert torch.equal(before[:, :, :17], after[:, :, :17])
    assert (before[:, :, 17:] != after[:, :, 17:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_strong_decay_neither_overflows_nor_loses_the_present(kind):
    x = make(1, 2, 130, 4, 4, kind, torch.float32)
    x["log_decay"] = torch.full_like(x["log_decay"], -50.0, requires_grad=True)
    made = attend(x, impl="compiled")
    present = (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    assert_close(made[:1], [present], 1e-6)
    assert all(torch.isfinite(g).all() for g in gradients(x, made))


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_reset_forgets_everything_before(impl, kind):
    x = make(1, 2, 30, 4, 4, kind)
    rates = x["log_decay"].detach().clone()
    rates[:, :, 19] = -torch.inf
    x["log_decay"] = rates.requires_grad_()
    made = attend(x, impl=impl, chunk_size=8)
    tail = {n: t[:, :, 19:] for n, t in x.items() if n != "state"}
    assert_close(
        (made[0][:, :, 19:], made[1]), attend({**tail, "state": None}, impl="reference"), 1e-12
    )
    for g in gradients(x, made):
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(impl, kind):
    x = make(1, 2, 5, 2, 3, kind)
    names = list(x)

    def call(*tensors):
        made = dict(zip(names, tensors, strict=True))
        return attend(made, impl=impl, chunk_size=2, scale=0.5)

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 2, 0, 3, 5), (0, 2, 4, 3, 5), (1, 2, 4, 0, 5)])
def test_empty(impl, kind, shape):
    x = make(*shape, kind)
    made = attend(x, impl=impl)
    assert made[0].shape == x["v"].shape and made[1].shape == x["state"].shape
    assert (made[0] == 0).all()
    if shape[2] == 0:
        torch.testing.assert_close(made[1], x["state"])
    assert all(torch.isfinite(g).all() for g in gradients(x, made, allow_unused=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision(kind, dtype, bound):
    x = {n: t.detach() for n, t in make(2, 2, 150, 16, 16, kind, dtype).items()}
    expected = attend({n: t.double() for n, t in x.items()}, impl="reference")
    for impl in ("reference", "compiled"):
        out, state = attend(x, impl=impl)
        assert out.dtype == dtype and state.dtype == torch.float32
        assert_close((out,), expected[:1], bound)
        assert_close((state,), expected[1:], 1e-5)


def test_grouped_queries():
    x = make(1, 4, 20, 3, 3)
    k, v = x["k"][:, :2], x["v"][:, :2]
    out = lightning_attention(x["q"], k, v, x["log_decay"])
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    torch.testing.assert_close(out, lightning_attention(x["q"], k, v, x["log_decay"]))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_in_a_row(kind):
    x = make(1, 2, 20, 3, 4, kind)
    bounds = [0, 5, 5, 19, 20]
    states = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    out, final = attend({**x, "state": states}, cu_seqlens=torch.tensor(bounds))
    for i in range(4):
        cut = slice(bounds[i], bounds[i + 1])
        one = {n: t if t.ndim == 1 else t[:, :, cut] for n, t in x.items()}
        expected = attend({**one, "state": states[i : i + 1]}, impl="reference")
        assert_close((out[:, :, cut], final[i : i + 1]), expected, 1e-12)


def test_slopes():
    factor = 1 + 1e-5
    expected = torch.tensor([2.0 ** -(h + 1) for h in range(8)])
    torch.testing.assert_close(lightning_slopes(8), expected * factor)
    # Six heads: those of four, then the first and third of eight.
    expected = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(lightning_slopes(6), expected * factor)
    torch.testing.assert_close(lightning_slopes(1), torch.tensor([2.0**-8]) * factor)
    last = lightning_slopes(8, 11, 12)
    torch.testing.assert_close(last, torch.tensor([2.0 ** -(h + 1) for h in range(8)]) * 1e-5)
    torch.testing.assert_close(
        lightning_slopes(4, 2, 5), lightning_slopes(4) / factor * (0.5 + 1e-5)
    )
    torch.testing.assert_close(fla_slopes(4, 1, 4), torch.tensor([0.0, 1.5, 3.0, 4.5]))
    for make_slopes in (lightning_slopes, fla_slopes):
        with pytest.raises(ShapeError, match="at least one head"):
            make_slopes(0)
        with pytest.raises(ShapeError, match="layer 3 of 3"):
            make_slopes(4, 3, 3)


def test_auto_takes_the_fast_path():
    x = make(1, 2, 4, 3, 3)
    y = make(1, 2, 4, 3, 3, "channel")
    with count_calls() as calls:
        attend(x)
        attend(y)
        attend(y, impl="reference")
        linear_attention(x["q"], x["k"], x["v"])
    assert dict(calls) == {
        ("lightning_attention", "compiled"): 1,
        ("gated_linear_attention", "compiled"): 1,
        ("gated_linear_attention", "reference"): 1,
        ("linear_attention", "compiled"): 1,
    }


def test_errors():
    x = make(1, 2, 4, 3, 5)
    q, k, v, g = x["q"], x["k"], x["v"], x["log_decay"]
    with pytest.raises(ShapeError, match="gated_linear_attention"):
        lightning_attention(q, k, v, torch.zeros(1, 2, 4))
    with pytest.raises(ShapeError, match="log_decay must have the shape"):
        gated_linear_attention(q, k, v, g)
    with pytest.raises(ShapeError, match="log_decay_value must have the shape"):
        gated_linear_attention(q, k, v, torch.zeros(1, 2, 4), log_decay_value=q)
    with pytest.raises(ShapeError, match=r"state must have the shape .* \(1, 2, 3, 5\)"):
        lightning_attention(q, k, v, g, state=torch.zeros(1, 2, 5, 3))
    with pytest.raises(ShapeError, match="same tokens"):
        lightning_attention(q, k[:, :, :3], v[:, :, :3], g)
    with pytest.raises(ShapeError, match="positive integer"):
        lightning_attention(q, k, v, g, chunk_size=0)
    with pytest.raises(ShapeError, match="floating-point tensors"):
        lightning_attention(q, k, v, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="run from 0 to 4"):
        lightning_attention(q, k, v, g, cu_seqlens=[0, 3])
    with pytest.raises(ShapeError, match="non-decreasing"):
        lightning_attention(q, k, v, g, cu_seqlens=[0, 3, 2, 4])
    with pytest.raises(UnsupportedError, match="expected one of"):
        lightning_attention(q, k, v, g, impl="fast")


@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_export(kind):
    x = {n: t.detach() for n, t in make(1, 2, 20, 3, 4, kind).items()}
    expected = attend(x, chunk_size=8)
    compiled = torch.compile(lambda x: attend(x, chunk_size=8), fullgraph=True, backend="eager")
    assert_close(compiled(x), expected, 1e-12)

    class Model(torch.nn.Module):
        def forward(self, x):
            return attend(x, chunk_size=8)

    assert_close(torch.export.export(Model(), (x,)).module()(x), expected, 1e-12)


@pytest.mark.parametrize("gate", ["sigmoid", "silu", "none"])
@pytest.mark.parametrize("norm", [True, False])
def test_module(gate, norm):
    torch.manual_seed(0)
    mixer = LightningAttention(12, 3, 1, 4, gate=gate, norm=norm, bias=True).double()
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    out, state = mixer(x, return_state=True)

    def heads(layer):
        return torch.nn.functional.silu(layer(x)).view(2, 19, 3, 4).transpose(1, 2)

    q, k, v = (heads(p) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    core = lightning_attention(q, k, v, -lightning_slopes(3, 1, 4), impl="reference")
    mixed = core.transpose(1, 2).reshape(2, 19, 12)
    if norm:
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if gate != "none":
        g = mixer.gate_proj(x)
        mixed = mixed * (g.sigmoid() if gate == "sigmoid" else g * g.sigmoid())
    torch.testing.assert_close(out, mixer.out_proj(mixed), atol=1e-9, rtol=0)

    first, carried = mixer(x[:, :11], return_state=True)
    second, final = mixer(x[:, 11:], carried, return_state=True)
    assert_close((torch.cat([first, second], 1), final), (out, state), 1e-9)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_module_refuses():
    with pytest.raises(ShapeError, match="multiple of heads"):
        LightningAttention(10, 3)
    with pytest.raises(ShapeError, match="gate must be one of"):
        LightningAttention(8, 2, gate="tanh")
    assert LightningAttention(10, 3, head_dim=4)(torch.zeros(1, 2, 10)).shape == (1, 2, 10)


def on(device, x):
    return {n: t.detach().to(device).requires_grad_() for n, t in x.items()}


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize(("shape", "chunk"), [((1, 2, 21, 5, 36), 16), ((1, 1, 70, 36, 4), 64)])
def test_kernel_is_the_reference(kind, dtype, bound, shape, chunk, device):
    x = on(device, make(*shape, kind, dtype))
    exact = on(device, {n: t.double() for n, t in x.items()})
    expected = attend(exact, impl="reference", scale=0.7)
    with count_calls() as calls:
        made = attend(x, impl="triton", scale=0.7, chunk_size=chunk)
    assert [path for _, path in calls] == ["triton"]
    assert made[0].dtype == dtype and made[1].dtype == torch.float32
    assert_close(made, expected, bound)
    assert_close(gradients(x, made), gradients(exact, expected), 2 * bound)


def test_kernel_with_few_inputs_and_other_layouts(device):
    x = on(device, make(2, 1, 5, 3, 4, dtype=torch.float32))
    q, k, v = (
        x[n].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n in "qkv"
    )
    out = lightning_attention(q, k, v, None, impl="triton")
    expected = lightning_attention(q, k, v, None, impl="reference")
    assert_close([out], [expected], 1e-6)
    # The gradient of a sum has no memory of its own: strides of zero.
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert_close(got, torch.autograd.grad(expected.sum(), (q, k, v)), 1e-6)


def test_kernel_resets(device):
    x = make(1, 1, 20, 4, 4, "step", torch.float32)
    rates = x["log_decay"].detach().clone()
    rates[:, :, 9] = -torch.inf
    x = on(device, {**x, "log_decay": rates})
    made = attend(x, impl="triton", chunk_size=16)
    expected = attend(x, impl="reference")
    assert_close(made, expected, 1e-5)
    assert_close(gradients(x, made), gradients(x, expected), 1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 2, 0, 3, 5), (0, 2, 4, 3, 5), (1, 2, 4, 0, 5), (1, 1, 1, 2, 2)]
)
def test_kernel_on_empty_and_single(shape, device):
    x = on(device, make(*shape, dtype=torch.float32))
    made, expected = attend(x, impl="triton"), attend(x, impl="reference")
    assert_close(made, expected, 1e-6)
    assert_close(gradients(x, made), gradients(x, expected), 1e-6)


def test_kernel_refuses():
    x = make(1, 2, 4, 3, 5)
    with pytest.raises(UnsupportedError, match="float32, float16 and bfloat16"):
        attend(x, impl="triton")
    with pytest.raises(UnsupportedError, match="not one per channel"):
        attend(make(1, 2, 4, 3, 5, "channel", torch.float32), impl="triton")


def test_kernel_in_torch(device):
    x = on(device, make(1, 1, 6, 3, 4, dtype=torch.float32))
    arguments = (x["q"], x["k"], x["v"], x["log_decay"], x["state"], 0.7, 64)
    attend(x, impl="triton")
    torch.library.opcheck(torch.ops.brainalign_kernels.lightning_forward.default, arguments)
    compiled = torch.compile(
        lambda x: attend(x, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    made, expected = compiled(x), attend(x, impl="reference")
    assert_close(made, expected, 1e-6)
    assert_close(gradients(x, made), gradients(x, expected), 1e-6)

    class Model(torch.nn.Module):
        def forward(self, x):
            return attend(x, impl="triton")

    x = {n: t.detach() for n, t in x.items()}
    assert_close(torch.export.export(Model(), (x,)).module()(x), expected, 1e-6)


def test_kernels_build_for_cards_that_are_not_there(tmp_path):
    pytest.importorskip("triton")
    for lines in run_builds("lightning_builds.py", tmp_path):
        # Six launches of two kernels, and the scan; or all with every flag and three widths.
        assert len(lines) == (6 * 2 * 8 * 3 + 8 if EVERY else 13)
