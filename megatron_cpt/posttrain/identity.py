"""What a fine-tuning run depends on, written down when it begins and compared when it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cpt.checkpoint.hf_tokenizer import TOKENIZER_FILES
from megatron_cpt.checkpoint.weight_files import weight_files
from megatron_cpt.config.renamed import current_name
from megatron_cpt.posttrain.checkpoints import RUN, sealed_steps
from megatron_cpt.posttrain.settings import DpoConfig, SftConfig
from megatron_cpt.posttrain.template_files import template_to_use
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError

if TYPE_CHECKING:
    from megatron_cpt.posttrain.data import Prepared
    from megatron_cpt.posttrain.templates import Template

WHOLE = 64 << 20  # bytes up to which all of a file is read
PIECES, PIECE = 64, 1 << 20  # of a larger one: weights that were trained on differ everywhere
# Settings that change what is saved, logged and where to, but no weight
HARMLESS = ("save", "export_to", "run.")

KINDS = {"data": "data file", "model": "file of the model", "template": "text of", "examples": "tokenization of"}


def digest(path: str) -> str:
    """SHA-256 of a file, of a large one of its size and of pieces from all over it."""
    size = os.path.getsize(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            found.update(file.read())
        for place in np.linspace(0, size - PIECE, PIECES, dtype=np.int64).tolist() if size > WHOLE else ():
            file.seek(place)
            found.update(file.read(PIECE))
    return found.hexdigest()


def facts_of(settings: Mapping[str, Any], files: Sequence[str], model: str, template: Template) -> dict[str, Any]:
    """{section: {name: value}}: the settings, and digests of the files that they name.

    Args:
        settings: the whole configuration as a dictionary
        files: of the data
    """
    return {
        "settings": flat(settings),
        "data": {path: digest(path) for path in files},
        "model": digests_of(model),
        "template": digest_of_template(template.tokenizer.chat_template)
        | ({} if template.date is None else {"date": template.date}),
    }


def digest_of_template(text: str) -> dict[str, str]:
    """{"chat_template": SHA-256 of its Jinja text}."""
    return {"chat_template": hashlib.sha256(text.encode()).hexdigest()}


def digests_of(model: str) -> dict[str, str]:
    """File -> digest of a model's folder."""
    present = [name for name in ("config.json", *TOKENIZER_FILES) if os.path.exists(os.path.join(model, name))]
    return {name: digest(os.path.join(model, name)) for name in [*present, *weight_files(model)]}


def first_start(path: str | None) -> datetime:
    """When a run began: now, or what its run.json says where it resumes; the first process's answer on all.

    A chat template may write the date into each conversation: the day after, its tokens would be others.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    answer = [datetime.now().replace(microsecond=0)]
    if path is not None and PartialState().is_main_process:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError), open(path, encoding="utf-8") as file:
            answer[0] = datetime.fromisoformat(json.load(file)["template"]["date"])
    broadcast_object_list(answer)
    return answer[0]


def facts_of_examples(prepared: Prepared[Any]) -> dict[str, Any]:
    """{"examples": {set: digest of all its tokens and labels, in their order}}."""
    sets = {"train": prepared.train, **{f"validation_{name}": items for name, items in prepared.validation.items()}}
    return {"examples": {name: digest_of_examples(items) for name, items in sets.items()}}


def digest_of_examples(items: list[Any]) -> str:
    """SHA-256 over what the model reads and what the loss counts."""
    found = hashlib.sha256()
    for item in items:
        for ids in (*item.sequences(), *([item.labels] if hasattr(item, "labels") else [item.prompt_ids])):
            found.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return found.hexdigest()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, as JSON has it, of the settings that change the result."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif not f"{prefix}{name}".startswith(HARMLESS):
            found[prefix + name] = json.loads(json.dumps(value))
    return found


def check_begun(config: SftConfig | DpoConfig) -> None:
    """Check that a run which would resume does so with what it began with, as far as settings and files tell.

    `config` may have refused values (see config/partial.py); of these nothing is said.

    Raises:
        InputError: something is another; InputErrors: several things are
    """
    if not sealed_steps(config.save):
        return
    now: dict[str, dict[str, Any]] = {"settings": flat(readable_fields(config)), "data": {}, "model": {}, "template": {}}
    with contextlib.suppress(RefusedValueError):
        paths = [source.path for source in (*config.data.sources, *config.data.validation)]
        now["data"] = {path: digest(path) for path in paths if os.access(path, os.R_OK) and os.path.isfile(path)}
    with contextlib.suppress(RefusedValueError, InputError, OSError):  # `check_model` and `check_weights` name what is wrong
        now["model"] = digests_of(config.model)
    # `read_template` names what is wrong with one; a model's own is one of its files
    with contextlib.suppress(RefusedValueError, InputError, OSError):
        if config.data.chat_template is not None:
            now["template"] = digest_of_template(template_to_use(config.data.chat_template))
    check_same(os.path.join(config.save, RUN), now, all_known=False)


def readable_fields(section: Any) -> dict[str, Any]:
    """A section as a dictionary, without the values that were refused."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        with contextlib.suppress(RefusedValueError):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                found[field.name] = readable_fields(value)
            elif isinstance(value, list):
                found[field.name] = [dataclasses.asdict(it) if dataclasses.is_dataclass(it) else it for it in value]  # type: ignore[arg-type]
            else:
                found[field.name] = value
    return found


