"""Models by name, path and instance; layers; what is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from brainalign.errors import (
    ChecksumError,
    ConfigError,
    MissingDependencyError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)
from brainalign.features import accuracy, find_weights, list_layers, load_model, zero_shot
from brainalign.features.layers import Layer, match, pool, pooled_shape, trace

MOBILENET = "mobilenetv2_100/mobilenetv2_100_tf_1001.safetensors"
MOBILENET_SHA = "1e79f648707bd1be25cdc4d669681264fdee92a181ec28c8826762e07ddc9e94"
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def offline_hub(monkeypatch):
    """A hub address at which nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """Return a folder with a tiny open_clip model, as open_clip itself lays it out."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(5)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    return folder


def noise(side: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


# --- open_clip ---------------------------------------------------------------------------------


def test_open_clip_folder(clip_folder):
    model = load_model(f"open_clip:local-dir:{clip_folder}", device="cpu")
    assert model.blocks() == [
        "visual.transformer.resblocks.0",
        "visual.transformer.resblocks.1",
        "output",
    ]
    assert model.traced["visual.transformer.resblocks.0"].shape == (17, 32)
    assert model.traced["visual.transformer.resblocks.0"].prefix == 1
    assert model.preprocessing["mean"] == [0.5] * 3
    assert model.preprocessing["image_size"] == [32, 32]
    x = model.transform(noise())[None]
    torch.testing.assert_close(model.encode_image(x), model.module.encode_image(x))
    assert model.encode_text(["a house", "a face"]).shape == (2, 16)
    assert not model.module.training


def test_open_clip_gradient_reaches_the_image(clip_folder):
    model = load_model(f"open_clip:local-dir:{clip_folder}", device="cpu")
    x = model.transform(noise())[None].requires_grad_()
    model.encode_image(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.module.parameters())


def test_random_keeps_architecture_and_follows_the_seed(clip_folder):
    name = f"open_clip:local-dir:{clip_folder}"
    trained = load_model(name, device="cpu")
    before = torch.random.get_rng_state()
    a, b, c = (load_model(f"random:{name}", seed=s, device="cpu") for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.layers() == trained.layers()
    assert a.weights_sha256 == b.weights_sha256
    assert len({a.weights_sha256, c.weights_sha256, trained.weights_sha256}) == 3
    assert a.name == f"random:{name}"
    assert a.preprocessing["options"]["seed"] == 0


def test_open_clip_folder_without_weights_is_refused(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        (clip_folder / "open_clip_config.json").read_text()
    )
    with pytest.raises(UnavailableError, match="without weights"):
        load_model(f"open_clip:local-dir:{tmp_path}")
    with pytest.raises(UnavailableError, match="no open_clip_config"):
        load_model(f"open_clip:local-dir:{tmp_path / 'nowhere'}")


# --- timm --------------------------------------------------------------------------------------


def test_timm_weights_file_is_loaded_and_checked(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    made = load_model("random:timm:vit_tiny_patch16_224", options=TINY_VIT, seed=3, device="cpu")
    file = tmp_path / "w" / "tiny.safetensors"
    file.parent.mkdir()
    save_file(made.module.state_dict(), file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setenv("BRAINALIGN_WEIGHTS", str(tmp_path))
    name = "timm:vit_tiny_patch16_224"
    model = load_model(
        name, weights="w/tiny.safetensors", sha256=sha, options=TINY_VIT, device="cpu"
    )
    assert model.weights_sha256 == made.weights_sha256
    with pytest.raises(ChecksumError, match="expected 00"):
        load_model(name, weights="w/tiny.safetensors", sha256="00" * 32, options=TINY_VIT)
    with pytest.raises(ConfigError, match=r"does not fit .*shape"):
        load_model(name, weights="w/tiny.safetensors", options={**TINY_VIT, "embed_dim": 48})
    with pytest.raises(ConfigError, match="is missing"):
        load_model(name, weights="w/tiny.safetensors", options={**TINY_VIT, "depth": 4})
    with pytest.raises(ConfigError, match="is unknown"):
        load_model(name, weights="w/tiny.safetensors", options={**TINY_VIT, "depth": 2})
    with pytest.raises(ConfigError, match="cannot be built"):
        load_model(f"random:{name}", options={"dept": 2})


def test_weights_are_found_inside_and_beside_the_mirror(tmp_path, monkeypatch):
    monkeypatch.delenv("BRAINALIGN_WEIGHTS", raising=False)
    monkeypatch.setenv("BRAINALIGN_MIRROR", str(tmp_path / "data"))
    for folder in (tmp_path / "weights", tmp_path / "data" / "weights"):
        with pytest.raises(UnavailableError, match="BRAINALIGN_WEIGHTS"):
            find_weights(f"{folder.parent.name}.bin")
        folder.mkdir(parents=True)
        (folder / f"{folder.parent.name}.bin").write_bytes(b"x")
        assert find_weights(f"{folder.parent.name}.bin").parent == folder


def test_timm_grid_of_architectures_is_traced():
    swin = load_model(
        "random:timm:swin_tiny_patch4_window7_224",
        options={
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 12,
            "depths": (1, 1),
            "num_heads": (1, 2),
        },
        image_size=64,
        device="cpu",
    )
    assert swin.traced["layers.0"] == Layer(
        "layers.0", (16, 16, 12), "maps_last", "SwinTransformerStage", 0, 0
    )
    # Attention runs on windows: its first axis is not images, so it is no layer.
    assert "layers.0.blocks.0.attn" not in swin.traced
    assert swin.select("layers.*") == ["layers.0", "layers.1"]
    resnet = load_model("random:timm:resnet10t", image_size=64, device="cpu")
    assert resnet.traced["layer2"].kind == "maps"
    assert resnet.traced["layer2"].shape == (128, 8, 8)
    reg = load_model(
        "random:timm:vit_small_patch14_reg4_dinov2",
        options={**TINY_VIT, "num_classes": 0},
        image_size=32,
        device="cpu",
    )
    assert reg.traced["blocks.0"].shape == (16 + 5, 24)
    assert reg.traced["blocks.0"].prefix == 5
    assert reg.traced["patch_embed"].prefix == 0


def test_pretrained_mobilenet(weights_folder):
    """The classifier names photographs as its README says, with its own preprocessing."""
    model = load_model(
        "timm:mobilenetv2_100",
        weights=weights_folder / MOBILENET,
        sha256=MOBILENET_SHA,
        options={"num_classes": 1001, "pad_type": "same"},
        mean=[128 / 255] * 3,
        std=[128 / 255] * 3,
        device="cpu",
    )
    assert model.blocks() == [*(f"blocks.{i}" for i in range(7)), "output"]
    assert model.preprocessing["mean"] == pytest.approx([128 / 255] * 3)
    photos = weights_folder.parent / "data" / "natural_photos"
    if not photos.is_dir():
        pytest.skip(f"no photographs beside the weights: {photos}")
    # Class and probability that the weights' README states for the whole image.
    stated = {
        "bird.bmp": (20, 0.98),
        "cat.bmp": (286, 0.74),
        "dragonfly.bmp": (320, 0.99),
        "grace_hopper.bmp": (653, 0.91),
        "hot_dog.jpg": (935, 0.93),
        "owl.jpg": (83, 0.72),
        "parrot.jpg": (89, 1.00),
        "pets.jpg": (172, 0.48),
        "sunflower.bmp": (986, 0.99),
    }

    def tensor(image):
        pixels = np.asarray(image, np.float32)
        return torch.from_numpy((pixels - 128) / 128).movedim(-1, 0)

    for name, (label, probability) in stated.items():
        with Image.open(photos / name) as image:
            rgb = image.convert("RGB")
        whole = tensor(rgb.resize((224, 224), Image.Resampling.BICUBIC))
        p = model.encode_image(whole[None])[0].softmax(0)
        assert (int(p.argmax()), float(p.max())) == (label, pytest.approx(probability, abs=0.006))
        # The model's own transform: the short side to 256, then the central 224.
        scale = 256 / min(rgb.size)
        width, height = (int(n * scale) for n in rgb.size)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        cropped = rgb.resize((width, height), Image.Resampling.BICUBIC).crop(
            (left, top, left + 224, top + 224)
        )
        torch.testing.assert_close(model.transform(rgb), tensor(cropped), atol=1e-5, rtol=0)


def test_wrong_number_of_classes_is_refused_not_left_random(weights_folder):
    with pytest.raises(ConfigError, match="num_classes"):
        load_model("timm:mobilenetv2_100", weights=weights_folder / MOBILENET)


# --- torchvision -------------------------------------------------------------------------------


def test_torchvision_network_with_the_preprocessing_of_its_weights():
    from torchvision.models import ResNet18_Weights, resnet18

    model = load_model("random:torchvision:resnet18", seed=4, device="cpu")
    assert model.name == "random:torchvision:resnet18" and not model.module.training
    assert model.blocks() == [*(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)), "output"]
    assert model.traced["layer3.1"].shape == (256, 14, 14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        own = resnet18().eval()
    x = ResNet18_Weights.DEFAULT.transforms()(noise(300))
    torch.testing.assert_close(model.transform(noise(300)), x, atol=0, rtol=0)
    torch.testing.assert_close(model.encode_image(x[None]), own(x[None]))
    assert model.preprocessing == {
        "image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear", "resize": 256, "options": {"seed": 4},
    }  # fmt: skip


def test_torchvision_settings_and_files_of_weights(tmp_path):
    half = load_model(
        "random:torchvision:squeezenet1_1", image_size=112, mean=[0.5] * 3, std=[0.25] * 3,
        options={"num_classes": 7}, device="cpu",
    )  # fmt: skip
    assert half.transform(noise(300)).shape == (3, 112, 112) and half.traced["output"].shape == (7,)
    assert half.preprocessing["resize"] == 128 and half.preprocessing["mean"] == [0.5] * 3
    grey = half.transform(Image.new("RGB", (300, 200), (128, 128, 128)))
    torch.testing.assert_close(grey, torch.full((3, 112, 112), (128 / 255 - 0.5) / 0.25))
    file = tmp_path / "w.pth"
    torch.save(half.module.state_dict(), file)
    name = "torchvision:squeezenet1_1"
    again = load_model(name, weights=file, options={"num_classes": 7}, device="cpu")
    assert again.weights_sha256 == half.weights_sha256
    with pytest.raises(ConfigError, match=r"does not fit .*shape"):
        load_model(name, weights=file)
    with pytest.raises(ConfigError, match="names its weights"):
        load_model(f"{name}/IMAGENET1K_V1", weights=file)
    with pytest.raises(UnknownNameError, match="Did you mean 'IMAGENET1K_V1'"):
        load_model(f"{name}/IMAGENET1K_V11")
    with pytest.raises(ConfigError, match="cannot be built"):
        load_model(f"random:{name}", options={"n_classes": 7})


def test_torchvision_weights_come_from_the_folder_of_weights(tmp_path, monkeypatch):
    """Under their published name, their digits checked, with all that goes with them."""
    from torchvision.models import GoogLeNet_Weights

    made = load_model(
        "random:torchvision:googlenet", options={"init_weights": False}, device="cpu"
    )  # fmt: skip
    torch.save(made.module.state_dict(), tmp_path / "w.pth")
    sha = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    file = (tmp_path / "w.pth").rename(tmp_path / f"googlenet-{sha[:8]}.pth")
    published = GoogLeNet_Weights.DEFAULT
    monkeypatch.setattr(published.value, "url", f"http://127.0.0.1:9/models/{file.name}")
    monkeypatch.setenv("BRAINALIGN_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = load_model("torchvision:googlenet", device="cpu")
    # These weights want their input scaled again, and learnt with heads that are taken off.
    assert model.module.transform_input and model.module.aux1 is None
    state = made.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.module.state_dict().items())
    with pytest.raises(ConfigError, match="cannot be built"):
        load_model("torchvision:googlenet", options={"num_classes": 7})
    file.write_bytes(b"other")
    with pytest.raises(ChecksumError, match=f"begins with {sha[:8]}"):
        load_model("torchvision:googlenet")
    file.unlink()
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9/models/googlenet.*reached"):
        load_model("torchvision:googlenet")


# --- transformers ------------------------------------------------------------------------------


def _save_transformers(folder: Path, kind: str) -> Path:
    import transformers as tr

    small = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(2)
    if kind == "vit":
        model = tr.ViTModel(tr.ViTConfig(**small, image_size=32, patch_size=8))
    elif kind == "dinov2":
        model = tr.Dinov2Model(tr.Dinov2Config(**small, image_size=32, patch_size=8))
    elif kind == "convnext":
        model = tr.ConvNextModel(
            tr.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
        )
    else:
        model = tr.CLIPModel(
            tr.CLIPConfig(
                vision_config={**small, "image_size": 32, "patch_size": 8},
                text_config={**small, "vocab_size": 60},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    tr.ViTImageProcessor(size=side, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext", "clip"])
def test_transformers_folder(kind, tmp_path):
    import transformers as tr

    folder = _save_transformers(tmp_path, kind)
    model = load_model(f"transformers:{folder}", device="cpu")
    assert model.preprocessing["mean"] == [0.4] * 3
    assert model.preprocessing["image_size"] == [32, 32]
    x = model.transform(noise())[None]
    assert x.shape == (1, 3, 32, 32)
    reference = tr.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind == "clip":
            expected = reference.visual_projection(reference.vision_model(x).pooler_output)
        else:
            expected = reference(x).last_hidden_state
    torch.testing.assert_close(model.encode_image(x), expected)
    blocks = [model.traced[n] for n in model.blocks() if n != "output"]
    if kind == "convnext":
        assert {b.kind for b in blocks} == {"maps"}
    else:
        assert [(b.shape, b.prefix) for b in blocks] == [((17, 24), 1)] * 2
    again = load_model(f"random:transformers:{folder}", device="cpu")
    assert again.layers() == model.layers()
    assert again.weights_sha256 != model.weights_sha256
    changed = load_model(f"transformers:{folder}", mean=[0.0] * 3, std=[1.0] * 3, device="cpu")
    assert changed.transform(noise()).max() <= 1


def test_transformers_clip_embeds_texts(tmp_path):
    import transformers as tr

    folder = _save_transformers(tmp_path, "clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "d", "o", "g</w>", "og</w>", "dog</w>"]
    tr.CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[("o", "g</w>"), ("d", "og</w>")]
    ).save_pretrained(folder)
    model = load_model(f"transformers:{folder}", device="cpu")
    embedded = model.encode_text(["a dog", "dog"])
    with torch.no_grad():
        alone = [
            model.module.text_projection(
                model.module.text_model(input_ids=torch.tensor([ids])).pooler_output
            )
            for ids in ([0, 2, 7, 1], [0, 7, 1])
        ]
    torch.testing.assert_close(embedded, torch.cat(alone), atol=1e-5, rtol=1e-4)
    labelled = zero_shot(model, Images([noise()]), ["dog", "a"], templates=["{}"])
    assert labelled["probability"].sum() == pytest.approx(1, abs=1e-6)


# --- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that answers as the hub does, for the folders under ``tmp_path / "hub"``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            folder = tmp_path / "hub" / "/".join(parts[:2])
            if self.path == "/":
                self.answer(200)
            elif "resolve" not in parts or not folder.is_dir():
                self.answer(404, X_Error_Code="RepoNotFound")
            elif not (folder / parts[-1]).is_file():
                self.answer(404, X_Error_Code="EntryNotFound")
            else:
                body = (folder / parts[-1]).read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                self.answer(200, body, ETag=f'"{tag}"', X_Repo_Commit="a" * 40)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def stop():
        server.shutdown()
        server.server_close()

    yield SimpleNamespace(folder=tmp_path / "hub" / "someone", stop=stop)
    stop()


def test_models_come_from_the_hub_and_then_from_the_cache(hub, clip_folder):
    hub.folder.mkdir(parents=True)
    _save_transformers(hub.folder / "vit", "vit")
    shutil.copytree(clip_folder, hub.folder / "clip")
    pairs = {
        "transformers:someone/vit": f"transformers:{hub.folder / 'vit'}",
        "open_clip:hf-hub:someone/clip": f"open_clip:local-dir:{clip_folder}",
    }
    hashes = {name: load_model(name, device="cpu").weights_sha256 for name in pairs}
    for name, local in pairs.items():
        assert hashes[name] == load_model(local, device="cpu").weights_sha256
    for name in ("transformers:someone/vi", "open_clip:hf-hub:someone/clop"):
        with pytest.raises(UnknownNameError, match="no model for"):
            load_model(name)
    hub.stop()
    for name, sha in hashes.items():
        assert load_model(name, device="cpu").weights_sha256 == sha


# --- instances ---------------------------------------------------------------------------------


def test_instance_with_transform_or_settings():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
    made = load_model(module, image_size=8, mean=[0.5] * 3, std=[0.5] * 3, device="cpu")
    assert made.name == "instance:Sequential"
    assert made.layers() == ["0", "1", "2", "output"]
    assert made.transform(noise()).shape == (3, 8, 8)
    other = load_model(module, transform=lambda image: made.transform(image) * 2, device="cpu")
    assert made.preprocessing["probe_sha256"] != other.preprocessing["probe_sha256"]
    with pytest.raises(ConfigError, match="needs transform"):
        load_model(module)
    with pytest.raises(ConfigError, match="JSON-able"):
        load_model("pixels", options={"side": module})


def test_instance_of_a_dual_encoder_runs_its_image_tower(clip_folder, tmp_path):
    import transformers as tr

    named = [
        load_model(f"open_clip:local-dir:{clip_folder}", device="cpu"),
        load_model(f"transformers:{_save_transformers(tmp_path, 'clip')}", device="cpu"),
    ]
    bare = [named[0].module, tr.AutoModel.from_pretrained(tmp_path)]
    for one, module in zip(named, bare, strict=True):
        instance = load_model(module, transform=one.transform, device="cpu")
        x = one.transform(noise())[None]
        torch.testing.assert_close(instance.encode_image(x), one.encode_image(x))
        assert instance.layers() == one.layers()


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:mobilenetv2_10", "mobilenetv2_100"),
        ("timm:resnet50.a1_in1", "a1_in1k"),
        ("open_clip:ViT-B-33/openai", "ViT-B-32"),
        ("open_clip:ViT-B-32/opena", "openai"),
        ("openclip:ViT-B-32/openai", "open_clip"),
        ("pixel", "pixels"),
        ("small_clip", "small-clip"),
        ("resnet50", "timm:resnet50"),
        ("v1:kay2018", "v1:kay2017"),
    ],
)
def test_unknown_model_names_the_nearest(name, hint):
    with pytest.raises(UnknownNameError) as error:
        load_model(name)
    assert f"Did you mean '{hint}'" in str(error.value) or f"'{hint}'" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "open_clip:ViT-B-32/openai",
        "open_clip:hf-hub:someone/something",
        "transformers:someone/something",
    ],
)
def test_no_network_is_said_quickly(name, offline_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        load_model(name)
    assert time.perf_counter() - start < 15
    assert before == constants.HF_HUB_OFFLINE


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"brainalign\[features\]"):
        load_model("timm:resnet18")


def test_arguments_that_do_not_go_together(clip_folder):
    with pytest.raises(ConfigError, match="which weights"):
        load_model("open_clip:ViT-B-32")
    with pytest.raises(ConfigError, match="do not go together"):
        load_model("random:pixels")
    with pytest.raises(ConfigError, match="sha256"):
        load_model("timm:resnet18", sha256="00")
    with pytest.raises(ConfigError, match=r"frequencies"):
        load_model("v1", options={"frequencis": (2, 4)})
    with pytest.raises(ConfigError, match="cannot use device"):
        load_model("pixels", device="cuda:99")
    with pytest.raises(ConfigError, match="no text tower"):
        load_model("pixels", device="cpu").encode_text(["a"])


# --- layers ------------------------------------------------------------------------------------

NAMES = ["blocks.0", "blocks.0.attn", "blocks.1", "blocks.10", "norm", "output"]


def test_patterns():
    assert match("blocks.*", NAMES, "m") == ["blocks.0", "blocks.1", "blocks.10"]
    assert match("blocks.?", NAMES, "m") == ["blocks.0", "blocks.1"]
    assert match("blocks.**", NAMES, "m") == NAMES[:4]
    assert match(r"re:blocks\.\d", NAMES, "m") == ["blocks.0", "blocks.1"]
    assert match(["output", "blocks.0", "blocks.0"], NAMES, "m") == ["blocks.0", "output"]
    with pytest.raises(UnknownNameError, match=r"Did you mean .*'blocks.1'"):
        match(["norm", "block.1"], NAMES, "m")
    with pytest.raises(ConfigError, match="regular expression"):
        match("re:(", NAMES, "m")


def test_trace_finds_the_batch_axis_and_leaves_out_what_has_none():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 6)
            self.constant = nn.Embedding(3, 6)
            self.pair = nn.LSTM(6, 5)

        def forward(self, x):
            tokens = x.flatten(2).permute(2, 0, 1)
            return self.pair(self.inner(tokens) + self.constant.weight[:1])[0].mean(0)

    module = SequenceFirst().eval()
    layers = trace(module, module, torch.rand(4, 3, 3))
    assert layers["inner"].batch_axis == 1
    assert layers["inner"].shape == (9, 6)
    assert layers["pair"].kind == "tokens"
    assert layers["output"].shape == (5,)
    assert "constant" not in layers
    x = torch.rand(2, 4, 3, 3)
    expected = module.inner(x.flatten(2).mT).mean(1)
    got = pool(module.inner(x.flatten(2).permute(2, 0, 1)), layers["inner"], "mean")
    torch.testing.assert_close(got, expected.detach())


def test_pooling():
    maps = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    layer = Layer("l", (2, 3, 4), "maps", "", 0, 0)
    assert pooled_shape(layer, "mean") == (2,)
    assert pooled_shape(layer, "none") == (12, 2)
    assert pooled_shape(layer, "flatten") == (24,)
    assert pool(maps, layer, "mean").tolist() == [[5.5, 17.5]]
    assert pool(maps, layer, "none")[0, 5].tolist() == [5, 17]
    assert pool(maps, layer, "flatten")[0].tolist() == list(range(24))
    last = layer._replace(kind="maps_last", shape=(3, 4, 2))
    torch.testing.assert_close(pool(maps.movedim(1, -1), last, "none"), pool(maps, layer, "none"))
    tokens = torch.arange(10.0).reshape(1, 5, 2)
    layer = Layer("t", (5, 2), "tokens", "", 0, 2)
    assert pool(tokens, layer, "class").tolist() == [[0, 1]]
    assert pool(tokens, layer, "mean").tolist() == [[6, 7]]
    assert pooled_shape(layer, "none") == (5, 2)
    with pytest.raises(ConfigError, match="no class token"):
        pooled_shape(layer._replace(prefix=0), "class")
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        pooled_shape(layer, "meen")
    with pytest.raises(ConfigError, match="flatten"):
        pooled_shape(Layer("o", (2, 2, 2, 2), "other", "", 0, 0), "mean")


def test_list_layers_of_a_baseline():
    assert [(x.name, x.shape) for x in list_layers("v1:kay2017")] == [
        ("normalised", (8192,)),
        ("output", (8192,)),
    ]
    assert load_model("v1:kay2017", device="cpu").blocks() == ["normalised"]


def test_importing_the_room_loads_no_torch():
    code = "import sys, brainalign.features; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- zero-shot ---------------------------------------------------------------------------------


class Images:
    """A set of stimuli in memory."""

    def __init__(self, images):
        self.images = images
        self.ids = [f"image{i}" for i in range(len(images))]
        self.hash = hashlib.sha256(b"".join(i.tobytes() for i in images)).hexdigest()

    def __len__(self):
        return len(self.images)

    def open(self, i):
        return self.images[i]


def test_zero_shot_against_the_formula(clip_folder):
    import open_clip

    model = load_model(f"open_clip:local-dir:{clip_folder}", device="cpu")
    images = Images([noise(seed=s) for s in range(7)])
    prompts = {"face": ["a face", "a drawing of a face"], "house": ["a house"], "word": ["word"]}
    labelled = zero_shot(model, images, prompts, batch_size=3)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        rows = []
        for texts in prompts.values():
            t = model.module.encode_text(tokenizer(texts), normalize=True).mean(0)
            rows.append(t / t.norm())
        x = torch.stack([model.transform(images.open(i)) for i in range(7)])
        similarity = model.module.encode_image(x, normalize=True) @ torch.stack(rows).T
        p = (model.module.logit_scale.exp() * similarity).softmax(1)
    np.testing.assert_allclose(labelled["similarity"], similarity, atol=1e-5)
    np.testing.assert_allclose(labelled["probability"], p, atol=1e-4)
    truth = np.array(list(prompts))[p.argmax(1)]
    assert accuracy(labelled, truth) == 1
    wrong = ["house" if t != "house" else "word" for t in truth[:3]]
    assert accuracy(labelled, [*wrong, *truth[3:]]) == pytest.approx(4 / 7)


def test_zero_shot_templates_and_refusals(clip_folder):
    model = load_model(f"open_clip:local-dir:{clip_folder}", device="cpu")
    images = Images([noise(seed=s) for s in range(2)])
    by_template = zero_shot(model, images, ["{x}", "dog"], templates=["a {}", "the {}"])
    spelled = zero_shot(model, images, {"{x}": ["a {x}", "the {x}"], "dog": ["a dog", "the dog"]})
    np.testing.assert_array_equal(by_template["similarity"], spelled["similarity"])
    with pytest.raises(ConfigError, match="template"):
        zero_shot(model, images, ["a", "b"], templates=["photo"])
    with pytest.raises(ConfigError, match="at least 2"):
        zero_shot(model, images, ["a"])
    with pytest.raises(SchemaError, match="3 true labels"):
        accuracy(by_template, ["dog"] * 3)
    with pytest.raises(SchemaError, match="'cat'"):
        accuracy(by_template, ["dog", "cat"])


def test_small_clip_is_an_open_clip_model():
    from importlib.resources import files

    folder = Path(str(files("brainalign"))) / "small_models" / "weights" / "small_clip"
    if not folder.is_dir():
        with pytest.raises(UnavailableError, match="small-clip"):
            load_model("small-clip")
        return
    model = load_model("small-clip", device="cpu")
    direct = load_model(f"open_clip:local-dir:{folder}", device="cpu")
    assert (model.name, model.weights_sha256) == ("small-clip", direct.weights_sha256)
    assert model.blocks()[-1] == "output"
    x = model.transform(noise())[None]
    torch.testing.assert_close(model.encode_image(x), direct.encode_image(x))
    assert model.encode_text(["a face"]).shape[1] == model.encode_image(x).shape[1]
