"""Weights read from safetensors, tensor by tensor and row by row."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tulu_lightning.errors import InputError
from tulu_lightning.models.streaming import WeightFiles

TENSORS = {
    "half": torch.arange(24.0).view(6, 4).bfloat16(),
    "scalar": torch.tensor(3.0),
    "ids": torch.arange(10).view(5, 2),
    "long": torch.randn(1000, 100, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def split(tmp_path):
    """A folder with two files and their index."""
    names = list(TENSORS)
    files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tmp_path


def test_several_files_are_one(split):
    files = WeightFiles(split)
    assert files.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert files.shape(name) == tuple(tensor.shape)
        assert files.dtype(name) == tensor.dtype
        found = files.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert "half" in files
    assert "other" not in files


def test_rows_and_blocks(split):
    files = WeightFiles(split)
    assert torch.equal(files.read("half", 2, 5), TENSORS["half"][2:5])
    assert torch.equal(files.read("half", 4), TENSORS["half"][4:])
    assert files.read("half", 6, 6).shape == (0, 4)
    found = files.read_part("long", (slice(10, 20), slice(90, 100)))
    assert torch.equal(found, TENSORS["long"][10:20, 90:])
    assert found.untyped_storage().nbytes() == 10 * 10 * 4, "nothing is kept of the rest of the file"


def test_a_single_file_is_read_as_transformers_wrote_it(tiny):
    files, whole = WeightFiles(tiny), load_file(f"{tiny}/model.safetensors")
    assert files.names() == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(files.read(name), tensor)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), r"it has no model-00002-of-00002\."),
        (lambda folder: _cut(folder / "model-00001-of-00002.safetensors"), r"model-00001-of-.* is damaged \("),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), r"index\.json: is no index of w"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            r"is no index of files beside it",
        ),
        (
            lambda folder: shutil.copy(
                folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
            ),
            r"says that model-0000\d-of-00002\.safetensors has \w+, which it does not",
        ),
    ],
)
def test_a_damaged_folder_is_refused(split, damage, message):
    damage(split)
    with pytest.raises(InputError, match=message):
        WeightFiles(split)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_an_unknown_name_and_an_empty_folder_are_refused(split, tmp_path):
    with pytest.raises(InputError, match="its weights have no tensor other among their 4"):
        WeightFiles(split).read("other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"it has no model\.safetensors"):
        WeightFiles(tmp_path / "empty")
