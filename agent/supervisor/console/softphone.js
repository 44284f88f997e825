// Calling the agent from this page: microphone in, voice out, keys, mute, levels. WebRTC (W3C webrtc-pc); the offer goes out
// complete with its candidates, so one request and one answer set the call up. Keys and the hang-up go over a data channel.

import { el, minutes } from "./elements.js";

const GATHER_MS = 2000;
const RECONNECT_MS = 10000; // as long as the server waits for our packets (webrtc.media_timeout_s)
const KEYS = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "*", "0", "#"];
const WORDS = {
  idle: "Ready",
  asking: "Waiting for the microphone",
  calling: "Calling",
  connecting: "Connecting",
  up: "In call",
  reconnecting: "Reconnecting",
};
const CAN_CHOOSE_SPEAKER = "setSinkId" in HTMLMediaElement.prototype;

export class Softphone {
  constructor({ root, opener, settings, onCall }) {
    Object.assign(this, { root, opener, settings, onCall });
    this.state = "idle";
    this.call = null;
    this.build();
    opener.hidden = false;
    opener.addEventListener("click", () => this.toggle());
    window.addEventListener("pagehide", () => this.hangUp());
  }

  build() {
    this.status = el("p", { class: "phone-status", role: "status" }, WORDS.idle);
    this.problem = el("p", { class: "problem", role: "alert", hidden: "" });
    this.number = el("input", { id: "phone-number", inputmode: "tel", maxlength: "64", value: "100" });
    this.devices = el("select", { id: "phone-device" });
    this.devices.addEventListener("change", () => this.switchMicrophone());
    this.speakers = el("select", { id: "phone-speaker" });
    this.speakers.addEventListener("change", () => this.switchSpeaker());
    this.levels = { you: meter("you", "caller"), agent: meter("agent", "agent") };
    this.callButton = button("Call", "primary", () => this.start());
    this.endButton = button("Hang up", "danger", () => this.hangUp());
    this.muteButton = button("Mute", "", () => this.mute());
    this.muteButton.setAttribute("aria-pressed", "false");
    this.voice = el("audio", { autoplay: "" });
    const close = button("×", "close", () => this.toggle());
    close.setAttribute("aria-label", "Close");
    this.root.replaceChildren(
      el("div", { class: "phone-head" }, [el("h2", {}, "Call the agent"), close]),
      this.status,
      this.problem,
      ...(this.settings.did ? [] : [el("label", { for: "phone-number" }, "Number"), this.number]),
      el("label", { for: "phone-device" }, "Microphone"),
      this.devices,
      ...(CAN_CHOOSE_SPEAKER ? [el("label", { for: "phone-speaker" }, "Speaker"), this.speakers] : []),
      this.levels.you.root,
      this.levels.agent.root,
      this.keypad(),
      el("div", { class: "phone-buttons" }, [this.callButton, this.muteButton, this.endButton]),
      this.voice,
    );
    if (!this.settings.is_on) this.fail(this.settings.off_because);
    this.show("idle");
    this.listDevices();
    if (navigator.mediaDevices) navigator.mediaDevices.addEventListener("devicechange", () => this.listDevices());
  }

  keypad() {
    this.keys = KEYS.map((digit) => {
      const key = button(digit, "", () => this.press(digit));
      key.setAttribute("aria-label", `Key ${digit === "*" ? "star" : digit === "#" ? "hash" : digit}`);
      return key;
    });
    return el("div", { class: "keypad", role: "group", "aria-label": "Keypad" }, this.keys);
  }

  toggle() {
    this.root.hidden = !this.root.hidden;
    this.opener.setAttribute("aria-expanded", String(!this.root.hidden));
  }

  show(state) {
    this.state = state;
    this.status.textContent = WORDS[state];
    this.root.dataset.state = state;
    this.number.disabled = state !== "idle";
    this.callButton.hidden = state !== "idle";
    this.callButton.disabled = !this.settings.is_on;
    this.endButton.hidden = state === "idle";
    this.muteButton.hidden = state === "idle";
    for (const key of this.keys) key.disabled = state !== "up";
    this.opener.textContent = state === "idle" ? "Call the agent" : WORDS[state];
  }

  fail(words) {
    this.problem.textContent = words;
    this.problem.hidden = !words;
  }

  // ---------------------------------------------------------------- the call

