"""Finds which kernels compute the recipe's attention on every rank's GPU, those that differ, and GPUs without products in fp8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tools.preflight.problems import Problem, majority, named

Devices = Mapping[int, Mapping[str, Any]]  # rank -> its device's facts, with `kernel_facts` as "attention"


def kernel_facts(device_type: str, calls: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return {kind of layer: [kernel, why no faster one]} of the recipe's attention, as torch chooses on this GPU."""
    if device_type != "cuda" or not calls:
        return {}
    from recipes.common.checks.attention_kernel import AttentionCall, chosen_kernel  # here: it imports transformers

    found = [AttentionCall(**call) for call in calls]
    return {call.layers: list(chosen_kernel(call, torch.device("cuda"))) for call in found}


def kernel_problems(devices: Devices, hosts: Sequence[str]) -> list[Problem]:
    """Return a problem for each host where attention runs on another kernel than on most ranks: it sets the pace."""
    problems = []
    for layers in _kinds(devices):
        chosen = {rank: one["attention"][layers] for rank, one in devices.items() if layers in one.get("attention", {})}
        usual = majority({str(rank): kernel for rank, (kernel, _) in chosen.items()})
        odd = [rank for rank, (kernel, _) in chosen.items() if kernel != usual]
        for host in dict.fromkeys(hosts[rank] for rank in odd):
            own = [rank for rank in odd if hosts[rank] == host]
            kernel, why = chosen[own[0]]
            message = f"{named(own, hosts)}: attention of {layers} layers runs on the {kernel} kernel ({why}), on most on {usual}"
            cure = "install the same torch and driver there, and keep other cuDNN libraries off LD_LIBRARY_PATH"
            problems.append(Problem(check="devices", hosts=(host,), ranks=tuple(own), message=message, cure=cure))
    return problems


def fp8_problems(devices: Devices, hosts: Sequence[str]) -> list[Problem]:
    """Return a problem for each host whose GPUs cannot multiply in fp8; none without GPUs, where torch emulates it."""
    from recipes.common.checks.precision_checks import capability_problems  # here: it imports transformers

    problems = []
    for host in dict.fromkeys(hosts[rank] for rank in devices):
        own = {rank: one for rank, one in devices.items() if hosts[rank] == host and "capability" in one}
        found = [(rank, line) for rank, one in own.items() for line in capability_problems(one["name"], tuple(one["capability"]))]
        if found:
            ranks = tuple(rank for rank, _ in found)
            message, _, cure = found[0][1].partition("; ")
            problems.append(Problem(check="devices", hosts=(host,), ranks=ranks, message=f"host {host}: {message}", cure=cure))
    return problems


def kernel_notes(devices: Devices, expected: Sequence[str]) -> list[str]:
    """Return the kernel of each kind of layer on the first rank; without a GPU the `expected` lines."""
    first = next((one["attention"] for one in devices.values() if one.get("attention")), {})
    if not first:
        return [f"attention on a GPU: {line}" for line in expected]
    return [f"attention of {layers} layers runs on the {kernel} kernel ({why})" for layers, (kernel, why) in first.items()]


def _kinds(devices: Devices) -> list[str]:
    return list(dict.fromkeys(layers for one in devices.values() for layers in one.get("attention", {})))
