"""What the tests share: golden checkpoints (values of transformers in f32), a real model, a runtime of two threads."""

import pytest

import rewardrt

from checkpoints import GOLDEN, SMOLLM2


@pytest.fixture(scope="session")
def runtime():
    with rewardrt.Runtime("cpu", threads=2) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def smollm2():
    assert (SMOLLM2 / "config.json").exists(), "make model puts SmolLM2-135M-Instruct there"
    return SMOLLM2


@pytest.fixture(scope="session")
def real(runtime, smollm2):
    """SmolLM2-135M-Instruct; tests do not change its weights."""
    with runtime.load_model(smollm2) as model:
        yield model


@pytest.fixture
def golden(runtime):
    """Loads a small random checkpoint of tests/golden in f32; it is closed after the test."""
    models = []

    def load(name, **options):
        models.append(runtime.load_model(GOLDEN / name, **{"precision": "f32", **options}))
        return models[-1]

    yield load
    for model in models:
        model.close()