# section -> settings that say where it comes from: where one of them is another, no more need be said
NAMED_BY = {
    "data": ("data.sources", "data.validation"),
    "model": ("model",),
    "template": ("data.chat_template",),
    "examples": (),
    "settings": (),
}


def check_same(path: str, now: Mapping[str, Mapping[str, Any]], all_known: bool = True) -> None:
    """Check that the run that run.json describes began with the same facts, of those that are given.

    `all_known`: what is not given now was taken away; else it is not known.

    Raises:
        InputError: a fact is another, or run.json is damaged; InputErrors: several are
    """
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        began = {section: dict(before[section]) for section in now}
        began["settings"] = by_names_of_today(began["settings"])
        now = respelled(now, began)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{path} does not say what the run began with ({type(error).__name__}: {error})"
        raise InputError(f"{said}; use another folder as save, or remove this one") from error
    folder, refusals = os.path.dirname(path), Refusals()
    others: dict[str, list[str]] = {}
    for section, facts in now.items():
        names = facts.keys() | began[section].keys() if all_known else facts.keys()
        others[section] = [name for name in sorted(names) if began[section].get(name) != facts.get(name)]
    other_model = bool(others.get("model")) or "model" in others.get("settings", ())
    for section, different in others.items():
        if set(NAMED_BY[section]) & set(others.get("settings", ())):
            continue
        if section == "template" and other_model and now["settings"].get("data.chat_template") is None:
            continue  # it is the model's own
        for name in different:
            was, now_is = began[section].get(name), now[section].get(name)
            if section == "settings":
                refusals.add(
                    InputError(f"{folder} has begun with {name} {was}, now it is {now_is}; use another folder as save")
                )
            else:
                refusals.add(
                    InputError(f"{folder} has begun with another {KINDS[section]} {name}; use another folder as save")
                )
    refusals.raise_any()


def by_names_of_today(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, which a run of the last release may have written."""
    for kind in (SftConfig, DpoConfig):
        settings = {current_name(kind, name): value for name, value in settings.items()}
    return dict(settings)


def respelled(now: Mapping[str, Mapping[str, Any]], began: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The facts of now; what is the same model, file or template as at the beginning has the name that it had then.

    It may be spelled in another way, be linked to, or lie elsewhere with the same content.
    """
    facts = {section: dict(values) for section, values in now.items()}
    settings, before = facts["settings"], began["settings"]
    same_content = {
        "model": facts["model"] == began["model"],
        "data.chat_template": facts["template"].get("chat_template") == began["template"].get("chat_template"),
    }
    for name, same in same_content.items():
        if name in settings and (same or is_same_place(settings[name], before.get(name))):
            settings[name] = before.get(name)
    names: dict[str, str] = {}
    for name in NAMED_BY["data"]:
        for source, was in zip(settings.get(name) or [], before.get(name) or [], strict=False):
            content = now["data"].get(source["path"])
            same = content is not None and content == began["data"].get(was["path"])
            if same or is_same_place(source["path"], was["path"]):
                names[source["path"]] = was["path"]
        if name in settings:
            settings[name] = [source | {"path": names.get(source["path"], source["path"])} for source in settings[name]]
    facts["data"] = {names.get(path, path): content for path, content in now["data"].items()}
    return facts


def is_same_place(first: object, second: object) -> bool:
    """Whether two values are paths of one file or folder."""
    with contextlib.suppress(ValueError):  # no path at all
        return isinstance(first, str) and isinstance(second, str) and os.path.realpath(first) == os.path.realpath(second)
    return False
