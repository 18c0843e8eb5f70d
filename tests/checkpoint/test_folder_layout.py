"""What counts as a checkpoint, and which one is the newest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.folders import atomic_folder, make_tombstone, remove_unfinished, set_aside_damaged, to_delete
from megatron_cpt.checkpoint.layout import (
    TRACKER,
    check_complete,
    check_intact,
    checkpoint_name,
    newest_complete,
    write_tracker,
)
from megatron_cpt.utils.errors import InputError

FORMAT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}'
FILES = {"metadata.json": len(FORMAT), ".metadata": 30, "common.pt": 40, "hf/config.json": 5, "__0_0.distcp": 1000}


def make(root: Path, iteration: int | None) -> Path:
    """A folder that looks like a checkpoint."""
    folder = root / checkpoint_name(iteration)
    (folder / "hf").mkdir(parents=True)
    for name, size in FILES.items():
        (folder / name).write_bytes(FORMAT if name == "metadata.json" else b"x" * size)
    (folder / "manifest.json").write_text(json.dumps({"files": FILES}))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_missing_and_cut_files_are_found(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    check_complete(str(folder))
    (folder / name).write_bytes((folder / name).read_bytes().replace(b", ", b",", 1)[: FILES[name] - 1])
    with pytest.raises(InputError, match=f"{name} has {FILES[name] - 1} bytes, manifest.json says {FILES[name]}"):
        check_complete(str(folder))
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"is not complete: {name} is missing"):
        check_complete(str(folder))


def test_a_manifest_that_cannot_be_read_is_not_complete(tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    (folder / "manifest.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        check_complete(str(folder))
    (folder / "manifest.json").unlink()  # as other software leaves it
    check_complete(str(folder))


def test_the_newest_complete_one_counts_whatever_the_tracker_says(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert newest_complete(root) == (None, [])
    assert newest_complete(root + "/nowhere") == (None, [])
    make(tmp_path, None)
    assert newest_complete(root) == (f"{root}/release", [])
    for iteration in (10, 20, 30):
        make(tmp_path, iteration)
    write_tracker(root, 20)  # killed between the rename and the tracker
    assert newest_complete(root) == (f"{root}/iter_0000030", [])
    (tmp_path / "iter_0000030" / "common.pt").unlink()
    (tmp_path / "iter_0000020" / "__0_0.distcp").write_bytes(b"")
    folder, passed_over = newest_complete(root)
    assert folder == f"{root}/iter_0000010"
    assert [line.split(" is not complete: ")[0] for line in passed_over] == [
        f"checkpoint {root}/iter_0000030",
        f"checkpoint {root}/iter_0000020",
    ]


def test_a_tracker_that_names_nothing_is_mentioned(tmp_path: Path) -> None:
    root = str(tmp_path)
    make(tmp_path, 10)
    write_tracker(root, 40)
    assert newest_complete(root) == (
        f"{root}/iter_0000010",
        [f"{root}/latest_checkpointed_iteration.txt names iter_0000040, which is not there"],
    )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon\n")
    folder, passed_over = newest_complete(root)
    assert folder == f"{root}/iter_0000010"
    assert "says 'soon'" in passed_over[0]


def test_unfinished_folders_do_not_count_and_are_removed(tmp_path: Path) -> None:
    root = str(tmp_path)
    make(tmp_path, 10)
    make(tmp_path, 20).rename(tmp_path / ".iter_0000020.tmp")
    make_tombstone(str(make(tmp_path, 5)))
    assert newest_complete(root) == (f"{root}/iter_0000010", [])
    remove_unfinished(root)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "started_from", "gone"),
    [
        (1, None, "release", [10, 20, 25, 30]),
        (3, None, "release", [10, 20]),
        (1, 20, "release", [10, 25, 30]),
        (2, 10, "release", [25]),
        (1, None, "iter_0000010", [20, 25, 30]),
        (9, None, "release", []),
    ],
)
def test_retention(keep_last: int, keep_every: int | None, started_from: str, gone: list[int], tmp_path: Path) -> None:
    for iteration in (None, 10, 20, 25, 30, 40):
        make(tmp_path, iteration)
    doomed = to_delete(str(tmp_path), keep_last, keep_every, str(tmp_path / started_from))
    assert doomed == [str(tmp_path / checkpoint_name(iteration)) for iteration in gone]


def test_retention_counts_complete_ones_only(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        make(tmp_path, iteration)
    for iteration in (20, 40):
        (tmp_path / checkpoint_name(iteration) / "common.pt").unlink()
    assert to_delete(str(tmp_path), 2, None, "elsewhere") == [str(tmp_path / "iter_0000020")]


def test_retention_neither_counts_nor_deletes_what_other_software_has_saved(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 99):
        make(tmp_path, iteration)
    for iteration in (10, 99):
        (tmp_path / checkpoint_name(iteration) / "manifest.json").unlink()
    assert to_delete(str(tmp_path), 1, None, "elsewhere") == [str(tmp_path / "iter_0000020")]


def test_damaged_checkpoints_are_set_aside_under_names_that_are_free(tmp_path: Path) -> None:
    for _ in range(2):
        for iteration in (10, 20, 30):
            if not (tmp_path / checkpoint_name(iteration)).exists():
                make(tmp_path, iteration)
        (tmp_path / "iter_0000030" / "common.pt").unlink()
        set_aside_damaged(str(tmp_path), 10)
        shutil.rmtree(tmp_path / "iter_0000030")  # not complete: it does not count anyway
    names = ["damaged_iter_0000020", "damaged_iter_0000020_2", "iter_0000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", ["²", "9" * 5000, "-1", "1_0"])
def test_a_tracker_names_a_step_or_nothing(content: str, tmp_path: Path) -> None:
    make(tmp_path, 7)
    (tmp_path / TRACKER).write_text(content, encoding="utf-8")
    folder, passed_over = newest_complete(str(tmp_path))
    assert folder == str(tmp_path / "iter_0000007")
    assert "should hold an iteration number" in passed_over[0]


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "nothing\0", "a\ud800", "", "a//b"])
@pytest.mark.parametrize("field", ["files", "crc32"])
def test_a_manifest_names_files_beside_it(name: str, field: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    (folder / "manifest.json").write_text(json.dumps({"files": FILES, field: {name: 1}}))
    with pytest.raises(InputError, match=f"{field} has .*; expected names of files beside it"):
        check_complete(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"metadata\.json is \[1\]; expected"),
        ("{", r"metadata\.json is not JSON"),
        ("{}", r"metadata\.json is \{\}; expected"),
        ('{"sharded_backend": "torch_dist", "more": 1}', r"metadata\.json is .*more.*; expected"),
        ('{"sharded_backend": "zarr"}', r"sharded_backend is 'zarr'; expected torch"),
        ('{"sharded_backend": ["torch_dist"]}', r"sharded_backend is \['torch_dist'\]; expected"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": "1"}', "sharded_backend_version is '1'; expected 1"),
    ],
)
def test_a_format_that_is_not_read_here(content: str, message: str, tmp_path: Path) -> None:
    """megatron-core reads this file without a look at it, after process groups have started."""
    folder = make(tmp_path, 7)
    (folder / "metadata.json").write_text(content)
    (folder / "manifest.json").unlink()  # as in a checkpoint of other software
    with pytest.raises(InputError, match=message):
        check_intact(str(folder))


@pytest.mark.parametrize("checksum", [7, "abc", "0000000G", ["00000000"]])
def test_checksums_are_checksums(checksum: object, tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    (folder / "manifest.json").write_text(json.dumps({"files": FILES, "crc32": {"common.pt": checksum}}))
    with pytest.raises(InputError, match=r"crc32 of 'common.pt' is .*; expected 8 hexadecimal digits"):
        check_complete(str(folder))


@pytest.mark.parametrize("size", ["40", -1, 40.0, None])
def test_sizes_are_numbers(size: object, tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    (folder / "manifest.json").write_text(json.dumps({"files": FILES | {"common.pt": size}}))
    with pytest.raises(InputError, match="names no files with sizes"):
        check_complete(str(folder))


def test_no_file_elsewhere_is_taken_for_one_of_the_model(tmp_path: Path) -> None:
    """It would be copied into every later checkpoint and into what people upload."""
    folder = make(tmp_path, 7)
    (folder / "hf" / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"hf/LICENSE is a symbolic link; expected a plain file"):
        check_complete(str(folder))


@pytest.mark.parametrize("name", ["metadata.json", "manifest.json", "hf/config.json", "run_config.yaml"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is a pipe or a device; expected a plain file"):
        check_complete(str(folder))


@pytest.mark.parametrize("name", ["link/", "link", "there/.", "there/", "new/deep", "lost/../new/deep", "link/../new"])
def test_a_folder_appears_however_its_place_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    path = f"{tmp_path}/{name}"
    with atomic_folder(path) as temporary:
        (Path(temporary) / "file").write_text("x")
    assert (Path(os.path.realpath(path)) / "file").read_text() == "x"
    assert (tmp_path / "link").is_symlink()
    assert not [found for found in tmp_path.rglob("*") if ".tmp" in found.name or found.name == "lost"]


def test_what_fails_leaves_no_folder_above_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(str(tmp_path / "a" / "b" / "c")):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
