# SPDX-License-Identifier: Apache-2.0
"""A run's folder takes one run, one process at a time, and never a score that is not whole."""

import multiprocessing

import numpy
import pytest

from vllm_hybrid_kv.tools.eval.errors import EvaluationError
from vllm_hybrid_kv.tools.eval.folder import (
    Folder,
    Scored,
    model_identity,
    read_scores,
    write_scores,
)

IDENTITY = {"model": {"name": "a", "files": [["b", 1, 2]]}, "data": "abc", "engine_args": {}}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "run")


def scored(positions=5):
    numbers = numpy.arange(float(positions))
    return Scored(-numbers, numbers / 7, numbers > 2)


def test_scores_come_back_as_they_were(tmp_path):
    write_scores(tmp_path / "a.npz", scored())
    back = read_scores(tmp_path / "a.npz", 5)
    for name in ("logprobs", "divergences", "agreements"):
        assert (getattr(back, name) == getattr(scored(), name)).all()
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("cut", [0, 1, 100, 400, -1])
def test_scores_that_are_not_whole_are_none(tmp_path, cut):
    file = tmp_path / "a.npz"
    write_scores(file, scored())
    file.write_bytes(file.read_bytes()[:cut])
    assert read_scores(file, 5) is None


def test_scores_of_another_length_are_none(tmp_path):
    write_scores(tmp_path / "a.npz", scored())
    assert read_scores(tmp_path / "a.npz", 6) is None
    assert read_scores(tmp_path / "b.npz", 5) is None


def test_the_same_run_goes_on(folder):
    for _ in range(2):
        with folder.opened(IDENTITY):
            folder.of("auto")
    assert (folder.path / "auto").is_dir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "abd"}, "data differs"),
        ({"model": {"name": "a", "files": [["b", 1, 3]]}}, "model differs"),
        ({"engine_args": {"dtype": "float32"}, "vllm": "1"}, "engine_args, vllm differ;"),
    ],
)
def test_another_run_is_refused_with_what_differs(folder, change, said):
    with folder.opened(IDENTITY):
        pass
    with pytest.raises(EvaluationError) as error, folder.opened({**IDENTITY, **change}):
        pass
    assert f"has another evaluation: {said}" in str(error.value)
    assert "--work" in str(error.value)


def test_a_file_of_somebody_elses_is_not_taken_for_a_run(folder):
    folder.path.mkdir()
    (folder.path / "run.json").write_text("5")
    with pytest.raises(EvaluationError, match="not an evaluation's"), folder.opened(IDENTITY):
        pass


def hold(path, held, go):
    with Folder(path).opened(IDENTITY):
        held.set()
        go.wait(30)


def test_two_processes_do_not_work_in_one_folder(folder):
    spawn = multiprocessing.get_context("spawn")
    held, go = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(folder.path, held, go))
    other.start()
    try:
        assert held.wait(30)
        with (
            pytest.raises(EvaluationError, match="another evaluation works there"),
            folder.opened(IDENTITY),
        ):
            pass
    finally:
        go.set()
        other.join(30)
    with folder.opened(IDENTITY):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(EvaluationError, match="give a folder that can be written"),
        Folder(tmp_path / "file" / "run").opened(IDENTITY),
    ):
        pass


def test_every_cache_has_a_folder_of_its_own(folder):
    folder.path.mkdir()
    names = ("auto", "k[a=0,b=1]", "k[a=0_b=1]", "k_a=0_b=1", "k")
    folders = [folder.of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders == [folder.of(name) for name in names]
    assert all(one.parent == folder.path for one in folders)


def test_a_model_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model_identity(str(tmp_path))
    assert before == model_identity(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("org/model") == {"name": "org/model"}
