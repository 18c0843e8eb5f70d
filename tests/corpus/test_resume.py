"""Runs that are killed, interrupted or out of space end, given again, with the files of a run that was not."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiny_corpora import ROOT, content, json_lines, read_lines, run, small_units, still_alive, write_lines

from megatron_cpt.corpus import partial as partial_module
from megatron_cpt.corpus import publish as publish_module
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, read_corpus_manifest
from megatron_cpt.corpus.partial import PartialCorpus, partial_folder, read_state
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.utils.errors import InputError

KILLED = 137


@pytest.fixture(autouse=True)
def _many_units_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 400)
    monkeypatch.setattr(partial_module, "SECONDS_BETWEEN_CHECKPOINTS", 0)


def some(name: str, count: int = 12) -> list[dict[str, Any]]:
    return [{"text": f"{name} document {i} 文档 " + "x" * (i * 7 % 50), "id": f"{name}{i}"} for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Input of every kind, with a document that is skipped here and there."""
    inside = tmp_path / "in"
    write_lines(inside / "a.jsonl", [*some("a"), {"text": ""}, *some("b", 3)])
    (inside / "b.jsonl.gz").write_bytes(gzip.compress(json_lines([*some("c", 5), {"id": 1}, *some("d")])))
    pq.write_table(pa.Table.from_pylist([*some("e"), {"text": None, "id": "none"}]), inside / "c.parquet", row_group_size=5)
    (inside / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines(some("f"))))
    return str(inside)


def settings_for(folder: str, **more: Any) -> dict[str, Any]:
    return {"input": folder, "metadata_keys": ["id"], "on_error": "skip", **more}


def facts(prefix: Path) -> dict[str, Any]:
    """The manifest without what differs from run to run."""
    found: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_bytes())
    return {name: value for name, value in found.items() if name not in ("command", "duration_seconds")}


