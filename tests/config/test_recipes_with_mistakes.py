"""The recipes' own files, and a start of each tool without a recipe, with several mistakes: as many lines, each naming its
field, whatever the mistakes are.

All that they name is there, but small. Without mistakes they are accepted. Which fields are wrong, and how many, is drawn by
hypothesis, from those that a file gives and those that it leaves out; a mistake is a value of a wrong kind, or a field that
is not known.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_shapes import TINY
from tiny_models import tools, write_empty_weights

from megatron_cpt.cluster.config import CheckConfig
from megatron_cpt.cluster.run_files import check_cluster_files as check_cluster
from megatron_cpt.config.cli import read_arguments, start_check
from megatron_cpt.config.run import RunConfig
from megatron_cpt.config.values import alternatives
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf, Verify
from megatron_cpt.convert.run_files import check_hf_to_megatron, check_megatron_to_hf, check_verify
from megatron_cpt.corpus.import_megatron import ImportCorpusConfig
from megatron_cpt.corpus.import_megatron import check_import_files as check_import
from megatron_cpt.corpus.merge import MergeConfig
from megatron_cpt.corpus.merge import check_merge_files as check_merge
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.corpus.preprocess import check_preprocess_files as check_preprocessing
from megatron_cpt.curation.config import CurateConfig
from megatron_cpt.curation.curate import check_curate_files as check_curation
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.evaluation.run_files import check_evaluation as check_evaluation
from megatron_cpt.mixture.inspect_data import InspectConfig
from megatron_cpt.mixture.inspect_data import check_inspect_files as check_inspection
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.run_files import check_plan_files as check_plan
from megatron_cpt.posttrain.run_files import check_chat
from megatron_cpt.posttrain.run_files import check_tuning as check_tuning
from megatron_cpt.posttrain.settings import ChatConfig, DpoConfig, SftConfig
from megatron_cpt.study.run_files import check_choice, check_run_options, check_study
from megatron_cpt.study.settings import ChooseOptions, FitOptions, PlanOptions, PlotOptions, RunOptions
from megatron_cpt.training.order_export import ExportOrderConfig
from megatron_cpt.training.order_export import check_export_files as check_order_export
from megatron_cpt.training.run_files import check_pretrain_files as check_run
from megatron_cpt.utils.errors import InputError, InputErrors

ROOT = Path(__file__).resolve().parents[2]
MIXTURE = "examples/quickstart/mixture.yaml"
SHAPE = TINY | {"num_hidden_layers": 30}
HF_FOLDERS = [
    "models/Meta-Llama-3-8B",
    "runs/quickstart/inputs/hf",
    "runs/quickstart/hf-cpt",
    "runs/quickstart-chat/sft/hf",
    "runs/quickstart-chat/dpo/hf",
]
MEGATRON_FOLDERS = ["runs/quickstart/megatron", "runs/llama3-8b/cpt"]


def read_yaml(path: str) -> Any:
    """What a file of the repository says."""
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


class Recipe(NamedTuple):
    """What reads a recipe; with which options; and the mixture file that is read, too."""

    kind: type
    check: Callable[[Any], object]
    options: list[str]
    mixture: str | None = None


RECIPES = {
    "quickstart/pretrain.yaml": Recipe(RunConfig, check_run, ["--check_only=true", "--world_size=2"], MIXTURE),
    "almr_study/smollm2_study.yaml": Recipe(PlanOptions, check_run_options, [], MIXTURE),
    "quickstart_chat/sft.yaml": Recipe(SftConfig, check_tuning, ["--save=runs/new"]),
    "quickstart_chat/dpo.yaml": Recipe(DpoConfig, check_tuning, ["--save=runs/new"]),
    "quickstart_chat/evaluate.yaml": Recipe(EvaluateConfig, check_evaluation, []),
    "llama3_8b/convert.yaml": Recipe(HfToMegatron, check_hf_to_megatron, []),
    "llama3_8b/export.yaml": Recipe(MegatronToHf, check_megatron_to_hf, []),
}
STUDY = "examples/almr_study/smollm2_study.yaml"
CORPUS, HF_FOLDER, MEGATRON_FOLDER = "runs/quickstart/data/en_train", HF_FOLDERS[0], MEGATRON_FOLDERS[0]
# Tools without a recipe: how each is read, and a start that is accepted
STARTS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "preprocess_data.py": (
        Recipe(PreprocessConfig, check_preprocessing, []),
        {"input": ["en_train.jsonl"], "tokenizer": HF_FOLDER, "output_prefix": "new", "language": "en"},
    ),
    "curate_data.py": (
        Recipe(CurateConfig, check_curation, []),
        {"input": ["en_train.jsonl"], "output_folder": "curated", "keep_languages": ["en"]},
    ),
    "merge_datasets.py": (
        Recipe(MergeConfig, check_merge, []),
        {"input": [CORPUS, CORPUS.replace("train", "valid")], "output_prefix": "all"},
    ),
    "import_corpus.py": (
        Recipe(ImportCorpusConfig, check_import, []),
        {"input": ["imported"], "tokenizer": HF_FOLDER, "language": "en"},
    ),
    "inspect_data.py": (Recipe(InspectConfig, check_inspection, []), {"input": [CORPUS]}),
    "export_order.py": (
        Recipe(ExportOrderConfig, check_order_export, []),
        {"mixture": MIXTURE, "global_batch_size": 4, "train_iters": 2, "output": "order.npy"},
    ),
    "chat.py": (Recipe(ChatConfig, check_chat, []), {"model": HF_FOLDER, "max_new_tokens": 16}),
    "plan_run.py": (
        Recipe(PlanConfig, check_plan, []),
        {"model": HF_FOLDER, "devices": 8, "run": "examples/quickstart/pretrain.yaml"},
    ),
    "check_cluster.py": (Recipe(CheckConfig, check_cluster, []), {"folder": "cluster"}),
    "convert_checkpoint.py verify": (Recipe(Verify, check_verify, []), {"a": HF_FOLDER, "b": MEGATRON_FOLDER}),
    "almr_study.py run": (Recipe(RunOptions, check_run_options, []), read_yaml(STUDY)),
    "almr_study.py fit": (Recipe(FitOptions, check_study, []), read_yaml(STUDY)),
    "almr_study.py plot": (Recipe(PlotOptions, check_study, []), read_yaml(STUDY)),
    "almr_study.py choose": (Recipe(ChooseOptions, check_choice, []), read_yaml(STUDY)),
}
READ_FIRST = {"mixture", "base", "save"}  # what these name cannot be read without them, or an option gives it instead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, chat_tokenizer_dir: str) -> Path:
    """Where the recipes find all they name."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in [*HF_FOLDERS, *(f"{megatron}/release/hf" for megatron in MEGATRON_FOLDERS)]:
        shutil.copytree(chat_tokenizer_dir if "cpt" in name else tiny_tokenizer_dir, folder / name)
        (folder / name / "config.json").write_text(json.dumps(SHAPE))
        write_empty_weights(folder / name)
        (folder / name / "chat_template.jinja").write_text("{{ messages }}")
    for name in MEGATRON_FOLDERS:
        for file in (".metadata", "common.pt"):
            (folder / name / "release" / file).write_bytes(b"")
        (folder / name / "release" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    for i, name in enumerate(("en_train", "zh_train", "en_valid", "zh_valid")):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"{i} the quick brown fox {j}"}) + "\n" for j in range(90)))
        prefix = str(folder / "runs/quickstart/data" / name)
        preprocess(PreprocessConfig(str(source), tiny_tokenizer_dir, prefix, name[:2], workers=1))
    for end in (".bin", ".idx"):
        shutil.copy(folder / f"{CORPUS}{end}", folder / f"imported{end}")
    for recipe in RECIPES:
        for i, path in enumerate(paths_in(yaml.safe_load((folder / "examples" / recipe).read_text()))):
            row = {"text": str(i)} if path.endswith("l") else {"instruction": f"{recipe} {i}", "output": "4"}
            if not (folder / path).exists():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(json.dumps(row if path.endswith("l") else [row]))
    return folder


