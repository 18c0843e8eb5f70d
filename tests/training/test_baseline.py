"""The change of a validation figure compares the same text, counted in the same way, whatever a resumed run is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Forks
from tiny_models import VARIANTS, read_rows, write_yaml
from tiny_runs import SAVE_INTERVAL, STEPS, Layout, Runs

from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.training.baseline import from_json
from megatron_cpt.training.validation_table import baseline_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("baseline"), tiny_tokenizer_dir, **VARIANTS["tied"])


@pytest.fixture(scope="module")
def finished(runs: Runs, forks: Forks) -> Path:
    forks.start(["--config", runs.configure("whole", Layout())], runs.folder / "whole.log").finish()
    return runs.folder / "whole"


def resume(runs: Runs, forks: Forks, finished: Path, name: str, *extra: str) -> tuple[list[dict[str, Any]], str]:
    """A run that was interrupted after its first checkpoint goes on, told something else: its evaluations, what it says."""
    folder = runs.interrupted(finished, name)
    job = forks.start(
        ["--config", runs.configure(name, Layout()), "--logging.report=true", *extra], runs.folder / f"{name}.log"
    )
    job.finish()
    return [row for row in read_rows(folder) if "validation" in row], job.text()


def other_text(runs: Runs) -> str:
    """A mixture with another text under the name of a validation set; returns the option."""
    source, prefix = runs.folder / "other.jsonl", str(runs.folder / "zh_other")
    text = "昨天下了一场大雨，路上没有人。"
    source.write_text("".join(json.dumps({"text": text * (i + 3)}) + "\n" for i in range(7)), encoding="utf-8")
    tokenizer = json.loads((runs.folder / "zh_valid.json").read_text())["tokenizer"]["path"]
    preprocess(PreprocessConfig(str(source), tokenizer, prefix, "zh", workers=1))
    fields = yaml.safe_load(Path(runs.mixture).read_text())
    fields["validation"][1]["prefix"] = "zh_other"
    return "--mixture=" + write_yaml(runs.folder / "other.yaml", fields)


def test_the_same_measurement_goes_on(runs: Runs, forks: Forks, finished: Path) -> None:
    evaluations, said = resume(runs, forks, finished, "same")
    whole = [row for row in read_rows(finished) if "validation" in row]
    assert evaluations == whole
    assert [row["iteration"] for row in evaluations] == [0, STEPS]
    assert f"validation at step {STEPS}, and the change since step 0" in said
    assert "from here on" not in said


@pytest.mark.parametrize("what", ["samples", "text", "eod_mask_loss", "reset_attention_mask"])
def test_another_measurement_has_a_baseline_of_its_own(runs: Runs, forks: Forks, finished: Path, what: str) -> None:
    extra, words = {
        "samples": ("--validation.eval_samples=2", "at step 0 and is 2; its changes are since"),
        "text": (other_text(runs) if what == "text" else "", "validation set zh: bin_sha256 was"),
        "eod_mask_loss": ("--data.eod_mask_loss=true", "zh: eod_mask_loss was False at step 0 and is True"),
        "reset_attention_mask": (
            "--data.reset_attention_mask=true",
            "zh: reset_attention_mask was False at step 0 and is True",
        ),
    }[what]
    evaluations, said = resume(runs, forks, finished, what, extra)
    assert words in said
    assert f"its changes are since step {SAVE_INTERVAL} from here on" in said
    assert [row["iteration"] for row in evaluations] == [0, SAVE_INTERVAL, STEPS]
    step_0, anew, last = (row["validation"]["zh"] for row in evaluations)
    assert last["baseline"] == {"iteration": SAVE_INTERVAL, "loss": anew["loss"], "bits_per_byte": anew["bits_per_byte"]}
    assert last["bits_per_byte_change"] == last["bits_per_byte"] / anew["bits_per_byte"] - 1
    false = last["bits_per_byte"] / step_0["bits_per_byte"] - 1
    assert last["bits_per_byte_change"] != pytest.approx(false, rel=0.05)
    report = (runs.folder / what / "report.md").read_text()
    (row,) = [line.split(" | ") for line in report.splitlines() if line.startswith("| zh | zh |")]
    assert row[4:7] == [
        f"{anew['bits_per_byte']:.4f} → {last['bits_per_byte']:.4f}",
        str(SAVE_INTERVAL),
        f"{100 * last['bits_per_byte_change']:+.1f} %",
    ]
    # Where only one set is another, the others are still compared with step 0.
    english = evaluations[-1]["validation"]["en"]["baseline"]["iteration"]
    assert english == (0 if what == "text" else SAVE_INTERVAL)
    saved = json.loads((runs.folder / what / f"iter_{STEPS:07d}" / "manifest.json").read_text())["training"]["baseline"]
    assert [(b.measurement.name, b.iteration) for b in from_json(saved)][2:] == (
        [("zh", SAVE_INTERVAL)] if what == "text" else [("en", SAVE_INTERVAL), ("zh", SAVE_INTERVAL)]
    )


def test_an_older_checkpoint_does_not_say_what_it_measured(runs: Runs, forks: Forks, finished: Path) -> None:
    folder = runs.interrupted(finished, "older")
    path = folder / f"iter_{SAVE_INTERVAL:07d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["training"]["baseline"] = {"zh": {"loss": 9.0, "bits_per_byte": 9.0}}
    del manifest["crc32"]  # it had no checksums either
    path.write_text(json.dumps(manifest))
    job = forks.start(["--config", runs.configure("older", Layout())], runs.folder / "older.log")
    job.finish()
    assert "validation set zh: nothing says how it was measured before; its changes are since step 2" in job.text()
    last = read_rows(folder)[-2]
    assert last["validation"]["zh"]["baseline"]["iteration"] == SAVE_INTERVAL


def test_rows_of_older_runs_are_compared_where_they_counted_the_same() -> None:
    def row(iteration: int, tokens: int) -> dict[str, Any]:
        figures = {"loss": 2.0, "bits_per_byte": 1.0, "tokens": tokens, "text_bytes": 10}
        return {"iteration": iteration, "validation": {"zh": figures}}

    assert baseline_of([row(0, 64), row(5, 64)], "zh") == {"iteration": 0, "loss": 2.0, "bits_per_byte": 1.0}
    assert baseline_of([row(0, 64), row(5, 32)], "zh") is None
