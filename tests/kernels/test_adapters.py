"""Swapping attention in models of four libraries, of their real classes and random weights."""

from __future__ import annotations

import math

import pytest
import torch
from real_models import (
    CASES,
    case_gpt2,
    case_hf_clip,
    case_open_clip,
    case_timm,
    case_timm_registers,
    images,
    llama,
    seeded,
    timm_vit,
    tokens,
    unet,
)
from torch import nn

from brainalign_kernels import ShapeError, UnsupportedError, count_calls, softmax_attention
from brainalign_kernels.adapters import attention_layers, parse, swap_attention


@pytest.mark.parametrize("name", CASES)
def test_plain_softmax_changes_nothing_and_restoring_is_exact(name):
    model, run = CASES[name]()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = run().detach()
    with count_calls() as calls, swap_attention(model, "softmax") as swap:
        inside = run().detach()
        assert model.state_dict().keys() == state.keys()
    assert list(swap.layers) == attention_layers(model)
    assert calls["softmax_attention", "compiled"] == len(swap.layers)
    scale = float(before.abs().max())
    assert float((inside - before).abs().max()) <= 1e-5 * max(scale, 1.0)
    after = run()
    assert torch.equal(after, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_another_attention_changes_the_output(name):
    model, run = CASES[name]()
    before = run().detach()
    seen = []

    def uniform(q, k, v, *, shape, mask, is_causal, scale):
        seen.append((q.shape[2], shape))
        return softmax_attention(torch.zeros_like(q), k, v, mask=mask, is_causal=is_causal)

    swap = swap_attention(model, uniform)
    assert float((run().detach() - before).abs().max()) > 1e-4
    assert len(seen) == len(swap.layers)
    seen.clear()
    swap.restore()
    swap.restore()
    assert torch.equal(run(), before)
    assert not seen


def grids(model, run):
    found = {}

    def record(q, k, v, *, shape, mask, is_causal, scale):
        found[(q.shape[2], k.shape[2])] = shape
        return softmax_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)

    with swap_attention(model, record):
        run()
    return found


def test_grids_are_read_from_the_model():
    assert grids(*case_timm()) == {(65, 65): (8, 8)}
    assert grids(*case_timm_registers()) == {(68, 68): (8, 8)}
    assert grids(*case_open_clip()) == {(17, 17): (4, 4), (9, 9): None}
    assert grids(*case_hf_clip()) == {(17, 17): (4, 4), (9, 9): None}
    assert grids(*case_gpt2()) == {(9, 9): None}
    wide = timm_vit(dynamic_img_size=True)
    assert grids(wide, lambda: wide(images()[:, :, :16])) == {(33, 33): (4, 8)}
    model = unet()
    text = torch.zeros(1, 5, 12)
    found = grids(model, lambda: model(torch.zeros(1, 4, 8, 16), 7, text))
    assert found == {(128, 128): (8, 16), (128, 5): None, (32, 32): (4, 8), (32, 5): None}


def test_layers_by_number_name_and_glob():
    model, run = case_open_clip()
    names = attention_layers(model)
    assert names[0] == "visual.transformer.resblocks.0.attn"
    for layers, expected in [
        (0, names[:1]),
        (-1, names[-1:]),
        (names[1], names[1:2]),
        ("visual.*", names[:2]),
        (["visual.*", 3], [*names[:2], names[3]]),
    ]:
        with swap_attention(model, "softmax", layers=layers) as swap, count_calls() as calls:
            run()
        assert list(swap.layers) == expected
        assert calls["softmax_attention", "compiled"] == len(expected)
    with pytest.raises(ShapeError, match="No attention layer is 'visual.attn'; there are visual"):
        swap_attention(model, "softmax", layers="visual.attn")
    with pytest.raises(ShapeError, match="no attention layer 4: the model has 4"):
        swap_attention(model, "softmax", layers=4)