def paths_in(value: Any) -> Iterator[str]:
    """What stands at `path`, anywhere."""
    if isinstance(value, dict) and "path" in value:
        yield value["path"]
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from paths_in(part)


class Mistake(NamedTuple):
    """A value in a file, where it is to be, and how the line begins that names it."""

    place: tuple[str | int, ...]
    value: Any
    said: str


def mistakes_of(fields: Any, place: tuple[str | int, ...] = ()) -> Iterator[Mistake]:
    """Each scalar of a file as something that no field takes; each section with a field that it does not have."""
    name = name_of(place)
    if isinstance(fields, dict):
        if name != "models":  # names of the user's own
            yield Mistake((*place, "nosuch"), 1, f"{name}.nosuch is unknown".lstrip("."))
        for field, value in fields.items():
            if field not in READ_FIRST:
                yield from mistakes_of(value, (*place, field))
    elif isinstance(fields, list):
        for i, value in enumerate(fields):
            yield from mistakes_of(value, (*place, i))
    else:
        yield Mistake(place, {"no": ["such"]}, f"{name} is ")


def mistakes_left_out(kind: type, fields: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[Mistake]:
    """Each setting of a tool that a file leaves out, as something that it does not take."""
    for field, hint in get_type_hints(kind).items():
        inner = fields.get(field, {})
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from mistakes_left_out(hint, inner, (*place, field))
        elif field not in fields and field not in READ_FIRST:
            is_table = any(get_origin(part) is dict or dataclasses.is_dataclass(part) for part in alternatives(hint))
            yield Mistake((*place, field), ["such"] if is_table else {"no": ["such"]}, f"{name_of((*place, field))} is ")


def name_of(place: tuple[str | int, ...]) -> str:
    """A place in a file as messages name it: `data.sources[1].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def with_mistakes(fields: Any, mistakes: list[Mistake]) -> Any:
    """The fields of a file with mistakes in them."""
    fields = copy.deepcopy(fields)
    for mistake in mistakes:
        place = fields
        for part in mistake.place[:-1]:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        place[mistake.place[-1]] = mistake.value
    return fields


def refusals(recipe: Recipe, path: str) -> list[str]:
    """The lines of a start with a configuration."""
    try:
        read_arguments(recipe.kind, [f"--config={path}", *recipe.options], "", start_check(recipe.check))
    except InputError as error:
        return [str(one) for one in (error.errors if isinstance(error, InputErrors) else (error,))]
    return []


def test_every_tool_is_started() -> None:
    configurations = {start.kind for start in (*RECIPES.values(), *(start for start, _ in STARTS.values()))}
    for tool in tools():
        named = set(re.findall(r"[:+] ?\"?(\w+)\"", tool.read_text()))
        assert named & {kind.__name__ for kind in configurations}, tool


@pytest.mark.parametrize("name", [*RECIPES, *STARTS])
def test_as_many_lines_as_mistakes(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    if name in RECIPES:
        recipe, fields = RECIPES[name], read_yaml(f"examples/{name}")
    else:
        recipe, fields = STARTS[name]
    if name.endswith("export.yaml"):
        fields["hf"] = "runs/exported"
    mixture = read_yaml(recipe.mixture) if recipe.mixture else {}
    possible = [(False, mistake) for mistake in mistakes_of(fields)]
    possible += [(False, mistake) for mistake in mistakes_left_out(recipe.kind, fields)]
    possible += [(True, mistake) for mistake in mistakes_of(mixture)] if recipe.mixture else []

    def start(drawn: list[tuple[bool, Mistake]]) -> list[str]:
        Path("run.yaml").write_text(yaml.safe_dump(with_mistakes(fields, [one for late, one in drawn if not late])))
        if recipe.mixture:
            Path(recipe.mixture).write_text(yaml.safe_dump(with_mistakes(mixture, [one for late, one in drawn if late])))
        return refusals(recipe, "run.yaml")

    assert start([]) == []
    before = sorted(os.listdir())

    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn=st.lists(st.sampled_from(possible), min_size=1, max_size=8, unique_by=lambda one: (one[0], one[1].place)))
    def check(drawn: list[tuple[bool, Mistake]]) -> None:
        lines = start(drawn)
        unsaid = [mistake.said for _, mistake in drawn if not any(mistake.said in line for line in lines)]
        assert not unsaid, "\n".join(lines)
        assert len(lines) == len(drawn), (drawn, lines)
        assert not [line for line in lines if "\n" in line]

    check()
    assert start([]) == []
    assert sorted(os.listdir()) == before
