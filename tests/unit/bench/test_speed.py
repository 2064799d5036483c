from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import speed
from fewbit.engines.session import Setting
from speed_answers import Candidate
from speed_peak import measure_peak

MACHINE = {"peak_gops": 1000.0, "host": {}, "versions": {}}


def case(source: str, batch: int, threads: int) -> dict[str, Any]:
    row = {"network": "tiny", "source": source, "batch": batch, "threads": threads, "seed": 0, "peers": ""}
    row |= {"contender": "fewbit int8", "how": "openvino, 1 stream", "form": "int8", "own": True}
    row |= {"images_per_s": 10.0, "interval95": [9.0, 11.0], "ms_per_batch_p50": 5.0, "rounds": 20}
    row |= {"best_peer": "nncf int8, latency hint", "ratio": 1.25, "ratio_interval95": [1.2, 1.3]}
    return row | {"answer": True, "int8_gain": 2.0, "peak_fraction": 0.1, "ms_by_cause": {"1x1": 4.0}}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(speed.main, list(arguments))


def write(path: Path, *rows: dict[str, Any]) -> str:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return text


def test_what_is_in_the_rows_is_not_measured_again(tmp_path: Path) -> None:
    path, source = tmp_path / "rows.jsonl", str(tmp_path / "tiny.toml")
    rows = [case(source, batch, 1) for batch in (1, 8)]
    text = write(path, MACHINE, *rows)
    path.write_text(text + '{"network": "ti', encoding="utf-8")  # killed while writing
    shown = run(source, "--batches", "1,8", "--threads", "1", "--rows", str(path))
    assert shown.exit_code == 0 and shown.stderr == ""
    assert path.read_text(encoding="utf-8") == text
    assert "Geometric mean ratio of 2 case(s): 1.25 [" in shown.stdout
    assert "Below: nowhere" in shown.stdout
    as_json = run(source, "--batches", "1,8", "--threads", "1", "--rows", str(path), "--json")
    assert json.loads(as_json.stdout) == {"machine": MACHINE, "rows": rows}


@pytest.mark.parametrize(
    "other", [("--threads", "2"), ("--seed", "1"), ("--only", "nncf"), ("--batches", "4")]
)
def test_another_case_is_measured(tmp_path: Path, other: tuple[str, str]) -> None:
    path, source = tmp_path / "rows.jsonl", str(tmp_path / "tiny.toml")
    write(path, MACHINE, case(source, 1, 1))
    usual = {"--batches": "1", "--threads": "1"} | {other[0]: other[1]}
    asked = [word for option in usual.items() for word in option]
    shown = run(source, *asked, "--rows", str(path))
    assert shown.exit_code == 2  # it goes on to open the card, which is not there
    assert shown.stderr.splitlines()[-1].startswith("Error: ") and "tiny.toml" in shown.stderr


def test_an_answer_without_a_profile_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Candidate("int8", "int8", tmp_path / "gone.onnx", Setting())
    assert speed.causes_of(gone, 1.0) == {}
    assert capsys.readouterr().err.startswith("no profile: gone.onnx: onnxruntime refuses it")


def test_the_peak_is_the_speed_of_a_large_convolution() -> None:
    found = measure_peak((32, 16, 3), batch=2, calls=3, length=2)
    assert 0.1 < found < 100_000


def test_the_cases_of_a_file_are_those_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert speed.read_rows(None) == speed.read_rows(path) == []
    speed.keep([{"a": 1}, {"b": 2}], path)
    speed.keep([{"c": 3}], path)
    speed.keep([{"d": 4}], None)
    assert speed.read_rows(path) == [{"a": 1}, {"b": 2}, {"c": 3}]
