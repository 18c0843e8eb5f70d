"""Settings by the names of the last release."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.config.cli import read_arguments
from megatron_cpt.config.renamed import current_name, current_names, formerly
from megatron_cpt.utils.errors import InputError, InputErrors


@dataclass(frozen=True)
class Limits:
    """Limits."""

    most: int = field(default=3, metadata=formerly("largest"))
    """How many."""
    strict: bool = field(default=False, metadata=formerly("severe"))
    """Whether."""


@dataclass(frozen=True)
class Part:
    """A part."""

    path: str = field(metadata=formerly("file"))
    """Where."""


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        limits: see Limits
        parts: some
        extra: more limits
        named: by name
    """

    limits: Limits = field(default_factory=Limits, metadata=formerly("borders"))
    parts: list[Part] = field(default_factory=list)
    extra: Limits | None = None
    named: dict[str, Part] = field(default_factory=dict)


def written(tmp_path: Path, content: Any, name: str = "tool.yaml") -> str:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def said(old: str, current: str) -> str:
    return f"note: {old} is now called {current}; the old name is accepted until the next release"


def test_a_file_with_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"borders": {"largest": 5}, "parts": [{"file": "a"}, {"file": "b"}], "extra": {"severe": True}}
    path = written(tmp_path, old | {"named": {"largest": {"file": "c"}}})
    parts = [Part("a"), Part("b")]
    assert read_arguments(Tool, ["--config", path]) == Tool(Limits(5), parts, Limits(strict=True), {"largest": Part("c")})
    assert capsys.readouterr().err.splitlines() == [
        said(f"{path}: borders", "limits"),
        said(f"{path}: limits.largest", "limits.most"),
        said(f"{path}: parts[0].file", "parts[0].path"),
        said(f"{path}: parts[1].file", "parts[1].path"),
        said(f"{path}: extra.severe", "extra.strict"),
        said(f"{path}: named.largest.file", "named.largest.path"),
    ]


@pytest.mark.parametrize(
    ("words", "found", "notes"),
    [
        (["--borders.largest", "5"], Tool(Limits(5)), [("--borders.largest", "--limits.most")]),
        (["--borders.most=5"], Tool(Limits(5)), [("--borders.most", "--limits.most")]),
        (["--borders.severe"], Tool(Limits(strict=True)), [("--borders.severe", "--limits.strict")]),
        (["--extra.largest", "5"], Tool(extra=Limits(5)), [("--extra.largest", "--extra.most")]),
        (["--parts", '[{"file": "a"}]'], Tool(parts=[Part("a")]), [("parts[0].file", "parts[0].path")]),
        (["--named.largest", '{"path": "a"}'], Tool(named={"largest": Part("a")}), []),
    ],
)
def test_an_option_with_an_old_name(
    words: list[str], found: Tool, notes: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_arguments(Tool, [*words, *words]) == found
    assert capsys.readouterr().err.splitlines() == [said(*names) for names in notes]  # each once


def test_the_later_one_wins_by_whichever_name(tmp_path: Path) -> None:
    new, old = (written(tmp_path, {name: {"most": 5}}, f"{name}.yaml") for name in ("limits", "borders"))
    for words, most in (
        (["--config", new, "--config", old, "--borders.largest", "7"], 7),
        (["--config", old, "--limits.most", "7"], 7),
        (["--borders.largest", "7", "--config", new], 5),
        (["--limits.most", "7", "--config", old], 5),
    ):
        assert read_arguments(Tool, words).limits.most == most


def test_both_names_in_one_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"limits": {"most": 4, "largest": 5}, "borders": {"most": 6}})
    lines = [
        f"{path}: borders is given beside limits, its name of today; expected one of the two",
        f"{path}: limits.largest is given beside limits.most, its name of today; expected one of the two",
    ]
    with pytest.raises(InputErrors) as found:
        read_arguments(Tool, ["--config", path])
    assert sorted(map(str, found.value.errors)) == lines


def test_messages_have_the_file_and_the_name_of_today(tmp_path: Path) -> None:
    path = written(tmp_path, {"borders": {"largest": "many"}})
    with pytest.raises(InputError, match=rf"^{path}: limits\.most is 'many'; expected a whole number$"):
        read_arguments(Tool, ["--config", path])


@pytest.mark.parametrize("word", ["--help", "--print_config"])
def test_what_is_printed_has_the_names_of_today(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"borders": {"largest": 5}})
    with pytest.raises(SystemExit):
        read_arguments(Tool, ["--config", path, word])
    printed = capsys.readouterr().out
    assert "most" in printed
    assert not any(old in printed for old in ("borders", "largest", "severe"))


def test_only_the_first_process_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert read_arguments(Tool, ["--borders.largest", "5"]) == Tool(Limits(5))
    assert capsys.readouterr().err == ""


def test_names_alone() -> None:
    for old, current in (
        ("borders.largest", "limits.most"),
        ("extra.severe", "extra.strict"),
        ("named.largest", "named.largest"),
        ("parts", "parts"),
        ("no_such.largest", "no_such.largest"),
    ):
        assert current_name(Tool, old) == current


def test_fields_as_they_are_given() -> None:
    notes: list[str] = []
    found = current_names(Tool, {"borders": {"largest": "5"}, "unknown": 1, "extra": None}, "f: ", notes)
    assert found == {"limits": {"most": "5"}, "unknown": 1, "extra": None}
    assert notes == [
        said(*names).removeprefix("note: ") for names in (("f: borders", "limits"), ("f: limits.largest", "limits.most"))
    ]
    with pytest.raises(InputError, match=r"f: limits\.largest is given beside limits\.most"):
        current_names(Tool, {"borders": {"largest": 5, "most": 5}}, "f: ")
