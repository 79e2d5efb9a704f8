"""Train a very small latent diffusion model on rendered scenes and their captions.

The result is a folder of the real classes: ``diffusers.StableDiffusionPipeline.from_pretrained(
FOLDER)`` loads an AutoencoderKL, a CLIPTextModel with its tokenizer, a UNet2DConditionModel and a
scheduler. The text encoder is the text tower of the small CLIP model, frozen, as Stable Diffusion's
is CLIP's.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainalign.data.store import atomic_dir, sha256_file, sha256_of
from brainalign.errors import ConfigError

from .clip import PROMPTS, WEIGHTS
from .scenes import CATEGORIES
from .training import (
    CAPTIONS,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    check_held_out,
    check_run,
    common_options,
    fit,
    options_parser,
    require,
    stored_scenes,
)

if TYPE_CHECKING:
    import torch

__all__ = ["main", "measure", "model_card", "text_encoder", "train_diffusion"]

_LATENT_CHANNELS = 16
_VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": _LATENT_CHANNELS,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [12, 24, 48, 96], "layers_per_block": 1, "norm_num_groups": 4,
    "sample_size": IMAGE_SIZE,
}  # fmt: skip
_UNET: dict[str, Any] = {
    "in_channels": _LATENT_CHANNELS, "out_channels": _LATENT_CHANNELS, "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "block_out_channels": [96, 160], "layers_per_block": 1, "norm_num_groups": 16,
    "attention_head_dim": 4,
}  # fmt: skip
# Stable Diffusion's noise.
_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip
# Weights of the latents' divergence, and of what a network sees of the decoder's pictures.
_KL, _PERCEIVED = 0.01, 0.5
_EMPTY = 0.2
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_SNR_LIMIT = 5.0


def text_encoder(clip: Path | str) -> tuple[Any, Any]:
    """Return the text tower of an open_clip model as a CLIPTextModel, and its tokenizer.

    Parameters
    ----------
    clip : path
        A folder that `brainalign.small_models.clip.train_clip` wrote.

    Returns
    -------
    transformers.CLIPTextModel, transformers.PreTrainedTokenizerFast
        The model gives the hidden states after the last layer norm, (text, token, width).

    Raises
    ------
    ConfigError
        If the tokenizer does not give its end token the highest id, where CLIP reads its output.
    """
    require("open_clip", "transformers")
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(clip))
    end = tokenizer.convert_tokens_to_ids("<end>")
    if end != len(tokenizer) - 1:
        raise ConfigError(f"The end token of {clip} has the id {end}, not the highest.")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    length, width = model.positional_embedding.shape
    blocks = model.transformer.resblocks
    config = CLIPTextConfig(
        vocab_size=model.token_embedding.num_embeddings, hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features, num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads, max_position_embeddings=length,
        hidden_act="gelu", layer_norm_eps=model.ln_final.eps, projection_dim=width,
        pad_token_id=tokenizer.convert_tokens_to_ids("<pad>"),
        bos_token_id=tokenizer.convert_tokens_to_ids("<start>"), eos_token_id=end,
    )  # fmt: skip
    target = CLIPTextModel(config)
    prefix = "text_model." if hasattr(target, "text_model") else ""
    state = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for i, block in enumerate(blocks):
        here = f"encoder.layers.{i}"
        parts = {
            "layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj, "self_attn.out_proj": block.attn.out_proj,
        }  # fmt: skip
        for name, part in parts.items():
            state[f"{here}.{name}.weight"], state[f"{here}.{name}.bias"] = part.weight, part.bias
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{here}.self_attn.{name}_proj.weight"] = weight
            state[f"{here}.self_attn.{name}_proj.bias"] = bias
    missing, unexpected = target.load_state_dict(
        {prefix + k: v.detach().clone() for k, v in state.items()}, strict=False
    )
    if unexpected or [k for k in missing if "position_ids" not in k]:
        raise ConfigError(
            f"The text tower of {clip} is not CLIP's: {missing} are missing, {unexpected} unknown."
        )
    return target.eval().requires_grad_(False), tokenizer


def _as_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """Return uint8 pictures as the autoencoder sees them, -1 to 1."""
    import torch

    pictures = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _optimiser(model: Any, settings: dict[str, Any]) -> Any:
    import torch

    return torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99),
        weight_decay=settings["weight_decay"],
    )  # fmt: skip


def _start_from_averages(model: Any, images: np.ndarray) -> None:
    """Set first weights with which the autoencoder passes on the colours of 8 x 8 squares.

    From random weights colour stays unlearnt for thousands of steps: the decoder has no use for
    what the encoder does not send, nor the other way round, and brightness drowns both. So three
    channels carry the whitened colours and three their negatives, as silu(x) - silu(-x) = x;
    residual branches start at zero.
    """
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images[:200:2])).reshape(-1, 3) / 127.5 - 1
    mean = pixels.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(pixels.T))
    whiten = (axes * variance.rsqrt()).T
    sign = torch.cat([torch.eye(3), -torch.eye(3)])
    own = range(6)
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            if kind == "ResnetBlock2D":
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    module.conv_shortcut.weight[:6] = 0
                    module.conv_shortcut.bias[:6] = 0
                    module.conv_shortcut.weight[own, own] = 1
            elif kind == "Attention":
                module.to_out[0].weight.zero_()
                module.to_out[0].bias.zero_()
            elif kind in ("Downsample2D", "Upsample2D"):
                module.conv.weight[:6] = 0
                module.conv.bias[:6] = 0
                if kind == "Downsample2D":
                    module.conv.weight[own, own, :2, :2] = 1 / 4
                else:
                    module.conv.weight[own, own] = torch.outer(binomial, binomial)
        encoder, decoder, latent = model.encoder, model.decoder, _LATENT_CHANNELS
        encoder.conv_in.weight[:6] = 0
        encoder.conv_in.weight[:6, :, 1, 1] = sign @ whiten
        encoder.conv_in.bias[:6] = -sign @ whiten @ mean
        encoder.conv_out.weight[:3] = 0
        encoder.conv_out.bias[:3] = 0
        encoder.conv_out.weight[:3, :6, 1, 1] = sign.T
        model.quant_conv.weight.zero_()
        model.quant_conv.bias[:latent] = 0
        model.quant_conv.bias[latent:] = -4  # of the log variance
        model.quant_conv.weight[range(latent), range(latent)] = 1
        model.post_quant_conv.weight.zero_()
        model.post_quant_conv.bias.zero_()
        model.post_quant_conv.weight[range(latent), range(latent)] = 1
        decoder.conv_in.weight[:6] = 0
        decoder.conv_in.bias[:6] = 0
        decoder.conv_in.weight[:6, :3, 1, 1] = sign
        decoder.conv_out.weight.mul_(0.1)
        decoder.conv_out.weight[:, :6] = 0
        decoder.conv_out.weight[:, :6, 1, 1] = torch.linalg.inv(whiten) @ sign.T
        decoder.conv_out.bias.copy_(mean)


def _begin(model: Any, folder: Path, part: str) -> None:
    """Give a part of the pipeline the weights of a folder, if that is of the same architecture."""
    from safetensors.torch import load_file

    weights = load_file(folder / part / _WEIGHTS_FILE)
    wanted = model.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in wanted.items()}:
        raise ConfigError(
            f"The {part} in {folder} is of another architecture than is trained here."
        )
    model.load_state_dict(weights)


def _train_autoencoder(
    images: np.ndarray,
    settings: dict[str, Any],
    device: str,
    folder: Path | None,
    every: int,
    start: Path | None,
) -> Any:
    import torch
    from diffusers import AutoencoderKL

    seed, crop = settings["seed"], settings["crop"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(**_VAE)
    if start:
        _begin(model, start, "vae")
    else:
        _start_from_averages(model, images)
    model = model.to(device, memory_format=torch.channels_last)

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        generator = torch.Generator().manual_seed((seed * 7919 + 1) * 1_000_003 + step)
        seen = images[chosen]
        if step < settings["crop_steps"]:
            rng = np.random.default_rng([seed, 4, step])
            corners = rng.integers(0, IMAGE_SIZE - crop + 1, (len(seen), 2))
            seen = np.stack(
                [p[y : y + crop, x : x + crop] for p, (y, x) in zip(seen, corners, strict=True)]
            )
        shown = _as_tensor(seen, device)
        latents = model.encode(shown).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator).to(device)
        made = model.decode(latents.mean + latents.std * noise).sample
        return _error(made - shown) + _KL * latents.kl().mean() / shown[0].numel()

    fit(
        model, _optimiser(model, settings), loss_of, len(images), settings, folder,
        name="autoencoder", save_every=every,
    )  # fmt: skip
    return model.requires_grad_(False)


def _error(wrong: torch.Tensor) -> torch.Tensor:
    """Return the absolute errors of pixels, of edges and of means over squares."""
    import torch
    from torch.nn.functional import avg_pool2d

    error = wrong.abs().mean()
    # Edges, which a mean absolute error alone lets blur, and colours, which it learns last.
    for axis in (-1, -2):
        error = error + torch.diff(wrong, dim=axis).abs().mean()
    for size in (2, 4, 8):
        error = error + avg_pool2d(wrong, size).abs().mean()
    return error


def _train_decoder(
    model: Any,
    clip: Path,
    images: np.ndarray,
    latents: tuple[torch.Tensor, torch.Tensor],
    settings: dict[str, Any],
    device: str,
    folder: Path | None,
    every: int,
) -> None:
    """Train the decoder alone, so that a network sees in what it draws what was there."""
    import open_clip
    import torch

    tower = open_clip.create_model_and_transforms(f"local-dir:{clip}")[0].visual
    if not hasattr(tower, "stem"):
        raise ConfigError(f"The decoder is trained with CLIP's residual network; {clip} has none.")
    tower = tower.to(device).eval().requires_grad_(False)
    mean, deviation = latents
    trained = torch.nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)

    def seen(pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return unit vectors of channels at each place, of the stem and of the first layers."""
        x = tower.stem(2 * pictures)  # standardised as the tower knows pictures
        stages = [x]
        for layer in (tower.layer1, tower.layer2, tower.layer3):
            x = layer(x)
            stages.append(x)
        return [torch.nn.functional.normalize(s, dim=1, eps=1e-6) for s in stages]

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        generator = torch.Generator().manual_seed((settings["seed"] * 7919 + 3) * 1_000_003 + step)
        shown = _as_tensor(images[chosen], device)
        noise = torch.randn(mean[chosen].shape, generator=generator).to(device)
        with torch.no_grad():
            wanted = seen(shown)
        made = model.decode(mean[chosen] + deviation[chosen] * noise).sample
        apart = sum((a - b).square().sum(1).mean() for a, b in zip(seen(made), wanted, strict=True))
        return _error(made - shown) + _PERCEIVED * apart

    fit(
        trained, _optimiser(trained, settings), loss_of, len(images), settings, folder,
        name="decoder", save_every=every,
    )  # fmt: skip
    trained.requires_grad_(False)


