"""A small model, a few pictures and an encoder, shared by all tests of synthesis."""

import numpy as np
import pytest
import tiny_pipeline as tiny

from brainalign.data.stimuli import write_stimuli
from brainalign.features import load_model


@pytest.fixture(scope="session")
def stimuli(tmp_path_factory):
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (24, 4, 4, 3))
    images = np.kron(coarse, np.ones((1, 16, 16, 1))).astype(np.uint8)
    return write_stimuli(tmp_path_factory.mktemp("s") / "x", images, [f"im{i}" for i in range(24)])


@pytest.fixture(scope="session")
def model():
    return load_model("small-clip", device="cpu")


@pytest.fixture(scope="session")
def encoder(model, stimuli):
    return tiny.encoder(model, stimuli)
