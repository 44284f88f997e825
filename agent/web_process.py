"""The web process: the supervisors' page, started and watched by the parent (agent/app.py). Reads the database, brings
browsers' offers to the media workers, asks the agent for what a supervisor does to a running call.

python -m agent.web_process --settings FILE.json --run-folder DIR --parent-pid PID [--new-token]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from agent.readiness import examine_running
from agent.run_folder import DIAL_SOCKET, MONITOR_SOCKET, offer_socket, read_settings
from agent.supervisor.serve import browser_desk, run_web


def main() -> None:
    parser = argparse.ArgumentParser(description="web process")
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--new-token", action="store_true")
    arguments = parser.parse_args()
    config = read_settings(arguments.settings)
    offers = [arguments.run_folder / offer_socket(index) for index in range(config.webrtc.num_workers)]
    run_web(
        config.web,
        config.storage,
        is_new_token_wanted=arguments.new_token,
        parent_pid=arguments.parent_pid,
        make_desk=lambda reader: browser_desk(config.webrtc, offers, config.telephony.answer_timeout_s, reader),
        monitor_socket=arguments.run_folder / MONITOR_SOCKET,
        dial_socket=arguments.run_folder / DIAL_SOCKET,
        examine=lambda reader: examine_running(config, arguments.run_folder, reader),
        on_ready=lambda url: print(json.dumps({"ready": True, "url": url}), flush=True),
    )


if __name__ == "__main__":
    main()