def _latents(vae: Any, images: np.ndarray, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each picture's latents."""
    import torch

    mean, deviation = [], []
    with torch.no_grad():
        for start in range(0, len(images), 64):
            found = vae.encode(_as_tensor(images[start : start + 64], device)).latent_dist
            mean.append(found.mean.contiguous())
            deviation.append(found.std.contiguous())
    return torch.cat(mean), torch.cat(deviation)


def _train_unet(
    vae: Any,
    text: tuple[Any, Any],
    latents: tuple[torch.Tensor, torch.Tensor],
    texts: list[list[str]],
    settings: dict[str, Any],
    device: str,
    folder: Path | None,
    every: int,
    stop_at: int | None,
    start: Path | None,
) -> tuple[Any, int]:
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    seed = settings["seed"]
    encoder, tokenizer = text[0].to(device), text[1]
    said = _tokens(tokenizer, [t for group in texts for t in group]).view(len(texts), CAPTIONS, -1)
    empty = _tokens(tokenizer, [""])[0]
    mean, deviation = latents
    scaling = 1 / float((mean.var() + deviation.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=scaling)
    settings = {**settings, "scaling_factor": round(scaling, 6)}
    noise_of = DDPMScheduler(**_NOISE)
    alphas = noise_of.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DConditionModel(**_UNET, cross_attention_dim=encoder.config.hidden_size)
    if start:
        _begin(model, start, "unet")
    model.to(device)

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        rng = np.random.default_rng([seed, 3, step])
        generator = torch.Generator().manual_seed((seed * 7919 + 2) * 1_000_003 + step)
        ids = said[chosen, rng.integers(0, CAPTIONS, len(chosen))].clone()
        ids[torch.from_numpy(rng.random(len(chosen)) < _EMPTY)] = empty
        with torch.no_grad():
            hidden = encoder(ids.to(device))[0]
        draw = torch.randn((2, len(chosen), *mean.shape[1:]), generator=generator).to(device)
        clean = (mean[chosen] + deviation[chosen] * draw[0]) * scaling
        # One time in each of as many equal stretches as there are pictures.
        place = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=generator)) / len(
            chosen
        )
        times = (place * len(alphas)).long()[torch.randperm(len(chosen), generator=generator)]
        times = times.to(device)
        noisy = noise_of.add_noise(clean, draw[1], times)
        error = (model(noisy, times, hidden).sample - draw[1]).square().mean((1, 2, 3))
        return (error * (_SNR_LIMIT / snr[times]).clamp(max=1)).mean()

    done = fit(
        model, _optimiser(model, settings), loss_of, len(texts), settings, folder,
        name="denoiser", save_every=every, stop_at=stop_at,
    )  # fmt: skip
    return model.requires_grad_(False), done


