"""What every room's tests share: tiny models on disk, quiet libraries, shapes checked while testing."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
# Caches of the tests do not outlive them; processes that tests start inherit the folder.
if "TANDEM_CACHE" not in os.environ:
    os.environ["TANDEM_CACHE"] = (_cache := tempfile.TemporaryDirectory(prefix="tandem-tests-")).name

from jaxtyping import install_import_hook

# Tensor signatures carry shapes; in the tests they are checked.
install_import_hook(
    [
        "trainer.schema",
        "trainer.objectives",
        "trainer.metrics",
        "trainer.policy.logprobs",
        "trainer.data.layout",
    ],
    "beartype.beartype",
)

from pathlib import Path

import pytest
import torch

from tests import tiny_models

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2")


@pytest.fixture(autouse=True)
def _one_thread_each() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """`models("llama")`: the folder of a tiny random model of that family, made once in a session."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.make(family, root / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(models) -> Path:
    return models("llama")


@pytest.fixture(scope="session")
def tiny_gpt2(models) -> Path:
    return models("gpt2")


@pytest.fixture(scope="session")
def tiny_gemma2(models) -> Path:
    return models("gemma2")


@pytest.fixture(scope="session")
def tiny_qwen2(models) -> Path:
    return models("qwen2")


@pytest.fixture(scope="session")
def tiny_mistral(models) -> Path:
    return models("mistral")
