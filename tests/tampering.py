"""What tests do to a training process before it starts: make parts of it slow, leave parts out, break parts on purpose.

Wishes come as JSON, `{name of a function below: its argument}`. A part that is about to be slow says so in a file
(`signs`), so that a test can wait for it to begin instead of guessing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def tamper(wishes: dict[str, Any]) -> None:
    """Do what is asked for, in this process."""
    for name, argument in wishes.items():
        globals()[name](argument)


def sign_of(path: str, rank: int) -> Path:
    """Where a rank leaves its signs."""
    return Path(f"{path}.{rank}")


def own_rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK", "0"))


def note(path: str) -> None:
    """Leave a sign that a place was reached: one more byte in a file."""
    with open(sign_of(path, own_rank()), "a", encoding="utf-8") as file:
        file.write(".")


@dataclass
class Pause:
    """What happens at the beginning of a call that is made slow: a sign, then `seconds` of sleep.

    Attributes:
        after: so many calls stay as they are
        ranks: which ranks; none: all
    """

    sign: str
    seconds: float
    after: int = 0
    ranks: list[int] | None = None
    calls: int = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > self.after and (self.ranks is None or own_rank() in self.ranks):
            note(self.sign)
            end = time.monotonic() + self.seconds
            while (left := end - time.monotonic()) > 0:
                time.sleep(left)


def slow(target: Any, name: str, pause: Pause, applies: Callable[..., bool] = lambda *args: True) -> None:
    """Let the calls of `target.name` for which `applies(*args)` begin with a pause."""
    real: Callable[..., Any] = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            pause()
        return real(*args, **kwargs)

    setattr(target, name, call)


def no_saves(_: Any) -> None:
    """Checkpoints are not written: for runs of which only the metrics are looked at."""
    from megatron_cpt.training import pretrain

    class Saver:
        committed = None

        def __init__(self, *args: Any) -> None: ...

        def prepare(self, *args: Any) -> None: ...

        def save(self, *args: Any, **kwargs: Any) -> None: ...

        def poll(self) -> None: ...

        def retry_pending(self) -> bool:
            return False

        def finish(self) -> None: ...

    pretrain.Saver = Saver  # type: ignore[assignment, misc]


def slow_checks(wish: dict[str, Any]) -> None:
    """When there are no process groups yet."""
    from megatron_cpt.training import pretrain

    slow(pretrain, "check_run", Pause(**wish))


def slow_start(wish: dict[str, Any]) -> None:
    """When there are process groups and no model yet."""
    from megatron_cpt.training import pretrain

    slow(pretrain, "build", Pause(**wish))


def slow_loading(wish: dict[str, Any]) -> None:
    """While the tensors of a checkpoint are read."""
    from megatron_cpt.checkpoint import save_load

    slow(save_load, "load_state", Pause(**wish))


def slow_microbatches(wish: dict[str, Any]) -> None:
    """In every micro-batch of training that is really computed."""
    from megatron_cpt.training.step import Microbatches

    slow(Microbatches, "_compute", Pause(**wish), lambda self, *args: not self.forward_only)


def slow_evaluation(wish: dict[str, Any]) -> None:
    """In every micro-batch of an evaluation that is really computed."""
    from megatron_cpt.training.step import Microbatches

    slow(Microbatches, "_compute", Pause(**wish), lambda self, *args: self.forward_only)


def slow_updates(wish: dict[str, Any]) -> None:
    """At the end of a step, where it is not given up any more."""
    from megatron_cpt.training import step

    slow(step, "apply_gradients", Pause(**wish))


def slow_steps(wish: dict[str, Any]) -> None:
    """When a step is over, whether it changed the weights or not, and not yet written down."""
    from megatron_cpt.training import pretrain

    slow(pretrain, "record_step", Pause(**wish))


def slow_reads(wish: dict[str, Any]) -> None:
    """In every read of a training micro-batch, which another thread does."""
    from megatron_cpt.mixture import loader

    slow(loader, "_read_and_finish", Pause(**wish))


def slow_saves(wish: dict[str, Any]) -> None:
    """In every save, when its temporary folder is there."""
    from megatron_cpt.checkpoint.save_operation import SaveOperation

    slow(SaveOperation, "_start_writers", Pause(**wish))


def loading_fails(wish: dict[str, Any]) -> None:
    """Rank `rank` raises `error` ("module.Class") while the tensors of a checkpoint are read."""
    from megatron_cpt.checkpoint import save_load

    module, name = wish["error"].rsplit(".", 1)
    error = getattr(importlib.import_module(module), name)
    real = save_load.load_tensor

    def load_tensor(*args: Any) -> Any:
        if own_rank() == wish["rank"]:
            raise error("broken on purpose")
        return real(*args)

    save_load.load_tensor = load_tensor


def first_saves_fail(number: int) -> None:
    """The first `number` saves cannot be committed."""
    from megatron_cpt.checkpoint.save_operation import SaveOperation

    real, left = SaveOperation._publish, number

    def call(self: SaveOperation, *args: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise OSError("broken on purpose")
        real(self, *args)

    SaveOperation._publish = call  # type: ignore[method-assign]


def slow_end(wish: dict[str, Any]) -> None:
    """When the run is over and the process groups are left."""
    from megatron_cpt.platforms import process_groups

    slow(process_groups.dist, "destroy_process_group", Pause(**wish))


def late_requests(folder: str) -> None:
    """Somebody asks to stop and to save when the run has done its last step, and nobody looks again."""
    from megatron_cpt.training import stopping
    from megatron_cpt.training.log import RunLog

    stopping.POLL_SECONDS, real = 3600.0, RunLog.status

    def status(self: RunLog, state: str, *args: Any) -> None:
        if state == "finished":
            for name in (stopping.STOP_FILE, stopping.SAVE_FILE):
                Path(folder, name).touch()
        real(self, state, *args)  # type: ignore[arg-type]

    RunLog.status = status  # type: ignore[method-assign, assignment]


def tell_pid(sign: str) -> None:
    """Write the process's number, for a test that did not start it itself."""
    sign_of(sign, own_rank()).write_text(str(os.getpid()), encoding="utf-8")


