"""A pipeline of the real classes with few random weights, and encoders of a small model."""

import numpy as np
import torch
import xarray as xr
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from brainalign.features import extract

SPACED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
WORDS = ("<start>", "<end>", "a", "photo", "of", "face", "house")


def pipeline(prediction_type="epsilon", *, size=16, attention=True, seed=0):
    """Latents of `size`, images of twice that."""
    cross, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=size, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
            down_block_types=(plain[0], cross[0]), up_block_types=(cross[1], plain[1]),
            attention_head_dim=8,
            mid_block_type="UNetMidBlock2DCrossAttn" if attention else "UNetMidBlock2D",
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, sample_size=2 * size,
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<end>",
        unk_token="a", model_max_length=8,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(**SPACED, clip_sample=False, prediction_type=prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return pipe


def encoder(model, stimuli, layer="output", pooling="unit", *, n=12, seed=0, subject="sub-01"):
    """Random weights on a layer, with ROIs A, B and none."""
    features = extract(model, stimuli, layer, pooling=pooling, progress=False)[layer]
    rng = np.random.default_rng(seed)
    x = features["features"].values
    return xr.Dataset(
        {
            "weights": (("neuroid", "feature"), rng.standard_normal((n, x.shape[1])) / 10),
            "intercept": ("neuroid", rng.standard_normal(n)),
            "alpha": ("neuroid", np.ones(n)),
            "feature_mean": ("feature", x.mean(0).astype(float)),
            "feature_scale": ("feature", x.std(0).astype(float) + 0.01),
        },
        coords={
            "model": str(features["model"].values), "layer": layer,
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(n)]),
            "roi": ("neuroid", [("A", "B", "")[i % 3] for i in range(n)]),
            "hemisphere": ("neuroid", ["L"] * n),
        },
        attrs={
            "subject": subject, "units": "z",
            **{k: features.attrs[k] for k in ("pooling", "preprocessing", "weights_sha256")},
        },
    )  # fmt: skip
