"""Every field of every tool: a value of the wrong kind is one line that names file, field, value and what was expected."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from megatron_cpt.config.cli import collect_arguments, normalise, read_arguments, run_subcommands
from megatron_cpt.config.values import COUNTED, alternatives, is_optional
from megatron_cpt.utils.errors import InputError, InputErrors

CONFIGS = [
    "config.run:RunConfig",
    "corpus.config:PreprocessConfig",
    "curation.config:CurateConfig",
    "corpus.merge:MergeConfig",
    "corpus.import_megatron:ImportCorpusConfig",
    "mixture.inspect_data:InspectConfig",
    "training.order_export:ExportOrderConfig",
    "convert.config:HfToMegatron",
    "convert.config:MegatronToHf",
    "convert.config:Verify",
    "planning.config:PlanConfig",
    "study.settings:PlanOptions",
    "study.settings:RunOptions",
    "study.settings:ChooseOptions",
    "posttrain.settings:SftConfig",
    "posttrain.settings:DpoConfig",
    "posttrain.settings:ChatConfig",
    "evaluation.config:EvaluateConfig",
]


def load(name: str) -> type:
    module, _, kind = name.partition(":")
    loaded: type = getattr(importlib.import_module(f"megatron_cpt.{module}"), kind)
    return loaded


def fields_of(kind: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field of a configuration, those of its sections too."""
    for field, hint in get_type_hints(kind).items():
        dotted = f"{name}.{field}".lstrip(".")
        yield dotted, hint
        for option in alternatives(hint):
            if dataclasses.is_dataclass(option):
                yield from fields_of(option, dotted)


def wrong_values(hint: Any) -> list[Any]:
    """Values that a field of this type does not take."""
    options = alternatives(hint)
    wrong: list[Any] = [] if is_optional(hint) or any(map(dataclasses.is_dataclass, options)) else [None]
    kinds = {get_origin(option) or option for option in options}
    if not kinds & {list}:
        wrong.append([["x"]])
    if not kinds & {dict} and not any(map(dataclasses.is_dataclass, options)):
        wrong.append({"a": 1})
    if kinds & {list, dict}:
        wrong.append([{"no such": 1}] if list in kinds else {"a": [1]})
    if str not in kinds:
        wrong += ["banana", "1:04", "010"]
    if int in kinds and not kinds & {float, str}:
        wrong += [1.5, 10**30]
    if kinds & {int, float} and str not in kinds:
        wrong += [True, "1e999999999"]
    return wrong


def refusals(config: type, words: list[str]) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_arguments(config, words)
    errors = caught.value.errors if isinstance(caught.value, InputErrors) else (caught.value,)
    return [str(error) for error in errors]


def nested(name: str, value: Any) -> Any:
    """A value at its dotted name."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_kinds(name: str, tmp_path: Path) -> None:
    config, path = load(name), tmp_path / "c.yaml"
    tried = 0
    for field, hint in fields_of(config):
        if "dict" in str(hint) and "Any" in str(hint):
            continue  # somebody else's settings, which take anything
        for value in wrong_values(hint):
            path.write_text(yaml.safe_dump(nested(field, value)))
            found = [line for line in refusals(config, ["--config", str(path)]) if line.startswith(f"{path}: {field}")]
            assert found, (field, value)
            assert all(" is " in line and "; expected " in line and "\n" not in line for line in found), found
            assert all(len(line) < 700 for line in found), found
            tried += 1
            if isinstance(value, str) and list[str] not in alternatives(hint):
                options = [f"--{field}={value}"]
                starts = (f"{field} is ", f"{field}[0] is ")
                assert any(line.startswith(starts) for line in refusals(config, options)), (field, value)
    assert tried >= 4 * len(dataclasses.fields(config)) // 3


@pytest.mark.parametrize("name", CONFIGS)
def test_amounts_have_units_everywhere(name: str) -> None:
    """20B and 500k, wherever tokens or samples are meant."""
    config = load(name)
    for field, hint in fields_of(config):
        if COUNTED.search(field.rsplit(".", 1)[-1]) and {int, float} & set(alternatives(hint)):
            reader = collect_arguments(config, normalise([f"--{field}", "20B"]))
            assert reader.refusals.errors == []
            place: Any = reader.given
            for part in field.split("."):
                place = place[part]
            assert place in (20 * 10**9, [20 * 10**9])


def test_true_is_not_the_number_one() -> None:
    found = refusals(load("planning.config:PlanConfig"), ["--devices", "true", "--model", "8B"])
    assert "devices is 'true'; expected a whole number" in found


def test_lengths_have_no_units() -> None:
    """2k would be 2,048 for some and 2,000 for others. Numbers of documents, rows and steps have units."""
    assert refusals(load("planning.config:PlanConfig"), ["--seq_length", "2k", "--devices", "8", "--model", "8B"])[-1] == (
        "seq_length is '2k'; expected a whole number without a unit"
    )
    for name in ("max_documents", "max_rows", "max_prompts", "train_iters", "max_steps", "max_document_characters"):
        assert COUNTED.search(name)
    for name in ("seq_length", "max_length", "shuffle_documents", "tensor_model_parallel_size"):
        assert not COUNTED.search(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_empty_sections(name: str, tmp_path: Path) -> None:
    """`training:` with all its lines commented out is a section that gives nothing."""
    config, path = load(name), tmp_path / "c.yaml"
    sections = [field.name for field in dataclasses.fields(config) if isinstance(get_type_hints(config)[field.name], type)]
    sections = [field for field in sections if dataclasses.is_dataclass(get_type_hints(config)[field])]
    path.write_text("".join(f"{section}:\n#  lr: 1\n" for section in sections))
    reader = collect_arguments(config, [f"--config={path}"])
    assert reader.refusals.errors == []
    assert list(reader.given) == sections


@pytest.mark.parametrize("name", CONFIGS)
def test_switches_and_choices(name: str) -> None:
    """What YAML 1.1 takes for true and false is that for switches, and text elsewhere."""
    config = load(name)
    for field, hint in fields_of(config):
        (first, *_) = alternatives(hint) or [None]
        for word, value in (("no", False), ("Yes", True)):
            given: Any = collect_arguments(config, [f"--{field}={word}"])
            errors, given = given.refusals.errors, given.given
            for part in field.split("."):
                given = given[part] if isinstance(given, dict) and part in given else None
            if hint is bool:
                assert (errors, given) == ([], value)
            elif first is str:
                assert (errors, given) == ([], word)
            elif get_origin(first) is Literal:
                assert errors
                assert word not in get_args(first)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_read_without_torch(name: str) -> None:
    """So a wrong value is answered at once, not after the seconds that torch and megatron-core take to import."""
    module, _, kind = name.partition(":")
    code = f"""if True:
        import sys
        from megatron_cpt.config.cli import read_arguments
        from megatron_cpt.{module} import {kind}
        try:
            read_arguments({kind}, ["--no_such_option", "3"], "")
        except Exception:
            print([module for module in ("torch", "megatron", "transformers", "scipy") if module in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_command_is_imported_after_its_options_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "verify", "--c", "3"])
    with pytest.raises(SystemExit, match="2"):
        run_subcommands({"verify": ("no.such.module:verify", "megatron_cpt.convert.config:Verify", nothing)}, "")


