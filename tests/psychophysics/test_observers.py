"""Observers: known channels through the whole pipeline, networks and their mapping to classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.features import load_model
from brainalign.psychophysics import (
    fit_channel,
    fit_index_channel,
    masking_design,
    threshold_indices,
)
from brainalign.psychophysics.analysis import accuracy_matrix
from brainalign.psychophysics.observers import (
    Classifier,
    SimulatedObserver,
    ZeroShotClassifier,
    grey_images,
    observe,
    output_labels,
    sixteen_classes,
)

CLASSES = tuple(sixteen_classes())


class Corners(nn.Module):
    """Says in which quarter of the picture the light is; its logits are the quarters' means."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        return self.gain * nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)


QUARTERS = {"upper": [0, 1], "lower left": [2], "lower right": [3]}


@pytest.fixture(scope="module")
def corners():
    return load_model(Corners(), image_size=32, mean=[0.4] * 3, std=[0.2] * 3, device="cpu")


@pytest.fixture(scope="module")
def lights():
    """Return pictures with one light quarter each, their names and classes."""
    images = torch.zeros(8, 32, 32)
    names, classes = [], []
    for i in range(8):
        y, x = divmod(i % 4, 2)
        images[i, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 1
        names.append(f"light{i}")
        classes.append(["upper", "upper", "lower left", "lower right"][i % 4])
    return images, names, classes


@pytest.mark.parametrize(("bandwidth", "centre"), [(1.5, 28.0), (3.0, 40.0), (5.0, 20.0)])
def test_known_channel_comes_back(bandwidth, centre):
    observer = SimulatedObserver(
        CLASSES, bandwidth=bandwidth, centre=centre, sensitivity=0.8, slope=2.5, seed=1
    )
    names = [f"i{i}" for i in range(160)]
    design = masking_design(names, [CLASSES[i % 16] for i in range(160)])
    trials = observe(observer, design, batch_size=2000)
    fit = fit_channel(trials)
    assert fit.n_trials == 5600 and fit.guess == 1 / 16
    for name, true in (("bandwidth", bandwidth), ("centre", centre), ("sensitivity", 0.8)):
        low, high = fit.intervals[name]
        assert low < true < high and high / low < 1.6, name
    # The published rule tells these channels too wide.
    rule = fit_index_channel(threshold_indices(accuracy_matrix(trials)))
    assert rule.bandwidth > bandwidth


def test_guesses_are_spread_over_the_other_classes():
    observer = SimulatedObserver(
        CLASSES, bandwidth=9.0, centre=28.0, sensitivity=50.0, seed=0, lapse=0.0
    )
    design = masking_design(
        [f"i{i}" for i in range(400)], ["cat"] * 400, noise_sds=[0.16], bands=[4]
    )
    trials = observe(observer, design, batch_size=400)
    names, counts = np.unique(trials["response"].values, return_counts=True)
    assert set(names) == set(CLASSES) and counts.max() < 60
    assert trials["subject"].item() == "simulated"


def test_a_network_sees_the_pictures(corners, lights):
    images, names, classes = lights
    observer = Classifier(corners, QUARTERS, name="corners")
    design = masking_design(names, classes, size=(32, 32), seed=2)
    trials = observe(observer, design, images, names, batch_size=17)
    share = accuracy_matrix(trials)
    assert (share.sel(noise_sd=0) == 1).all()
    # Only noise as slow as a quarter can hide it.
    assert float(share.isel(noise_sd=-1, frequency=-1)) == 1
    again = observe(observer, design, images, names, batch_size=64)
    assert (again["response"].values == trials["response"].values).all()


def test_mean_over_members(corners):
    # Upper left and right share the light; their mean is less than that of the lower left alone.
    x = torch.zeros(1, 32, 32)
    x[0, :16, :16], x[0, 16:, :16] = 0.9, 0.6
    design = masking_design(["a"], ["upper"], size=(32, 32), noise_sds=[0.0], bands=[0])
    logits = corners.encode_image((x[:, None].expand(1, 3, 32, 32) - 0.4) / 0.2).softmax(1)[0]
    by_hand = {k: float(logits[v].mean()) for k, v in QUARTERS.items()}
    said = Classifier(corners, QUARTERS).respond(x, design)
    assert said.tolist() == [max(by_hand, key=by_hand.get)]


def test_mappings(corners, tmp_path):
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(QUARTERS))
    assert Classifier(corners, file).classes == tuple(QUARTERS)
    with pytest.raises(UnknownNameError, match="outputs 0 to 3; got 4"):
        Classifier(corners, {"a": [0], "b": [4]})
    with pytest.raises(ConfigError, match="4 outputs and no labels"):
        Classifier(corners)
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no mapping of classes"):
        Classifier(corners, file)
    with pytest.raises(ConfigError, match="2 classes or more"):
        Classifier(corners, {"a": [0]})


