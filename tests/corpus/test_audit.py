"""A fast tokenizer that is wrong anywhere never leaves a trace in a corpus; what was checked is in the manifest."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_children import own_children
from tiny_corpora import content, run, small_units, texts, write_lines

from megatron_cpt.corpus import audit as audit_module
from megatron_cpt.corpus import partial as partial_module
from megatron_cpt.corpus import preprocess as preprocess_module
from megatron_cpt.corpus.audit import ODD_TEXTS, Audit, TokenizerMismatchError
from megatron_cpt.corpus.encoding import Encoder, TokenPolicy, count_languages, per_text, useful_workers
from megatron_cpt.corpus.manifest import TokenizerInfo, read_corpus_manifest
from megatron_cpt.corpus.partial import PartialCorpus, partial_folder, read_state
from megatron_cpt.corpus.reading import ReadOptions, Unit, units
from megatron_cpt.corpus.sources import find_sources, sha256_file
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.fast import FastTokenizer
from megatron_cpt.utils.errors import InputError, ProcessDiedError

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: Patch) -> None:
    small_units(monkeypatch, 200)
    monkeypatch.setattr(partial_module, "SECONDS_BETWEEN_CHECKPOINTS", 0)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """80 documents in about 14 units; the 30th says WRONG."""
    return write_lines(tmp_path / "a.jsonl", [{"text": f"{'WRONG' if i == 30 else 'document'} {i} 文档"} for i in range(80)])


@pytest.fixture
def wanted(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> dict[str, bytes]:
    """The corpus of the reference tokenizer."""
    return content(run(tmp_path / "wanted", tiny_tokenizer_dir, input=source, fast_tokenizer="never").prefix)


def flat(rows: list[Any]) -> Any:
    """What `encode_batch` gives: ids back to back, and lengths."""
    return np.concatenate([*rows, np.empty(0, np.uint32)]), np.array([len(row) for row in rows], np.int64)


def corrupt(is_wrong: Callable[[str], bool], patch: Patch) -> None:
    """Make the fast tokenizer give one id too many for some texts."""
    original = FastTokenizer.encode_batch

    def encode_batch(self: FastTokenizer, some: Sequence[str]) -> Any:
        encoded = per_text(*original(self, some))
        return flat(
            [np.append(ids, ids[:1] + 1) if is_wrong(text) else ids for text, ids in zip(some, encoded, strict=True)]
        )

    patch.setattr(FastTokenizer, "encode_batch", encode_batch)


def says_wrong(text: str) -> bool:
    return "WRONG" in text


def is_odd(text: str) -> bool:
    return text == ODD_TEXTS[-5]


def fast(prefix: Path, tokenizer: str, source: str, **more: Any) -> str:
    """Preprocess with the fast tokenizer; what the manifest says of the encoder."""
    corpus = run(prefix, tokenizer, **{"input": source, "fast_tokenizer": "always"} | more)
    return read_corpus_manifest(corpus.prefix).encoder


def encoder_of_state(prefix: Path) -> str:
    return str((read_state(partial_folder(str(prefix))) or {})["encoder"])


@pytest.mark.parametrize("workers", [1, 3])
def test_fast_and_reference_make_the_same_corpus(
    workers: int, tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes]
) -> None:
    encoder = fast(tmp_path / "c", tiny_tokenizer_dir, source, workers=workers)
    assert content(tmp_path / "c") == wanted
    found = re.fullmatch(r"gigatoken [\d.]+, equal to the reference on (\d+) samples of the input", encoder)
    assert found
    assert int(found[1]) == 4 * 13  # of each unit


def test_fast_and_reference_with_ranks_and_32_bit_tokens(tmp_path: Path, source: str) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"do", b"cu", b"docu", "文".encode()]
    tokens += [b"%c%c%c" % (i // 256 // 256, i // 256 % 256, i % 256) for i in range(65536 + 256, 65536 * 2)]
    (tmp_path / "ranks").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(dict.fromkeys(tokens)))
    )
    settings: dict[str, Any] = {"input": source, "bos": "document"}
    one = run(tmp_path / "one", str(tmp_path / "ranks"), fast_tokenizer="never", **settings)
    fast(tmp_path / "two", str(tmp_path / "ranks"), source, bos="document")
    assert one.dtype == np.int32
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("quick_answer", [False, True])
@pytest.mark.parametrize("is_wrong", [is_odd, says_wrong])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_fast_tokenizer_is_found_and_left(
    workers: int,
    is_wrong: Callable[[str], bool],
    quick_answer: bool,
    tmp_path: Path,
    tiny_tokenizer_dir: str,
    source: str,
    wanted: dict[str, bytes],
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the constant texts or by one sample; whenever the answer comes, before or after there is something on the disk."""
    corrupt(is_wrong, monkeypatch)
    if quick_answer:
        original = Audit.compare

        def compare(self: Audit, sample: Any) -> None:
            original(self, sample)
            self.settle()

        monkeypatch.setattr(Audit, "compare", compare)
    encoder = fast(tmp_path / "c", tiny_tokenizer_dir, source, workers=workers)
    warning = capsys.readouterr().err
    assert "WARNING: gigatoken is wrong here, so all is done again without it" in warning
    assert "the reference [" in warning
    assert ("WRONG" if is_wrong is says_wrong else "ﬁ") in warning
    assert content(tmp_path / "c") == wanted
    assert encoder == "the reference tokenizer"
    assert not list(tmp_path.glob("c.partial*"))


