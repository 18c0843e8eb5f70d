"""Rows of new tokens, rows that nobody has trained, and what the trip through Megatron leaves of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, make_tiny_llama, run_tool

from megatron_cpt.convert.config import HfToMegatron, MegatronToHf, Verify
from megatron_cpt.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_cpt.convert.megatron_weights import open_megatron
from megatron_cpt.convert.verify import verify
from megatron_cpt.convert.vocabulary import Extension, extend_rows, new_tokens
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.utils.errors import InputError

NEW = ["公园散步", "brown fox jumps", "<|new|>"]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(params=["untied", "tied"])
def hf(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    return Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, **VARIANTS[request.param]))


@pytest.fixture
def untied(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    return Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, **VARIANTS["untied"]))


@pytest.fixture
def added(tmp_path: Path) -> str:
    path = tmp_path / "added.txt"
    path.write_text("\n".join(NEW) + "\n\n", encoding="utf-8")
    return str(path)


def test_new_rows_are_the_mean_of_what_their_text_was(hf: Path, added: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Path(hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron"), added_tokens=added)))
    before, after = load_file(hf / "model.safetensors"), open_megatron(str(folder))
    assert set(before) == set(after)
    old, new = AutoTokenizer.from_pretrained(hf), AutoTokenizer.from_pretrained(folder / "hf")
    assert len(old) == 400
    assert [new.encode(text) for text in NEW] == [[400], [401], [402]]
    for name in (EMBEDDING, OUTPUT) if OUTPUT in before else (EMBEDDING,):
        assert torch.equal(after[name][:400], before[name])
        assert len(after[name]) == 403
        for number, text in enumerate(NEW, 400):
            parts = old.encode(text)
            assert len(parts) > 1
            assert torch.allclose(after[name][number], before[name][parts].mean(dim=0), atol=1e-6)
    manifest = json.loads((folder / "manifest.json").read_text())["vocabulary"]
    assert (manifest["size"], manifest["new_rows"]) == (403, "subtokens")
    assert manifest["tensors"][EMBEDDING] == manifest["tensors"][EMBEDDING] | {
        "added": 3,
        "from_subtokens": 3,
        "near_zero": [],
    }
    back = Path(megatron_to_hf(MegatronToHf(str(folder), str(tmp_path / "back"))))
    assert read_llama_config(str(back)).vocab_size == 403
    assert "tensors equal" in verify(Verify(str(folder), str(back), logits=True))
    assert AutoTokenizer.from_pretrained(back).encode(NEW[0]) == [400]


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_other_beginnings(kind: str, untied: Path, added: str, tmp_path: Path) -> None:
    folder = hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), added_tokens=added, embedding_init=kind))  # type: ignore[arg-type]
    before = load_file(untied / "model.safetensors")[EMBEDDING]
    rows = open_megatron(folder)[EMBEDDING][400:]
    if kind == "zero":
        assert not rows.any()
        return
    away = (rows - before.mean(dim=0)) / before.std(dim=0)
    assert 0.05 < away.std() < 0.2  # noise of a tenth of the standard deviation
    assert not torch.equal(rows[0], rows[1])


def test_a_tokenizer_as_a_folder_and_rows_that_were_there(untied: Path, added: str, tmp_path: Path) -> None:
    """Rows that the model had to spare are taken first."""
    first = hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "first"), added_tokens=added))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"vocab_size": 402}))
    tensors = load_file(untied / "model.safetensors")
    for name in (EMBEDDING, OUTPUT):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, 64)])
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    options = {"extend_tokenizer": str(Path(first) / "hf")}
    second = hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "second"), **options))
    assert torch.equal(open_megatron(second)[EMBEDDING], open_megatron(first)[EMBEDDING])


def test_rows_near_zero_are_reported_and_repaired(untied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(untied / "model.safetensors")
    dead = [7, 8, 9, 300]
    tensors[EMBEDDING][dead] *= 1e-6
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    kept = hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "kept")))
    said = capfd.readouterr().err
    assert f"{EMBEDDING}: 4 rows are near zero (below 1% of the median norm" in said
    assert "7-9, 300; training may blow up on them; --repair_untrained_embeddings makes them mean rows" in said
    assert OUTPUT not in said
    assert torch.equal(open_megatron(kept)[EMBEDDING], tensors[EMBEDDING])
    repaired = open_megatron(
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "repaired"), repair_untrained_embeddings=True))
    )
    assert "7-9, 300; are mean rows now" in capfd.readouterr().err
    norms = repaired[EMBEDDING].norm(dim=1)
    alive = [n for n in range(400) if n not in dead]
    assert torch.equal(repaired[EMBEDDING][alive], tensors[EMBEDDING][alive])
    assert torch.equal(repaired[OUTPUT], tensors[OUTPUT])
    assert norms[dead].min() > 0.02 * norms[alive].median()
    again = open_megatron(
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "again"), repair_untrained_embeddings=True))
    )
    assert torch.equal(again[EMBEDDING], repaired[EMBEDDING])  # the noise is a function of the seed


def test_what_is_no_extension_is_refused(untied: Path, added: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    other = tmp_path / "other"
    first = Path(hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "first"), added_tokens=added))) / "hf"
    other.mkdir()
    content = json.loads((first / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    swapped = sorted(ids, key=lambda token: ids[token])[10:12]
    ids[swapped[0]], ids[swapped[1]] = ids[swapped[1]], ids[swapped[0]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer_config.json").write_bytes((first / "tokenizer_config.json").read_bytes())
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for options, message in (
        ({"extend_tokenizer": str(other)}, r"other: token .* is id 1[01]; in .*hf it has id 1[01]; keep all ids"),
        ({"extend_tokenizer": str(untied)}, "has no token that"),
        ({"extend_tokenizer": "nowhere"}, "tokenizer nowhere: no such folder"),
        ({"added_tokens": str(empty)}, "holds no token"),
        ({"added_tokens": "nowhere.txt"}, "added_tokens nowhere.txt cannot be read"),
        ({"added_tokens": added, "extend_tokenizer": str(first)}, "are both given; expected one"),
    ):
        with pytest.raises(InputError, match=message):
            hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), **options))  # type: ignore[arg-type]
        assert not (tmp_path / "megatron").exists()


def test_a_model_with_fewer_rows_than_its_tokenizer_has_tokens(untied: Path, added: str, tmp_path: Path) -> None:
    """As after adding a padding token to the tokenizer alone: its rows are made with the new ones."""
    tensors = load_file(untied / "model.safetensors")
    for name in (EMBEDDING, OUTPUT):
        tensors[name] = tensors[name][:390].clone()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"vocab_size": 390}))
    folder = hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), added_tokens=added))
    rows = open_megatron(folder)[EMBEDDING]
    assert rows.shape == (403, 64)
    assert torch.equal(rows[:390], tensors[EMBEDDING])
    assert (rows[390:].norm(dim=1) > 0.02 * rows[:390].norm(dim=1).median()).all()
    assert json.loads((Path(folder) / "manifest.json").read_text())["vocabulary"]["tensors"][EMBEDDING]["added"] == 13


def test_added_tokens_that_are_there_already(untied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A byte order mark is no token, nor is a line of spaces; tokens that the tokenizer has are passed over."""
    from transformers import AutoTokenizer

    path = tmp_path / "added.txt"
    path.write_text("\ufeff公园散步\n   \nhe\n公园散步\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(untied)
    assert len(tokenizer.encode("he")) == 1
    folder = Path(hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), added_tokens=str(path))))
    assert "2 of 3 are there already" in capfd.readouterr().err
    extended = AutoTokenizer.from_pretrained(folder / "hf")
    assert len(extended) == 401
    assert extended.encode("公园散步") == [400]
    path.write_text("he\n")
    with pytest.raises(InputError, match="has all of these tokens already"):
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "other"), added_tokens=str(path)))


