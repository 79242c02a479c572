"""The frame of first light: what is reported of a part that passes, fails, is skipped or takes too long."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import invoke
from tests.gpu import first_light, light_parts


@pytest.fixture
def settings(tmp_path):
    return first_light.settings_of(tmp_path, "cpu", "auto", None, None)


@pytest.mark.parametrize("part, expected", [
    (lambda light: light.close("figure", 1e-4), ("passed", [1e-4, "at most 0.001", True])),
    (lambda light: light.close("figure", 2e-3), ("failed", [2e-3, "at most 0.001", False])),
    (lambda light: light.close("figure", float("nan")), ("failed", None)),
    (lambda light: light.network("none"), ("skipped", "run the part networks before")),
    (lambda light: light.run("-c", "raise SystemExit(3)"), ("failed", "found exit code 3 of -c, expected 0")),
])
def test_what_a_part_reports(settings, monkeypatch, tmp_path, part, expected):
    monkeypatch.setitem(light_parts.PARTS, "fid", part)
    light_parts.main("fid", json.dumps(settings), str(tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["status"] == expected[0]
    if isinstance(expected[1], list):
        assert found["checks"] == {"figure": expected[1]}
    elif expected[1]:
        assert expected[1] in found["reason"] and found["checks"] == {}


@pytest.mark.slow
def test_a_part_ends_at_its_limit_with_its_children(settings, monkeypatch):
    monkeypatch.setattr(sys, "executable", "sleep")  # which knows no -m, and fails
    assert first_light.run_part("oom", settings, 20)["status"] == "failed"
    monkeypatch.undo()
    found = first_light.run_part("oom", settings, 0.5)
    assert found["status"] == "timeout" and found["seconds"] < 10


def test_the_report_grows_and_decides_the_exit_code(tmp_path, monkeypatch):
    results = {"oom": {"status": "passed", "checks": {"a": [1, "at most 2", True]}}, "fp16": {"status": "skipped"}}
    monkeypatch.setattr(first_light, "machine", lambda device: {"card": device})
    monkeypatch.setattr(first_light, "run_part", lambda name, *_: {"seconds": 0.0, **results[name]})
    args = [f"--out={tmp_path}", "--device=cpu", "--parts=fp16,oom"]
    assert invoke(first_light.main, args).exit_code == 0
    report = json.loads((tmp_path / "first_light.json").read_text())
    assert list(report["parts"]) == ["oom", "fp16"] and report["settings"]["scale"] == "small"
    results["oom"]["status"] = "failed"
    failed = invoke(first_light.main, args)
    assert failed.exit_code == 1 and "failed: oom" in failed.output
    assert "expected some of tests,networks" in invoke(first_light.main, [f"--out={tmp_path}", "--parts=all"]).output
    assert list(first_light.LIMITS) == [name for name in first_light.LIMITS if name in light_parts.PARTS]
    assert len(first_light.LIMITS) == len(light_parts.PARTS)
