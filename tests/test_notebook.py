"""The notebook runs as it stands, without a network, and with a real llama.cpp for its judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.judges.conftest import gguf  # noqa: F401

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "hh_rlhf.ipynb"


def run(folder: Path, **replaced: str) -> list[str]:
    """What its cells print, run in a folder; `replaced` are lines of the first one, by their names."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[test]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    lines = notebook.cells[1].source.splitlines()
    for name, value in replaced.items():
        (place,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} ="))
        lines[place] = f"{name} = {value!r}"
    notebook.cells[1].source = "import torch; torch.set_num_threads(1)\n" + "\n".join(lines)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def test_it_holds_no_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[test]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_it_runs(tmp_path) -> None:
    printed = "".join(run(tmp_path))
    assert printed.count("Number of wins of the DPO model: ") == 2
    assert (tmp_path / "runs/notebook/checkpoints/best/adapter_model.safetensors").is_file()
    assert list((tmp_path / "runs/notebook/win_rate/verdicts").glob("*/parts/*.jsonl"))


@pytest.mark.slow
def test_it_runs_with_llama_cpp(gguf, tmp_path) -> None:  # noqa: F811
    printed = "".join(run(tmp_path, JUDGE=str(gguf("A"))))
    # It always says A.
    assert printed.count("Winner: Both") == 2
