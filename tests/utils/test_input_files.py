"""Files of strangers: what they say is what is read, and none takes long, much memory, or the process with it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.convert.targets import check_hf_target, check_megatron_target
from megatron_cpt.corpus.publish import check_output_folder
from megatron_cpt.curation.config import CurateConfig
from megatron_cpt.curation.curate import check_curate_output as check_curated
from megatron_cpt.posttrain.run_files import check_save
from megatron_cpt.study.grid import check_study_folder as check_study_folder
from megatron_cpt.training import run_files as training_files
from megatron_cpt.training.order_export import check_export_output as check_order
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import (
    MOST_JSON_BYTES,
    amount,
    check_folder,
    load_json,
    load_yaml,
    number,
    parse_json,
    parse_yaml,
    plain_number,
    text_of,
    why_unwritable,
)

TENFOLD = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}' if before else '1'] * 10)}]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
HOSTILE = {
    "aliases": TENFOLD,
    "merged aliases": "a: &a {k: 1}\n" + "b: {<<: [" + "*a, " * 60_000 + "]}\n",
    "an alias within itself": "a: &a [*a]\n",
    "brackets": "a: " + "[" * 50_000,
    "braces": "{" * 50_000,
    "dashes": "- " * 50_000 + "1",
    "many values": "a: [" + "1," * 200_000 + "]",
    "a tag": "a: !!python/object/apply:os.system [true]",
    "a field twice": "a: 1\nb: 2\na: 3\n",
    "a field twice in a section": "s: {a: 1, 'a': 2}\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "a list as a name": "? [1]\n: 2\n",
    "junk": "\x00\x01\x02",
    "too large": "a: b\n" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        load_yaml(path, "configuration")
    assert time.process_time() - began < 20
    message = str(caught.value)
    assert message.startswith(f"configuration {path} ")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: 1\nb: \xff\n", "is no text: byte 8 is not UTF-8; expected UTF-8 text"),
        ("a: 1\n".encode("utf-16"), "is UTF-16; expected UTF-8, as iconv -f UTF-16 -t UTF-8 makes of it"),
        ("a: 1\n".encode("utf-16-be"), "is UTF-16BE; expected UTF-8"),
        ("a: 1\n".encode("utf-32-le"), "is UTF-32LE; expected UTF-8"),
        (b"\x7fELF\x02\x01\x01" + bytes(64), "is not YAML: line 1: character 0x7f; expected text"),
        (b"a: 1\nb: \x00\n", "is not YAML: line 2: character 0x0; expected text"),
        (b"\x89PNG\r\n", "is no text: byte 0 is not UTF-8; expected UTF-8 text"),
    ],
)
def test_what_is_no_text_is_said_in_our_words(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_yaml(path, "configuration")
    assert str(caught.value).startswith(f"configuration {path} {said}")
    assert "codec" not in str(caught.value)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(path) == {"a": 1}


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes("a: é\n".encode("latin-1"))
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "No such file"),
        (tmp_path / "latin1", "is no text: byte 3 is not UTF-8; expected"),
    ):
        for read in (load_yaml, load_json):
            with pytest.raises(InputError, match=str(path)) as caught:
                read(path)
            assert words in str(caught.value) or read is load_json
    with pytest.raises(InputError, match="has more than"):
        load_yaml("/dev/zero")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "comments").write_text("# training:\n")
    assert load_yaml(tmp_path / "empty") == load_yaml(tmp_path / "comments") == {}
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(tmp_path / "mark") == {"a": 1}


SCALARS = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(alphabet="0123456789._:eExXoO-+nyTrue ~", max_size=8))


@given(text=SCALARS.map(str))
def test_a_scalar_says_what_is_written(text: str) -> None:
    """Whatever is made of it, its text can be had back."""
    try:
        (value,) = parse_yaml(f"[{text}]", "") or [None]
    except (InputError, ValueError):
        return
    if value is None:
        assert text.strip() in ("", "~", "null")
    elif isinstance(value, bool | int | float | str):
        assert text_of(value) == text.strip()


@given(value=st.recursive(st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(), st.lists, max_leaves=20))
def test_what_pyyaml_writes_is_read(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump({"a": value}), "") == {"a": value}


@given(value=st.floats(allow_nan=False, allow_infinity=False, min_value=-1e99, max_value=1e99))
def test_numbers_that_pyyaml_writes(value: float) -> None:
    text = yaml.safe_dump({"a": value})
    exact = number(parse_yaml(text, "")["a"])
    if exact is None:  # beyond the limits
        assert abs(value) < 1e-90
    else:
        assert float(exact) == value
        assert parse_yaml(text, "", plain_number)["a"] == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", Fraction(1, 10**5)),
        ("1_000", 1000),
        ("1/3", Fraction(1, 3)),
        (".5", Fraction(1, 2)),
        (0.1, Fraction(1, 10)),
        ("-2", -2),
        *(
            (word, None)
            for word in ("1e999999999", "1e100", "9" * 5000, "1/0", "010", "0x10", "1__0", "nan", "", True, None, [1])
        ),
    ],
)
def test_number(written: Any, value: Fraction | None) -> None:
    assert number(written) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("20B", 20 * 10**9),
        ("1M", 10**6),
        ("1.7T", 17 * 10**11),
        ("500_000", 500_000),
        (7, 7),
        ("2e9", 2 * 10**9),
        *((word, None) for word in ("0640", "1.5", "B", "2X", True, None, "1e999999999")),
    ],
)
def test_amount(written: Any, value: int | None) -> None:
    assert amount(written) == value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 61 + "1" + "}" * 61, "9" * 5000, "{", b"\xff{}"])
def test_hostile_json(text: str | bytes) -> None:
    with pytest.raises(InputError, match=r"^config\.json is not JSON: ") as caught:
        parse_json(text, "config.json")
    assert "\n" not in str(caught.value)
    assert parse_json('{"a":' * 59 + "[1]" + "}" * 59, "") is not None


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    """A pipe, a device and a file without bytes on disk, whatever library would open them."""
    (tmp_path / "config.json").symlink_to("/dev/zero")
    for read in (lambda: load_json(tmp_path / "config.json"), lambda: check_folder(tmp_path)):
        with pytest.raises(InputError, match=r"config\.json is a pipe or a device; expected a plain file"):
            read()
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is a pipe or a device"):
        check_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("tokenizer.json", "model.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(InputError, match=r"tokenizer\.json has 268,435,457 bytes; expected at most 268,435,456"):
        check_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "model.safetensors")
    check_folder(tmp_path)  # as in the cache of huggingface_hub
    with pytest.raises(InputError, match="is a symbolic link; expected a plain file"):
        check_folder(tmp_path, links=False)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").symlink_to("/etc/hostname")
    (tmp_path / "README.md").unlink()
    check_folder(tmp_path)
    with pytest.raises(InputError, match=r"tool\.jinja is a symbolic link; expected a plain file"):
        check_folder(tmp_path, links=False)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """Where a checkpoint was downloaded, the files are in `blobs`."""
    blob, folder = tmp_path / "models--a--b/blobs/0123", tmp_path / "models--a--b/snapshots/main/hf"
    blob.parent.mkdir(parents=True)
    folder.mkdir(parents=True)
    blob.write_text("{}")
    (folder / "config.json").symlink_to(os.path.relpath(blob, folder))
    check_folder(folder, links=False)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../../../elsewhere/blobs/0123")
    with pytest.raises(InputError, match="is a symbolic link"):
        check_folder(folder, links=False)


def test_a_tilde_is_a_name_where_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who means the home folder by it asks for that one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert why_unwritable("~/new") is None
    (tmp_path / "~").write_text("no folder")
    assert why_unwritable("~/new") == f"{tmp_path}/~ is no folder"


def test_where_rights_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has all rights to /proc, where nobody can make a file."""
    assert why_unwritable(str(tmp_path / "new" / "folder")) is None
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "access", lambda *_, **__: True)
    assert re.fullmatch("/proc cannot be written to: .+", why_unwritable("/proc/new/folder") or "")


OUTPUTS: dict[str, tuple[str, Callable[[str], object]]] = {
    "pretrain_cpt.py": ("checkpoint.save is /proc/x", training_files.check_save_folder),
    "finetune_sft.py": ("save is /proc/x", check_save),
    "curate_data.py": ("output_folder is /proc/x", lambda path: check_curated(CurateConfig("in", path, "zh"))),
    "preprocess_data.py": ("output_prefix is /proc/x/a", lambda path: check_output_folder(f"{path}/a")),
    "hf-to-megatron": ("megatron is /proc/x", check_megatron_target),
    "megatron-to-hf": ("hf is /proc/x", check_hf_target),
    "export_order.py": ("output is /proc/x/a.npy", lambda path: check_order(f"{path}/a.npy")),
    "almr_study.py": ("folder is /proc/x", check_study_folder),
}


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="there is no /proc")
@pytest.mark.parametrize("tool", OUTPUTS)
def test_an_output_that_cannot_be_made_is_named(tool: str) -> None:
    named, check = OUTPUTS[tool]
    with pytest.raises(InputError, match=f"^{re.escape(named)}[;,] .*/proc cannot be written to: "):
        check("/proc/x")
