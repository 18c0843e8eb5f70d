"""Which documents each step of a run reads, or has read, and in which steps a document was read."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.checkpoint.layout import find_checkpoint, is_of_a_run, read_checkpoint_manifest
from megatron_cpt.config.fields import config_from
from megatron_cpt.config.require import Requirements
from megatron_cpt.config.run import RunConfig
from megatron_cpt.corpus.config import available_cores
from megatron_cpt.mixture.document_reads import (
    CorpusDocuments,
    Lookup,
    Reads,
    Stretch,
    documents_of,
    locate_on_cpu,
    read_steps,
    reads_of_documents,
)
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.ledger import check_max_epochs
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.order.order import SampleOrder
from megatron_cpt.mixture.reads_file import FORMATS, is_of, manifest_of, write_reads
from megatron_cpt.mixture.state import MOST_SAMPLES, DataState, initial_state, saved_phases
from megatron_cpt.training.device_order import OnDevice, check_library
from megatron_cpt.training.run_files import length_of, schedule_of
from megatron_cpt.utils.compare import describe_difference
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError, RunError
from megatron_cpt.utils.input_files import why_unwritable
from megatron_cpt.utils.progress import meter
from megatron_cpt.utils.signals import interruptible

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_STEPS = 1 << 40
MOST_IN_A_STEP = 1 << 24  # samples that the order shuffles together
OUTPUTS = " or ".join(f"NAME{suffix}" for suffix in FORMATS)
MOST_NAMED = 8  # of files in a message
OF_A_MIXTURE = ("global_batch_size", "train_iters", "order")  # a run has recorded its own


@dataclass(frozen=True)
class ExportOrderConfig:
    """Which steps of which run, and where the rows go."""

    run: str | None = None
    """Folder of a run, or a checkpoint of one: what it has read, and will read."""
    mixture: str | None = None
    """A mixture file: what a run with it would read. With `run`: where the run's own lies now."""
    global_batch_size: int | None = None
    """Of a mixture: samples of a step."""
    train_iters: int | None = None
    """Of a mixture: length of the run in steps."""
    order: Literal["default", "megatron"] | None = None
    """Of a mixture: as data.order of a run. Default: default."""
    first_step: int = 1
    """The first step to write, from 1 on."""
    last_step: int | None = None
    """The last step to write. Default: that of the run."""
    find: list[str] | str = field(default_factory=list)
    """Only rows of these documents, as CORPUS:DOCUMENT (from 0 on) or FILE:LINE (from 1 on)."""
    output: str | None = None
    """File for the rows: NAME.parquet or NAME.npy. May be left out with `find`, whose rows are printed then."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the order is computed."""
    num_workers: int = field(default_factory=available_cores)
    """Threads."""
    overwrite: bool = False
    """Replace an output of other steps or of another run."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, global_batch_size=1, train_iters=1, first_step=1, last_step=1, num_workers=1)
            need.field(self, "global_batch_size", lambda value: value <= MOST_IN_A_STEP, "at most 2**24")
            need.field(self, "train_iters", lambda value: value <= MOST_STEPS, "at most 2**40")
            with need.noted():
                if self.run is None:
                    for name in ("mixture", "global_batch_size", "train_iters"):
                        if getattr(self, name) is None:
                            need.add(InputError(f"{name} is missing; expected one, or run"))
            for name in OF_A_MIXTURE:
                with need.noted():
                    if self.run is not None and getattr(self, name) is not None:
                        raise InputError(f"{name} is {getattr(self, name)} with run; expected none: the run has its own")
            with need.noted():
                batch, steps = self.global_batch_size or 0, self.train_iters or 0
                if batch <= MOST_IN_A_STEP and steps <= MOST_STEPS:
                    samples = batch * steps
                    need(samples <= MOST_SAMPLES, "global_batch_size * train_iters", samples, "at most 2**58")
            with need.noted():
                ends = self.output is None or Path(self.output).suffix in FORMATS
                need(ends, "output", self.output or "''", OUTPUTS)
            with need.noted():
                if self.output is None and not self.documents:
                    raise InputError(f"output is missing; expected {OUTPUTS}, or find")
            with need.noted():
                for name in self.documents:
                    is_number = re.fullmatch(r"\d{1,18}", name.rpartition(":")[2], re.ASCII) is not None
                    need(is_number and ":" in name, "find", name or "''", "CORPUS:DOCUMENT or FILE:LINE")

    @property
    def documents(self) -> list[str]:
        """What to find."""
        return [self.find] if isinstance(self.find, str) else self.find


@dataclass(frozen=True)
class OrderedRun:
    """A run as far as the order of its data goes: stretches of steps that follow each other."""

    mixture: Mixture
    stretches: list[Stretch]


def export_order(config: ExportOrderConfig) -> str | None:
    """Write or print the rows; returns the output's path.

    Raises:
        InputError: a run or a mixture that cannot be read, steps or documents that it does not have, an output of others
        RunError: the output cannot be written to its end
    """
    if config.output is not None:
        config = replace(config, output=os.path.expanduser(config.output))
    with interruptible():
        ordered = open_run(config)
        first, last = export_steps(config, ordered)
        made_from = describe_export(config, ordered, first, last)
        if config.output is not None and is_there(config, made_from):
            logger.info(f"{config.output} is there, of the same steps: nothing to do")
            return config.output
        documents = documents_of(ordered.mixture.corpora)
        names, files = made_from["corpora"], made_from["files"]
        if config.find:
            wanted = dict.fromkeys(place for name in config.documents for place in find_documents(name, documents))
            pieces = reads_of_documents(ordered.stretches, documents, list(wanted), first, last)
        else:
            lookup: Lookup = OnDevice() if config.device == "cuda" else locate_on_cpu
            pieces = read_steps(ordered.stretches, documents, first, last, lookup, config.num_workers)
        if config.output is None:
            if not print_reads(pieces, names, files):
                logger.info(f"not read in steps {first:,} to {last:,}")
            return None
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        try:
            write_reads(Path(config.output), with_meter(pieces, ordered, first, last), made_from)
        except OSError as error:
            if error.filename is not None and error.errno not in DISK_FULL:  # a name that cannot be opened
                raise
            raise RunError(f"output {config.output} could not be written: {error.strerror or error}") from error
        return config.output


def check_export_files(config: ExportOrderConfig) -> None:
    """Check what a configuration names, whatever is wrong with it.

    Raises:
        InputError: something is wrong; InputErrors: several things are
    """
    refusals = Refusals()
    with refusals.noted():
        if config.device == "cuda":
            check_library()
    with refusals.noted():
        if config.output is not None:
            check_export_output(os.path.expanduser(config.output))
    ordered: OrderedRun | None = None
    with refusals.noted():
        ordered = open_run(config)
    with refusals.noted():
        if ordered is not None:
            export_steps(config, ordered)
    with refusals.noted():
        if config.find and (ordered is not None or config.run is None):
            mixture = ordered.mixture if ordered is not None else mixture_of(config)
            documents = documents_of(mixture.corpora)
            for name in config.documents:
                with refusals.noted():
                    find_documents(name, documents)
    refusals.raise_any()


def check_export_output(output: str) -> None:
    """Raise InputError unless files of these names can be written."""
    why = why_unwritable(os.path.dirname(output))
    for path in (output, manifest_of(output)):
        if os.path.lexists(path) and not os.path.isfile(path):
            why = f"{path} is there, and is no file"
    if why:
        raise InputError(f"output is {output}; expected a name in a folder to write to ({why})")


def mixture_of(config: ExportOrderConfig) -> Mixture:
    """The mixture that is named. RefusedValueError: none is, which `ExportOrderConfig` says."""
    if config.mixture is None:
        raise RefusedValueError
    return load_mixture(config.mixture)


def open_run(config: ExportOrderConfig) -> OrderedRun:
    """The run, or the run that there would be.

    Raises:
        InputError: it cannot be read, or its mixture is another one by now, or training would refuse it
    """
    if config.run is not None:
        return read_exported_run(config.run, config.mixture, config.num_workers)
    mixture = mixture_of(config)
    batch, steps = config.global_batch_size, config.train_iters
    if batch is None or steps is None:  # `ExportOrderConfig` names it
        raise RefusedValueError
    samples = batch * steps
    schedule = schedule_of(mixture, config.order or "default", samples, config.num_workers)
    check_max_epochs(mixture, schedule, samples)
    order = initial_state(mixture, schedule, batch).order(mixture, schedule)
    return OrderedRun(mixture, [Stretch(1, 0, samples, batch, order)])


def read_exported_run(path: str, mixture_path: str | None, threads: int) -> OrderedRun:
    """A run by its newest checkpoint, or by one of its checkpoints. `mixture_path`: where its mixture file is now."""
    folder = find_checkpoint(path)
    if not is_of_a_run(folder):
        raise InputError(f"run is {path}; expected a run's folder, or a checkpoint of one ({folder} has converted weights)")
    manifest = read_checkpoint_manifest(folder)
    config = config_from(RunConfig, manifest["config"], os.path.join(folder, "manifest.json"))
    if mixture_path is None:
        check_mixture_file(path, config.mixture)
    mixture = load_mixture(mixture_path or config.mixture)
    samples = length_of(config, mixture.seq_length, manifest).run_samples
    schedule = schedule_of(mixture, config.data.order, samples, threads)
    state = DataState(saved_phases(manifest["data"]))
    for old, new in ((state.current.mixture, mixture.fingerprint()), (state.current.schedule, schedule.describe())):
        if old != new:
            raise InputError(f"{mixture.path}: not the mixture that {folder} has read: {describe_difference(old, new)}")
    check_steps(folder, state, manifest["iteration"], manifest["consumed_samples"])
    stretches, step = list[Stretch](), 1
    for i, phase in enumerate(state.phases):
        end = state.phases[i + 1].start if i + 1 < len(state.phases) else samples
        part = DataState(state.phases[: i + 1])
        if phase.start >= state.mixture_start.start:
            order = part.order(mixture, schedule)
            stretches.append(Stretch(step, phase.start, end, phase.global_batch_size, order))
        step += -(-(end - phase.start) // phase.global_batch_size)
    return OrderedRun(mixture, stretches)


def check_mixture_file(run: str, mixture: str) -> None:
    """Raise InputError unless the mixture file of a run is there, whose path is relative to where the run was started."""
    if not os.path.exists(mixture):
        relative = "" if os.path.isabs(mixture) else ", seen from where the run was started"
        raise InputError(
            f"run {run}: its mixture file is {mixture}{relative}: no such file; expected mixture, where it lies now"
        )


def check_steps(folder: str, state: DataState, iteration: int, consumed_samples: int) -> None:
    """Raise InputError where the phases do not tell of all global batch sizes: those of before, in Megatron-LM's order."""
    ends = [*(phase.start for phase in state.phases[1:]), consumed_samples]
    steps = sum(-(-(end - one.start) // one.global_batch_size) for one, end in zip(state.phases, ends, strict=True))
    if steps != iteration:
        raise InputError(
            f"{os.path.join(folder, 'manifest.json')}: data.segments are {steps:,} steps up to sample {consumed_samples:,}; "
            f"expected {iteration:,}, as iteration: an earlier version did not record that global_batch_size changed"
        )


def export_steps(config: ExportOrderConfig, ordered: OrderedRun) -> tuple[int, int]:
    """The first and the last step to write.

    Raises:
        InputError: the run has no such steps, or read them of another mixture
    """
    begins, ends = ordered.stretches[0].first_step, ordered.stretches[-1].end_step - 1
    first, last = config.first_step, config.last_step or ends
    if first < begins:
        raise InputError(
            f"first_step is {first}; expected {begins} or more: before that the run read another mixture than "
            f"{ordered.mixture.path}; a checkpoint from before tells what"
        )
    if not first <= last <= ends:
        raise InputError(f"first_step is {first} and last_step {last}; expected steps from {begins} to {ends}")
    return first, last


def with_meter(pieces: Iterator[Reads], ordered: OrderedRun, first: int, last: int) -> Iterator[Reads]:
    """The rows, while a bar shows how far they are: by tokens, as ids of four bytes."""
    sample_bytes = 4 * ordered.mixture.seq_length
    samples = sum(len(stretch.samples_of(first, last)) for stretch in ordered.stretches)
    with meter(samples * sample_bytes, of="tokens") as shown:
        for reads in pieces:
            shown.advance(len(set(reads.sample.tolist())) * sample_bytes, len(reads))
            yield reads


def find_documents(name: str, documents: Sequence[CorpusDocuments]) -> list[tuple[int, int]]:
    """CORPUS:DOCUMENT or FILE:LINE -> corpora and documents: several where several corpora have read that line.

    Raises:
        InputError: there is none, or several files have that name
    """
    where, _, digits = name.rpartition(":")
    number = int(digits)
    for place, one in enumerate(documents):
        if one.corpus.name == where:
            if number >= one.corpus.data.num_documents:
                raise InputError(f"find is {name}; expected a document from 0 to {one.corpus.data.num_documents - 1}")
            return [(place, number)]
    listed = [(place, file, path) for place, one in enumerate(documents) for file, path in enumerate(one.origins.files)]
    exactly = [of for of in listed if of[2] == where or os.path.realpath(of[2]) == os.path.realpath(where)]
    files = exactly or [of for of in listed if os.path.basename(of[2]) == where]
    paths = list(dict.fromkeys(path for _, _, path in files))
    known = ", ".join(one.corpus.name for one in documents)
    if not files:
        raise InputError(
            f"find is {name}, which names no corpus and no file of the mixture; expected one of {known}, or a file of one"
        )
    if len({os.path.realpath(path) for path in paths}) > 1:
        raise InputError(f"find is {name}, which names several files; expected one of {', '.join(paths[:MOST_NAMED])}")
    if number == 0:
        raise InputError(f"find is {name}; expected a line from 1 on")
    found = [(place, documents[place].origins.find(file, number)) for place, file, _ in files]
    places = [(place, document) for place, document in found if document is not None]
    if not places:
        corpora = list(dict.fromkeys(documents[place].corpus.name for place, _ in found))
        raise InputError(
            f"find is {name}: that line gave no document of {' or '.join(corpora)}, or its lines are not known; "
            f"use {corpora[0]}:N"
        )
    return places


def describe_export(config: ExportOrderConfig, ordered: OrderedRun, first: int, last: int) -> dict[str, Any]:
    """What decides the rows, in plain values."""
    state = [
        {
            "first_step": stretch.first_step,
            "first_sample": stretch.first_sample,
            "end_sample": stretch.end_sample,
            "global_batch_size": stretch.global_batch_size,
        }
        for stretch in ordered.stretches
    ]
    return {
        "run": None if config.run is None else os.path.normpath(config.run),
        "mixture": os.path.normpath(ordered.mixture.path),
        "fingerprint": ordered.mixture.fingerprint(),
        "stretches": state,
        "order": "default" if isinstance(ordered.stretches[-1].order, SampleOrder) else "megatron",
        "first_step": first,
        "last_step": last,
        "find": config.documents,
        "corpora": [corpus.name for corpus in ordered.mixture.corpora],
        "files": [source.path for corpus in ordered.mixture.corpora for source in corpus.manifest.sources],
    }


def is_there(config: ExportOrderConfig, made_from: dict[str, Any]) -> bool:
    """Whether the output is there, of just this.

    Raises:
        InputError: it is there, of something else
    """
    output = config.output or ""
    existing = [path for path in (output, manifest_of(output)) if os.path.exists(path)]
    if not existing or config.overwrite:
        return False
    if is_of(Path(output), made_from):
        return True
    raise InputError(
        f"output {output}: {existing[0]} is there, and was not made of these steps; expected another name, or overwrite"
    )


def print_reads(pieces: Iterator[Reads], corpora: Sequence[str], files: Sequence[str]) -> int:
    """Print a line for each row; returns how many there are."""
    try:
        rows = _print_reads(pieces, corpora, files)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as head: what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    return rows


def _print_reads(pieces: Iterator[Reads], corpora: Sequence[str], files: Sequence[str]) -> int:
    rows = 0
    for reads in pieces:
        for i in range(len(reads)):
            first, tokens = int(reads.first_token[i]), int(reads.tokens[i])
            where = f"{corpora[reads.corpus[i]]}:{reads.document[i]}"
            origin = f" ({files[reads.file[i]]}:{reads.line[i]})" if reads.line[i] > 0 else ""
            print(f"step {reads.step[i]}, sample {reads.sample[i]}: {where}{origin}, tokens {first} to {first + tokens - 1}")
        rows += len(reads)
    return rows
