"""The demo's caller, a process of its own: dials, says its clips over RTP, listens, barges in, hangs up, reports.

    python -m agent.demo_caller --uri sip:100@127.0.0.1:5060 --order 45612 [--record OUT.wav]

Shares nothing with the agent but the committed clips; the last line is its report as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from agent.caller import run_caller
from agent.demo_script import caller_script


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uri", required=True)
    parser.add_argument("--order", required=True)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    script = caller_script(arguments.order)
    report = asyncio.run(run_caller(arguments.uri, script, record=arguments.record, max_duration_s=150.0))
    print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
