"""The machine that figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from fewbit.engines.limit import onednn_limit
from fewbit.engines.session import EngineName, Rounding
from fewbit.spec import Frozen

# What the instruction sets are called here, and in /proc/cpuinfo (x86 "flags", Arm "Features") or macOS'
# sysctl.
_ISA: dict[str, tuple[str, ...]] = {
    "sse4_1": ("sse4_1",),
    "avx2": ("avx2",),
    "avx512f": ("avx512f",),
    "avx_vnni": ("avx_vnni",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "avx_vnni_int8": ("avx_vnni_int8",),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("asimd", "hw.optional.neon", "hw.optional.AdvSIMD"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "bf16": ("bf16", "hw.optional.arm.FEAT_BF16"),
    "sve": ("sve",),
}
_X86 = ("x86_64", "amd64", "i386", "i686")
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_LIMITS_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
_VNNI = {"avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8"}
_PACKAGES = (
    "fewbit",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "openvino",
    "nncf",
)


class Host(Frozen):
    """A machine, as far as it tells.

    Attributes:
        cpu: The processor's name.
        machine: Its architecture ("x86_64", "arm64").
        isa: Instruction sets that matter here, of those known to `fewbit.measure.host`.
        cores: Cores that this process may use (affinity and container limits counted in).
        memory_bytes: Memory that this process may use.
        os: Operating system and release.
        load_average: Over the last minute when described; none where the system does not tell.
        governor: Clock mode of the first core; empty where it cannot be read.
        bf16: It multiplies bfloat16 natively, and ``ONEDNN_MAX_CPU_ISA`` does not forbid it.
        saturates_u8s8: Its int8 products of u8 and s8 go through 16 bits that can overflow (x86 without VNNI
            or AMX).
    """

    cpu: str
    machine: str = ""
    isa: tuple[str, ...] = ()
    cores: int
    memory_bytes: int
    os: str
    load_average: float | None = None
    governor: str = ""
    bf16: bool = False
    saturates_u8s8: bool = False


def describe_host() -> Host:
    """Look at this machine."""
    machine = platform.machine().lower()
    cpu, features = _processor()
    isa = tuple(name for name, flags in _ISA.items() if features.intersection(flags))
    return Host(
        cpu=cpu or platform.processor() or machine,
        machine=machine,
        isa=isa,
        cores=usable_cores(),
        memory_bytes=usable_memory(),
        os=f"{platform.system()} {platform.release()}",
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        bf16=bool(_NATIVE_BF16.intersection(isa)) and not forbids_bf16(),
        saturates_u8s8=machine in _X86 and not _VNNI.intersection(isa),
    )


def rounding_of(engine: EngineName, host: Host) -> Rounding:
    """Return what the reference must round as, to give the codes of an engine on a machine.

    OpenVINO leaves signed activations in int8 where oneDNN may use AMX, which ``ONEDNN_MAX_CPU_ISA`` limits.

    >>> host = Host(cpu="EPYC", isa=("avx512_vnni",), cores=8, memory_bytes=2**30, os="Linux")
    >>> rounding_of("openvino", host)
    'openvino'
    """
    if engine == "reference":
        return "exact"
    allowed = onednn_limit() == "ALL" or "AMX" in onednn_limit()
    if engine == "openvino" and allowed and {"amx_int8", "amx_bf16"} <= set(host.isa):
        return "openvino_amx"
    return engine


def forbids_bf16() -> bool:
    """Tell whether `onednn_limit` is a processor without bfloat16."""
    return onednn_limit() in _LIMITS_WITHOUT_BF16


def sums_exactly(engine: EngineName) -> bool:
    """Tell whether an engine adds products of u8 and s8 exactly here; it is asked where that is in doubt."""
    from fewbit.engines.saturation import saturating_engines

    return engine not in saturating_engines((engine,), describe_host().saturates_u8s8)


def usable_cores() -> int:
    """Count the cores that this process may use."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    quota = _text(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        counts.append(-(-int(quota[0]) // int(quota[1])))
    return max(1, min(counts))


def usable_memory() -> int:
    """Return the bytes of memory that this process may use."""
    limit = _text(Path("/sys/fs/cgroup/memory.max"))
    physical = int(psutil.virtual_memory().total)
    return min(physical, int(limit)) if limit.isdigit() else physical


def versions() -> dict[str, str]:
    """Return the versions of fewbit, Python and the packages that shape a result; none is imported."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and the features it tells."""
    if sys.platform == "darwin":
        return _processor_of_macos()
    return read_cpuinfo(_text(Path("/proc/cpuinfo")))


def read_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    r"""Read the name and features of the first processor of /proc/cpuinfo; empty where there is none.

    >>> read_cpuinfo("model name : Fast\nflags : avx2 avx512_vnni\n")[0]
    'Fast'
    """
    name, features = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key in ("model name", "hardware") and not name:
            name = value.strip()
        elif key in ("flags", "features") and not features:
            features = frozenset(value.split())
    return name, features


def _processor_of_macos() -> tuple[str, frozenset[str]]:
    sysctl = shutil.which("sysctl") or "/usr/sbin/sysctl"
    try:
        listed = subprocess.run(
            [sysctl, "hw.optional", "machdep.cpu"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return "", frozenset()
    name, features = "", set[str]()
    for line in listed.stdout.splitlines():
        key, _, value = line.partition(":")
        if key == "machdep.cpu.brand_string":
            name = value.strip()
        elif key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            features.update(value.lower().replace(".", "_").split())
        elif value.strip() == "1":
            features.add(key)
    return name, frozenset(features)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