def fail_in_step(wish: dict[str, Any]) -> None:
    """Rank `rank` raises at the end of its `step`-th step."""
    if own_rank() != wish["rank"]:
        return
    from megatron_cpt.training import step

    real, calls = step.apply_gradients, 0

    def call(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == wish["step"]:
            note(wish["sign"])
            raise ArithmeticError("broken on purpose")
        real(*args)

    step.apply_gradients = call


def corrupt_weights(wish: dict[str, Any]) -> None:
    """On rank `rank` one weight changes after the `step`-th step, as on a device that computes wrongly."""
    if own_rank() != wish["rank"]:
        return
    from megatron_cpt.training import pretrain

    real, calls = pretrain.train_step, 0

    def call(chunks: Any, *args: Any) -> Any:
        nonlocal calls
        result = real(chunks, *args)
        calls += 1
        if calls == wish["step"]:
            with torch.no_grad():
                next(chunks[0].parameters()).view(-1)[0] += 0.5
        return result

    pretrain.train_step = call


def poison(wish: dict[str, Any]) -> None:
    """In the run's steps `first` to `last` the loss or gradient (`what`) is multiplied by `factor`, a number or "nan"."""
    from megatron_cpt.training import pretrain, step

    real_schedule, real_step, real_fit = step.run_schedule, pretrain.train_step, pretrain.fit
    factor, iteration = float(wish["factor"]), 0

    def fit(context: Any, state: Any) -> None:
        nonlocal iteration
        iteration = state.progress.iteration
        real_fit(context, state)

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal iteration
        iteration += 1
        return real_step(*args, **kwargs)

    def run_schedule(chunks: Any, *args: Any, **kwargs: Any) -> Any:
        report, skipped = real_schedule(chunks, *args, **kwargs)
        if wish["first"] <= iteration <= wish["last"]:
            if wish["what"] == "loss" and report is not None:
                report[0] *= factor
            elif wish["what"] == "gradient":
                for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                    parameter.main_grad.mul_(factor)
        return report, skipped

    pretrain.fit, pretrain.train_step, step.run_schedule = fit, train_step, run_schedule


def tell_state(sign: str) -> None:
    """After each step, a line with a checksum of the rank's weights and of its optimizer's state."""
    from megatron_cpt.training import pretrain

    real = pretrain.train_step

    def call(chunks: Any, optimizer: Any, *args: Any) -> Any:
        result = real(chunks, optimizer, *args)
        with open(sign_of(sign, own_rank()), "a", encoding="utf-8") as file:
            file.write(checksum(chunks, optimizer) + "\n")
        return result

    pretrain.train_step = call


def checksum(chunks: Any, optimizer: Any) -> str:
    """Of every weight, and of everything the optimizer keeps: main weights, moments, number of updates."""
    kept = [parameter for chunk in chunks for parameter in chunk.parameters()]
    counts = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            kept += group["params"]
            counts.append(group.get("step"))
        for values in part.optimizer.state.values():
            kept += [values[name] for name in sorted(values) if isinstance(values[name], torch.Tensor)]
    digest = hashlib.sha256(str(counts).encode())
    for tensor in kept:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def wishes_of_environment() -> dict[str, Any]:
    """Those in the variable TAMPER."""
    with contextlib.suppress(KeyError):
        return dict(json.loads(os.environ["TAMPER"]))
    return {}


def signs(path: str, rank: int = 0) -> int:
    """How often a rank has reached a place so far."""
    sign = sign_of(path, rank)
    return sign.stat().st_size if sign.exists() else 0


def tell_engine(sign: str) -> None:
    """Note, as JSON Lines, what the run gives to megatron-core, torch and the trackers: where its settings act."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel

    from megatron_cpt.checkpoint.save_operation import SaveOperation
    from megatron_cpt.training import pretrain, step
    from megatron_cpt.training.stopping import Peers

    def tell(call: str, **values: Any) -> None:
        with open(sign_of(sign, own_rank()), "a", encoding="utf-8") as file:
            file.write(json.dumps({"call": call} | values, default=str) + "\n")

    def before(target: Any, name: str, told: Callable[..., None]) -> None:
        real: Callable[..., Any] = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            told(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(target, name, call)

    real_build = pretrain.build

    def build(*args: Any) -> Any:
        chunks, optimizer = real_build(*args)
        tell("layers", layers=sum(len(chunk.module.decoder.layers) for chunk in chunks))
        return chunks, optimizer

    pretrain.build = build
    before(GPTModel, "__init__", lambda *args, **kwargs: tell("model", **vars(kwargs["config"])))
    before(DistributedDataParallel, "__init__", lambda *args, **kwargs: tell("ddp", **vars(args[2])))
    before(step, "clip_grad_by_total_norm_fp32", lambda *args, max_norm, **kwargs: tell("clip", max_norm=max_norm))
    before(pretrain, "prefetch", lambda reads, workers, ahead, *rest: tell("prefetch", workers=workers, ahead=ahead))
    before(pretrain, "check_replicas", lambda chunks, iteration, ranks: tell("check_replicas", iteration=iteration))
    before(pretrain, "rerunning", lambda wanted, batches: tell("rerunning", wanted=wanted))
    before(Peers, "__init__", lambda self, *args: tell("heartbeat", seconds=args[-1]))
    before(
        SaveOperation,
        "__init__",
        lambda self, request: tell("save", optimizer=request.optimizer is not None, background=request.staging is not None),
    )

    real_schedule, real_apply = step.get_forward_backward_func, step.apply_gradients

    def get_forward_backward_func() -> Callable[..., Any]:
        schedule = real_schedule()

        def call(**kwargs: Any) -> Any:
            sizes = {name: kwargs[name] for name in ("num_microbatches", "micro_batch_size", "forward_only")}
            tell("schedule", **sizes, precision=torch.get_float32_matmul_precision(), seed=torch.initial_seed())
            return schedule(**kwargs)

        return call

    def apply_gradients(optimizer: Any, *args: Any) -> None:
        names = ("lr", "weight_decay", "betas", "eps")
        tell("update", groups=[{name: group[name] for name in names} for group in optimizer.param_groups])
        real_apply(optimizer, *args)

    step.get_forward_backward_func, step.apply_gradients = get_forward_backward_func, apply_gradients


def no_wandb(sign: str) -> None:
    """In place of Weights & Biases, something that notes what it is asked for."""
    import wandb

    class Run:
        offline, dir, starting_step = True, "nowhere/files", 0

        def log(self, *args: Any, **kwargs: Any) -> None: ...

        def finish(self, **kwargs: Any) -> None: ...

    def init(**kwargs: Any) -> Run:
        wanted = {name: kwargs[name] for name in ("project", "name", "mode")}
        sign_of(sign, own_rank()).write_text(json.dumps(wanted), encoding="utf-8")
        return Run()

    wandb.init = init  # type: ignore[assignment]


def failing_saves(_: Any) -> None:
    """No checkpoint can be written."""
    from megatron_cpt.checkpoint import saver

    def attempt(request: Any) -> None:
        raise saver.CheckpointError("broken on purpose")

    saver.SaveOperation = attempt  # type: ignore[assignment, misc]
