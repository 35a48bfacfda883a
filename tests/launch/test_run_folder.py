import errno
import tempfile
from pathlib import Path

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.launch.run_folder import ensure_writable, latest_checkpoint, resolve_checkpoint
from tulu_lightning.models.saved import step_of


def test_the_newest_complete_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert latest_checkpoint(tmp_path) is None
    for name in ("step-9.ckpt", "step-000010.ckpt", "step-11.ckpt.tmp", "step-x.ckpt", "last.ckpt"):
        (folder / name).touch()
    assert latest_checkpoint(tmp_path) == folder / "step-000010.ckpt"
    (folder / "step-12.ckpt").mkdir()  # a sharded checkpoint is a folder
    assert latest_checkpoint(tmp_path) == folder / "step-12.ckpt"


def test_a_run_that_has_not_started_has_nothing_to_resume(tmp_path):
    assert resolve_checkpoint("auto", tmp_path / "nowhere") is None
    assert resolve_checkpoint(None, tmp_path) is None


@pytest.mark.parametrize("name", ["best", "hpc", "registry"])
def test_lightnings_own_names_are_refused(name, tmp_path, monkeypatch):
    """They ended in a traceback: no ModelCheckpoint is configured, no HPC checkpoint was found."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"ckpt_path: is {name}, .*Use auto, last, none or the path"):
        resolve_checkpoint(name, tmp_path)
    Path(name).touch()
    assert resolve_checkpoint(name, tmp_path) == name


def test_an_address_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"ckpt_path: is https://host/step-4\.ckpt, an address.* Copy it there first"):
        resolve_checkpoint("https://host/step-4.ckpt", tmp_path)


def test_a_checkpoint_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(tmp_path / "step-4.ckpt", tmp_path)
    assert str(caught.value) == (
        f"ckpt_path: there is no checkpoint '{tmp_path}/step-4.ckpt'. "
        "Give an existing one, or auto to resume the run if it can be."
    )
    (tmp_path / "step-40.ckpt").touch()
    with pytest.raises(InputError, match=r"Did you mean '.*/step-40\.ckpt'\?"):
        resolve_checkpoint(tmp_path / "step-4.ckpt", tmp_path)


def test_the_step_is_read_from_the_name():
    assert step_of("runs/x/checkpoints/step-000012.ckpt") == 12
    assert step_of("last.ckpt") is None


def test_a_run_folder_is_created_and_left_clean(tmp_path):
    assert list(ensure_writable(tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        ensure_writable(tmp_path / "file" / "run")
    assert str(caught.value) == (
        f"{tmp_path}/file/run: the run folder cannot be written (Not a directory). "
        "Set trainer.default_root_dir to a folder you can write to."
    )

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        ensure_writable(tmp_path)
