"""What is shipped for Prometheus and Grafana speaks of metrics that there are, in a language that they understand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rustord import metrics

MONITORING = Path(__file__).parents[1] / "packaging" / "monitoring"
RULES = MONITORING / "alerts.yaml"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())
DOCUMENT = Path(metrics.__file__).with_name("METRICS.md").read_text()


def expressions() -> list[str]:
    """All that is asked of Prometheus."""
    rules = re.findall(r"expr: (?:\|\s*)?(.*)", RULES.read_text())
    return rules + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_metric_and_label_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", DOCUMENT, re.MULTILINE)
    documented = {}
    for name, kind, labels in rows:
        for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            documented[name + suffix] = set(re.findall(r"`(\w+)`", labels)) | {"instance", "job"}
    assert len(expressions()) > 20
    for expression in expressions():
        used = re.findall(r"\b(rustord_\w+)(?:\{([^}]*)\})?", expression)
        assert used or expression.startswith(("up{", "process_")), expression
        for name, selectors in used:
            assert set(re.findall(r"(\w+)\s*[=!]", selectors)) <= documented[name], expression


def test_every_alert_says_what_to_do() -> None:
    alerts = RULES.read_text().split("- alert: ")[1:]
    assert len(alerts) >= 8
    for alert in alerts:
        assert re.search(r"severity: (critical|warning)", alert)
        assert re.search(r"summary: \".+\"", alert)
        assert re.search(r"description: \".+\"", alert)


def test_no_two_panels_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at: dict[str, Any] = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


if PROMTOOL := shutil.which("promtool"):  # to have it, Debian starts a whole Prometheus, which no test may ask for

    def test_promtool_takes_the_rules() -> None:
        done = subprocess.run([PROMTOOL, "check", "rules", RULES], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
