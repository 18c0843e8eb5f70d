"""What the change of a validation figure is relative to: the first measurement of the same text in the same way.

A run may be resumed with other validation sets or settings. Figures of another text, or of the same text counted in another
way, are not compared: a new baseline begins where the run is measured anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.loader import validation_samples
from megatron_cpt.mixture.mixture import Corpus, Mixture
from megatron_cpt.training.validation_result import ValidationResult


@dataclass(frozen=True)
class Measurement:
    """All that the figures of a validation set depend on beside the weights. Figures of equal measurements compare."""

    name: str
    bin_sha256: str
    idx_sha256: str
    """The borders of documents, which the two settings below look at."""
    tokenizer: str
    """Its fingerprint: what a token is, and the bytes it stands for."""
    seq_length: int
    samples: int
    eod_mask_loss: bool
    reset_attention_mask: bool


@dataclass(frozen=True)
class Baseline:
    """The figures of a set when it was first measured so, after `iteration` steps of the run."""

    measurement: Measurement
    iteration: int
    loss: float
    bits_per_byte: float


def measurement(corpus: Corpus, seq_length: int, config: RunConfig) -> Measurement:
    """How a run measures a validation set."""
    return Measurement(
        name=corpus.name,
        bin_sha256=corpus.manifest.files["bin"].sha256,
        idx_sha256=corpus.manifest.files["idx"].sha256,
        tokenizer=corpus.manifest.tokenizer.fingerprint,
        seq_length=seq_length,
        samples=validation_samples(corpus, seq_length, config.validation.eval_samples),
        eod_mask_loss=config.data.eod_mask_loss,
        reset_attention_mask=config.data.reset_attention_mask,
    )


def measurements(mixture: Mixture, config: RunConfig) -> list[Measurement]:
    """Those of all validation sets, in their order."""
    return [measurement(corpus, mixture.seq_length, config) for corpus in mixture.validation]


def find_baseline(baselines: Sequence[Baseline], wanted: Measurement) -> Baseline | None:
    """The baseline of this very measurement."""
    return next((baseline for baseline in baselines if baseline.measurement == wanted), None)


def extend_baselines(
    baselines: Sequence[Baseline], taken: Sequence[Measurement], results: Sequence[ValidationResult], iteration: int
) -> list[Baseline]:
    """The baselines with those that begin with these results, one for each measurement that has none."""
    new = [
        Baseline(how, iteration, result.loss, result.bits_per_byte)
        for how, result in zip(taken, results, strict=True)
        if find_baseline(baselines, how) is None
    ]
    return [*baselines, *new]


def incomparable(baselines: Sequence[Baseline], wanted: Sequence[Measurement], iteration: int) -> list[str]:
    """A sentence for each set of a run at `iteration` that was not measured so before."""
    return [
        f"validation set {how.name}: {why_not(baselines, how)}; its changes are since step {iteration:,} from here on"
        for how in wanted
        if find_baseline(baselines, how) is None
    ]


def why_not(baselines: Sequence[Baseline], wanted: Measurement) -> str:
    """What a set's newest baseline was measured on that is another now."""
    before = [baseline for baseline in baselines if baseline.measurement.name == wanted.name]
    if not before:
        return "nothing says how it was measured before"
    old, new = asdict(before[-1].measurement), asdict(wanted)
    changed = [
        f"{name} was {short_checksum(value)} at step {before[-1].iteration:,} and is {short_checksum(new[name])}"
        for name, value in old.items()
        if value != new[name]
    ]
    return ", ".join(changed)


def short_checksum(value: Any) -> str:
    """A value; the beginning of a checksum."""
    return str(value) if len(str(value)) < 20 else f"{str(value)[:12]}..."


def baselines_json(baselines: Sequence[Baseline]) -> list[dict[str, Any]]:
    """Plain values for a checkpoint."""
    return [asdict(baseline) for baseline in baselines]


def from_json(saved: Any) -> list[Baseline]:
    """From a checkpoint. Older ones have {set: figures}, which does not say what was measured: none."""
    if isinstance(saved, dict):
        return []
    return [Baseline(**entry | {"measurement": Measurement(**entry["measurement"])}) for entry in saved]