def test_a_token_that_would_be_decoded_as_something_else(untied: Path, tmp_path: Path) -> None:
    """A byte-level decoder takes the letters of an added token for the bytes that they stand for."""
    path = tmp_path / "added.txt"
    path.write_text("公园散步\nüber\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"token 'über' would be decoded as '\ufffdber'; .* use --extend_tokenizer"):
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), added_tokens=str(path)))


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"), ("tokenizer.json", "")]
)
def test_a_tokenizer_that_cannot_be_read(name: str, content: str, untied: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (broken / file).write_bytes((untied / file).read_bytes())
    (broken / name).write_text(content)
    said = r"(: not a tokenizer\.json.*; expected a| is \[\]; expected a JSON object| is not JSON: Expecting value)"
    with pytest.raises(InputError, match=f"broken/{name}{said}"):
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), extend_tokenizer=str(broken)))


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds(seed: int, untied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"seed is {seed}; expected a whole number from 0"):
        hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), seed=seed))


def test_an_embedding_of_zeros_is_reported(untied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(untied / "model.safetensors")
    tensors[EMBEDDING].zero_()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatron(str(untied), str(tmp_path / "megatron"), repair_untrained_embeddings=True))
    assert f"{EMBEDDING}: 400 rows are near zero" in capfd.readouterr().err


