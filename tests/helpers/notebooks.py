"""Runs notebooks in a real kernel, in a folder."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


def run(notebook: Any, folder: Path) -> list[list[Any]]:
    """Run a notebook, or a list of cells. Return the outputs of each code cell as a saved notebook holds them."""
    pytest.importorskip("ipykernel", reason="needs ipykernel, to run a notebook")
    pytest.importorskip("nbclient", reason="needs nbconvert, to run a notebook")
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    if isinstance(notebook, list):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in notebook])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the other tests
    resources = {"metadata": {"path": str(folder)}}
    with TemporaryDirectory() as place:  # not TCP: kernels that start together may choose the same port
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{place}/socket"}})
        NotebookClient(notebook, timeout=300, config=config, resources=resources).execute(env=environment)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def printed(outputs: list[Any], stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)


def shown(outputs: list[Any], kind: str = "text/plain") -> list[str]:
    """Return what the outputs display, as one MIME type."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]
