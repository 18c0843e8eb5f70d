"""Importing this makes megatron-core run on this machine: for modules that import megatron, before they do.

The rooms that use megatron throughout call `prepare_platform()` in their `__init__`; `model/` has modules without torch too.
"""

from megatron_cpt.platforms import prepare_platform

prepare_platform()
