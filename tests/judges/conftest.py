"""Tiny GGUF judges, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

NO_LLAMA = "llama-cpp-python is not installed: pip install -e '.[judge]'"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory):
    """`gguf(always="A")`: the file of a tiny judge that llama.cpp runs, made once in a session."""
    pytest.importorskip("llama_cpp", reason=NO_LLAMA)
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[test]'")
    from tests.judges import tiny_gguf

    root = tmp_path_factory.mktemp("gguf")

    def file(always: str | None = None) -> Path:
        path = root / f"{always}.gguf"
        return path if path.exists() else tiny_gguf.make(path, always=always)

    return file
