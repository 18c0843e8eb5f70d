"""How the learning rate moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.require import Requirements, at_most_one
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class LrConfig:
    """Warm-up to optimizer.lr and decay to optimizer.min_lr at the end of the run."""

    decay_style: Literal["linear", "cosine", "WSD", "constant"] = "linear"
    """Linear is the ALMR paper's schedule for CPT. WSD (warm-up, stable, decay) stays at optimizer.lr until it decays."""
    warmup_iters: int | None = None
    """Steps of linear warm-up; or give warmup_samples or warmup_tokens."""
    warmup_samples: int | None = None
    """Samples of linear warm-up."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up, rounded up to whole samples."""
    wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "minus_sqrt"
    """Shape of the decay at the end of WSD."""
    wsd_decay_iters: int | None = None
    """Steps of the decay at the end of WSD; or give wsd_decay_samples or wsd_decay_tokens. Default: a tenth of the run."""
    wsd_decay_samples: int | None = None
    """Samples of the decay at the end of WSD."""
    wsd_decay_tokens: int | None = None
    """Tokens of the decay at the end of WSD, rounded up to whole samples."""
    on_continue: Literal["restart", "continue"] | None = None
    """What a run does whose schedule is another than the one its checkpoint was trained with: warm up again and decay again
    from there ("restart"), or go on where the new schedule would be by now ("continue"). Not given: it is an error."""

    def __post_init__(self) -> None:
        amounts = ("iters", "samples", "tokens")
        with Requirements() as need:
            need.at_least(self, **{f"{kind}_{unit}": 0 for kind in ("warmup", "wsd_decay") for unit in amounts})
            with need.noted():
                at_most_one("lr", self, *(f"warmup_{unit}" for unit in amounts))
            with need.noted():
                decay = at_most_one("lr", self, *(f"wsd_decay_{unit}" for unit in amounts))
                if decay and self.decay_style != "WSD":
                    raise InputError(f"lr.{decay} is given with decay_style {self.decay_style}; expected WSD")
