from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.engines.session import EngineName, Rounding
from fewbit.measure import host
from fewbit.measure.host import (
    Host,
    describe_host,
    forbids_bf16,
    read_cpuinfo,
    rounding_of,
    usable_cores,
    usable_memory,
    versions,
)


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_this_host() -> None:
    found = describe_host()
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_bytes > 2**28
    assert found.os.startswith(platform.system())
    assert Host.model_validate_json(found.model_dump_json()) == found


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the flags are read from /proc/cpuinfo here")
def test_instruction_sets_are_those_of_the_kernel() -> None:
    _, flags = read_cpuinfo(Path("/proc/cpuinfo").read_text())
    found = describe_host()
    for name in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"):
        assert (name in found.isa) == (name in flags)
    assert found.bf16 == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@pytest.mark.parametrize(
    ("machine", "flags", "saturates", "bf16"),
    [
        ("x86_64", "avx2 fma", True, False),
        ("x86_64", "avx2 avx512f avx512bw", True, False),
        ("x86_64", "avx2 avx_vnni", False, False),
        ("x86_64", "avx2 avx512_vnni avx512_bf16", False, True),
        ("AMD64", "", True, False),
        ("aarch64", "fp asimd asimddp i8mm bf16", False, True),
        ("arm64", "", False, False),
    ],
)
def test_saturation_and_bf16_follow_from_the_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, saturates: bool, bf16: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(host, "_processor", lambda: ("Some CPU", frozenset(flags.split())))
    found = describe_host()
    assert (found.saturates_u8s8, found.bf16, found.cpu) == (saturates, bf16, "Some CPU")


@pytest.mark.parametrize(
    ("engine", "isa", "limit", "wanted"),
    [
        ("openvino", ("avx512_vnni",), None, "openvino"),
        ("openvino", ("avx512_vnni", "amx_int8", "amx_bf16"), None, "openvino_amx"),
        ("openvino", ("avx512_vnni", "amx_int8", "amx_bf16"), "avx512_core_amx", "openvino_amx"),
        ("openvino", ("avx512_vnni", "amx_int8", "amx_bf16"), "AVX512_CORE_VNNI", "openvino"),
        ("onnxruntime", ("avx512_vnni", "amx_int8", "amx_bf16"), None, "onnxruntime"),
        ("reference", ("avx512_vnni", "amx_int8", "amx_bf16"), None, "exact"),
    ],
)
def test_the_reference_rounds_as_the_engine_does_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
    engine: EngineName,
    isa: tuple[str, ...],
    limit: str | None,
    wanted: Rounding,
) -> None:
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert rounding_of(engine, Host(cpu="", isa=isa, cores=1, memory_bytes=1, os="")) == wanted


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (None, True),
        ("", True),
        ("ALL", True),
        ("no such name", True),
        ("avx512_core_bf16", True),
        ("AVX512_CORE_AMX", True),
        ("avx2", False),
        ("AVX512_CORE_VNNI", False),
    ],
)
def test_bf16_is_not_native_where_onednn_is_to_do_without(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, wanted: bool
) -> None:
    monkeypatch.setattr(host, "_processor", lambda: ("made", frozenset({"avx512_bf16"})))
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert describe_host().bf16 is wanted and forbids_bf16() is not wanted
    if limit:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)
        assert describe_host().bf16 is wanted
    monkeypatch.setattr(host, "_processor", lambda: ("made", frozenset({"avx2"})))
    assert not describe_host().bf16


def test_cpuinfo_of_x86_and_arm() -> None:
    x86 = "model name\t: Xeon\nflags\t\t: fpu avx2\n\nmodel name\t: Other\nflags\t\t: fpu\n"
    assert read_cpuinfo(x86) == ("Xeon", frozenset({"fpu", "avx2"}))
    assert read_cpuinfo("processor : 0\nFeatures : fp asimd\n") == ("", frozenset({"fp", "asimd"}))
    assert read_cpuinfo("") == ("", frozenset())


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"/sys/fs/cgroup/cpu.max": "150000 100000", "/sys/fs/cgroup/memory.max": str(2**20)}
    monkeypatch.setattr(host, "_text", lambda path: told.get(str(path), ""))
    monkeypatch.setattr(host.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == 2
    assert usable_memory() == 2**20
    told.update({"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"})
    assert usable_cores() == 8
    assert usable_memory() > 2**20


def test_a_system_that_tells_nothing_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_text", lambda path: "")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(host.os, "getloadavg", raising=False)
    monkeypatch.delattr(host.os, "sched_getaffinity", raising=False)
    found = describe_host()
    assert (found.isa, found.load_average, found.governor) == ((), None, "")
    assert found.cpu


def test_macos_is_asked_by_sysctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(
        "#!/bin/sh\n"
        "echo 'hw.optional.arm.FEAT_DotProd: 1'\necho 'hw.optional.arm.FEAT_I8MM: 0'\n"
        "echo 'hw.optional.arm.FEAT_BF16: 1'\necho 'machdep.cpu.brand_string: Apple M2'\n"
    )
    sysctl.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(host.shutil, "which", lambda _: str(sysctl))
    found = describe_host()
    assert found.cpu == "Apple M2"
    assert {"dotprod", "bf16"} <= set(found.isa) and "i8mm" not in found.isa


def test_versions_import_nothing() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert {"fewbit", "numpy", "onnx", "onnxruntime", "openvino", "torch"} <= set(found)
    program = (
        "import sys; from fewbit.measure.host import versions; versions(); "
        "print([m for m in ('torch', 'onnxruntime', 'openvino', 'onnx') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