@pytest.mark.parametrize("name", ["gpt2", "unet", "timm"])
def test_some_layers_only(name):
    model, run = CASES[name]()
    before = run()
    first = attention_layers(model)[0]
    with swap_attention(model, "softmax", layers=first):
        inside = run()
    assert float((inside - before).abs().max()) <= 1e-5 * float(before.abs().max())
    with swap_attention(model, lambda q, k, v, **options: 0 * q, layers=first):
        one = run()
    with swap_attention(model, lambda q, k, v, **options: 0 * q):
        every = run()
    assert not torch.equal(one, before) and not torch.equal(one, every)
    assert torch.equal(run(), before)


def test_generation_with_a_cache():
    model = llama()
    start = tokens(4, 1)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(start)}
    before = model.generate(start, **options)
    with count_calls() as calls, swap_attention(model, "softmax"):
        assert torch.equal(model.generate(start, **options), before)
    assert calls["softmax_attention", "compiled"] == 2 * 6


def test_gradients_pass_through():
    model, _ = case_timm()
    x = images().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    with swap_attention(model, "softmax"):
        got = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast_as_the_model_does_it():
    model, _ = case_timm()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(images())
        with swap_attention(model, "softmax"):
            inside = model(images())
    assert float((inside - before).abs().max()) <= 0.02 * float(before.abs().max())


def test_compiled_model():
    model, run = case_timm()
    with swap_attention(model, "softmax"):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images()), run())


def test_swapping_twice_is_refused():
    for name in ("timm", "open_clip", "gpt2", "unet"):
        model, run = CASES[name]()
        before = run()
        with swap_attention(model, "softmax"):
            with pytest.raises(UnsupportedError, match="swapped already"):
                swap_attention(model, "softmax")
        assert torch.equal(run(), before)


def test_an_error_inside_leaves_the_model_as_it_was():
    model, run = case_hf_clip()
    before = run()
    with pytest.raises(RuntimeError, match="broken"), swap_attention(model, broken):
        run()
    assert torch.equal(run(), before)
    assert model.config.vision_config._attn_implementation == "sdpa"


def broken(q, k, v, **options):
    raise RuntimeError("broken")


def test_wrong_shape_is_named():
    model, run = case_timm()
    with swap_attention(model, lambda q, k, v, **options: v[:, :, 1:]):
        with pytest.raises(ShapeError, match=r"blocks.0.attn' gave \(2, 3, 64, 16\); expected"):
            run()


def test_models_that_cannot_be_swapped():
    with pytest.raises(UnsupportedError, match="Linear has no attention layer"):
        swap_attention(nn.Linear(2, 2), "softmax")
    model = nn.MultiheadAttention(8, 2, dropout=0.5)
    x = torch.zeros(3, 1, 8)
    with swap_attention(model, "softmax"):
        with pytest.raises(UnsupportedError, match="need_weights=False"):
            model(x, x, x)
        with pytest.raises(UnsupportedError, match="model.eval"):
            model(x, x, x, need_weights=False)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "padding", "both", "heads"])
@pytest.mark.parametrize("same", [True, False])
def test_multi_head_attention_of_pytorch(mask, same):
    make = torch.Generator().manual_seed(4)
    kv = {} if same else {"kdim": 6, "vdim": 10}
    model = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True, **kv))
    q, k, v = (
        torch.randn(2, n, d, generator=make)
        for n, d in [(5, 8), (7, kv.get("kdim", 8)), (7, kv.get("vdim", 8))]
    )
    keep = torch.rand(5, 7, generator=make) > 0.4
    keep[:, 0] = True
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    options = {
        "none": {},
        "bool": {"attn_mask": ~keep},
        "float": {"attn_mask": torch.randn(5, 7, generator=make)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": ~keep, "key_padding_mask": padding},
        "heads": {"attn_mask": torch.randn(4, 5, 7, generator=make)},
    }[mask]
    expected = model(q, k, v, need_weights=False, **options)[0]
    with swap_attention(model, "softmax"):
        got = model(q, k, v, need_weights=False, **options)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_nested_tensors_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 1))
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    with swap_attention(model, "softmax"), pytest.raises(UnsupportedError, match="nested"):
        model(torch.zeros(2, 4, 8), src_key_padding_mask=padding)