  async start() {
    this.fail("");
    const call = (this.call = { isOver: false });
    try {
      this.show("asking");
      this.speakWith(call, await navigator.mediaDevices.getUserMedia({ audio: this.wanted() }));
      await this.listDevices();
      if (call.isOver) return;
      this.show("calling");
      const ticket = await post("/api/browser-calls/tokens", { did: this.settings.did || this.number.value.trim() });
      await this.connect(call, ticket);
    } catch (error) {
      if (!call.isOver) this.finish(call, wordsOf(error));
    }
  }

  async connect(call, ticket) {
    const connection = (call.connection = new RTCPeerConnection({
      iceServers: ticket.ice_servers,
      iceTransportPolicy: ticket.ice_transport_policy,
    }));
    call.sender = connection.addTrack(call.microphone.getAudioTracks()[0], call.microphone);
    call.control = connection.createDataChannel("control");
    call.control.addEventListener("close", () => this.finish(call, "")); // the other side's goodbye
    connection.addEventListener("track", (event) => this.hear(call, event));
    connection.addEventListener("connectionstatechange", () => this.follow(call));
    await connection.setLocalDescription(await connection.createOffer());
    await gathered(connection);
    const answer = await post("/api/browser-calls", { token: ticket.token, sdp: connection.localDescription.sdp });
    if (call.isOver) return;
    this.show("connecting");
    call.id = answer.call_id;
    await connection.setRemoteDescription({ type: "answer", sdp: answer.sdp });
  }

  hear(call, event) {
    const stream = event.streams[0] || new MediaStream([event.track]);
    this.voice.srcObject = stream;
    call.audio = new AudioContext();
    call.meters = [
      [this.levels.you, analyser(call.audio, call.microphone)],
      [this.levels.agent, analyser(call.audio, stream)],
    ];
    this.draw(call);
  }

  follow(call) {
    if (call.isOver) return;
    const state = call.connection.connectionState;
    if (state === "connected" && this.state !== "up") {
      clearTimeout(call.givingUp);
      this.show("up");
      if (!call.startedAt) this.onCall(call.id);
      call.startedAt = call.startedAt || Date.now();
    } else if (state === "disconnected" && this.state === "up") {
      // Packets are missing: a change of network, a tunnel. Most come back (W3C webrtc-pc 5.6.2).
      this.show("reconnecting");
      call.givingUp = setTimeout(() => this.finish(call, "The connection was lost."), RECONNECT_MS);
    } else if (state === "failed") {
      this.finish(call, call.startedAt ? "The connection was lost." : "The connection for the sound could not be made.");
    } else if (state === "closed") this.finish(call, "");
  }

  draw(call) {
    if (call.isOver) return;
    for (const [level, node] of call.meters) level.set(loudness(node));
    if (this.state === "up") this.status.textContent = `${WORDS.up} ${minutes((Date.now() - call.startedAt) / 1000)}`;
    requestAnimationFrame(() => this.draw(call));
  }

  press(digit) {
    if (this.call && this.call.control.readyState === "open") this.call.control.send(JSON.stringify({ digit }));
  }

  mute() {
    const track = this.call && this.call.microphone && this.call.microphone.getAudioTracks()[0];
    if (!track) return;
    track.enabled = !track.enabled;
    this.muteButton.textContent = track.enabled ? "Mute" : "Unmute";
    this.muteButton.setAttribute("aria-pressed", String(!track.enabled));
  }

  hangUp() {
    const call = this.call;
    if (!call || call.isOver) return;
    if (call.control && call.control.readyState === "open") call.control.send(JSON.stringify({ hangup: true }));
    this.finish(call, "");
  }

  finish(call, problem) {
    if (call.isOver) return;
    call.isOver = true;
    clearTimeout(call.givingUp);
    if (call.microphone) stop(call.microphone);
    if (call.audio) call.audio.close();
    // A moment later, so that the hang-up on the data channel leaves first.
    if (call.connection) setTimeout(() => call.connection.close(), 200);
    this.voice.srcObject = null;
    this.muteButton.textContent = "Mute";
    this.muteButton.setAttribute("aria-pressed", "false");
    for (const level of Object.values(this.levels)) level.set(0);
    this.fail(problem);
    this.show("idle");
  }

  // ------------------------------------------------- microphones and speakers

