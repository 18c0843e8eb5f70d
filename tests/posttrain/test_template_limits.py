"""A chat template is a stranger's program: it ends, and takes no more memory than it may."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cpt.posttrain import template_limits
from megatron_cpt.posttrain.template_limits import limited
from megatron_cpt.posttrain.templates import load_template
from megatron_cpt.utils.errors import InputError

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop": (ENDLESS, "more than 0.5 seconds"),
    "a long text": ("{{ 'x' * 10000000000 }}", "MiB of memory"),
    "a text that doubles": (
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "MiB of memory",
    ),
    "a wide field": ("{{ '%10000000000d' % 1 }}", ""),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "a power": ("{{ 3 ** (10 ** 9) }}", "the operator **"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name: str, tmp_path: Path, chat_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.5)
    template, words = HOSTILE[name]
    (tmp_path / "template.jinja").write_text(template)
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match="chat template of") as caught:
        load_template(chat_tokenizer_dir, str(tmp_path / "template.jinja"))
    assert words in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == memory
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_takes_little_is_let_through() -> None:
    tokenizer = SimpleNamespace(name_or_path="this", chat_template="{{ '**' }}")
    with limited(tokenizer):
        assert len("x" * 10**8) == 10**8
    with pytest.raises(KeyError), limited(tokenizer):
        raise KeyError


def test_a_large_template(tmp_path: Path, chat_tokenizer_dir: str) -> None:
    (tmp_path / "template.jinja").write_text("x" * 1_000_001)
    with pytest.raises(InputError, match="more than 1,000,000 characters"):
        load_template(chat_tokenizer_dir, str(tmp_path / "template.jinja"))
