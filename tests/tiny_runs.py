"""Short training runs of a tiny model on tiny corpora, through the real tools."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks import Forks
from tiny_models import make_tiny_llama, read_rows, run_tool, write_yaml

from megatron_cpt.convert.config import HfToMegatron
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess

STEPS = 5
SAVE_INTERVAL = 2


@dataclass(frozen=True)
class Layout:
    """tensor x pipeline x data parallel sizes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP{self.tp}{'+SP' if self.sp else ''}xPP{self.pp}xDP{self.dp}"


class Runs:
    """Starts training runs of one tiny model in a folder; with `forks` in forked processes."""

    def __init__(self, folder: Path, tokenizer_dir: str, forks: Forks | None = None, **model: Any) -> None:
        self.folder, self.forks = folder, forks
        hf = make_tiny_llama(folder / "hf", tokenizer_dir, **model)
        hf_to_megatron(HfToMegatron(hf, str(folder / "megatron")))
        for language, text in (
            ("en", "The quick brown fox jumps over the lazy dog. "),
            ("zh", "今天天气很好，我们去公园散步。"),
        ):
            for part, documents in (("train", 40), ("valid", 7)):
                source = folder / f"{language}_{part}.jsonl"
                source.write_text(
                    "".join(
                        json.dumps({"text": f"{part} {i}: " + text * (i % 5 + 3)}, ensure_ascii=False) + "\n"
                        for i in range(documents)
                    ),
                    encoding="utf-8",
                )
                preprocess(
                    PreprocessConfig(
                        input=[str(source)],
                        tokenizer=tokenizer_dir,
                        output_prefix=str(folder / f"{language}_{part}"),
                        language=language,
                        workers=1,
                    )
                )
        mixture = {
            "seq_length": 64,
            "seed": 7,
            "almr": 0.33,
            "general": [{"prefix": "en_train"}],
            "additional": [{"prefix": "zh_train"}],
            "validation": [{"prefix": "en_valid", "name": "en"}, {"prefix": "zh_valid", "name": "zh"}],
        }
        self.mixture = write_yaml(folder / "mixture.yaml", mixture)

    def configure(self, name: str, layout: Layout) -> str:
        """Write the configuration of the run `name`; returns its path."""
        save = self.folder / name
        config = {
            "mixture": self.mixture,
            "checkpoint": {"load": str(self.folder / "megatron"), "save": str(save), "save_interval": SAVE_INTERVAL},
            "training": {"train_iters": STEPS, "micro_batch_size": 2, "global_batch_size": 8},
            "parallel": {
                "tensor_model_parallel_size": layout.tp,
                "pipeline_model_parallel_size": layout.pp,
                "sequence_parallel": layout.sp,
            },
            "optimizer": {
                "lr": 3e-3,
                "min_lr": 1e-4,
            },
            "lr": {"warmup_iters": 2},
            "logging": {"report": False},
        }
        return write_yaml(self.folder / f"{name}.yaml", config)

    def train(self, name: str, layout: Layout, *extra: str, check: bool = True, gpu: bool = False) -> Path:
        """Run (or resume) the training named `name` to its end; returns its folder. `result` is the finished process."""
        self.start("--config", self.configure(name, layout), *extra, processes=layout.processes, check=check, gpu=gpu)
        return self.folder / name

    def start(
        self, *argv: str, processes: int = 1, check: bool = True, gpu: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """The training tool with any command line, to its end."""
        if self.forks is not None:
            self.result = self.forks.run(*argv, log=self.folder / "forked.log", processes=processes, check=check)
        else:
            self.result = run_tool("pretrain_cpt.py", *argv, processes=processes, check=check, gpu=gpu)
        return self.result

    def interrupted(self, finished: Path, name: str) -> Path:
        """A run folder as it was when `finished` had saved its first checkpoint and one step more was lost."""
        save = self.folder / name
        save.mkdir()
        shutil.copytree(finished / f"iter_{SAVE_INTERVAL:07d}", save / f"iter_{SAVE_INTERVAL:07d}")
        (save / "latest_checkpointed_iteration.txt").write_text(str(SAVE_INTERVAL))
        rows = [row for row in read_rows(finished) if row["iteration"] <= SAVE_INTERVAL + 1]
        (save / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return save
