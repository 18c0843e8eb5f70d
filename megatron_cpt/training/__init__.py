"""The training run: setup -> main -> fit -> validate -> save."""

from megatron_cpt.platforms import prepare_platform

prepare_platform()  # before any module of this room imports megatron