def test_specifications():
    assert str(parse("softmax")) == "softmax"
    with pytest.raises(ShapeError, match="no attention 'softmx'. Known: .*softmax"):
        parse("softmx")
    with pytest.raises(ShapeError, match="'softmax' has no option 'k=3'. Known, .*: none"):
        parse("softmax:k=3")


def test_specifications_carry_all_options():
    assert str(parse("neighborhood:k=5")) == "neighborhood:d=1,k=5,stride=1"
    assert str(parse(" neighborhood : stride=2, k=5 ")) == "neighborhood:d=1,k=5,stride=2"
    with pytest.raises(ShapeError, match="neighborhood:k is 'x'; expected int, such as 7"):
        parse("neighborhood:k=x")
    with pytest.raises(ShapeError, match="no option 'k'. Known, with defaults: k=7, d=1, stride=1"):
        parse("neighborhood:k")
    with pytest.raises(ShapeError, match="agent:m is 48; expected a square"):
        parse("agent:m=48")


def qkv(shape, prefix, heads=2, groups=2, d=5, e=3, batch=2):
    make = torch.Generator().manual_seed(3)
    n = math.prod(shape) + prefix
    return [
        torch.randn(batch, h, n, c, generator=make, dtype=torch.float64)
        for h, c in [(heads, d), (groups, d), (groups, e)]
    ]


def run(spec, q, k, v, shape=None, mask=None, is_causal=False, scale=None):
    return parse(spec)(q, k, v, shape=shape, mask=mask, is_causal=is_causal, scale=scale)


def test_neighborhood_with_tokens_before_the_grid():
    q, k, v = qkv((4, 5), 2)
    out = run("neighborhood:k=3", q, k, v, (4, 5), scale=0.3)
    logits = 0.3 * q @ k.transpose(-1, -2)
    for i in range(22):
        if i < 2:
            seen = list(range(22))
        else:
            row, column = divmod(i - 2, 5)
            rows, columns = min(max(row - 1, 0), 1), min(max(column - 1, 0), 2)
            window = [5 * y + x for y in range(rows, rows + 3) for x in range(columns, columns + 3)]
            seen = [0, 1, *(2 + j for j in window)]
        expected = logits[:, :, i, seen].softmax(-1)[:, :, None] @ v[:, :, seen]
        torch.testing.assert_close(out[:, :, i : i + 1], expected)
    plain = run("neighborhood:k=3", *(x[:, :, 2:] for x in (q, k, v)), (4, 5), scale=0.3)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    with count_calls() as calls:
        same = run("neighborhood:k=3", *(x[:, :, 2:] for x in (q, k, v)), (4, 5), mask, scale=0.3)
    assert list(calls) == [("neighborhood_attention", "compiled")]
    torch.testing.assert_close(same, plain)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_neighborhood_under_a_mask(kind):
    from brainalign_kernels import neighborhood_mask

    q, k, v = qkv((4, 5), 0)
    make = torch.Generator().manual_seed(5)
    keep = torch.rand(2, 1, 1, 20, generator=make) > 0.3
    mask = keep if kind == "bool" else torch.randn(1, 2, 20, 20, generator=make).double()
    logits = q @ k.transpose(-1, -2) / 5**0.5
    logits = logits.masked_fill(~keep, -torch.inf) if kind == "bool" else logits + mask
    window = neighborhood_mask((4, 5), kernel_size=3)
    expected = logits.masked_fill(~window, -torch.inf).softmax(-1).nan_to_num(0) @ v
    torch.testing.assert_close(run("neighborhood:k=3", q, k, v, (4, 5), mask), expected)