def test_wrong_ids_of_the_same_number_are_found(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    original = FastTokenizer.encode_batch

    def encode_batch(self: FastTokenizer, some: Sequence[str]) -> Any:
        encoded = per_text(*original(self, some))
        return flat([ids[::-1] if says_wrong(text) else ids for text, ids in zip(some, encoded, strict=True)])

    monkeypatch.setattr(FastTokenizer, "encode_batch", encode_batch)
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source) == "the reference tokenizer"
    assert content(tmp_path / "c") == wanted


@contextmanager
def interrupted_at(unit: int) -> Iterator[None]:
    """Stop a run before it takes a unit."""
    original = PartialCorpus.add

    def add(self: PartialCorpus, *encoded: Any) -> None:
        if self.units == unit:
            raise KeyboardInterrupt
        original(self, *encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialCorpus, "add", add)
        yield


def test_found_wrong_after_a_resume(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    """What the fast tokenizer made before the interruption is done again too."""
    corrupt(says_wrong, monkeypatch)
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        fast(tmp_path / "c", tiny_tokenizer_dir, source)
    assert encoder_of_state(tmp_path / "c") == "gigatoken"
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source) == "the reference tokenizer"
    assert content(tmp_path / "c") == wanted


def test_interrupted_before_the_samples_are_compared(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    """A sample nobody looked at is not kept as checked, and the interruption is not lost."""
    monkeypatch.setattr(partial_module, "SECONDS_BETWEEN_CHECKPOINTS", 1000)

    def compare(self: Audit, sample: Any) -> None:
        self._ask("compare", list(sample))
        if any(says_wrong(text) for text, _ in sample):
            raise KeyboardInterrupt

    corrupt(says_wrong, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "compare", compare)
        with pytest.raises(KeyboardInterrupt, match="is unfinished"):
            fast(tmp_path / "c", tiny_tokenizer_dir, source, checksum_inputs=False)
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source) == "the reference tokenizer"
    assert content(tmp_path / "c") == wanted