def test_sixteen_classes_are_those_of_imagenet():
    pytest.importorskip("timm")
    classes = sixteen_classes()
    assert len(classes) == 16 and sum(map(len, classes.values())) == 207
    model = load_model(nn.Identity(), image_size=8, mean=[0.5] * 3, std=[0.5] * 3, device="cpu")
    labels = output_labels(model, 1000)
    assert {s for members in classes.values() for s in members} <= set(labels)
    place = {c: sorted(labels.index(s) for s in members) for c, members in classes.items()}
    # Numbers that any table of ImageNet gives: airliner, polar bear, Persian cat, cleaver.
    assert place["airplane"] == [404] and 296 in place["bear"]
    assert 283 in place["cat"] and place["knife"] == [499]
    assert output_labels(model, 1001) == ["background", *labels]


def test_classifier_of_torchvision():
    pytest.importorskip("torchvision")
    model = load_model("random:torchvision:resnet18", device="cpu")
    observer = Classifier(model)
    x = torch.rand(6, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.preprocessing[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        p = model.module((x[:, None] - mean) / std).softmax(1).double()
    labels = output_labels(model, 1000)
    by_class = torch.stack(
        [
            p[:, [labels.index(s) for s in synsets]].mean(1)
            for synsets in sixteen_classes().values()
        ],
        1,
    )
    assert observer.classes == CLASSES
    expected = [CLASSES[i] for i in by_class.argmax(1)]
    assert observer.respond(x, None).tolist() == expected


#: What the images show that are of one of the 16 classes, by eye: of the photographs, and of the
#: 92 images of Kriegeskorte et al. 2008. The ostrich (image30) and the stove (image91) are of the
#: words' classes, but ImageNet's n01518878 and n04330267 are among no class's synsets.
PHOTOGRAPHS = {"bird": "bird", "cat": "cat", "owl": "bird", "parrot": "bird"}
OF_92 = {
    "image30": "bird", "image33": "elephant", "image41": "dog", "image42": "dog",
    "image73": "bottle", "image84": "chair", "image91": "oven",
}  # fmt: skip


@pytest.fixture(scope="module")
def mobilenet(weights_folder):
    pytest.importorskip("timm")
    weights = weights_folder / "mobilenetv2_100" / "mobilenetv2_100_tf_1001.safetensors"
    if not weights.is_file():
        pytest.skip("no MobileNetV2 weights")
    model = load_model(
        "timm:mobilenetv2_100", weights=weights, options={"num_classes": 1001, "pad_type": "same"},
        mean=[128 / 255] * 3, std=[128 / 255] * 3, device="cpu",
    )  # fmt: skip
    return Classifier(model, name="mobilenetv2")


@pytest.fixture(scope="module")
def named(mobilenet, mirror, tmp_path_factory):
    """Return the images that the network names rightly without noise, and what they show."""
    from brainalign.data.stimuli import index_images
    from brainalign.data.studies import kriegeskorte2008

    photographs = index_images(mirror / "natural_photos").select([*PHOTOGRAPHS])
    study = kriegeskorte2008.load(
        mirror / kriegeskorte2008.FOLDER, stimuli_folder=tmp_path_factory.mktemp("92")
    )
    objects = study.stimuli.select([*OF_92])
    images = torch.cat([grey_images(s, (224, 224)) for s in (photographs, objects)])
    shown = PHOTOGRAPHS | OF_92
    design = masking_design([*shown], [*shown.values()], noise_sds=[0.0], bands=[0])
    right = observe(mobilenet, design, images, [*shown])["correct"].values
    ids = [i for i, r in zip(shown, right, strict=True) if r]
    return ids, [shown[i] for i in ids], images[torch.as_tensor(right)]


def test_imagenet_network_names_photographs(mobilenet, named):
    assert mobilenet.classes == CLASSES
    assert mobilenet._mean.sum(0).tolist() == pytest.approx([1.0] * 16)
    ids, _, _ = named
    assert {"bird", "cat", "image33", "image41", "image42"} <= set(ids)
    # No class has the stove's synset; the ostrich, of none either, is taken for another bird.
    assert "image30" in ids and "image91" not in ids


def test_zero_shot_clip():
    pytest.importorskip("open_clip")
    from brainalign.small_models.scenes import render_scenes

    scenes = [
        s for s in render_scenes(60, seed=30_001, size=96) if s.category in ("food", "places")
    ]
    images = torch.stack(
        [torch.from_numpy(s.image.astype(np.float32)).mean(-1) / 255 for s in scenes]
    )
    names = [f"s{i}" for i in range(len(scenes))]
    observer = ZeroShotClassifier(
        "small-clip", {"food": ["a picture of food"], "places": ["a picture of a place"]}
    )
    design = masking_design(
        names, [s.category for s in scenes], size=(96, 96), noise_sds=[0.0], bands=[0]
    )
    correct = observe(observer, design, images, names)["correct"].values
    for category in ("food", "places"):  # chance is one half
        assert correct[[s.category == category for s in scenes]].mean() > 0.7
    with pytest.raises(ConfigError, match="2 classes or more"):
        ZeroShotClassifier(observer.model, ["food"])


def test_observers_refuse_what_they_cannot_name(corners, lights):
    images, names, classes = lights
    observer = Classifier(corners, QUARTERS)
    design = masking_design(names, classes, size=(32, 32))
    with pytest.raises(SchemaError, match="needs images"):
        observe(observer, design)
    with pytest.raises(SchemaError, match="There is no image 'light7'"):
        observe(observer, design, images[:7], names[:7])
    with pytest.raises(SchemaError, match="Did you mean 'upper'"):
        observe(observer, design.assign(category=("trial", ["uper"] * design.sizes["trial"])))


def test_intervals_are_as_wide_as_few_images_make_them(mobilenet, named):
    from brainalign.psychophysics import bootstrap_channel

    ids, classes, images = named
    design = masking_design(ids, classes, seed=1)
    trials = observe(mobilenet, design, images, ids, batch_size=35)
    # It chooses from 16 classes, though few are shown.
    options = {"guess": 1 / 16}

    def spread(of):
        draws = bootstrap_channel(of, n_bootstrap=100, **options)
        return float(np.log2(draws["sensitivity"]).std())

    # Leaving images out one by one tells another way how far they differ.
    kept = [trials.isel(trial=trials["stimulus_id"].values != i) for i in ids]
    left_out = np.log2([fit_channel(k, **options).channel.sensitivity for k in kept])
    jackknife = np.sqrt(len(ids) - 1) * left_out.std()
    few = spread(trials)
    assert 0.5 < few / jackknife < 2
    # Sixteen times as many that differ as these do would tell four times as much.
    many = xr.concat(
        [
            trials.assign_coords(
                stimulus_id=("trial", [f"{i} {copy}" for i in trials["stimulus_id"].values])
            )
            for copy in range(16)
        ],
        "trial", coords="minimal", compat="override",
    )  # fmt: skip
    assert 2 < few / spread(many) < 8
    fit = fit_channel(trials, **options)
    assert fit.n_trials == 35 * len(ids)
    # They do not say where the channel ends above, and that is told; but that it is no narrow one.
    assert "centre_open" in fit.channel.flags and np.isinf(fit.intervals["centre"][1])
    # While its centre may lie ever farther beyond the bands, it may be ever wider.
    low, high = fit.intervals["bandwidth"]
    assert low > 2.5 and np.isinf(high) and "bandwidth_open" in fit.channel.flags


def test_classifier_of_transformers(tmp_path):
    tr = pytest.importorskip("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog", 2: "tiger"}
    config = tr.ViTConfig(**small, id2label=labels, label2id={v: k for k, v in labels.items()})
    reference = tr.ViTForImageClassification(config).eval()
    for name, module in (("whole", reference), ("headless", reference.vit)):
        module.save_pretrained(tmp_path / name)
        tr.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3
        ).save_pretrained(tmp_path / name)
    model = load_model(f"transformers:classifier:{tmp_path / 'whole'}", device="cpu")
    observer = Classifier(model, {"feline": ["cat", "tiger"], "canine": ["dog"]})
    x = torch.rand(6, 32, 32)
    with torch.no_grad():
        logits = reference(pixel_values=((x - 0.4) / 0.2)[:, None].expand(-1, 3, -1, -1)).logits
    p = logits.softmax(1)
    expected = np.where(p[:, [0, 2]].mean(1) > p[:, 1], "feline", "canine")
    assert observer.respond(x, None).tolist() == expected.tolist()
    with pytest.raises(ConfigError, match="no trained head"):
        load_model(f"transformers:classifier:{tmp_path / 'headless'}", device="cpu")
    assert load_model(f"transformers:{tmp_path / 'headless'}", device="cpu").layers()