def _tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return ids (text, token) as the pipeline itself makes them."""
    made = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return made.input_ids


def train_diffusion(
    out_folder: Path | str,
    *,
    clip: Path | str = WEIGHTS,
    start: Path | str | None = None,
    n_scenes: int = 12_000,
    autoencoder_steps: int = 4800,
    decoder_steps: int = 0,
    steps: int = 6000,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | str | None = None,
    scenes: Path | str | None = None,
    save_every: int = 200,
    stop_at: int | None = None,
    n_measure: int = 20,
    judge: Path | str | None = None,
    overwrite: bool = False,
) -> Path | None:
    r"""Train autoencoder and denoiser on scenes rendered on the spot; write a diffusers pipeline.

    The autoencoder minimises the mean absolute error of pictures, of their horizontal and vertical
    differences and of their means over squares of 2, 4 and 8 pixels, plus a small Kullback-Leibler
    term; two thirds of its updates see quarters of pictures. With `decoder_steps` its decoder alone
    goes on to minimise these errors of :math:`\hat x` plus what a network sees of them,

    .. math:: 0.5 \sum_l \mathrm{mean}_p
        \lVert \bar f_l(\hat x)_p - \bar f_l(x)_p \rVert^2,

    with the channels :math:`\bar f_l(x)_p` at place p, of unit length, of the stem and the first
    three layers of the small CLIP model. Then, with the encoder's latents :math:`z` and noise
    :math:`\epsilon`, the denoiser minimises

    .. math:: \min(1, 5 / \mathrm{SNR}_t) \,
        \lVert \epsilon_\theta(\sqrt{\bar\alpha_t} z + \sqrt{1 - \bar\alpha_t} \epsilon, t, c)
        - \epsilon \rVert^2

    over times t, with captions c, one in five of them empty.

    Parameters
    ----------
    out_folder : path
        Gets the pipeline's folders (float16), ``training.json``, ``MODEL_CARD.md`` and
        ``samples.png``.
    clip : path
        Folder of the small CLIP model whose text tower conditions the denoiser and whose image
        tower, a residual network, the decoder is trained with.
    start : path, optional
        A folder of this function whose autoencoder and denoiser are begun with, at half the rate.
        With ``autoencoder_steps=0`` the latents stay as they are, and so does the denoiser with
        ``steps=0``.
    n_scenes : int
        Number of scenes to learn from.
    autoencoder_steps, steps : int
        Updates of the autoencoder (8 pictures each) and of the denoiser (32 each); 0 only with
        `start`.
    decoder_steps : int
        Updates of the decoder between the two (16 pictures each).
    seed : int
        Names the scenes and draws first weights, batches and noise; below 10000.
    device : str
        Where torch computes.
    checkpoint : path, optional
        A folder for the scenes and the state every `save_every` steps; training goes on from there
        where it was cut off.
    scenes : path, optional
        The folder for rendered scenes, where several runs share them; default `checkpoint`.
    save_every : int
        Steps between two checkpoints.
    stop_at : int, optional
        Stop the denoiser after this step and leave only the checkpoint.
    n_measure : int
        Pictures drawn of each category for the model card.
    judge : path, optional
        Folder of the classifier that labels them; see `measure`.
    overwrite : bool
        Whether to replace `out_folder`.

    Returns
    -------
    Path or None
        `out_folder`; None where `stop_at` ended the run early.

    Raises
    ------
    ConfigError
        If numbers make no sense, there is no judge, `start` has another architecture, `clip` has
        no residual network for the decoder, or the checkpoint belongs to other settings.

    References
    ----------
    Rombach et al. (2022), High-resolution image synthesis with latent diffusion models, CVPR.
    Hang et al. (2023), Efficient diffusion training via min-SNR weighting strategy, ICCV. Zhang et
    al. (2018), The unreasonable effectiveness of deep features as a perceptual metric, CVPR.
    """
    require("diffusers", "transformers", "open_clip")
    out_folder = Path(out_folder)
    check_run(out_folder, seed, checkpoint, stop_at, overwrite)
    least = 0 if start else 1
    if n_scenes < 32 or min(steps, autoencoder_steps) < least or decoder_steps < 0:
        raise ConfigError(
            f"Training needs n_scenes >= 32, steps and autoencoder_steps >= {least} and "
            f"decoder_steps >= 0; got n_scenes={n_scenes}, steps={steps}, autoencoder_steps="
            f"{autoencoder_steps}, decoder_steps={decoder_steps}."
        )
    if stop_at is None:
        judge = _judge(judge)
    folder = Path(checkpoint) if checkpoint else None
    shared = Path(scenes) if scenes else folder
    text = text_encoder(clip)
    images, texts, _ = stored_scenes(n_scenes, seed, shared)
    settings: dict[str, Any] = {"n_scenes": n_scenes, "seed": seed}
    begun = Path(start) if start else None
    rate = 0.5 if begun else 1.0
    if begun:
        settings["start"] = sha256_of(
            [sha256_file(begun / part / _WEIGHTS_FILE) for part in ("vae", "unet")]
        )
    first = {
        **settings, "steps": autoencoder_steps, "batch_size": 8, "learning_rate": rate * 2e-3,
        "weight_decay": 0.0, "crop": IMAGE_SIZE // 2, "crop_steps": autoencoder_steps * 2 // 3,
    }  # fmt: skip
    vae = _train_autoencoder(images, first, device, folder and folder / "vae", save_every, begun)
    # The encoder changes no more: decoder and denoiser learn from the same latents.
    latents = _latents(vae, images, device)
    clip_weights = sha256_file(Path(clip) / "open_clip_model.safetensors")
    middle = {
        **first, "steps": decoder_steps, "batch_size": 16, "crop_steps": 0, "clip": clip_weights,
    }  # fmt: skip
    if decoder_steps:
        _train_decoder(
            vae,
            Path(clip),
            images,
            latents,
            middle,
            device,
            folder and folder / "decoder",
            save_every,
        )
    second = {
        **settings, "steps": steps, "batch_size": 32, "learning_rate": rate * 1e-3,
        "weight_decay": 0.01, "clip": clip_weights,
    }  # fmt: skip
    unet, done = _train_unet(
        vae, text, latents, texts, second, device, folder and folder / "unet", save_every, stop_at,
        begun,
    )  # fmt: skip
    if done < steps:
        return None
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(out_folder, overwrite=overwrite) as made:
        _write(made, vae, unet, *text)
        measured = measure(made, n=n_measure, judge=judge)
        record = {
            "settings": {"autoencoder": first, "decoder": middle, "denoiser": second},
            "parameters": {
                "autoencoder": _count(vae), "denoiser": _count(unet), "text": _count(text[0])
            },
            "measured": measured,
        }  # fmt: skip
        (made / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (made / "MODEL_CARD.md").write_text(model_card(record), encoding="utf-8")
    return out_folder


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _write(folder: Path, vae: Any, unet: Any, encoder: Any, tokenizer: Any) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    pipeline.to(torch.float32)


def _draw(pipeline: Any, prompt: str, seeds: range, steps: int, guidance: float) -> list[Any]:
    import torch

    return pipeline(
        [prompt] * len(seeds), num_inference_steps=steps, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
    ).images  # fmt: skip


def measure(
    folder: Path | str,
    *,
    n: int = 20,
    seed: int = HELD_OUT_SEED,
    steps: int = 25,
    guidance: float = 3.0,
    judge: Path | str | None = None,
) -> dict[str, Any]:
    """Measure a pipeline of `train_diffusion`, loading it by name.

    Parameters
    ----------
    folder : path
        The pipeline.
    n : int
        Pictures of each category.
    seed : int
        Names the held-out scenes that the autoencoder is tried on; 10000 or more.
    steps : int
        Denoising steps.
    guidance : float
        Classifier-free guidance of the pictures drawn from a prompt.
    judge : path, optional
        Folder of the classifier that labels the pictures, of
        `brainalign.small_models.classifier.train_classifier`, which has no part in training or
        guiding; default the one that comes with the package.

    Returns
    -------
    dict
        ``reconstruction``: peak signal-to-noise ratio (dB) over held-out scenes; ``label``: share
        of pictures drawn from "a picture of ..." that the judge gives the category of the prompt,
        with ``chance``, ``n`` and ``by_category``; ``judge``; ``unprompted``: share of each label
        among as many pictures drawn without a prompt.

    Raises
    ------
    ConfigError
        If `seed` is one that training may have used.
    """
    require("diffusers", "transformers", "open_clip")
    import torch
    from diffusers import StableDiffusionPipeline

    from .scenes import render_scenes

    check_held_out(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shown = np.stack([s.image for s in render_scenes(120, seed=seed, size=IMAGE_SIZE)])
    with torch.no_grad():
        inside = _as_tensor(shown, "cpu")
        made = pipeline.vae.decode(pipeline.vae.encode(inside).latent_dist.mean).sample.clamp(-1, 1)
        error = float((made - inside).square().mean())
    judge = _judge(judge)
    drawn = {
        c: _draw(pipeline, f"a picture of {PROMPTS[c]}", range(n), steps, guidance)
        for c in CATEGORIES
    }
    free = _draw(pipeline, "", range(n * len(CATEGORIES)), steps, 1.0)
    prompted = [p for c in CATEGORIES for p in drawn[c]]
    labels = _labels(judge, prompted + free)
    hits = {
        c: float(np.mean([label == c for label in labels[i * n : (i + 1) * n]]))
        for i, c in enumerate(CATEGORIES)
    }
    rest = labels[n * len(CATEGORIES) :]
    # 256 colours, which take a third of the space.
    sheet = _sheet([*drawn.values(), free[:n]]).quantize(256)
    sheet.save(Path(folder) / "samples.png", optimize=True)
    return {
        "reconstruction": 10 * math.log10(4 / error),
        "label": {
            "correct": float(np.mean(list(hits.values()))), "chance": 1 / len(CATEGORIES),
            "n": n * len(CATEGORIES), "by_category": hits,
        },
        "unprompted": {c: rest.count(c) / len(rest) for c in CATEGORIES},
        "judge": judge.name, "steps": steps, "guidance": guidance, "seed": seed,
    }  # fmt: skip


def _judge(folder: Path | str | None) -> Path:
    """Return the folder of the judging model; it must be there before hours of training."""
    folder = Path(folder) if folder else WEIGHTS.with_name("small_classifier")
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"There is no classifier to judge the pictures with in {folder}.",
            "Train one with: python -m brainalign.small_models.classifier --out DIR",
        )
    return folder


def _labels(judge: Path, pictures: list[Any]) -> list[str]:
    """Return the category that the classifier gives each picture."""
    import torch

    from brainalign.features import load_model

    model = load_model(f"timm:local-dir:{judge}", device="cpu")
    with torch.inference_mode():
        seen = [model.module(model.transform(p)[None])[0] for p in pictures]
    return [CATEGORIES[int(s.argmax())] for s in seen]


def _sheet(rows: list[list[Any]]) -> Any:
    from PIL import Image

    width = min(16, max(len(r) for r in rows))
    sheet = Image.new("RGB", (width * (IMAGE_SIZE + 2), len(rows) * (IMAGE_SIZE + 2)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row[:width]):
            sheet.paste(picture, (x * (IMAGE_SIZE + 2), y * (IMAGE_SIZE + 2)))
    return sheet


def model_card(record: dict[str, Any]) -> str:
    """Return the text of ``MODEL_CARD.md``: what the model is, how it was made, how good it is."""
    measured, count = record["measured"], record["parameters"]
    settings = record["settings"]
    first = settings["autoencoder"]
    label = measured["label"]
    each = ", ".join(f"{c} {100 * v:.0f} %" for c, v in label["by_category"].items())
    free = ", ".join(f"{c} {100 * v:.0f} %" for c, v in measured["unprompted"].items())
    told = [
        f"{first['n_scenes']:,} scenes drawn by `brainalign.small_models.scenes`, {CAPTIONS} "
        f"captions each, seed {first['seed']}."
    ]
    if "start" in first:
        told.append("Training began with the weights of a pipeline of the same architecture.")
    names = {
        "autoencoder": "Autoencoder",
        "decoder": "Its decoder alone, by what the image tower of small-clip sees as well",
        "denoiser": "Denoiser",
    }
    for key, name in names.items():
        part = settings[key]
        if part["steps"]:
            told.append(
                f"{name}: {part['steps']:,} updates of {part['batch_size']} pictures, peak rate "
                f"{part['learning_rate']:g}."
            )
    told.append(
        "A caption in five was left empty. float32; stored as float16. Made by `python -m "
        "brainalign.small_models.diffusion`."
    )
    training = textwrap.fill(" ".join(told), 99)
    return f"""# small-diffusion

