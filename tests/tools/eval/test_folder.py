# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one run and one process at a time."""

import pytest

from vllm_hybrid_kv.tools.eval.folder import Folder, model_identity
from vllm_hybrid_kv.tools.output import ToolError

IDENTITY = {"model": {"name": "a", "files": [["b", 1, 2]]}, "data": "abc", "engine_args": {}}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "run")


def refusal(folder, identity=IDENTITY):
    with pytest.raises(ToolError) as error, folder.opened(identity):
        pass
    assert "--work" in str(error.value)
    return str(error.value)


def test_the_same_run_can_open_its_folder_again(folder):
    for _ in range(2):
        with folder.opened(IDENTITY):
            folder.of("auto")
    assert (folder.path / "auto").is_dir()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"data": "abd"}, "another data;"),
        ({"model": {"name": "a", "files": [["b", 1, 3]]}}, "another model;"),
        ({"engine_args": {"dtype": "float32"}, "vllm": "1"}, "another engine_args, vllm;"),
    ],
)
def test_another_run_is_rejected_with_the_difference(folder, change, differs):
    with folder.opened(IDENTITY):
        pass
    assert differs in refusal(folder, {**IDENTITY, **change})


def test_a_foreign_file_is_not_a_run(folder):
    folder.path.mkdir()
    (folder.path / "run.json").write_text("5")
    assert "does not belong to an evaluation" in refusal(folder)


def test_a_folder_is_locked_while_it_is_open(folder):
    # Locks of `flock` belong to an open file: a second one of this process conflicts, too.
    with folder.opened(IDENTITY):
        assert "another evaluation uses this folder" in refusal(folder)
    with folder.opened(IDENTITY):
        pass


def test_a_folder_that_cannot_be_written_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    assert "choose a writable folder" in refusal(Folder(tmp_path / "file" / "run"))


def test_every_cache_has_its_own_folder(folder):
    folder.path.mkdir()
    names = ("auto", "k[a=0,b=1]", "k[a=0_b=1]", "k_a=0_b=1", "k")
    folders = [folder.of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders == [folder.of(name) for name in names]
    assert all(one.parent == folder.path for one in folders)


def test_a_changed_file_makes_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model_identity(str(tmp_path))
    assert before == model_identity(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("org/model") == {"name": "org/model"}