@pytest.mark.parametrize("prefix", [0, 2])
def test_halo_with_tokens_before_the_grid(prefix):
    q, k, v = qkv((4, 6), prefix)
    out = run("halo:block=2,halo=1", q, k, v, (4, 6), scale=0.3)
    for i in range(prefix, prefix + 24):
        row, column = divmod(i - prefix, 6)
        rows, columns = row // 2 * 2 - 1, column // 2 * 2 - 1
        keys, values = [], []
        for y in range(rows, rows + 4):
            for x in range(columns, columns + 4):
                inside = 0 <= y < 4 and 0 <= x < 6
                j = prefix + 6 * y + x
                keys.append(k[:, :, j] if inside else torch.zeros_like(k[:, :, 0]))
                values.append(v[:, :, j] if inside else torch.zeros_like(v[:, :, 0]))
        keys = torch.stack([*keys, *k[:, :, :prefix].unbind(2)], 2)
        values = torch.stack([*values, *v[:, :, :prefix].unbind(2)], 2)
        weights = (0.3 * q[:, :, i : i + 1] @ keys.transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(out[:, :, i : i + 1], weights @ values)
    expected = softmax_attention(q[:, :, :prefix], k, v, scale=0.3)
    torch.testing.assert_close(out[:, :, :prefix], expected)


def test_agents_are_pooled_from_the_image_only():
    q, k, v = qkv((4, 6), 1)
    agents = q[:, :, 1:].unflatten(2, (2, 2, 2, 3)).mean((3, 5)).flatten(2, 3)
    gathered = softmax_attention(agents, k, v)
    torch.testing.assert_close(
        run("agent:m=4", q, k, v, (4, 6)), softmax_attention(q, agents, gathered)
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_lightning_in_both_directions(groups):
    q, k, v = qkv((4, 6), 1, heads=4, groups=groups)
    out = run("lightning", q, k, v, (4, 6))
    place = torch.arange(25)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]).double() * (1 + 1e-5)
    decay = (-slopes[:, None, None] * (place[:, None] - place).abs()).exp()
    k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
    expected = (q @ k.transpose(-1, -2) * decay) @ v
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


SEQUENCE = ["flow", "lightnet", "lightning", "linear", "neighborhood:k=3", "sink:c=1"]


@pytest.mark.parametrize("spec", SEQUENCE)
@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "llama"])
def test_text_stays_causal(spec, name):
    model, run_model = CASES[name]()
    inputs = tokens()
    with swap_attention(model, spec):
        before = run_model()
        inputs[:, -1] = (inputs[:, -1] + 1) % 50
        after = model(input_ids=inputs).logits
    assert torch.isfinite(before).all()
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=1e-4, atol=1e-4)
    assert float((after[:, -1] - before[:, -1]).abs().max()) > 1e-3


