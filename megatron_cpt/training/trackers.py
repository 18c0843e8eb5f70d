"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases. Both are optional and may fail without harm."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_text
from megatron_cpt.utils.redaction import redacted, secrets_of

logger = logging.getLogger(__name__)

WANDB_ID = "wandb_id"
LOGIN_SECONDS = 60  # for typing the key in where there is none: the other ranks are waiting
TRAINING_SERIES = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "throughput/tokens_per_second": "tokens_per_second",
    "throughput/tokens_per_second_per_device": "tokens_per_second_per_device",
    "throughput/mfu": "mfu",
    "throughput/mfu_causal": "mfu_causal",
    "throughput/step_seconds": "seconds",
    "throughput/data_seconds": "data_seconds",
    "data/almr": "almr_realised",
    "data/consumed_tokens": "consumed_tokens",
    "data/consumed_samples": "consumed_samples",
}
VALIDATION_SERIES = ("loss", "bits_per_byte", "perplexity")
VALIDATION_CHANGES = ("loss_change", "bits_per_byte_change")


def check_logging(config: LoggingConfig) -> None:
    """Whether what the configuration asks for is installed.

    Raises:
        InputError: it is not; the message names the field and what to install
    """
    wanted = {
        "tensorboard": config.tensorboard and "logging.tensorboard is true",
        "wandb": config.wandb_project is not None and "logging.wandb_project is given",
    }
    for package, reason in wanted.items():
        if reason and not is_installed(package):
            raise InputError(f"{reason} but the package {package} is not installed; pip install 'megatron-cpt[logging]'")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name (wandb/ of an earlier run) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def training_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The series that a training row adds to, with their values."""
    values = {series: row[name] for series, name in TRAINING_SERIES.items() if row.get(name) is not None}
    return values | {"train/skipped": float(bool(row.get("skipped")))}


def validation_scalars(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The series that a validation adds to, with their values. Changes since another step than 0 are series of their own."""
    scalars: dict[str, float | None] = {}
    for name, values in sets.items():
        since = values["baseline"]["iteration"]
        figures = {figure: figure for figure in VALIDATION_SERIES}
        figures |= {figure + (f"_since_{since}" if since else ""): figure for figure in VALIDATION_CHANGES}
        scalars |= {f"validation/{name}/{series}": values[figure] for series, figure in figures.items()}
    return {series: value for series, value in scalars.items() if value is not None}


@dataclass(frozen=True)
class Start:
    """What a sink has to know of this start of the run.

    Attributes:
        iteration: steps done before it
        last_recorded: last step that an earlier start recorded, beyond `iteration` if some were lost; -1 without any
        run: run.json
    """

    folder: str
    iteration: int
    last_recorded: int
    run: dict[str, Any]


class Tracker(Protocol):
    """Takes named figures of steps."""

    name: str
    failures: tuple[type[Exception], ...]
    """What may go wrong there that is no fault of the run's."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in tensorboard/ of the run's folder. Each start makes one, which takes back steps that are done again."""

    name = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = start.iteration + 1 if start.iteration else 0  # a new run validates before its first step, as step 0
        self.writer = SummaryWriter(os.path.join(start.folder, "tensorboard"), purge_step=first, flush_secs=30)
        if not start.iteration:
            config = json.dumps(start.run.get("config"), indent=2, ensure_ascii=False)
            self.writer.add_text("config", f"```json\n{config}\n```", 0)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for the folder's run, however often that is resumed: its id lies in the folder.

    What was sent cannot be taken back, and steps that are done again would be points beside those they replace: they are
    left out until the run is past the last one recorded.
    """

    name = "Weights & Biases"

    def __init__(self, start: Start, config: LoggingConfig) -> None:
        import wandb

        self.failures: tuple[type[Exception], ...] = (wandb.Error, OSError)
        identity, known = wandb_id(start)
        self.run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or os.path.basename(os.path.abspath(start.folder)),
            id=identity,
            resume="allow",
            mode=config.wandb_mode,
            dir=start.folder,
            config=start.run,
            settings=wandb.Settings(console="off", silent=True, login_timeout=LOGIN_SECONDS),
        )
        self.first = max(start.last_recorded + 1 if known else 0, self.run.starting_step)

    @property
    def place(self) -> str:
        """Where to look."""
        return str(self.run.url if not self.run.offline else self.run.dir.removesuffix("/files"))

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        if iteration >= self.first:
            self.run.log(dict(values), step=iteration)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def wandb_id(start: Start) -> tuple[str, bool]:
    """The id of the W&B run and whether it has been used. A run that begins anew is another one there too."""
    path = os.path.join(start.folder, WANDB_ID)
    if start.iteration and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read().strip(), True
    identity = secrets.token_hex(4)
    write_text(path, identity + "\n")
    return identity, False


class Trackers:
    """The trackers that the configuration asks for. One that fails is left out from there on, and that is said."""

    def __init__(self, config: LoggingConfig, start: Start) -> None:
        self.open: list[Tracker] = []
        if config.tensorboard:
            try:
                self.open.append(TensorBoard(start))
            except OSError as error:
                logger.warning(f"TensorBoard is not used: {error}")
        if config.wandb_project is not None:
            self._start_wandb(config, start)

    def _start_wandb(self, config: LoggingConfig, start: Start) -> None:
        import wandb

        try:
            sink = WeightsAndBiases(start, config)
        except (wandb.Error, OSError) as error:  # a server that is away must not keep a job from its GPUs
            logger.warning(f"Weights & Biases is not used: {redacted(str(error), secrets_of(os.environ))}")
            return
        logger.info(f"Weights & Biases: {sink.place}")
        self.open.append(sink)

    def training(self, row: Mapping[str, Any]) -> None:
        """Record a training step."""
        self._write(row["iteration"], training_scalars(row))

    def validation(self, iteration: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        """Record an evaluation."""
        tokens = {} if iteration else {"data/consumed_tokens": 0.0}  # later the step itself says it
        self._write(iteration, validation_scalars(sets) | tokens)

    def _write(self, iteration: int, values: Mapping[str, float]) -> None:
        for sink in list(self.open):
            try:
                sink.write(iteration, values)
            except sink.failures as error:
                logger.warning(f"{sink.name} is left out from step {iteration} on: {error}")
                self.open.remove(sink)

    def close(self, failed: bool) -> None:
        """Write what waits and close."""
        for sink in self.open:
            try:
                sink.close(failed)
            except sink.failures as error:
                logger.warning(f"{sink.name} could not be closed: {error}")
        self.open.clear()