A very small text-to-image latent diffusion model for machines without a network, tests and
demonstrations. It is an ordinary `StableDiffusionPipeline` of diffusers:

| part | class | parameters |
|---|---|---|
| autoencoder, 64 x 64 pixels to 8 x 8 x 16 latents | `AutoencoderKL` | {count["autoencoder"]:,} |
| denoiser, epsilon prediction | `UNet2DConditionModel` | {count["denoiser"]:,} |
| text tower of small-clip, 32 tokens | `CLIPTextModel` | {count["text"]:,} |

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")
pipeline("a picture of a red car on grass", num_inference_steps=25, guidance_scale=3).images[0]
```

## Training

{training}

## Measured

- Reconstruction of 120 held-out scenes: {measured["reconstruction"]:.1f} dB.
- "a picture of ..." for six categories, {label["n"]} pictures, {measured["steps"]} steps, guidance
  {measured["guidance"]:g}: {100 * label["correct"]:.1f} % are given the category of the prompt by
  the judge `{measured["judge"]}` (chance {100 * label["chance"]:.1f} %): {each}.
- Without a prompt the judge finds: {free}.

`samples.png` shows the first pictures of each category, seed by seed, none left out; the last row
has no prompt.

## Limits

Pictures are 64 pixels wide and soft: the outlines are those of the scenes, letters cannot be read,
and small things melt. It knows rendered scenes and nothing else.
"""


def main(arguments: list[str] | None = None) -> int:
    """Train from the command line; see ``--help``."""
    parser = options_parser(
        "diffusion", "Train a very small StableDiffusionPipeline on rendered scenes.",
        scenes=12_000, steps=6000, seed=0, measured=(20, "pictures a category"),
    )  # fmt: skip
    parser.add_argument("--clip", type=Path, default=WEIGHTS, help="gives the text tower")
    parser.add_argument("--start", type=Path, help="model folder whose weights are begun with")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=4800, help="updates before those of --steps"
    )
    parser.add_argument(
        "--decoder-steps", type=int, default=0, help="updates of the decoder alone, after these"
    )
    parser.add_argument("--judge", type=Path, help="labels the pictures of the card")
    chosen = parser.parse_args(arguments)
    out, common = common_options(parser, chosen)
    train_diffusion(
        out, **common, clip=chosen.clip, start=chosen.start,
        autoencoder_steps=chosen.autoencoder_steps, decoder_steps=chosen.decoder_steps,
        judge=chosen.judge,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