@pytest.mark.parametrize("spec", SEQUENCE)
def test_causal_mask_of_the_text_tower(spec):
    model, _ = case_open_clip()
    inputs = tokens()
    layers = "transformer.*"
    with swap_attention(model, spec, layers=layers):
        seen = []
        handle = model.transformer.register_forward_hook(lambda m, a, out: seen.append(out))
        model.encode_text(inputs)
        inputs[:, -1] = (inputs[:, -1] + 1) % 50
        model.encode_text(inputs)
        handle.remove()
    torch.testing.assert_close(seen[1][:, :-1], seen[0][:, :-1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[1][:, -1], seen[0][:, -1])


GRID = ["clear:r=2", "neighborhood:k=3", "neighborhood:k=2,d=2", "halo:block=4,halo=1", "agent:m=4"]


@pytest.mark.parametrize("spec", [*SEQUENCE, *GRID, "reversed"])
def test_every_mechanism_in_an_image_model(spec):
    outputs = {}
    for name in ("timm_registers", "timm_rope", "hf_vit", "open_clip", "unet"):
        model, run_model = CASES[name]()
        before = run_model()
        with swap_attention(model, spec) as swap:
            outputs[name] = run_model()
        assert torch.isfinite(outputs[name]).all()
        assert float((outputs[name] - before).abs().max()) > 1e-3
        assert len(swap.layers) + len(swap.skipped) == len(attention_layers(model))
        if name == "open_clip" and parse(spec).grid:
            assert set(swap.skipped.values()) == {"its tokens are no image"}
            assert all(layer.startswith("visual.") for layer in swap.layers)
        if name == "unet" and not parse(spec).cross:
            assert set(swap.skipped.values()) == {"its queries and keys are different tokens"}
        assert torch.equal(run_model(), before)


def test_a_window_over_everything_is_softmax():
    model, run_model = case_timm_registers()
    before = run_model()
    with swap_attention(model, "neighborhood:k=8"):
        torch.testing.assert_close(run_model(), before, rtol=1e-4, atol=1e-4)
    with swap_attention(model, "sink:c=-1e9"):
        torch.testing.assert_close(run_model(), before, rtol=1e-4, atol=1e-4)


def test_what_a_mechanism_cannot_do_is_said():
    model, run_model = CASES["gpt2_padded"]()
    with swap_attention(model, "flow"):
        with pytest.raises(UnsupportedError, match="flow takes no mask but a causal one"):
            run_model()
    with swap_attention(model, "agent:m=4"):
        with pytest.raises(UnsupportedError, match="agent is not causal"):
            model(input_ids=tokens())
    with pytest.raises(UnsupportedError, match="cannot replace 'transformer.*no image"):
        swap_attention(case_open_clip()[0], "halo", layers="transformer.*")
    model, run_model = case_timm()
    with swap_attention(model, "neighborhood:k=9"):
        with pytest.raises(ShapeError):
            run_model()
    with swap_attention(model, "neighborhood:k=3", grid=(3, 7)) as swap:
        model.blocks[0].attn(torch.zeros(1, 22, 48))
        assert swap.calls == 1


@pytest.mark.parametrize("prefix", [0, 2])
def test_clear_with_tokens_before_the_grid(prefix):
    q, k, v = qkv((4, 6), prefix)
    places = [divmod(i, 6) for i in range(24)]
    near = [[math.dist(x, y) < 2 for y in places] for x in places]
    keep = torch.ones(24 + prefix, 24 + prefix, dtype=torch.bool)
    keep[prefix:, prefix:] = torch.tensor(near)
    out = run("clear:r=2", q, k, v, (4, 6), scale=0.3)
    expected = softmax_attention(q, k, v, mask=keep[None, None], scale=0.3)
    torch.testing.assert_close(out, expected)
    half = torch.zeros(1, 1, 1, 24 + prefix, dtype=torch.float64)
    half[..., -3:] = -torch.inf
    out = run("clear:r=2", q, k, v, (4, 6), half, scale=0.3)
    keep[:, -3:] = False
    expected = softmax_attention(q, k, v, mask=keep[None, None], scale=0.3)
    torch.testing.assert_close(out, expected)


def test_hip_in_a_language_model():
    model, run_model = CASES["llama"]()
    before = run_model()
    with swap_attention(model, "hip:k=16,block_q=4"):
        torch.testing.assert_close(run_model(), before, rtol=1e-4, atol=1e-4)
    with swap_attention(model, "hip:k=2,block_q=2,block_k=1") as swap:
        assert float((run_model() - before).abs().max()) > 1e-3
        assert swap.calls == 2
    model, run_model = case_timm()
    with swap_attention(model, "hip"), pytest.raises(UnsupportedError, match="hip is causal"):
        run_model()


@pytest.mark.parametrize("groups", [1, 4])
def test_reversed_sends_to_what_is_attended_to(groups):
    q, k, v = qkv((4, 6), 1, heads=4, groups=groups)
    out = run("reversed", q, k, v, (4, 6), scale=0.3)
    k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
    weights = (0.3 * q @ k.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(out, weights.transpose(-1, -2) @ v)
    with pytest.raises(UnsupportedError, match="reversed is not causal"):
        run("reversed", q, k, v, is_causal=True)