  wanted() {
    const exact = this.devices.value ? { deviceId: { exact: this.devices.value } } : {};
    return { ...exact, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
  }

  // Names are known once the microphone was allowed.
  async listDevices() {
    if (!navigator.mediaDevices) {
      this.fail("The browser gives its microphone to pages over HTTPS or on this machine only.");
      return;
    }
    const found = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.deviceId);
    const microphones = options(found, "audioinput", "microphone");
    choices(this.devices, microphones.length ? microphones : [el("option", { value: "" }, "as the browser asks")]);
    const speakers = options(found, "audiooutput", "speaker").filter((option) => option.value !== "default");
    choices(this.speakers, [el("option", { value: "" }, "as the system has it"), ...speakers]);
  }

  speakWith(call, microphone) {
    call.microphone = microphone;
    // Not heard when we stop it ourselves: the device was unplugged, or the permission taken back.
    microphone.getAudioTracks()[0].addEventListener("ended", () => {
      if (!call.isOver && call.microphone === microphone) this.fail("The microphone is gone. Choose another one.");
    });
  }

  async switchMicrophone() {
    const call = this.call;
    if (!call || call.isOver || !call.sender) return;
    const before = call.microphone;
    let next = null;
    this.devices.disabled = true; // one at a time
    try {
      next = await navigator.mediaDevices.getUserMedia({ audio: this.wanted() });
      next.getAudioTracks()[0].enabled = before.getAudioTracks()[0].enabled;
      await call.sender.replaceTrack(next.getAudioTracks()[0]);
      this.speakWith(call, next);
      stop(before);
      if (call.isOver) stop(next);
      else if (call.meters) call.meters[0][1] = analyser(call.audio, next);
      this.fail("");
    } catch (error) {
      if (next) stop(next);
      if (call.isOver) return;
      this.devices.value = before.getAudioTracks()[0].getSettings().deviceId;
      this.fail(`${wordsOf(error)} The microphone stays as it was.`);
    } finally {
      this.devices.disabled = false;
    }
  }

  async switchSpeaker() {
    try {
      await this.voice.setSinkId(this.speakers.value);
      this.fail("");
    } catch (error) {
      this.speakers.value = this.voice.sinkId;
      this.fail(`${wordsOf(error, "speaker")} The speaker stays as it was.`);
    }
  }
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}

function options(devices, kind, name) {
  return devices
    .filter((device) => device.kind === kind)
    .map((device) => el("option", { value: device.deviceId }, device.label || name));
}

// What was chosen stays chosen, where it is still there.
function choices(select, found) {
  const chosen = select.value;
  select.replaceChildren(...found);
  if (found.some((option) => option.value === chosen)) select.value = chosen;
}

function button(words, kind, onClick) {
  const made = el("button", kind ? { type: "button", class: kind } : { type: "button" }, words);
  made.addEventListener("click", onClick);
  return made;
}

function meter(name, lane) {
  const bar = el("span", { class: "bar" });
  const root = el("div", { class: `level ${lane}` }, [el("span", { class: "level-name" }, name), el("span", { class: "track" }, [bar])]);
  return { root, set: (share) => (bar.style.width = `${Math.round(share * 100)}%`) };
}

function analyser(context, stream) {
  const node = context.createAnalyser();
  node.fftSize = 1024;
  context.createMediaStreamSource(stream).connect(node);
  return node;
}

// -60 dBFS and below is 0, full scale is 1.
function loudness(node) {
  const samples = new Float32Array(node.fftSize);
  node.getFloatTimeDomainData(samples);
  const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
  return power > 0 ? Math.min(1, Math.max(0, 1 + (10 * Math.log10(power)) / 60)) : 0;
}

function gathered(connection) {
  if (connection.iceGatheringState === "complete") return Promise.resolve();
  return new Promise((done) => {
    setTimeout(done, GATHER_MS);
    connection.addEventListener("icegatheringstatechange", () => connection.iceGatheringState === "complete" && done());
  });
}

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json();
  if (response.ok) return answer;
  const wait = response.headers.get("retry-after");
  throw new Error(`${sentence(answer.error)}${wait ? ` Try again in ${wait} s.` : ""}`);
}

function wordsOf(error, device = "microphone") {
  if (error.name === "NotAllowedError") return `The browser does not let this page use the ${device}.`;
  if (error.name === "NotFoundError" || error.name === "OverconstrainedError") return `There is no such ${device}.`;
  if (error.name === "NotReadableError") return `The ${device} is used by another program or does not work.`;
  return sentence(error.message.replace(/\.$/, ""));
}

function sentence(words) {
  return `${words.charAt(0).toUpperCase()}${words.slice(1)}.`;
}