def test_a_part_of_a_character_has_no_sub_tokens(untied: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untied)
    half = tokenizer.convert_ids_to_tokens(tokenizer.encode("园"))[0]  # one byte of three
    new = tmp_path / "new"
    tokenizer.save_pretrained(new)
    content = json.loads((new / "tokenizer.json").read_text())
    content["model"]["vocab"][half * 2] = 400
    (new / "tokenizer.json").write_text(json.dumps(content))
    assert new_tokens(str(untied), str(new), 400) == {400: ()}


def test_an_extended_model_trains_in_two_parts(added: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """403 rows, with one of padding; the corpora are made with the new tokenizer."""
    from tiny_runs import Layout, Runs

    runs = Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS["untied"])
    folder = hf_to_megatron(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "extended"), added_tokens=added))
    tokenizer = str(Path(folder) / "hf")
    for part in ("en_train", "zh_train", "en_valid", "zh_valid"):
        source, prefix = str(tmp_path / f"{part}.jsonl"), str(tmp_path / part)
        options = ["--tokenizer", tokenizer, "--language", part[:2], "--workers", "1", "--overwrite", "true"]
        run_tool("preprocess_data.py", "--input", source, "--output_prefix", prefix, *options)
    extended = ("--checkpoint.load", str(tmp_path / "extended"))
    losses = []
    for name, layout in (("one", Layout()), ("two", Layout(tp=2, sp=True))):
        run = runs.train(name, layout, *extended)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=5e-6)


def test_mean_rows_are_of_the_rows_that_count() -> None:
    """Neither those near zero nor those of new tokens, such as padding, pull the mean; the seed draws the noise."""
    generator = torch.Generator().manual_seed(5)
    tensor = 10 + torch.randn(12, 64, generator=generator)
    tensor[3] = 0  # dead
    tensor[10:] = -1000  # of no token
    new: dict[int, tuple[int, ...]] = {10: (), 11: (), 12: ()}

    def rows(seed: int) -> torch.Tensor:
        plan = Extension(vocab_size=13, new=new, new_rows="mean", repair=True, tokenizer=None, seed=seed)
        return extend_rows(tensor, plan, near_zero=[3])

    found, mean = rows(1), tensor[[0, 1, 2, *range(4, 10)]].mean(dim=0)
    for number in (3, 10, 11, 12):
        assert (found[number] - mean).abs().mean() < 0.2, number
    assert torch.equal(found, rows(1))
    assert not torch.equal(found[12], rows(2)[12])
