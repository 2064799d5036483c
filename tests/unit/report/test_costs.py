from __future__ import annotations

from fewbit.engines.placement_cost import PlacementCost
from fewbit.engines.session import Setting
from fewbit.report.costs import SHOWN, cost_view, lead_of, rest_of
from fewbit.report.html import render
from fewbit.report.summary import result_json
from fewbit.search.trial import StudyRecord
from made_study import cost, study

SETTING = Setting(engine="openvino", batch=8, threads=2, streams=2)


def test_findings_of_one_cause_share_a_row_and_the_costliest_comes_first() -> None:
    view = cost_view(cost(SETTING))
    assert [(row.ms, row.share, row.kind, row.asked, row.where) for row in view.rows] == [
        ("1.75 ms", "17.5 %", "2 x unfused operator", "", "stage1.0.swish, stage2.0.swish"),
        ("1.5 ms", "15.0 %", "float operator", "asked for", "stage3.3.linear"),
        ("0.5 ms", "5.0 %", "input conversion", "", "input:q"),
    ]
    assert view.rows[0].runs == "Subgraph (jit)" and view.rows[0].remedy == "bf16 for this region"
    assert view.more == ()


def test_the_lead_says_what_is_asked_for_and_what_is_not() -> None:
    assert lead_of(cost(SETTING)) == (
        "One call on OpenVINO, batch 8, 1 thread takes 10 ms in its own profile; 2.25 ms of that, 22.5 %, go "
        "into what is named here. The recipe keeps 1.5 ms in float on purpose."
    )
    plain = PlacementCost(setting=SETTING, integers=False, ms=3.0, findings=(), rest={"3x3": 3.0})
    assert lead_of(plain).endswith("3 ms in its own profile; the file is in float and asks for no integers.")
    assert rest_of(cost(SETTING)) == "The other 6.25 ms: 3x3 5 ms, classifier 1.25 ms."
    assert rest_of(PlacementCost(setting=SETTING, integers=True, ms=0, findings=(), rest={})) == ""


def test_what_costs_less_is_folded_away() -> None:
    one = cost(SETTING).findings[0]
    findings = tuple(
        one.model_copy(update={"why": f"cause {i}", "ms": 40.0 - i, "layers": tuple("abcde")})
        for i in range(SHOWN + 2)
    )
    view = cost_view(cost(SETTING).model_copy(update={"findings": findings}))
    assert [row.why for row in view.rows] == [f"cause {i}" for i in range(SHOWN)]
    assert [row.why for row in view.more] == [f"cause {SHOWN}", f"cause {SHOWN + 1}"]
    assert view.rows[0].where == "a, b, c and 2 more"


def test_the_page_and_the_result_have_it_and_an_older_study_does_without() -> None:
    record = study()
    page = render(record)
    assert "What keeps operators out of integers" in page and "stage1.0.swish, stage2.0.swish" in page
    assert 'href="#costs"' in page
    assert record.answer is not None and record.answer.cost is not None
    assert result_json(record)["placement_cost"] == record.answer.cost.model_dump(mode="json")
    data = record.model_dump(mode="json")
    del data["answer"]["cost"]
    older = StudyRecord.model_validate(data)
    page = render(older)
    assert "What keeps operators out of integers" not in page and 'href="#costs"' not in page
    assert result_json(older)["placement_cost"] is None
