"""Every setting of SFT and DPO arrives where it acts, through the tools' own way: YAML, configuration, trainer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from chats import conversations, preferences, read_metrics, write_rows
from safetensors.torch import load_file
from test_dpo import log_probability

from megatron_cpt.config.cli import run_tool
from megatron_cpt.posttrain import dpo, sft
from megatron_cpt.posttrain.data import SourceConfig, prepare_dpo, prepare_sft
from megatron_cpt.posttrain.dpo import DpoConfig, finetune_dpo
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.settings import TuningDataConfig
from megatron_cpt.posttrain.sft import SftConfig, finetune_sft
from megatron_cpt.posttrain.templates import IGNORED, load_template
from megatron_cpt.posttrain.trainers import EpochSampler
from megatron_cpt.utils.errors import InputError

TOOLS = {"sft": (sft, finetune_sft, SftConfig, conversations), "dpo": (dpo, finetune_dpo, DpoConfig, preferences)}
STEPS = 10  # of the schedule that is looked at


@dataclasses.dataclass(frozen=True)
class Arrived:
    """What finetune_sft.py or finetune_dpo.py would train with."""

    trainer: Any
    save: str
    merge: bool
    config: dict[str, Any]
    matmul_precision: str

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups of parameters."""
        self.trainer.create_optimizer_and_scheduler(STEPS)
        return list(self.trainer.optimizer.param_groups)

    def rates(self) -> list[float]:
        """Learning rate of each step, over the full one."""
        self.groups()
        return [self.trainer.lr_scheduler.lr_lambdas[0](step) for step in range(STEPS)]

    def report(self) -> dict[str, Any]:
        """data_report.json"""
        return json.loads((Path(self.save) / "data_report.json").read_text())


def arrive(tool: str, folder: Path, settings: dict[str, Any]) -> Arrived:
    """Run a tool up to its first step, with settings from a YAML file."""
    module, finetune, config_class, _ = TOOLS[tool]
    path = folder / f"{tool}.yaml"
    path.write_text(yaml.safe_dump(settings))
    found: list[Arrived] = []

    def train(trainer: Any, save: str, point: Any, tokenizer: Any, config: Any, facts: Any, merge: bool, *_: Any) -> str:
        found.append(Arrived(trainer, save, merge, config, torch.get_float32_matmul_precision()))
        return save

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_training", train)
        try:
            run_tool(finetune, config_class, "", ["--config", str(path)])  # type: ignore[arg-type]
        finally:
            torch.set_float32_matmul_precision("highest")
    return found[0]


def row_of(tool: str, number: int, words: int) -> dict[str, Any]:
    """A conversation or pair of a certain length."""
    answers = {"sft": {"output": "dog " * words}, "dpo": {"chosen": "dog " * words, "rejected": "cat"}}
    return {"instruction": f"fox {number}", **answers[tool]}


def settings_of(tool: str, model: str, folder: Path) -> dict[str, Any]:
    """Every setting as it is not by default, but for `lora`, `export_to` and those that others make void."""
    sources = [dataclasses.asdict(source) for source in write_rows(folder, TOOLS[tool][3])]
    held = folder / "held.json"
    held.write_text(json.dumps([row_of(tool, number, 2) for number in range(5)]))
    odd = folder / "odd.json"
    odd.write_text(json.dumps([{"instruction": "no answer"}, row_of(tool, 1, 300)]))
    template = folder / "mine.jinja"
    marks = "{{ '<|im_start|>' + m['role'] + ' says\n' + m['content'] + '<|im_end|>\n' }}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant says\n' }}{% endif %}"
    template.write_text("{% for m in messages %}" + marks + "{% endfor %}" + ask)
    own: dict[str, Any] = {"packing": False}
    if tool == "dpo":
        own = {"beta": 0.35, "loss_type": "robust", "label_smoothing": 0.2}
    return own | {
        "model": model,
        "save": str(folder / "run"),
        "data": {
            "sources": [sources[0], sources[1] | {"max_rows": 20}, {"path": str(odd), "language": "en"}],
            "validation": [{"path": str(held), "language": "fr", "max_rows": 3}],
            "almr": 0.4,
            "max_length": 150,
            "on_overlength": "skip",
            "on_error": "skip",
            "chat_template": str(template),
        },
        "training": {
            "epochs": 2.5,
            "max_steps": 7,
            "micro_batch_size": 2,
            "global_batch_size": 6,
            "params_dtype": "bf16",
            "float32_matmul_precision": "medium",
            "gradient_checkpointing": True,
            "seed": 77,
        },
        "optimizer": {
            "lr": 3e-4,
            "decay_style": "linear",
            "warmup_fraction": 0.4,
            "weight_decay": 0.07,
            "clip_grad": 0.6,
            "adam_beta1": 0.8,
            "adam_beta2": 0.97,
            "adam_eps": 1e-5,
        },
        "run": {"save_interval": 3, "keep_last": 5, "eval_interval": 4, "log_interval": 2, "report_to": ["tensorboard"]},
    }