def test_killed_while_it_begins_again(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    """kill -9 right after the mismatch, before the wrong units are removed: they are not gone on with."""
    corrupt(says_wrong, monkeypatch)
    child = os.fork()
    if child == 0:
        preprocess_module.discard = lambda *_: os._exit(9)  # type: ignore[attr-defined]
        fast(tmp_path / "c", tiny_tokenizer_dir, source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source) == "the reference tokenizer"
    assert content(tmp_path / "c") == wanted


@pytest.mark.parametrize("fast_tokenizer", ["auto", "always"])
def test_the_reference_is_gone_on_with(
    fast_tokenizer: str, tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    """Interrupted after it began again: the resumed run does not try the fast tokenizer a second time."""
    monkeypatch.setattr(preprocess_module, "FAST_FROM_BYTES", 0)
    corrupt(says_wrong, monkeypatch)
    with interrupted_at(10), pytest.raises(KeyboardInterrupt):
        fast(tmp_path / "c", tiny_tokenizer_dir, source, fast_tokenizer=fast_tokenizer)
    assert encoder_of_state(tmp_path / "c") == "reference"
    monkeypatch.setattr(FastTokenizer, "__init__", lambda *_: pytest.fail("tried again"))
    encoder = fast(tmp_path / "c", tiny_tokenizer_dir, source, fast_tokenizer=fast_tokenizer)
    assert content(tmp_path / "c") == wanted
    assert encoder == "the reference tokenizer"


def test_small_inputs_are_not_worth_the_loading(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(FastTokenizer, "__init__", lambda *_: pytest.fail("loaded"))
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source, fast_tokenizer="auto") == "the reference tokenizer"
    assert fast(tmp_path / "d", tiny_tokenizer_dir, source, fast_tokenizer="never") == "the reference tokenizer"


def test_a_vocabulary_that_is_not_supported(
    tmp_path: Path, source: str, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", -20.0), ("</s>", 0.0), ("document", -2.0), (" ", -1.0), *((str(i), -3.0) for i in range(10))]
    Tokenizer(models.Unigram(pieces, unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    settings: dict[str, Any] = {"input": source, "eos_token": "</s>"}
    monkeypatch.setattr(preprocess_module, "FAST_FROM_BYTES", 0)
    one = run(tmp_path / "one", str(tmp_path / "tokenizer.json"), fast_tokenizer="auto", **settings)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    (slower, lost) = said
    assert slower.endswith("; the slower reference encodes")
    assert "src/" not in slower
    assert lost.endswith(
        "cannot spell every script: a, é, ж, α, ע, ع, ह, ไ, 中, の, 한, 🦊 do not come back from its tokens"
    )
    assert read_corpus_manifest(one.prefix).encoder == "the reference tokenizer"
    run(tmp_path / "two", str(tmp_path / "tokenizer.json"), fast_tokenizer="never", **settings)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with pytest.raises(InputError, match="fast_tokenizer is 'always' but gigatoken cannot read"):
        run(tmp_path / "three", str(tmp_path / "tokenizer.json"), fast_tokenizer="always", **settings)
    assert not list(tmp_path.glob("three*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_panic_in_the_middle(
    workers: int,
    tmp_path: Path,
    tiny_tokenizer_dir: str,
    source: str,
    wanted: dict[str, bytes],
    monkeypatch: Patch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What the Rust library raises is no Exception, and it prints a line by itself: the reference does all of it again."""
    load = FastTokenizer.__init__

    class Panics:
        def __init__(self, backend: Any) -> None:
            self._backend = backend

        def encode_batch(self, some: Sequence[str], parallel: bool) -> Any:
            if any(says_wrong(text) for text in some):
                os.write(2, b"thread '<unnamed>' panicked at src/bpe/mod.rs:88:24")
                raise BaseException("called unwrap on None")
            return self._backend.encode_batch(some, parallel=parallel)

    def init(self: FastTokenizer, path: str) -> None:
        load(self, path)
        self._backend = Panics(self._backend)

    monkeypatch.setattr(FastTokenizer, "__init__", init)
    assert fast(tmp_path / "c", tiny_tokenizer_dir, source, workers=max(workers, 1)) == "the reference tokenizer"
    assert content(tmp_path / "c") == wanted
    said = capfd.readouterr().err
    assert "WARNING: gigatoken is wrong here, so all is done again without it: it cannot encode a text that begins" in said
    assert "src/bpe" not in said


# --- the helper process ---


def test_the_helper_that_is_killed(tmp_path: Path, tiny_tokenizer_dir: str, source: str, monkeypatch: Patch) -> None:
    """Nobody checks any more: no corpus, no hang, and the next run is right."""
    original = PartialCorpus.add

    def add(self: PartialCorpus, *unit: Any) -> None:
        original(self, *unit)
        if self.units == 4:
            (helper, *_) = own_children()
            helper.kill()

    with monkeypatch.context() as patch:
        patch.setattr(PartialCorpus, "add", add)
        with pytest.raises(ProcessDiedError, match="the checking process was killed"):
            fast(tmp_path / "c", tiny_tokenizer_dir, source)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "c.partial"}
    assert own_children() == []
    fast(tmp_path / "c", tiny_tokenizer_dir, source)


def test_audit_answers(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    reference = load_tokenizer(tiny_tokenizer_dir)
    with Audit(tiny_tokenizer_dir, None) as audit:
        audit.ask_facts()
        assert audit.facts() == TokenizerInfo.of(tiny_tokenizer_dir, reference)
        right = [(text, np.array(reference.encode(text), np.uint32)) for text in ODD_TEXTS]
        audit.compare(right)
        audit.compare([])
        audit.settle()
        files = [source, write_lines(tmp_path / "gone.jsonl", [1])]
        sources, _ = find_sources(files)
        Path(files[1]).unlink()
        audit.hash([file.url for file in sources])

        def compare() -> None:
            audit.compare([("a", np.array([5000], np.uint32))])
            audit.settle()

        with pytest.raises(TokenizerMismatchError, match=r"'a': gigatoken gives \[5000\], the reference \["):
            compare()
        assert audit.checksums() == {files[0]: sha256_file(files[0]), files[1]: None}
    assert own_children() == []


def test_few_comparisons_are_on_the_way(tiny_tokenizer_dir: str, monkeypatch: Patch) -> None:
    """A slow reference holds the run up, rather than letting samples pile up in memory."""
    monkeypatch.setattr(audit_module, "MOST_ON_THE_WAY", 5)
    with Audit(tiny_tokenizer_dir, None) as audit:
        (helper,) = own_children()
        for _ in range(5):
            helper.suspend()
            audit.compare([("", np.array([], np.uint32))])

        def resume(*_: object) -> None:
            helper.resume()

        signal.signal(signal.SIGALRM, resume)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        audit.compare([("", np.array([], np.uint32))])  # waits for the alarm
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_bad_tokenizer_is_an_input_error(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    for mode in ("never", "always"):
        with pytest.raises(InputError, match="nothing there"):
            run(tmp_path / "c", str(tmp_path / "none"), input=source, fast_tokenizer=mode)
        with pytest.raises(InputError, match="eos_token is '<none>'"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=source, fast_tokenizer=mode, eos_token="<none>")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# --- the cache of the fast tokenizer ---


def test_replaced_workers_make_no_difference(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, wanted: dict[str, bytes], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(Encoder, "is_worn_out", lambda self: True)
    fast(tmp_path / "c", tiny_tokenizer_dir, source, workers=2)
    assert content(tmp_path / "c") == wanted


class Hoarder:
    """An engine that keeps 40 megabytes every time there is something to encode."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def encode_batch(self, some: Sequence[str]) -> Any:
        if some:
            self.kept.append(np.ones(40 << 20, np.uint8))
        return np.ones(len(some), np.uint32), np.ones(len(some), np.int64)


@pytest.mark.parametrize("audited", [True, False])
def test_a_worker_that_has_grown_is_worn_out(audited: bool, tmp_path: Path) -> None:
    sources, _ = find_sources([write_lines(tmp_path / "b.jsonl", [{"text": "a"}] * 10)])
    encoder = Encoder(Hoarder(), TokenPolicy(None, None, "uint16"), sources, ReadOptions(), audited, cache_bytes=100 << 20)
    assert not encoder.is_worn_out()
    (unit,) = units(sources, ReadOptions())
    encoder(Unit([], 0))
    assert not encoder.is_worn_out()
    for _ in range(4):
        encoder(unit)
    assert encoder.is_worn_out() == audited


# --- what the manifest says ---


def test_languages_by_their_share_of_the_text(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Three quarters of the bytes are Chinese, a fifth is English, the rest is none."""
    chinese = "今天天气很好，我们去公园散步，看见很多人在湖边唱歌跳舞，孩子们放风筝。"
    english = "The weather is fine today and we are walking in the park with all of our friends and children. "
    chinese, english, none = (text * 20 for text in (chinese, english, "0 1 2 3 4 5 "))
    sizes = [len(text.encode()) for text in (chinese, english, none)]
    counts = [round(share * 200_000 / size) for share, size in zip((0.75, 0.2, 0.05), sizes, strict=True)]
    documents = [text for text, count in zip((chinese, english, none), counts, strict=True) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(documents))
    source = write_lines(tmp_path / "a.jsonl", [{"text": documents[i]} for i in order])
    manifest = read_corpus_manifest(run(tmp_path / "c", tiny_tokenizer_dir, input=source).prefix)
    assert manifest.languages == pytest.approx({"zh": 0.75, "en": 0.2, "un": 0.05}, abs=0.01)
    assert list(manifest.languages) == ["zh", "en", "un"]  # the largest first
    assert (manifest.text_bytes, manifest.characters) == (
        sum(len(text.encode()) for text in documents),
        sum(map(len, documents)),
    )


def test_languages_of_odd_texts() -> None:
    odd = ["\x00\x01", "\ufffe", "\U0010ffff" * 50, "", "a", "\u200b" * 100, "\ud7ff", "<|x|>" * 99]
    assert count_languages(odd, 800) == {"un": 800}


def test_checksums_sizes_and_documents_of_the_sources(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "b.txt").write_bytes(b"\n")
    write_lines(tmp_path / "in" / "c.jsonl", [{"text": f"text {i}"} for i in range(50)])
    write_lines(tmp_path / "in" / "d.jsonl", [])
    settings: dict[str, Any] = {"input": str(tmp_path / "in"), "on_error": "skip"}
    manifest = read_corpus_manifest(run(tmp_path / "c", tiny_tokenizer_dir, **settings).prefix)
    assert [source.documents for source in manifest.sources] == [1, 0, 50, 0]
    for source in manifest.sources:
        assert source.bytes == Path(source.path).stat().st_size
        assert source.sha256 == sha256_file(source.path)
    manifest = read_corpus_manifest(run(tmp_path / "d", tiny_tokenizer_dir, checksum_inputs=False, **settings).prefix)
    assert {source.sha256 for source in manifest.sources} == {None}


def test_bytes_per_token_is_of_the_text(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    ratios = []
    for number, policy in enumerate([{}, {"eos": "none"}, {"bos": "document"}]):
        manifest = read_corpus_manifest(run(tmp_path / f"c{number}", tiny_tokenizer_dir, input=source, **policy).prefix)
        ratios.append(manifest.bytes_per_token)
        assert manifest.tokens == 80 * (1 - number % 2 + number // 2) + round(manifest.text_bytes / ratios[0])
    assert len(set(ratios)) == 1
    assert texts(run(tmp_path / "d", tiny_tokenizer_dir, input=source), tiny_tokenizer_dir)[30] == "WRONG 30 文档"


@pytest.mark.parametrize(
    ("workers", "read_bytes", "wanted"),
    [(4, 0, 0), (4, 10, 0), (1, 10, 0), (4, 201, 2), (4, 5000, 4), (1, 5000, 1), (1, 201, 1)],
)
def test_useful_workers(workers: int, read_bytes: int, wanted: int) -> None:
    assert useful_workers(workers, read_bytes, 200) == wanted
