"""Pictures of the lab as SVG: a call's time line (both parties' voiced stretches, stimuli and answers marked), and all
the figures of one line.

A small writer of our own: no plotting library is needed, and every browser and editor shows the file.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

_WIDTH_PER_S, _LEFT, _LANE = 40, 80, 34
_FIGURE_LEFT, _FIGURE_WIDTH, _ROW = 180, 480, 28
_COLOURS = {"caller": "#2b6cb0", "agent": "#c05621", "mark": "#718096"}


def timeline(call: dict[str, Any]) -> str:
    """One call as `agent.lab.measure.measure` gives it."""
    end_s = max([end for lane in ("caller_s", "agent_s") for _, end in call[lane]], default=1.0) + 1
    width, height = round(_LEFT + end_s * _WIDTH_PER_S), 4 * _LANE + 30
    title = f"{call.get('scenario', '')} on {call.get('line', '')}, seed {call.get('seed', '')}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(8, 18, title, "#1a202c"),
    ]
    parts += _grid(end_s, height)
    for row, party in enumerate(("caller", "agent")):
        top = 30 + row * (_LANE + 6)
        parts.append(_text(8, top + 20, party, _COLOURS[party]))
        parts += [
            f'<rect x="{_x(start):.1f}" y="{top + 4}" width="{max(1.0, _x(stop) - _x(start)):.1f}" '
            f'height="{_LANE - 8}" rx="2" fill="{_COLOURS[party]}"/>'
            for start, stop in call[f"{party}_s"]
        ]
    for index, stimulus in enumerate(call["stimuli"]):
        top = 30 + 2 * (_LANE + 6) + 14 * (index % 3)
        parts.append(_text(_x(stimulus["at_s"]), top + 12, _label(stimulus), _COLOURS["mark"]))
    return "\n".join([*parts, "</svg>"])


def figures(line: dict[str, Any]) -> str:
    """One line's figures as `agent.lab.run.by_line` gives them: every value a dot, median and 95th percentile marked;
    the counts as bars."""
    summary, rows = line["summary"], [(name, values) for name, values in line["values_ms"].items() if values]
    counts = [(name, summary[name]) for name in ("missed_stops", "pauses_taken", "unanswered_turns")]
    counts += [(f"false_stops, {kind}", count) for kind, count in summary["false_stops_by_kind"].items()]
    counts = [(name, count) for name, count in counts if not count.endswith("/0")]
    height = 60 + _ROW * (len(rows) + len(counts))
    title = f"line {line['line']}, {summary['calls']} calls"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_FIGURE_LEFT + _FIGURE_WIDTH + 220}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(8, 18, title, "#1a202c"),
    ]
    most = max((value for _, values in rows for value in values), default=1.0)
    for index, (name, values) in enumerate(rows):
        parts += _dots(40 + index * _ROW, name, values, summary[name], most)
    for index, (name, count) in enumerate(counts, start=len(rows)):
        parts += _bar(40 + index * _ROW, name, count)
    return "\n".join([*parts, "</svg>"])


def _dots(top: int, name: str, values: list[float], spread: dict[str, Any], most: float) -> list[str]:
    def x(value: float) -> float:
        return _FIGURE_LEFT + value / most * _FIGURE_WIDTH

    parts = [_text(8, top + 16, name, "#1a202c")]
    parts += [
        f'<circle cx="{x(value):.1f}" cy="{top + 12}" r="3" fill="{_COLOURS["agent"]}" fill-opacity="0.4"/>'
        for value in values
    ]
    parts += [
        f'<line x1="{x(spread[mark]):.1f}" y1="{top + 2}" x2="{x(spread[mark]):.1f}" y2="{top + 22}" '
        f'stroke="{_COLOURS["caller"]}" stroke-width="2"/>'
        for mark in ("p50", "p95")
    ]
    said = f"p50 {spread['p50']}, p95 {spread['p95']} ms, n {spread['n']}"
    return [*parts, _text(_FIGURE_LEFT + _FIGURE_WIDTH + 12, top + 16, said, _COLOURS["mark"])]


def _bar(top: int, name: str, count: str) -> list[str]:
    part, whole = (int(number) for number in count.split("/"))
    width = part / whole * _FIGURE_WIDTH
    return [
        _text(8, top + 16, name, "#1a202c"),
        f'<rect x="{_FIGURE_LEFT}" y="{top + 4}" width="{_FIGURE_WIDTH}" height="16" fill="#edf2f7"/>',
        f'<rect x="{_FIGURE_LEFT}" y="{top + 4}" width="{width:.1f}" height="16" fill="{_COLOURS["agent"]}"/>',
        _text(_FIGURE_LEFT + _FIGURE_WIDTH + 12, top + 16, f"{part} of {whole}", _COLOURS["mark"]),
    ]


def _grid(end_s: float, height: int) -> list[str]:
    lines = []
    for second in range(0, int(end_s) + 1):
        lines.append(f'<line x1="{_x(second)}" y1="26" x2="{_x(second)}" y2="{height - 18}" stroke="#e2e8f0"/>')
        if second % 5 == 0:
            lines.append(_text(_x(second) - 4, height - 4, f"{second} s", _COLOURS["mark"]))
    return lines


def _label(stimulus: dict[str, Any]) -> str:
    for key in ("voice_to_voice_ms", "stop_ms", "silence_ms", "gap_ms", "pause_ms"):
        if stimulus.get(key) is not None:
            return f"{stimulus['label']} {stimulus[key]} ms"
    return f"{stimulus['label']}: none"


def _x(at_s: float) -> float:
    return _LEFT + at_s * _WIDTH_PER_S


def _text(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'
