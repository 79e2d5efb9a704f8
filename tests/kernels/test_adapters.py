"""Swapping attention in models of four libraries, of their real classes and random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainalign_kernels import ShapeError, UnsupportedError, count_calls, softmax_attention
from brainalign_kernels.adapters import attention_layers, parse, swap_attention


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        # Libraries initialise so small that attention is nearly uniform, whatever computes it.
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
            else:
                nn.init.normal_(parameter, std=1.5 * (len(parameter) / parameter.numel()) ** 0.5)
        return model.eval().requires_grad_(False)


def images(size=32, batch=2, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def tokens(length=9, batch=2, words=50):
    return torch.randint(1, words, (batch, length), generator=torch.Generator().manual_seed(2))


def timm_vit(**options):
    timm = pytest.importorskip("timm")
    return seeded(
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=4,
            embed_dim=48,
            depth=2,
            num_heads=3,
            num_classes=7,
            **options,
        )
    )


def case_timm():
    model = timm_vit(qk_norm=True)
    return model, lambda: model(images())


def case_timm_registers():
    model = timm_vit(reg_tokens=3, init_values=1.0)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model, lambda: model(images())


def case_timm_rope():
    timm = pytest.importorskip("timm")
    model = seeded(
        lambda: timm.create_model(
            "eva02_tiny_patch14_224", img_size=28, patch_size=7, embed_dim=48, depth=2, num_heads=3
        )
    )
    return model, lambda: model(images(28))


def case_timm_swin():
    timm = pytest.importorskip("timm")
    model = seeded(
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            window_size=7,
            embed_dim=24,
            depths=(2, 1),
            num_heads=(2, 4),
        )
    )
    return model, lambda: model(images(56))


def clip(**vision):
    open_clip = pytest.importorskip("open_clip")
    size = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    return seeded(lambda: open_clip.CLIP(24, {**size, **vision}, text))


def case_open_clip():
    model = clip()
    return model, lambda: torch.cat([model.encode_image(images()), model.encode_text(tokens())])


def case_open_clip_pooler():
    model = clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2)
    return model, lambda: torch.cat([model.encode_image(images()), model.encode_text(tokens())])


def case_open_clip_custom():
    from open_clip.transformer import Transformer

    model = seeded(lambda: Transformer(32, 2, 2, qk_norm=True, scale_heads=True))
    mask = torch.full((9, 9), -torch.inf).triu(1)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    return model, lambda: model(x, attn_mask=mask)


def case_hf_vit(implementation="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        attn_implementation=implementation,
    )
    model = seeded(lambda: transformers.ViTModel(config))
    return model, lambda: model(pixel_values=images()).last_hidden_state


def case_hf_vit_eager():
    return case_hf_vit("eager")


def case_hf_clip():
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={**size, "hidden_size": 32, "vocab_size": 50, "max_position_embeddings": 12},
        vision_config={**size, "hidden_size": 48, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = seeded(lambda: transformers.CLIPModel(config))
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, 6:] = 0

    def run():
        out = model(input_ids=tokens(), pixel_values=images(), attention_mask=keep)
        return torch.cat([out.image_embeds, out.text_embeds])

    return model, run


def case_gpt2(implementation="sdpa", padded=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=48,
        n_layer=2,
        n_head=3,
        attn_implementation=implementation,
    )
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, 6:] = 0 if padded else 1
    return model, lambda: model(input_ids=tokens(), attention_mask=keep).logits


def case_gpt2_eager():
    return case_gpt2("eager")


def case_gpt2_padded():
    return case_gpt2(padded=True)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def case_llama():
    model = llama()
    return model, lambda: model(input_ids=tokens()).logits


def unet(**options):
    diffusers = pytest.importorskip("diffusers")
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
            **options,
        )
    )


def case_unet():
    model = unet()
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
    return model, lambda: model(images(16, channels=4), 7, text).sample


def case_torch():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=False)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(7, 2, 32, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    return model, lambda: model(x.requires_grad_(), src_key_padding_mask=padding)


CASES = {name.removeprefix("case_"): f for name, f in globals().items() if name[:5] == "case_"}


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
    before = run()
    seen = []

    def uniform(q, k, v, *, shape, mask, is_causal, scale):
        seen.append((q.shape[2], shape))
        return softmax_attention(torch.zeros_like(q), k, v, mask=mask, is_causal=is_causal)

    swap = swap_attention(model, uniform)
    assert float((run() - before).abs().max()) > 1e-4
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


def test_specifications():
    assert str(parse("softmax")) == "softmax"
    with pytest.raises(ShapeError, match="no attention 'softmx'. Known: .*softmax"):
        parse("softmx")
    with pytest.raises(ShapeError, match="'softmax' has no option 'k=3'. Known, .*: none"):
        parse("softmax:k=3")
