"""One setting each of everything that may not change what is computed, or hardly."""

from __future__ import annotations

from dataclasses import dataclass

# Relative differences that are allowed; test_matrix.py says why.
FP32 = {"loss": 5e-6, "grad_norm": 5e-6}
BF16 = {"loss": 1e-3, "grad_norm": 5e-3}
BF16_FIRST_STEP = {"loss": 1e-5, "grad_norm": 1e-5}
PACKED = ("--data.reset_attention_mask", "true", "--data.eod_mask_loss", "true")


@dataclass(frozen=True)
class Case:
    """A layout, and what else may not change what is computed."""

    tp: int = 1
    pp: int = 1
    virtual: int | None = None
    dp: int = 1
    sp: bool = False
    recompute: str | None = None
    dtype: str = "fp32"
    packed: bool = False
    extra: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def arguments(self) -> list[str]:
        values = {
            "parallel.tensor_model_parallel_size": self.tp,
            "parallel.pipeline_model_parallel_size": self.pp,
            "parallel.virtual_pipeline_model_parallel_size": self.virtual,
            "parallel.sequence_parallel": str(self.sp).lower(),
            "parallel.recompute_granularity": self.recompute,
            "training.params_dtype": self.dtype,
        }
        given = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*given, *self.extra, *(PACKED if self.packed else ())]

    def tolerance(self, iteration: int) -> dict[str, float]:
        """Relative differences from a single process, in that step."""
        if self.dtype == "fp32":
            return FP32
        return BF16_FIRST_STEP if iteration < 2 and self.tp == 1 else BF16

    def __str__(self) -> str:
        virtual = f"v{self.virtual}" if self.virtual else ""
        layout = f"TP{self.tp}{'+SP' if self.sp else ''}-PP{self.pp}{virtual}-DP{self.dp}-{self.dtype}"
        more = [self.recompute or "", "packed" if self.packed else "", *(word.split(".")[-1] for word in self.extra)]
        return "-".join([layout, *filter(None, more)])