def in_child(work: Callable[[], object]) -> int:
    """The status with which a forked process ends that does `work`: 0, 1 after an error, KILLED."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


EVENTS = ("replace", "unlink", "fsync", "rmdir")


def count_events(at: int, happen: Callable[[], None], patch: pytest.MonkeyPatch) -> list[str]:
    """Do `happen` in place of the at-th (from 1) step that changes what is on the disk; returns the steps so far.

    Steps are renames, removals and syncs, and, in the middle of `add`, a flush of half of the files.
    """
    seen: list[str] = []
    main = os.getpid()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if os.getpid() == main:
                seen.append(name)
                if len(seen) == at:
                    happen()
            return original(*arguments, **named)

        return call

    def add(self: PartialCorpus, *unit: Any) -> None:
        original_add(self, *unit)
        for stream in list(self._streams.values())[len(seen) % 2 :: 2]:
            stream.flush()
        seen.append("add")
        if len(seen) == at:
            happen()

    original_add = PartialCorpus.add
    for name in EVENTS:
        patch.setattr(os, name, counted(name, getattr(os, name)))
    patch.setattr(PartialCorpus, "add", add)
    return seen


def kill_at(at: int, prefix: Path, tokenizer: str, settings: dict[str, Any]) -> int:
    """Run in a process that ends, without cleaning up, at the at-th step; its status."""

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            count_events(at, lambda: os._exit(KILLED), patch)
            run(prefix, tokenizer, **settings)

    return in_child(work)


def steps_of(prefix: Path, tokenizer: str, settings: dict[str, Any]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        seen = count_events(0, lambda: None, patch)
        run(prefix, tokenizer, **settings)
    return seen


def points(steps: list[str]) -> tuple[list[int], list[int]]:
    """(steps while there was something to encode, steps after it, but few of those that only remove the folder)."""
    last_add = len(steps) - steps[::-1].index("add")
    last_rename = len(steps) - steps[::-1].index("replace")
    return list(range(1, last_add)), [*range(last_add, last_rename + 2), len(steps) - 2, len(steps)]


SCENARIOS: dict[str, dict[str, Any]] = {
    "as they come": {},
    "two workers": {"workers": 2},
    "shuffled": {"shuffle_documents": 7},
    "a partition": {"partition": "1/2"},
    "fast tokenizer": {"fast_tokenizer": "always"},
    "held out": {"holdout": 7, "shuffle_documents": 7},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_anywhere_then_run_again(name: str, tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    settings = settings_for(folder, **SCENARIOS[name])
    (tmp_path / "wanted").mkdir()
    steps = steps_of(tmp_path / "wanted" / "c", tiny_tokenizer_dir, settings)
    suffix = "-00001-of-00002" if "partition" in settings else ""
    names = [f"c{suffix}", *(["c_holdout"] if "holdout" in settings else [])]
    wanted = {name: (content(tmp_path / "wanted" / name), facts(tmp_path / "wanted" / name)) for name in names}
    before, after = points(steps)
    if name == "shuffled":
        after = [at for at in after if steps[at - 1] != "fsync"]  # between any two renames
    for at in [*before[:: 11 if name == "as they come" else 31], *after[:: 1 if name == "shuffled" else 7]]:
        out = tmp_path / f"at{at}"
        out.mkdir()
        assert kill_at(at, out / "c", tiny_tokenizer_dir, settings) == KILLED
        with suppress(InputError):  # it was complete already
            run(out / "c", tiny_tokenizer_dir, **settings)
        assert {name: (content(out / name), facts(out / name)) for name in names} == wanted, (at, steps[at - 1])
        files = {f"{name}{end}" for name in names for end in (*wanted[name][0], ".json")}
        assert {path.name for path in out.iterdir()} == files, (at, steps[at - 1])
        shutil.rmtree(out)


def test_killed_again_and_again(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    settings = settings_for(folder, shuffle_documents=3)
    steps = steps_of(tmp_path / "wanted", tiny_tokenizer_dir, settings)
    (tmp_path / "out").mkdir()
    runs = 0
    while (status := kill_at(20 + runs, tmp_path / "out" / "c", tiny_tokenizer_dir, settings)) == KILLED:
        runs += 1
        assert runs < len(steps)
    assert (status, runs > 3) == (0, True)
    assert content(tmp_path / "out" / "c") == content(tmp_path / "wanted")
    assert [path.name for path in (tmp_path / "out").glob("*partial*")] == []


def test_an_old_corpus_is_whole_or_replaced_wherever_the_kill(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """Overwriting: at any time a manifest that is there vouches for the files beside it."""
    source = write_lines(tmp_path / "old.jsonl", [{"text": "old", "id": 0}, {"text": ""}])
    settings = settings_for(folder, overwrite=True)
    new = run(tmp_path / "new", tiny_tokenizer_dir, **settings).prefix
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(source))
    old = content(tmp_path / "c")
    steps = steps_of(tmp_path / "c", tiny_tokenizer_dir, settings)
    renames = [at for at in points(steps)[1] if steps[at - 1] != "fsync"]
    for at in renames[1::2]:
        run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(source, overwrite=True))
        assert content(tmp_path / "c") == old
        assert kill_at(at, tmp_path / "c", tiny_tokenizer_dir, settings) == KILLED
        if (tmp_path / "c.json").exists():
            assert content(tmp_path / "c") in (old, content(new))
            check_files(tmp_path / "c")
        if content(tmp_path / "c") != content(new):
            # within the renames it needs no second permission; the old corpus is gone then
            again = settings if content(tmp_path / "c") == old else settings_for(folder)
            run(tmp_path / "c", tiny_tokenizer_dir, **again)
        assert content(tmp_path / "c") == content(new)
        shutil.rmtree(tmp_path / "c.partial", ignore_errors=True)


def check_files(prefix: Path) -> CorpusManifest:
    manifest = read_corpus_manifest(str(prefix))
    for suffix, info in manifest.files.items():
        assert sha256_file(f"{prefix}.{suffix}") == info.sha256
    return manifest


def test_checksums_of_what_was_read_before_the_interruption(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    settings = settings_for(folder)
    steps = steps_of(tmp_path / "c", tiny_tokenizer_dir, settings)
    before, after = points(steps)
    for at in (before[-20], after[8]):
        assert kill_at(at, tmp_path / f"c{at}", tiny_tokenizer_dir, settings) == KILLED
        run(tmp_path / f"c{at}", tiny_tokenizer_dir, **settings)
        found = read_corpus_manifest(str(tmp_path / f"c{at}")).sources
        assert [source.sha256 for source in found] == [sha256_file(source.path) for source in found]


def test_a_finished_run_leaves_nothing_but_the_corpus(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    run(tmp_path / "out" / "c", tiny_tokenizer_dir, **settings_for(folder))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "c.bin", "c.idx", "c.json", "c.metadata.jsonl", "c.errors.jsonl",
    }  # fmt: skip
    assert len(read_lines(tmp_path / "out" / "c.errors.jsonl")) == 3


# --- what may and what may not change ---


def interrupt(prefix: Path, tokenizer: str, units: int = 4, **settings: Any) -> None:
    """Stop a run after some units."""

    def stop_after(self: PartialCorpus, *unit: Any) -> None:
        if self.units == units:
            raise KeyboardInterrupt
        original(self, *unit)

    original = PartialCorpus.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialCorpus, "add", stop_after)
        with pytest.raises(KeyboardInterrupt, match=r"is unfinished; \d+ documents? safe: give the same command"):
            run(prefix, tokenizer, **settings)
    assert (read_state(partial_folder(str(prefix))) or {})["units"] == units


CHANGES: list[tuple[str, Any]] = [
    ("text_key", "id"),
    ("metadata_keys", ["text"]),
    ("document_separator", "#"),
    ("max_document_characters", 10**6),
    ("eos", "none"),
    ("bos", "document"),
    ("eos_token", "!"),
    ("language", "zh"),
    ("shuffle_documents", 1),
    ("holdout", 3),
]


def test_other_settings_are_refused(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    interrupt(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    before = {path.name: path.read_bytes() for path in (tmp_path / "c.partial").iterdir()}
    for field, value in CHANGES:
        said = "tokenizer" if field == "eos_token" else field
        with pytest.raises(InputError, match=rf"c\.partial: an unfinished corpus of another run: {said}\b"):
            run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder) | {field: value})
    assert {path.name: path.read_bytes() for path in (tmp_path / "c.partial").iterdir()} == before


@pytest.mark.parametrize(("field", "value"), CHANGES[::4])
def test_other_settings_with_overwrite_begin_anew(
    field: str, value: Any, tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    interrupt(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    changed = settings_for(folder) | {field: value}
    run(tmp_path / "c", tiny_tokenizer_dir, **changed, overwrite=True)
    run(tmp_path / "wanted", tiny_tokenizer_dir, **changed)
    assert content(tmp_path / "c") == content(tmp_path / "wanted")
    assert facts(tmp_path / "c") == facts(tmp_path / "wanted")


@pytest.mark.parametrize(("field", "value"), [("language", "zh"), ("shuffle_documents", 1), ("eos", "none")])
def test_other_settings_are_refused_within_the_renames(
    field: str, value: Any, tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    """A complete corpus that only waits for its names is not passed off as what is asked for now."""
    steps = steps_of(tmp_path / "wanted", tiny_tokenizer_dir, settings_for(folder))
    renames = [i for i, step in enumerate(steps, start=1) if step == "replace"]
    assert kill_at(renames[-2], tmp_path / "c", tiny_tokenizer_dir, settings_for(folder)) == KILLED
    with pytest.raises(InputError, match=rf"another run: {field}|found .*c\.bin"):
        run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder) | {field: value})
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


def test_other_input_is_refused(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    interrupt(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    file, kept = Path(folder) / "a.jsonl", tmp_path / "kept"
    shutil.copy2(file, kept)
    for change in ("longer", "touched", "gone", "more"):
        if change == "longer":
            file.write_bytes(file.read_bytes() + b'{"text": "more"}\n')
            os.utime(file, ns=(0, kept.stat().st_mtime_ns))
        elif change == "touched":
            os.utime(file, (1, 1))
        elif change == "gone":
            file.unlink()
        else:
            (Path(folder) / "z.jsonl").write_text('{"text": "more"}\n')
        with pytest.raises(InputError, match="another run: input"):
            run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
        if change != "more":
            shutil.copy2(kept, file)
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder), overwrite=True)
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


def test_another_tokenizer_is_refused(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    interrupt(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    other = shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    description = json.loads((other / "tokenizer.json").read_text())
    description["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="another run: tokenizer is"):
        run(tmp_path / "c", str(other), **settings_for(folder))


def test_workers_and_on_error_may_change(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """As a user does it: the run stops at the first bad document, and goes on with more workers and without it."""
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder))
    with pytest.raises(InputError, match=r"a\.jsonl:13: no text"):
        run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder) | {"on_error": "fail"})
    assert (read_state(tmp_path / "c.partial") or {})["units"] > 0
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, workers=3))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


def test_two_runs_at_once(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """The second is refused and does no harm to the first."""
    first, running, go_on = tmp_path / "c", tmp_path / "running", tmp_path / "go_on"
    original = PartialCorpus.checkpoint

    def wait(self: PartialCorpus) -> None:
        original(self)
        running.touch()
        while not go_on.exists():
            time.sleep(0.01)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PartialCorpus, "checkpoint", wait)
            run(first, tiny_tokenizer_dir, **settings_for(folder))

    child = threading.Thread(target=lambda: status.append(in_child(work)))
    status: list[int] = []
    child.start()
    try:
        while not running.exists():
            time.sleep(0.01)
        for _ in range(2):
            with pytest.raises(InputError, match=r"c\.partial: another process is writing this corpus"):
                run(first, tiny_tokenizer_dir, **settings_for(folder), overwrite=True)
        run(tmp_path / "other", tiny_tokenizer_dir, **settings_for(folder))
    finally:
        go_on.touch()
        child.join()
    assert status == [0]
    assert content(first) == content(tmp_path / "other")


# --- no space left ---


@pytest.mark.parametrize("name", ["as they come", "shuffled"])
def test_no_space_left(name: str, tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """Syncing fails at some time: there is no corpus, and when there is space again the run goes on to the same files."""
    settings = settings_for(folder, **SCENARIOS[name])

    def no_space() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    steps = steps_of(tmp_path / "wanted", tiny_tokenizer_dir, settings)
    syncs = [i for i, step in enumerate(steps, start=1) if step == "fsync"]
    for at in [*syncs[:-8:17], *syncs[-8::2]]:
        with pytest.MonkeyPatch.context() as patch:
            count_events(at, no_space, patch)
            with pytest.raises(InputError, match=rf"c{at}.*No space left on device"):
                run(tmp_path / f"c{at}", tiny_tokenizer_dir, **settings)
        assert not list(tmp_path.glob(f"c{at}.[bijm]*"))
        run(tmp_path / f"c{at}", tiny_tokenizer_dir, **settings)
        assert content(tmp_path / f"c{at}") == content(tmp_path / "wanted"), at
        assert not list(tmp_path.glob(f"c{at}.partial*"))


@pytest.mark.parametrize("what", ["write_index", "shuffle_documents", "sha256_file"])
def test_no_space_for_the_last_steps(
    what: str, tmp_path: Path, folder: str, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = settings_for(folder, shuffle_documents=1)
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, what, no_space)
        with pytest.raises(InputError, match=r"c\.partial: cannot be written \(No space left"):
            run(tmp_path / "c", tiny_tokenizer_dir, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "c.partial"}
    run(tmp_path / "c", tiny_tokenizer_dir, **settings)
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings)
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


# --- the real tool ---

DRIVER = """
import sys, time
from megatron_cpt.corpus import partial, preprocess, reading
partial.SECONDS_BETWEEN_CHECKPOINTS = 0
reading.UNIT_BYTES = preprocess.UNIT_BYTES = 400
add = partial.PartialCorpus.add
def slow(self, *unit):
    add(self, *unit)
    print(self.units, flush=True)
    time.sleep({seconds})
