"""Planning with what tools/check_cluster.py has measured instead of data sheets and efficiencies of other people's runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import DEVICES, LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster, Device
from megatron_cpt.planning.layouts import Layout, TrainingJob
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.timing import layout_throughput
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import load_json, shown

STEPS_TO_EFFICIENCY = 40  # halvings of 0 to 1


def known_device(name: str) -> Device | None:
    """The preset of a device by torch's name for it."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key.split("-")[0] in words), None)


def planned_rate(settings: Mapping[str, Any], device: Device, devices: int) -> float:
    """Tokens per second of each device that the plan expects of a stack of layers, data-parallel over `devices`.

    `settings`: model, layers, seq_length, micro_batch_size, microbatches, params_dtype and fp8 of the stack
    """
    llama = dataclasses.replace(find_model(settings["model"]), num_hidden_layers=settings["layers"])
    batch = settings["micro_batch_size"] * settings["microbatches"] * devices
    job = TrainingJob(llama, settings["seq_length"], batch, settings["params_dtype"], bool(settings.get("fp8")))
    several = devices > 1
    parallel = ParallelConfig(overlap_grad_reduce=several, overlap_param_gather=several)
    layout = Layout(parallel, devices, settings["micro_batch_size"], settings["microbatches"])
    return layout_throughput(job, layout, Cluster(device, devices)).tokens_per_second_per_device


def with_measured(config: PlanConfig) -> PlanConfig:
    """The plan's settings with what was measured; what is given stays.

    Raises:
        InputError: the file is not of check_cluster.py
    """
    if config.measured is None:
        return config
    content = load_json(config.measured, "measurements")
    try:
        changes = changes_from(content, config)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"{config.measured}: is {shown(content)}; expected what tools/check_cluster.py has written"
        ) from error
    given = {name: value for name, value in changes.items() if name == "device" or getattr(config, name) is None}
    return dataclasses.replace(config, **given)


def changes_from(content: Mapping[str, Any], config: PlanConfig) -> dict[str, Any]:
    """Settings of a plan by name, as far as the checks have measured them."""
    rows = {row["name"]: row["figures"] for row in content["checks"] if row["state"] == "passed"}
    known = known_device(str(content["device"]))
    device = known or DEVICES[config.device.lower()]
    changes: dict[str, Any] = {"device": device.name}
    if content["nodes"] > 1:
        changes["devices_per_node"] = int(content["devices_per_node"])
    if "devices" in rows:
        device = dataclasses.replace(device, memory_gb_per_s=rows["devices"]["memory_gb_per_s"] / MEMORY_EFFICIENCY)
        changes["memory_gb_per_s"] = device.memory_gb_per_s
        changes["memory_gib"] = float(rows["devices"]["memory_gib"])
    links = rows.get("links", {})
    inside = links.get("all_reduce_within_a_node_gb_per_s", links.get("all_reduce_gb_per_s"))
    if inside is not None:
        changes["nvlink_gb_per_s"] = inside / LINK_EFFICIENCY
    across = links.get("send_across_nodes_gb_per_s")
    if across is not None:
        changes["network_gb_per_s"] = across / LINK_EFFICIENCY
    for fp8, name in ((False, "matmul_efficiency"), (True, "fp8_efficiency")):
        speeds = [one for one in rows.values() if "settings" in one and bool(one["settings"].get("fp8")) == fp8]
        if known is not None and speeds:
            best = max(speeds, key=lambda one: one["tokens_per_second_per_device"])
            changes[name] = efficiency(best, name, dataclasses.replace(device, **of_device(changes)), content["processes"])
    return changes


def of_device(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are a device's."""
    names = {field.name for field in dataclasses.fields(Device)}
    return {name: value for name, value in changes.items() if name in names}


def efficiency(figures: Mapping[str, Any], name: str, device: Device, devices: int) -> float:
    """The share of the peak with which the plan expects the rate that was measured."""
    low, high = 0.0, 1.0
    for _ in range(STEPS_TO_EFFICIENCY):
        middle = (low + high) / 2
        rate = planned_rate(figures["settings"], dataclasses.replace(device, **{name: middle}), devices)  # type: ignore[arg-type]
        low, high = (middle, high) if rate < figures["tokens_per_second_per_device"] else (low, middle)
    return round(high, 3)
