"""Small models of real classes, with random weights: four libraries and PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn


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
    x = torch.randn(7, 2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    return model, lambda: model(x, src_key_padding_mask=padding)


def case_torch_fused():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    return model, lambda: model(x)


CASES = {name.removeprefix("case_"): f for name, f in globals().items() if name[:5] == "case_"}