partial.PartialCorpus.add = slow
sys.argv = ["tools/preprocess_data.py", *sys.argv[1:]]
exec(open(sys.argv[0]).read())
"""


def command(prefix: Path, folder: str, tokenizer: str, seconds: float = 0.02, **settings: Any) -> list[str]:
    options = {"input": folder, "tokenizer": tokenizer, "output_prefix": prefix, "language": "en", "workers": 2}
    options |= {"metadata_keys": "id", "on_error": "skip", **settings}
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-c", DRIVER.format(seconds=seconds), *words]


@pytest.fixture
def tool() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        started.append(subprocess.Popen(words, start_new_session=True, **piped, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_unit(process: subprocess.Popen[str], unit: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(unit):
            return
    raise AssertionError(f"it ended before unit {unit}: {process.communicate()}")


def test_the_tool_is_killed(
    tmp_path: Path, folder: str, tiny_tokenizer_dir: str, tool: Callable[..., subprocess.Popen[str]]
) -> None:
    """A real kill -9 of the main process: its helpers go too, and the same command goes on where it was."""
    process = tool(command(tmp_path / "c", folder, tiny_tokenizer_dir))
    wait_for_unit(process, 5)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) == 3
    process.kill()
    process.communicate()
    assert still_alive(helpers) == []
    assert (read_state(tmp_path / "c.partial") or {})["units"] >= 4
    process = tool(command(tmp_path / "c", folder, tiny_tokenizer_dir, 0))
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()[-1]) == (0, f"{tmp_path}/c.json"), err
    assert "going on with" in err
    assert int(out.splitlines()[0]) >= 5
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_the_tool_is_told_to_stop(
    number: int,
    whole_group: bool,
    tmp_path: Path,
    folder: str,
    tiny_tokenizer_dir: str,
    tool: Callable[..., subprocess.Popen[str]],
) -> None:
    """SIGTERM to the main process (kill) or to all processes at once (SLURM), or Ctrl-C."""
    process = tool(command(tmp_path / "c", folder, tiny_tokenizer_dir))
    wait_for_unit(process, 3)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    end_of_text, line = err.strip().splitlines()
    assert end_of_text.startswith("documents end with ")
    assert line.startswith(f"interrupted: {tmp_path}/c is unfinished; ")
    assert "give the same command again to go on" in line
    assert {path.name for path in tmp_path.iterdir()} == {"in", "c.partial"}
    units = (read_state(tmp_path / "c.partial") or {})["units"]
    assert units >= 3
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


def test_a_killed_worker_ends_the_tool_with_one_line(
    tmp_path: Path, folder: str, tiny_tokenizer_dir: str, tool: Callable[..., subprocess.Popen[str]]
) -> None:
    process = tool(command(tmp_path / "c", folder, tiny_tokenizer_dir))
    wait_for_unit(process, 3)
    _, *workers = psutil.Process(process.pid).children()  # the first is the one that checks
    workers[0].kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1, err
    end_of_text, line = err.strip().splitlines()
    assert end_of_text.startswith("documents end with ")
    assert "killed by signal 9" in line
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


@pytest.mark.parametrize(("limit", "settings"), [(600, {}), (4000, {"shuffle_documents": 1})])
def test_a_disk_that_is_really_full(
    limit: int,
    settings: dict[str, Any],
    tmp_path: Path,
    folder: str,
    tiny_tokenizer_dir: str,
    tool: Callable[..., subprocess.Popen[str]],
) -> None:
    """No file may grow beyond a limit, which `write` answers as it does on a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = command(tmp_path / "c", folder, tiny_tokenizer_dir, 0, **settings)
    run(tmp_path / "wanted", tiny_tokenizer_dir, **settings_for(folder, **settings))
    assert (tmp_path / "wanted.bin").stat().st_size > limit
    process = tool(words, preexec_fn=limited)
    _, err = process.communicate()
    assert process.returncode == 2, err
    end_of_text, line = err.strip().splitlines()
    assert end_of_text.startswith("documents end with ")
    assert line.startswith("error: ")
    assert "File too large" in line
    assert f"{tmp_path}/c" in line  # where there is no space
    assert not list(tmp_path.glob("c.[bijme]*"))
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, **settings))
    assert content(tmp_path / "c") == content(tmp_path / "wanted")


