from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fewbit.engines.session import Setting
from fewbit.errors import InputError
from fewbit.search.kept_aids import KeptAids, Run
from fewbit.search.mixed_precision import Mix
from fewbit.search.weight_widths import Widths

MIX = Mix(regions=("a",), keep_float=("conv",), ms=1.0, loss=0.5, ratio=0.9)


@dataclass
class Bench:
    """Answers, and counts how often it is asked."""

    asked: list[str] = field(default_factory=list)
    fails: bool = False

    def ranking(self, engine: str, base: str) -> tuple[str, ...]:
        self.asked.append("ranking")
        return ("conv", "fc")

    def mixes(self, setting: Setting, tell: Any) -> tuple[Mix, ...]:
        self.asked.append(f"mixes {setting.threads} {setting.streams} {setting.float_precision}")
        if self.fails:
            raise InputError("the engine is gone")
        return (MIX,)

    def widths(self, limit_s: float | None, tell: Any) -> tuple[Widths, ...]:
        self.asked.append(f"widths {limit_s}")
        if self.fails:
            raise InputError("it takes longer")
        return ()


class Decisions(dict[str, str]):
    """A journal in memory."""

    def decision(self, name: str) -> str | None:
        return self.get(name)

    def decide(self, name: str, value: str) -> None:
        self[name] = value


@dataclass
class Case:
    """The aids of one network, with what the run would know."""

    bench: Bench = field(default_factory=Bench)
    journal: Decisions = field(default_factory=Decisions)
    notes: list[str] = field(default_factory=list)
    goes_on: bool = True
    ms: float = 5.0
    minutes: float | None = None

    def aids(self) -> Any:
        setting = Setting(engine="openvino", batch=8, threads=4, streams=2)
        trial = SimpleNamespace(timing=SimpleNamespace(ms_per_batch_p50=self.ms), setting=setting)
        view = SimpleNamespace(find=lambda *_: trial)
        trials: Any = SimpleNamespace(
            benches={"net": self.bench}, sessions=SimpleNamespace(free=lambda: None)
        )
        journal: Any = self.journal
        run = Run(lambda: view, lambda: self.goes_on, lambda: 100.0, lambda *_: None, self.notes.append)  # type: ignore[arg-type,return-value]
        return KeptAids(trials, journal, run, self.minutes).aids()


def test_what_was_worked_out_is_read_again() -> None:
    case = Case()
    for _ in range(2):
        aids = case.aids()
        assert aids.ranking("net", "openvino", "int8") == ("conv", "fc")
        assert aids.mixing("net", "openvino", "int8", "bf16") == (MIX,)
        assert aids.widening("net") == ()
    assert case.bench.asked == ["ranking", "mixes 2 1 bf16", "widths 40.0"]
    assert case.notes == []


def test_what_fails_is_a_note_and_no_mix() -> None:
    case = Case(Bench(fails=True))
    aids = case.aids()
    assert aids.mixing("net", "openvino", "int8", "bf16") == () and aids.widening("net") == ()
    assert case.notes == [
        "net on openvino: mixed precision was not tried (the engine is gone)",
        "net: weights under 8 bits were not tried (it takes longer)",
    ]


def test_a_batch_of_under_2_ms_and_a_search_of_few_minutes_try_no_mix() -> None:
    quick = Case(ms=1.9)
    assert quick.aids().mixing("net", "openvino", "int8", "bf16") == () and quick.bench.asked == []
    assert Case(minutes=7.9).aids().mixing is None and Case(minutes=8).aids().mixing is not None


def test_nothing_is_worked_out_for_a_trial_that_will_not_come() -> None:
    case = Case(goes_on=False)
    aids = case.aids()
    assert aids.ranking("net", "openvino", "int8") == ()
    assert aids.mixing("net", "openvino", "int8", "bf16") == ()
    assert aids.widening("net") == ()
    assert case.bench.asked == [] and not case.journal and case.notes == []
    case.goes_on = True
    assert aids.widening("net") == () and case.bench.asked == ["widths 40.0"]  # it was not refused


def test_a_refusal_of_widths_is_asked_for_and_noted_once_a_run() -> None:
    case = Case(Bench(fails=True))
    aids = case.aids()
    for _ in range(3):
        assert aids.widening("net") == ()
    assert case.bench.asked == ["widths 40.0"]
    assert case.notes == ["net: weights under 8 bits were not tried (it takes longer)"]
    assert case.aids().widening("net") == () and len(case.bench.asked) == 2  # the next run may have more time
