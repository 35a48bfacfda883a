"""The quickstart notebook runs from top to bottom, and shows what its text says."""

import json
import statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def source() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[nbformat.NotebookNode, Path]:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder / "runs" / "quickstart"


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")


def metric(run: Path, stage: str, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_no_outputs_are_committed(source):
    assert [cell.outputs for cell in code(source)] == [[]] * len(code(source))
    assert {cell.execution_count for cell in code(source)} == {None}


def test_the_pack_it_shows_trains_the_answer_and_the_end_token_only(executed):
    notebook, _ = executed
    rows = [line for line in printed(notebook).splitlines() if line.startswith("<|user|>")]
    assert len(rows) == 3
    for row in rows:
        context, _, trained = row.partition("«")
        assert context.endswith("⏎<|assistant|>⏎")
        assert trained[0].isdigit()
        assert trained[1:] == "»«<|im_end|>»"


def test_sft_comes_near_the_lowest_loss_there_is(executed):
    loss = metric(executed[1], "sft", "loss")
    assert len(loss) == 30  # 240 rows, 16 a step, twice
    assert loss[0] > 5.0  # about ln(264): nothing is known yet
    assert 1.0 < statistics.mean(loss[-3:]) < 1.6  # ln(10) / 2 = 1.15


def test_ppo_raises_the_reward(executed):
    reward = metric(executed[1], "ppo", "reward")
    assert len(reward) == 15
    assert reward[0] < 3.0  # one digit in ten earns 10
    assert statistics.mean(reward[-3:]) > reward[0] + 4.0


def test_it_ends_with_two_plots_and_eight_rollouts(executed):
    notebook, _ = executed
    plots = [o for cell in code(notebook) for o in cell.outputs if o.output_type == "display_data"]
    assert len(plots) == 2
    assert printed(notebook).count("reward +") + printed(notebook).count("reward -") == 8