def nothing(config: Any) -> None:
    """The check of a tool that has none."""


SOURCE = {"path": "x", "language": "zh"}
# Wrong values, and as many lines; fields that must be given are missing in most
WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "posttrain.settings:SftConfig": (
        {
            "data": {"sources": [{"path": "x", "language": "zh zh", "max_rows": 0}], "almr": 2, "max_length": 3},
            "training": {"epochs": 0, "seed": -1},
            "optimizer": {"lr": 0, "weight_decay": -1, "adam_beta2": 1},
            "lora": {"r": 0, "dropout": 1},
            "run": {"keep_last": 0},
        },
        12,
    ),
    "posttrain.settings:DpoConfig": (
        {"model": "x", "save": "y", "data": {"sources": [SOURCE]}, "beta": 0, "label_smoothing": 0.7},
        2,
    ),
    "posttrain.settings:ChatConfig": ({"model": "x", "max_new_tokens": 0, "top_p": 2, "repetition_penalty": 0}, 3),
    "planning.config:PlanConfig": (
        {
            "model": "8B",
            "devices": 8,
            "seq_length": 0,
            "top": 0,
            "overhead_gib": -1,
            "memory_gib": 0,
            "matmul_efficiency": 2,
        },
        5,
    ),
    "study.settings:PlanOptions": ({"lr": {"min": 2, "max": 1, "number": 1}, "limits": {"runs": -1, "hours": -1}}, 4),
    "evaluation.config:EvaluateConfig": ({"output": "x", "limit": 0, "max_length": 1, "models": {}, "text": []}, 4),
    "config.run:RunConfig": (
        {
            "parallel": {"tensor_model_parallel_size": 0, "recompute_method": "block"},
            "loss_spikes": {"spike_window": 0, "heartbeat_seconds": 1},
            "data": {"num_workers": 100_000, "prefetch": 0},
            "logging": {"log_interval": 0, "peak_tflops": 0},
            "training": {"train_iters": 5},
        },
        8,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named_all_at_once(name: str, tmp_path: Path) -> None:
    (wrong, number), path = WRONG[name], tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(InputErrors) as caught:
        read_arguments(load(name), ["--config", str(path)], "")
    lines = [str(error) for error in caught.value.errors if "is missing" not in str(error)]
    assert len(lines) == number, "\n".join(lines)
    assert all(line.startswith(f"{path}: ") for line in lines), "\n".join(lines)


ENCODED = {
    "config.run:RunConfig": ["logging.wandb_project", "logging.wandb_name"],
    "corpus.config:PreprocessConfig": ["text_key", "metadata_keys", "document_separator", "eos_token"],
    "corpus.import_megatron:ImportCorpusConfig": ["eos_token"],
    "curation.config:CurateConfig": ["text_key", "keep_fields", "document_separator", "slurm.qos", "slurm.sbatch_args.x"],
    "posttrain.settings:ChatConfig": ["prompt", "system"],
    "evaluation.config:EvaluateConfig": ["pairwise.judge.model"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in ENCODED.items() for field in fields])
def test_text_that_is_encoded_is_unicode(name: str, field: str) -> None:
    """Bytes of another encoding, as options may have them, and halves of characters, as YAML may: `"\\ud800"`."""
    for text in ("a\udcff", "\ud800"):
        found = refusals(load(name), [f"--{field}={text}"])
        assert any(f"{field} is {text!r}; expected " in line and "text in UTF-8" in line for line in found), found