# --- places that cannot be written ---


def test_things_in_the_way(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    for name in ("c.partial", "d.partial.lock", "e.bin"):
        prefix = tmp_path / name[0]
        in_the_way = tmp_path / name
        if name == "c.partial":
            in_the_way.write_text("a file")
        else:
            in_the_way.mkdir()
        with pytest.raises((InputError, OSError)) as refusal:
            run(prefix, tiny_tokenizer_dir, **settings_for(folder))
        assert str(in_the_way.parent if in_the_way.suffix == ".lock" else in_the_way) in str(refusal.value)
        assert in_the_way.exists()
        assert not Path(f"{prefix}.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_folder_that_not_even_root_may_write_to(folder: str, tiny_tokenizer_dir: str) -> None:
    for prefix in ("/proc/new_folder/c", "/proc/c"):
        with pytest.raises((InputError, OSError), match="/proc"):
            run(prefix, tiny_tokenizer_dir, **settings_for(folder))


def test_in_a_thread_signals_are_left_alone(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    made: list[IndexedCorpus] = []
    thread = threading.Thread(target=lambda: made.append(run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder))))
    thread.start()
    thread.join()
    assert made[0].num_documents == 56
    assert signal.getsignal(signal.SIGTERM) is before
    run(tmp_path / "d", tiny_tokenizer_dir, **settings_for(folder))
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_is_not_slow(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """A run that is all done but the renames takes no time: nothing is encoded again."""
    settings = settings_for(folder)
    steps = steps_of(tmp_path / "wanted", tiny_tokenizer_dir, settings)
    renames = [i for i, step in enumerate(steps, start=1) if step == "replace"]
    assert kill_at(renames[-1], tmp_path / "c", tiny_tokenizer_dir, settings) == KILLED
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialCorpus, "add", lambda *_: pytest.fail("encoded again"))
        run(tmp_path / "c", tiny_tokenizer_dir, **settings)
    assert time.monotonic() - began < 5
    assert content(tmp_path / "c") == content(tmp_path / "wanted")
