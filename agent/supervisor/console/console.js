// The supervisors' page: list of calls, one call with its live transcript, its recording and its latencies.
//
// Everything shown comes from callers and models, so it is an attacker's text: it reaches the page only through textContent
// (function `el`), never as markup. One event stream says that something changed; what is shown is then fetched again.

import { Player } from "./player.js";
import { detailOf } from "./detail.js";
import { Softphone } from "./softphone.js";
import { LiveEar } from "./live_ear.js";
import { el, clock, shortTime } from "./elements.js";

const PAGE_ROWS = 50;
const NARROW = matchMedia("(max-width: 52rem)"); // as in console.css: the call stands below the list
const TYPED_MS = 400;
const REFRESH_MS = 250; // at most four fetches a second, however fast a call talks

const state = { callId: "", startSecond: null, calls: [], player: null, detail: null, me: null, ear: null };

async function getJson(path) {
  const response = await fetch(path, { headers: { accept: "application/json" } });
  if (response.status === 401) location.assign("/login");
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

// Waits until nothing was typed for a moment: a search is one request, and one line in the audit, not one per letter.
function whenTyped(work) {
  let waiting = 0;
  return () => {
    clearTimeout(waiting);
    waiting = setTimeout(work, TYPED_MS);
  };
}

// Runs `work` soon, and again if it was asked for meanwhile; never twice at once.
function soon(work) {
  let isRunning = false;
  let isWanted = false;
  return async function run() {
    isWanted = true;
    if (isRunning) return;
    isRunning = true;
    while (isWanted) {
      isWanted = false;
      try {
        await work();
      } catch (error) {
        console.error(error);
      }
      await new Promise((done) => setTimeout(done, REFRESH_MS));
    }
    isRunning = false;
  };
}

// ------------------------------------------------------------------ the list

function listPath(before) {
  const query = new URLSearchParams({ limit: PAGE_ROWS });
  const text = document.getElementById("text").value.trim();
  const which = document.getElementById("state").value;
  if (text) query.set("text", text);
  if (which) query.set("state", which);
  if (before) query.set("before", before);
  return `/api/calls?${query}`;
}

// The links take away what the list shows, not only its first page.
function showExport() {
  const query = new URLSearchParams(listPath().split("?")[1]);
  query.delete("limit");
  for (const link of document.querySelectorAll("#export a")) link.href = `/api/export/calls.${link.dataset.kind}?${query}`;
}

const refreshList = soon(async () => {
  const { calls } = await getJson(listPath());
  showList(calls, calls.length === PAGE_ROWS);
});

async function showOlder() {
  const last = state.calls[state.calls.length - 1];
  const { calls } = await getJson(listPath(last.started_at));
  showList([...state.calls, ...calls], calls.length === PAGE_ROWS);
}

function showList(calls, hasMore) {
  state.calls = calls;
  showExport();
  document.getElementById("calls").replaceChildren(...calls.map(listItem));
  document.getElementById("no-calls").hidden = calls.length > 0;
  document.getElementById("more").hidden = !hasMore;
}

function listItem(call) {
  const link = el("a", { href: `#${call.call_id}` }, [
    el("span", { class: "who" }, call.display_name || call.ani || "number withheld"),
    outcome(call),
    el("span", { class: "soft" }, [call.campaign || call.did, counted(call.num_turns, "turn")].join(" · ")),
    el("span", { class: "soft number" }, shortTime(call.started_at)),
  ]);
  if (call.call_id === state.callId) link.setAttribute("aria-current", "true");
  return el("li", {}, [link]);
}

export function outcome(call) {
  if (call.state === "open") return el("span", { class: "badge is-open" }, "now");
  const isProblem = call.disposition === "failed";
  return el("span", { class: isProblem ? "badge is-problem" : "badge" }, call.disposition || "ended");
}

// --------------------------------------------------------------- the summary

const SHORT_NAMES = {
  voice_to_voice_ms: "voice to voice",
  first_word_ms: "first word",
  duck_ms: "duck",
  stop_ms: "stop",
};

function counted(number, name) {
  return `${number} ${name}${number === 1 ? "" : "s"}`;
}

const refreshSummary = soon(async () => {
  const summary = await getJson("/api/summary");
  const rows = [el("div", {}, [el("dt", {}, "calls now"), el("dd", {}, String(summary.num_open_calls))])];
  for (const latency of summary.latencies) {
    const value = el("dd", { title: `median and 95th percentile of ${latency.n} in ${summary.hours} hours` }, [
      `${Math.round(latency.p50)} ms `,
      el("small", {}, `p95 ${Math.round(latency.p95)} · n ${latency.n}`),
    ]);
    rows.push(el("div", {}, [el("dt", {}, SHORT_NAMES[latency.name] || latency.name), value]));
  }
  if (summary.num_unmeasured_calls > 0) {
    const title = `in calls that ended in the last ${summary.hours} hours; the figures beside it leave them out`;
    const value = `${counted(summary.num_unmeasured_turns, "answer")} in ${counted(summary.num_unmeasured_calls, "call")}`;
    rows.push(el("div", { class: "alert", role: "alert", title }, [el("dt", {}, "no latency of"), el("dd", {}, value)]));
  }
  document.getElementById("summary").replaceChildren(...rows);
});

// ------------------------------------------------------------------ one call

function readAddress() {
  // #call-id or #call-id@seconds: a link to a moment of a call.
  const [callId, second] = decodeURIComponent(location.hash.slice(1)).split("@");
  const isSame = callId === state.callId;
  state.callId = callId;
  state.startSecond = second === undefined ? null : Number(second);
  if (!isSame) {
    state.player = null;
    state.detail = null;
    stopListening();
    refreshCall();
    showList(state.calls, !document.getElementById("more").hidden);
  } else if (state.player && state.startSecond !== null) {
    state.player.seek(state.startSecond);
  }
}

const refreshCall = soon(async () => {
  const callId = state.callId;
  if (!callId) return;
  let call;
  try {
    call = await getJson(`/api/calls/${encodeURIComponent(callId)}`);
  } catch {
    document.getElementById("detail").replaceChildren(el("p", { class: "empty" }, "There is no such call."));
    return;
  }
  if (callId !== state.callId) return; // another one was chosen meanwhile
  if (!state.detail) {
    state.detail = detailOf({
      onSeek: (second) => state.player && state.player.seek(second),
      loadEvents,
      actions: state.me ? actionsOf(state.me.rights) : [],
    });
    document.getElementById("detail").replaceChildren(state.detail.root);
    if (NARROW.matches) document.getElementById("detail").scrollIntoView(); // else it opens below the list, unseen
    document.title = `${call.display_name || call.ani || call.call_id} · MinMo calls`;
  }
  state.detail.update(call, outcome(call));
  const mayHear = state.me && state.me.rights.includes("playback");
  const isRecorded = call.recording && call.state === "closed";
  if (!state.player && isRecorded && mayHear) await addPlayer(call);
  if (isRecorded && !mayHear) state.detail.placePlayer(el("p", { class: "soft" }, "Recorded; hearing it needs the right playback."));
});

// ------------------------------------------------- what may be done to a running call

function actionsOf(rights) {
  const actions = [];
  if (rights.includes("listen")) {
    const listen = el("button", { type: "button", "aria-pressed": "false" }, "Listen");
    listen.addEventListener("click", () => (state.ear ? stopListening() : startListening(listen)));
    actions.push(listen);
  }
  if (rights.includes("pause_recording")) {
    const pause = el("button", { type: "button", "aria-pressed": "false" }, "Pause recording");
    pause.addEventListener("click", () => switchRecording(pause));
    actions.push(pause);
  }
  if (rights.includes("hang_up")) {
    const hangUp = el("button", { type: "button", class: "danger" }, "End call");
    hangUp.addEventListener("click", () => endCall(hangUp));
    actions.push(hangUp);
  }
  return actions;
}

async function startListening(button) {
  const ear = new LiveEar((isOver) => {
    button.textContent = isOver ? "Listen" : "Stop listening";
    button.setAttribute("aria-pressed", String(!isOver));
    if (isOver && state.ear === ear) state.ear = null;
  });
  state.ear = ear;
  await ear.start(`/api/calls/${encodeURIComponent(state.callId)}/listen`);
}

function stopListening() {
  if (state.ear) state.ear.stop();
  state.ear = null;
}

async function switchRecording(button) {
  const isPaused = button.getAttribute("aria-pressed") === "true";
  const path = `/api/calls/${encodeURIComponent(state.callId)}/recording/${isPaused ? "go-on" : "pause"}`;
  const response = await fetch(path, { method: "POST" });
  if (!response.ok) {
    button.textContent = (await response.json()).error;
    return;
  }
  button.setAttribute("aria-pressed", String(!isPaused));
  button.textContent = isPaused ? "Pause recording" : "Go on recording";
}

// Asked twice: the first click only arms the button.
async function endCall(button) {
  if (!button.dataset.armed) {
    button.dataset.armed = "yes";
    button.textContent = "End it now?";
    setTimeout(() => {
      delete button.dataset.armed;
      button.textContent = "End call";
    }, 4000);
    return;
  }
  const response = await fetch(`/api/calls/${encodeURIComponent(state.callId)}/hang-up`, { method: "POST" });
  button.textContent = response.ok ? "Ending" : (await response.json()).error;
}

function loadEvents() {
  return getJson(`/api/calls/${encodeURIComponent(state.callId)}/events`);
}

async function addPlayer(call) {
  const path = `/api/calls/${encodeURIComponent(call.call_id)}`;
  const peaks = await getJson(`${path}/peaks?bins=900`);
  if (call.call_id !== state.callId || state.player) return;
  const detail = state.detail;
  state.player = new Player({
    source: `${path}/recording`,
    peaks,
    onTime: (second) => detail.markPlaying(second),
  });
  detail.placePlayer(state.player.root);
  if (state.startSecond !== null) state.player.seek(state.startSecond);
}

// ------------------------------------------------------------------ the stream

function follow() {
  const connection = document.getElementById("connection");
  const stream = new EventSource("/api/live");
  stream.addEventListener("ready", () => {
    connection.textContent = "live";
    connection.classList.add("is-live");
    refreshAll();
  });
  stream.addEventListener("error", () => {
    connection.textContent = "reconnecting";
    connection.classList.remove("is-live");
    if (stream.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
    getJson("/api/summary").catch(() => {}); // the session may have ended: then this leads to the login
  });
  stream.addEventListener("journal", (message) => {
    const entry = JSON.parse(message.data);
    if (entry.call_id === state.callId) refreshCall();
    if (LIST_KINDS.has(entry.kind)) refreshList();
    if (SUMMARY_KINDS.has(entry.kind)) refreshSummary();
  });
}

const LIST_KINDS = new Set(["call_opened", "call_updated", "call_closed", "turn_appended"]);
const SUMMARY_KINDS = new Set(["call_opened", "call_closed", "metric_added"]);

function refreshAll() {
  refreshList();
  refreshSummary();
  refreshCall();
}

async function start() {
  state.me = await getJson("/api/me").catch(() => null);
  if (state.me && state.me.rights.includes("export")) document.getElementById("export").hidden = false;
  if (state.me && state.me.rights.includes("call")) {
    new Softphone({
      root: document.getElementById("call"),
      opener: document.getElementById("call-open"),
      settings: state.me.browser_calls,
      onCall: (callId) => {
        location.hash = callId;
      },
    });
  }
  readAddress();
  refreshAll();
  follow();
}

document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("filters").addEventListener("input", whenTyped(refreshList));
document.getElementById("more").addEventListener("click", showOlder);
window.addEventListener("hashchange", readAddress);
start();
setInterval(() => state.detail && state.detail.tick(clock()), 1000);