@pytest.fixture(scope="module", params=["sft", "dpo"])
def tool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def arrived(tool: str, chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> Arrived:
    folder = tmp_path_factory.mktemp(tool)
    return arrive(tool, folder, settings_of(tool, chat_model, folder))


LORA = {"r": 3, "alpha": 5, "dropout": 0.25, "target_modules": ["q_proj", "up_proj"], "merge": False}


@pytest.fixture(scope="module")
def with_adapters(tool: str, chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> Arrived:
    """Adapters, a share of the rows to evaluate on, long rows cut."""
    folder = tmp_path_factory.mktemp(tool)
    settings = settings_of(tool, chat_model, folder)
    del settings["data"]["validation"]
    settings["data"] |= {"validation_share": 0.25, "max_length": 40, "on_overlength": "truncate"}
    return arrive(tool, folder, settings | {"lora": LORA})


def answer_lengths(dataset: Any) -> list[int]:
    """Tokens of the whole examples of a data set."""
    if "input_ids" in dataset.column_names:
        return [len(row["input_ids"]) for row in dataset]
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]


def text_of(found: Arrived) -> str:
    """The first example to train on."""
    row = found.trainer.train_dataset[0]
    return found.trainer.processing_class.decode(row.get("input_ids") or row["prompt_ids"])


def adapters(found: Arrived) -> Any:
    return found.trainer.model.peft_config["default"]


def batch_size(found: Arrived) -> int:
    """Examples of the first batch that is read."""
    batch = next(iter(found.trainer.get_train_dataloader()))
    return len(batch["input_ids"]) // (2 if "completion_mask" in batch else 1)


def order(found: Arrived) -> bool:
    trainer = found.trainer
    return list(trainer._get_train_sampler()) == list(EpochSampler(len(trainer.train_dataset), 0, 77))


def dropouts(found: Arrived) -> set[float]:
    return {m.p for name, m in found.trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in name}


def decays(found: Arrived) -> set[tuple[int, float]]:
    """(dimensions, weight decay) of the parameters."""
    return {(parameter.ndim, group["weight_decay"]) for group in found.groups() for parameter in group["params"]}


# setting -> what has arrived of it, and what should have
ROWS: dict[str, tuple[Callable[[Arrived], Any], Any]] = {
    "model": (lambda found: Path(found.trainer.model.config._name_or_path).name, "hf"),
    "save": (lambda found: (found.save == found.trainer.args.output_dir, Path(found.save).name), (True, "run")),
    "data.sources": (lambda found: len(found.report()["sources"]), 4),
    "data.sources.path": (lambda f: [Path(s["path"]).name for s in f.report()["sources"]][2:], ["odd.json", "held.json"]),
    "data.sources.language": (lambda found: list(found.trainer.eval_dataset), ["fr"]),
    "data.sources.group": (lambda found: found.report()["sources"][1]["group"], "additional"),
    "data.sources.max_rows": (lambda found: found.report()["sources"][3]["validation"], 3),
    "data.validation": (lambda found: {name: len(rows) for name, rows in found.trainer.eval_dataset.items()}, {"fr": 3}),
    "data.almr": (lambda found: found.report()["almr"], pytest.approx(0.4, abs=0.03)),
    "data.max_length": (lambda found: max(answer_lengths(found.trainer.train_dataset)) <= 150, True),
    "data.on_overlength": (lambda found: found.report()["sources"][2]["broken"]["too long"]["first"], [2]),
    "data.on_error": (lambda found: found.report()["sources"][2]["rows"], 2),
    "data.chat_template": (lambda found: "user says" in text_of(found), True),
    "training.epochs": (lambda found: found.trainer.args.num_train_epochs, 2.5),
    "training.max_steps": (lambda found: found.trainer.args.max_steps, 7),
    "training.micro_batch_size": (batch_size, 2),
    "training.global_batch_size": (lambda found: found.trainer.args.gradient_accumulation_steps, 3),
    "training.params_dtype": (
        lambda f: (f.trainer.accelerator.mixed_precision, f.trainer.model.dtype),
        ("bf16", torch.float32),
    ),
    "training.float32_matmul_precision": (lambda found: found.matmul_precision, "medium"),
    "training.gradient_checkpointing": (lambda found: found.trainer.args.gradient_checkpointing, True),
    "training.seed": (order, True),
    "optimizer.lr": (lambda found: {group["initial_lr"] for group in found.groups()}, {3e-4}),
    "optimizer.decay_style": (lambda found: found.rates()[-1], pytest.approx(1 / 7)),
    "optimizer.warmup_fraction": (lambda found: found.rates()[:4], [0.25, 0.5, 0.75, 1.0]),
    "optimizer.weight_decay": (decays, {(2, 0.07), (1, 0.0)}),
    "optimizer.clip_grad": (lambda found: found.trainer.args.max_grad_norm, 0.6),
    "optimizer.adam_beta1": (lambda found: {group["betas"][0] for group in found.groups()}, {0.8}),
    "optimizer.adam_beta2": (lambda found: {group["betas"][1] for group in found.groups()}, {0.97}),
    "optimizer.adam_eps": (lambda found: {group["eps"] for group in found.groups()}, {1e-5}),
    "run.save_interval": (lambda f: (f.trainer.args.save_strategy, f.trainer.args.save_steps), ("steps", 3)),
    "run.keep_last": (lambda found: found.trainer.args.save_total_limit, 5),
    "run.eval_interval": (lambda f: (f.trainer.args.eval_strategy, f.trainer.args.eval_steps), ("steps", 4)),
    "run.log_interval": (lambda found: found.trainer.args.logging_steps, 2),
    "run.report_to": (lambda found: found.trainer.args.report_to, ["tensorboard"]),
}
ROWS_OF_ADAPTERS: dict[str, tuple[Callable[[Arrived], Any], Any]] = {
    "data.validation_share": (lambda found: [source["validation"] for source in found.report()["sources"]], [6, 6, 1]),
    "data.max_length": (lambda found: max(answer_lengths(found.trainer.train_dataset)), 40),
    "data.on_overlength": (lambda found: found.report()["sources"][2]["truncated"], 1),
    "lora.r": (lambda found: adapters(found).r, 3),
    "lora.alpha": (lambda found: adapters(found).lora_alpha, 5),
    "lora.dropout": (dropouts, {0.25}),
    "lora.target_modules": (lambda found: adapters(found).target_modules, {"q_proj", "up_proj"}),
    "lora.merge": (lambda found: found.merge, False),
}
OF_SFT: dict[str, tuple[Callable[[Arrived], Any], Any]] = {
    "packing": (lambda found: "seq_lengths" in found.trainer.train_dataset.column_names, False),
}
OF_DPO: dict[str, tuple[Callable[[Arrived], Any], Any]] = {
    "beta": (lambda found: found.trainer.beta, 0.35),
    "loss_type": (lambda found: found.trainer.loss_types, ["robust"]),
    "label_smoothing": (lambda found: found.trainer.label_smoothing, 0.2),
}
ELSEWHERE = {"export_to": "test_export_to_writes_instead_of_training"}


@pytest.mark.parametrize("name", ROWS)
def test_a_setting_arrives(arrived: Arrived, name: str) -> None:
    find, expected = ROWS[name]
    assert find(arrived) == expected


@pytest.mark.parametrize("name", ROWS_OF_ADAPTERS)
def test_a_setting_of_adapters_arrives(with_adapters: Arrived, name: str) -> None:
    find, expected = ROWS_OF_ADAPTERS[name]
    assert find(with_adapters) == expected


def test_settings_of_one_tool_arrive(tool: str, arrived: Arrived) -> None:
    for name, (find, expected) in {"sft": OF_SFT, "dpo": OF_DPO}[tool].items():
        assert find(arrived) == expected, name


def test_the_seed_draws_the_first_values_of_adapters(
    tool: str, with_adapters: Arrived, chat_model: str, tmp_path: Path
) -> None:
    """Whatever was drawn before."""
    torch.rand(3)
    settings = settings_of(tool, chat_model, tmp_path) | {"lora": LORA}
    again = arrive(tool, tmp_path, settings)
    other = arrive(
        tool, tmp_path, settings | {"save": str(tmp_path / "other"), "training": settings["training"] | {"seed": 78}}
    )
    first, second, third = (
        next(parameter for name, parameter in found.trainer.model.named_parameters() if "lora_A" in name)
        for found in (with_adapters, again, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def leaves(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default of every setting, those of the members of lists too."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        kind = get_type_hints(config_class)[field.name]
        inner = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and dataclasses.is_dataclass(k)]
        is_list = "list" in str(kind)
        if not inner or is_list:
            found[prefix + field.name] = field.default
        if inner and not (is_list and field.name != "sources"):  # validation has the same members
            found |= leaves(inner[0], f"{prefix}{field.name}.")
    return found


def test_every_setting_has_a_row(tool: str) -> None:
    known = {*ROWS, *ROWS_OF_ADAPTERS, *ELSEWHERE, *(OF_SFT if tool == "sft" else OF_DPO)}
    assert set(leaves(TOOLS[tool][2])) == known


def test_every_setting_is_another_than_its_default(tool: str, chat_model: str, tmp_path: Path) -> None:
    settings = settings_of(tool, chat_model, tmp_path) | {"lora": LORA}
    for name, default in leaves(TOOLS[tool][2]).items():
        if name in ELSEWHERE or name.startswith("data.sources.") or name == "data.validation_share":
            continue
        value: Any = settings
        for part in name.split("."):
            value = value[part]
        assert value != default, name


def test_export_to_writes_instead_of_training(tool: str, chat_model: str, tmp_path: Path) -> None:
    settings = settings_of(tool, chat_model, tmp_path) | {"export_to": str(tmp_path / "export")}
    settings["data"]["chat_template"] = "chatml"
    settings |= {"loss_type": "sigmoid"} if tool == "dpo" else {}
    with pytest.raises(IndexError):  # nothing has arrived at the trainer
        arrive(tool, tmp_path, settings)
    assert (tmp_path / "export" / f"{tool}.yaml").exists()


def test_smoothing_is_refused_where_the_loss_has_none(chat_model: str, tmp_path: Path) -> None:
    data = TuningDataConfig([SourceConfig("x.json", "en")])
    for kind in ("hinge", "ipo", "sppo_hard", "apo_zero"):
        with pytest.raises(
            InputError, match=rf"label_smoothing is 0\.1; expected 0 with loss_type {kind}, or sigmoid or robust"
        ):
            DpoConfig(chat_model, str(tmp_path), data, loss_type=kind, label_smoothing=0.1)  # type: ignore[arg-type]


def by_hand(weights: dict[str, torch.Tensor], loss: Callable[[int], torch.Tensor], rates: list[float]) -> list[float]:
    """AdamW with clipping, as Loshchilov and Hutter have it; changes the weights, returns the norms of the gradients.

    With the settings of `exact_settings`; weight decay on matrices only.
    """
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for step, rate in enumerate(rates, 1):
        gradients = dict(zip(weights, torch.autograd.grad(loss(step - 1), list(weights.values())), strict=True))
        norm = torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients.values())).item()
        norms.append(norm)
        with torch.no_grad():
            for name, gradient in gradients.items():
                clipped = gradient * min(1.0, 0.5 / norm)
                first[name] = 0.8 * first[name] + 0.2 * clipped
                second[name] = 0.9 * second[name] + 0.1 * clipped**2
                if weights[name].ndim > 1:
                    weights[name] *= 1 - rate * 0.3
                mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
                weights[name] -= rate * mean / (square.sqrt() + 1e-3)
    return norms


def exact_settings(tool: str, model: str, folder: Path) -> dict[str, Any]:
    """Three steps of four examples in two batches, with numbers that show."""
    settings = settings_of(tool, model, folder)
    settings["data"] |= {"validation": [], "validation_share": 0, "chat_template": "chatml"}
    settings["training"] = {"max_steps": 3, "micro_batch_size": 2, "global_batch_size": 4, "seed": 5}
    settings["optimizer"] = {"lr": 2e-3, "decay_style": "linear", "warmup_fraction": 0.6, "weight_decay": 0.3,
                             "clip_grad": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-3}  # fmt: skip
    settings["run"] = {}
    return settings


def test_weights_are_those_of_the_formulas(tool: str, chat_model: str, tmp_path: Path) -> None:
    """Of AdamW, its clipping, schedule and decay; of the loss: the mean of a step's answer tokens, conservative DPO."""
    _, finetune, config_class, _ = TOOLS[tool]
    settings = exact_settings(tool, chat_model, tmp_path)
    settings |= {"loss_type": "sigmoid", "beta": 0.4, "label_smoothing": 0.1} if tool == "dpo" else {}
    path = tmp_path / "exact.yaml"
    path.write_text(yaml.safe_dump(settings))
    run_tool(finetune, config_class, "", ["--config", str(path)])  # type: ignore[arg-type]
    rows = [row for row in read_metrics(tmp_path / "run") if "grad_norm" in row]
    data = TuningDataConfig(
        **settings["data"] | {"sources": [SourceConfig(**source) for source in settings["data"]["sources"]]}
    )
    prepare: Any = {"sft": prepare_sft, "dpo": prepare_dpo}[tool]
    examples = prepare(data, load_template(chat_model, "chatml"), 5).train
    model, reference = load_trainable_model(chat_model), load_trainable_model(chat_model)
    numbers = list(EpochSampler(len(examples), 0, 5))
    losses = []

    def loss(step: int) -> torch.Tensor:
        batch = [examples[number] for number in numbers[4 * step : 4 * step + 4]]
        losses.append((sft_loss if tool == "sft" else cdpo_loss)(batch))
        return losses[-1]

    def sft_loss(batch: list[Any]) -> torch.Tensor:
        sums, counted = [], 0
        for example in batch:
            logits, labels = model(torch.tensor([example.input_ids])).logits[0, :-1], torch.tensor(example.labels[1:])
            sums.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            counted += int((labels != IGNORED).sum())
        return torch.stack(sums).sum() / counted

    def cdpo_loss(batch: list[Any]) -> torch.Tensor:
        return torch.stack([cdpo(pair) for pair in batch]).mean()

    def cdpo(pair: Any) -> torch.Tensor:
        ratios = []
        for answer in (pair.chosen_ids, pair.rejected_ids):
            with torch.no_grad():
                base = log_probability(reference, pair.prompt_ids, answer)
            ratios.append(log_probability(model, pair.prompt_ids, answer) - base)
        margin = 0.4 * (ratios[0] - ratios[1])
        logsigmoid = torch.nn.functional.logsigmoid
        return -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)

    weights = dict(model.named_parameters())
    rates = [2e-3 * share for share in (0.5, 1.0, 0.5)]  # two steps of warm-up, then linear to 0 after the third
    norms = by_hand(weights, loss, rates)
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert [row["loss"] for row in rows] == pytest.approx([value.item() for value in losses], rel=1e-5)
    assert min(norms) > 0.5, "gradients are clipped"
    for name, written in load_file(tmp_path / "run" / "hf" / "model.safetensors").items():
        assert torch.allclose(written, weights[name], rtol=0, atol=2e-5), name
