"""Captures what real peers send, into tests/fixtures/captures/: SIP messages, RTP, offers of browsers.

    .venv/bin/python -m tests.live.capture [baresip sipp sipsak kamailio linphone pjsua2 chromium aiortc]

Each peer calls a party of ours on loopback (called_party.py), which keeps its bytes as they came. Without names: every
peer that is installed (`sudo make peers`; linphone by `apt-get install linphone-cli`). Files are named by origin,
version and what they are; a newer version lands beside the older one, and tests take the newest. The folder's README.md
gets a row for each. Not a test: tests/telephony/test_captures.py and its neighbours replay what lies there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import functools
import http.server
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from agent.lab import rtp
from telephony.leg import Hold, Unhold
from telephony.trunk_config import TrunkConfig
from telephony.webrtc.ice import gather_only_on
from telephony.webrtc.peer import BrowserPeer
from tests.live.baresip import baresip, silence
from tests.live.browser import browser
from tests.live.called_party import CalledParty, exchanged_with
from tests.live.lines_peers import free_port, kamailio, line
from tests.live.sipp import sipp
from tests.live.speech import clip
from tests.telephony.captures import FOLDER, Datagram, write_pcap

ROOT = Path(__file__).resolve().parents[2]
PCMA = ("8 101", "a=rtpmap:8 PCMA/8000\r\na=rtpmap:101 telephone-event/8000\r\na=fmtp:101 0-15\r\n")
CLIP = "hours_day"  # "what are your opening hours on …", 1.4 s, of the demo's assets
CLIP_AFTER_S, KEYS = 0.5, "123#"
CONSOLE = ROOT / "agent" / "supervisor" / "console"
LINPHONE = """[sip]
sip_port={port}
sip_tcp_port=0
sip_tls_port=0
guess_hostname=0
contact="Linphone" <sip:linphone@127.0.0.1>
use_ipv6=0
ipv6_migration_done=1
bind_address=127.0.0.1
"""
# The page's own phone (softphone.js), whose two requests are answered here instead of by the agent.
CALL_FROM_THE_PAGE = """
(async () => {
  window.fetch = async (path, request) => {
    if (path.endsWith('/tokens')) {
      const ticket = { token: 't', ice_servers: [], ice_transport_policy: 'all' };
      return new Response(JSON.stringify(ticket), { status: 200 });
    }
    window.offer = JSON.parse(request.body).sdp;
    return new Promise(() => {});
  };
  const { Softphone } = await import('/softphone.js');
  const parts = [document.createElement('div'), document.createElement('button')];
  document.body.replaceChildren(...parts);
  const settings = { is_on: true, did: '100' };
  window.phone = new Softphone({ root: parts[0], opener: parts[1], settings, onCall: () => {} });
  window.phone.start();
})()
"""


def debian_version(package: str) -> str:
    """1:3.6.1-1+b2 -> 3.6.1."""
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=True
    )
    return re.sub(r"^\d+:|-[^-]*$", "", shown.stdout)


def keep(origin: str, version: str, what: str, content: bytes | list[Datagram], said: str) -> None:
    """One file and its row in README.md."""
    path = FOLDER / f"{origin}-{version}-{what}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_pcap(path, content)
    readme = FOLDER / "README.md"
    day = datetime.datetime.now(datetime.UTC).date()
    row = f"| `{path.name}` | {origin} {version} | {day} | `{origin}` | {said} |"
    lines = [one for one in readme.read_text().splitlines() if not one.startswith(f"| `{path.name}` ")]
    last = max(at for at, one in enumerate(lines) if one.startswith("|"))
    table = [at for at in range(last + 1) if lines[at].startswith("| `")]
    rows = sorted([lines[at] for at in table] + [row])
    head = lines[: table[0]] if table else lines[: last + 1]
    readme.write_text("\n".join([*head, *rows, *lines[last + 1 :]]) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes", flush=True)


def speech() -> np.ndarray:
    return np.concatenate([silence(CLIP_AFTER_S), clip(CLIP), silence(120)])


def capture_baresip(folder: Path) -> None:
    save = functools.partial(keep, "baresip", debian_version("baresip-core"))
    with CalledParty() as party, baresip(folder / "pcmu", speech(), dial=f"sip:100@{party.address}") as peer:
        save("invite.sip", party.request("INVITE"), "call to sip:100")
        party.request("ACK")
        save("pcmu.pcap", party.listen(CLIP_AFTER_S + 1.9), f"its first 2.4 s, PCMU, `{CLIP}` from {CLIP_AFTER_S} s on")
        first = len(party.rtp)
        for key in KEYS:
            peer.press(key)
            time.sleep(0.4)
        save("telephone-event.pcap", party.rtp[first:], f"keys {KEYS} pressed, and the silence in between")
        peer.press("x")
        save("reinvite-hold.sip", party.request("INVITE", 1), "key x: holds the call of `invite.sip`")
        party.request("ACK", 1)
        peer.press("X")
        save("reinvite-resume.sip", party.request("INVITE", 2), "key X: resumes it")
        party.request("ACK", 2)
        peer.press("b")
        save("bye.sip", party.request("BYE"), "key b: ends it")
    with CalledParty(PCMA) as party, baresip(folder / "pcma", speech(), dial=f"sip:100@{party.address}"):
        party.request("ACK")
        save("pcma.pcap", party.listen(CLIP_AFTER_S + 1.9), "as `pcmu.pcap`, answered with PCMA only")


def capture_sipp(folder: Path) -> None:
    save = functools.partial(keep, "sipp", debian_version("sip-tester"))
    (folder / "pcap").symlink_to("/usr/share/sip-tester")
    for scenario, what in (("uac", "invite.sip"), ("uac_pcap", "invite-pcma.sip")):
        with CalledParty() as party:
            command = ["sipp", party.address, "-sn", scenario, "-s", "100", "-i", "127.0.0.1", "-p", str(free_port())]
            command += ["-mp", str(free_port() & ~1), "-m", "1", "-nostdin", "-timeout", "5"]
            with started(command, folder):
                save(what, party.request("INVITE"), f"its own scenario `-sn {scenario}`")
                party.request("ACK")
    path = folder / "play.al"
    path.write_bytes(rtp.encode(rtp.PCMA, clip(CLIP).astype(float)))
    media = f'<nop><action><exec rtp_stream="{path},1,8,PCMA/8000"/></action></nop>'
    with CalledParty(PCMA) as party, sipp(folder, party.address, 3000, media, ("-m", "1")):
        party.request("ACK")
        save("pcma.pcap", party.listen(1.9), f"`rtp_stream` of `{CLIP}` as PCMA/8000")


def capture_sipsak(folder: Path) -> None:
    with CalledParty() as party, started(["sipsak", "-s", f"sip:100@{party.address}"], folder):
        keep("sipsak", debian_version("sipsak"), "options.sip", party.request("OPTIONS"), "`sipsak -s sip:100@…`")


def capture_kamailio(folder: Path) -> None:
    save = functools.partial(keep, "kamailio", debian_version("kamailio"))
    deployed = (ROOT / "deploy" / "kamailio" / "kamailio.cfg").read_text()
    with CalledParty() as party:
        (folder / "dispatcher.list").write_text(f"1 sip:{party.address}\n")
        with kamailio(folder / "proxy", deployed, "-A", f'WORKERS="{folder}/dispatcher.list"') as proxy:
            save("options-ping.sip", party.request("OPTIONS"), "deploy/kamailio asks whether a worker is alive")
            with baresip(folder / "caller", silence(60), dial=f"sip:100@{proxy.address}"):
                save("invite-forwarded.sip", party.request("INVITE"), "baresip's call through deploy/kamailio")
                party.request("ACK")
    asyncio.run(_register(folder, save))


async def _register(folder: Path, save: Callable[..., None]) -> None:
    """REGISTER of our own worker at tests/live/registrar.cfg, with a relay of bytes in between."""
    os.environ["TRUNK_PASSWORD"] = "sesame"
    config = (ROOT / "tests" / "live" / "registrar.cfg").read_text().replace("CALLEE", "127.0.0.1:9")
    with kamailio(folder / "registrar", config) as registrar:
        with CalledParty(upstream=exchanged_with(registrar.address)) as party:
            trunk = TrunkConfig(
                name="carrier", hosts=(party.address,), registers=True, username="acme",
                password_env="TRUNK_PASSWORD", domain="carrier.test", options_s=0,
            )  # fmt: skip
            async with line(trunks=(trunk,)):
                await asyncio.to_thread(party.request, "REGISTER", 1)
                while len(party.answers) < 2:  # noqa: ASYNC110 - a thread adds them
                    await asyncio.sleep(0.05)
            of_worker = functools.partial(keep, "pjsua2", metadata.version("pjsua2-python").partition(".post")[0])
            of_worker("register.sip", party.request("REGISTER"), "our trunk at tests/live/registrar.cfg")
            of_worker("register-authorized.sip", party.request("REGISTER", 1), "the same after the challenge")
            save("register-challenge.sip", party.answers[0], "its answer to `pjsua2-*-register.sip`")
            save("register-ok.sip", party.answers[1], "its answer to `pjsua2-*-register-authorized.sip`")


def capture_linphone(folder: Path) -> None:
    for made in (".local/share/linphone", ".config/linphone"):
        (folder / made).mkdir(parents=True)
    (folder / "rc").write_text(LINPHONE.format(port=free_port()))
    with CalledParty() as party:
        command = ["linphonec", "-c", str(folder / "rc"), "-s", f"sip:100@{party.address}"]
        with started(command, folder):
            version = debian_version("linphone-cli")
            keep("linphone", version, "invite.sip", party.request("INVITE"), "`linphonec -s sip:100@…`")
            party.request("ACK")


def capture_pjsua2(folder: Path) -> None:
    save = functools.partial(keep, "pjsua2", metadata.version("pjsua2-python").partition(".post")[0])

    async def call() -> None:
        with CalledParty() as party:
            async with line() as near:
                heard = await near.call(uri=f"sip:100@{party.address}")
                await heard.confirmed()
                save("invite.sip", party.request("INVITE"), "our own worker calls")
                for number, command in enumerate((Hold, Unhold), 1):
                    await heard.leg.send(command(leg_id=heard.leg.leg_id))
                    reinvite = await asyncio.to_thread(party.request, "INVITE", number)
                    await asyncio.to_thread(party.request, "ACK", number)
                    what = "reinvite-hold.sip" if command is Hold else "reinvite-resume.sip"
                    save(what, reinvite, f"`{command.__name__}` in that call")
                heard.leg.hang_up()
                await heard.ended()

    asyncio.run(call())


def capture_chromium(folder: Path) -> None:
    handler = functools.partial(_QuietFiles, directory=str(CONSOLE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        media = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        with browser(folder, *media) as page:
            page.open(f"http://localhost:{server.server_port}/icon.svg")
            page.wait("document.readyState === 'complete'")
            page.open(f"http://localhost:{server.server_port}/login.html")
            page.wait("document.readyState === 'complete' && location.pathname === '/login.html'")
            page.value(CALL_FROM_THE_PAGE)
            page.wait("window.offer")
            offer = str(page.value("window.offer"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    keep("chromium", debian_version("chromium"), "offer.sdp", offer.encode(), "the page's phone (console/softphone.js)")


class _QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def capture_aiortc(folder: Path) -> None:
    gather_only_on("127.0.0.1")

    async def offer() -> str:
        peer = BrowserPeer()
        try:
            return await peer.offer()
        finally:
            await peer.hang_up()

    text = asyncio.run(offer())
    keep("aiortc", metadata.version("aiortc"), "offer.sdp", text.encode(), "telephony/webrtc/peer.py")


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


PEERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "baresip": ("baresip", capture_baresip), "sipp": ("sipp", capture_sipp), "sipsak": ("sipsak", capture_sipsak),
    "kamailio": ("kamailio", capture_kamailio), "linphone": ("linphonec", capture_linphone),
    "pjsua2": ("", capture_pjsua2), "chromium": ("chromium", capture_chromium), "aiortc": ("", capture_aiortc),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.live.capture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", choices=[[], *PEERS], help="default: all that are installed")
    for name in parser.parse_args().peers or PEERS:
        program, capture = PEERS[name]
        if program and not shutil.which(program):
            print(f"{name}: {program} is not installed")
            continue
        with tempfile.TemporaryDirectory(prefix=f"minmo-capture-{name}-") as folder:
            capture(Path(folder))


if __name__ == "__main__":
    main()
