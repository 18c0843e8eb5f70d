"""The training run: setup -> main -> fit -> evaluate -> save."""

from megatron_cpt.platforms import prepare_platform

prepare_platform()  # before any module of this room imports megatron
