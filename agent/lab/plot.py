"""Pictures of a lab call as SVG: both parties' voiced stretches on one time line, stimuli and answers marked.

A small writer of our own: no plotting library is needed, and every browser and editor shows the file.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

_WIDTH_PER_S, _LEFT, _LANE = 40, 80, 34
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


def _grid(end_s: float, height: int) -> list[str]:
    lines = []
    for second in range(0, int(end_s) + 1):
        lines.append(f'<line x1="{_x(second)}" y1="26" x2="{_x(second)}" y2="{height - 18}" stroke="#e2e8f0"/>')
        if second % 5 == 0:
            lines.append(_text(_x(second) - 4, height - 4, f"{second} s", _COLOURS["mark"]))
    return lines


def _label(stimulus: dict[str, Any]) -> str:
    for key in ("voice_to_voice_ms", "stop_ms", "silence_ms", "pause_ms"):
        if stimulus.get(key) is not None:
            return f"{stimulus['label']} {stimulus[key]} ms"
    return f"{stimulus['label']}: none"


def _x(at_s: float) -> float:
    return _LEFT + at_s * _WIDTH_PER_S


def _text(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'
