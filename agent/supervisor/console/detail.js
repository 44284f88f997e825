// One call: who, what was said and heard, how fast we were, why the agent spoke as it did.

import { el, fullTime, minutes, secondsBetween } from "./elements.js";

const LATENCIES = {
  voice_to_voice_ms: "voice to voice",
  first_word_ms: "first word",
  duck_ms: "ducked after",
  stop_ms: "stopped after",
  echo_return_loss_db: "echo return loss",
  echo_enhancement_db: "echo removed",
};

function nameOf(metric) {
  return LATENCIES[metric] || metric.replace(/_(ms|db)$/, "").replaceAll("_", " ");
}

// The unit is the end of the name: ("duck_ms", 48.5) -> "49 ms"; a count has none.
function figureOf(metric, value) {
  const unit = metric.endsWith("_ms") ? " ms" : metric.endsWith("_db") ? " dB" : "";
  return `${Math.round(value)}${unit}`;
}

export function detailOf({ onSeek, loadEvents, actions = [] }) {
  const controls = el("div", { class: "actions" }, actions);
  const heading = el("div", { class: "heading" });
  const subtitle = el("p", { class: "soft" });
  const place = el("div");
  const transcript = el("ol", { class: "transcript", "aria-live": "polite", "aria-label": "Transcript" });
  const facts = el("dl", { class: "facts" });
  const problems = el("section", { class: "card", hidden: "" });
  const events = eventsOf(loadEvents);
  const root = el("article", {}, [
    heading,
    subtitle,
    controls,
    place,
    el("section", { class: "card" }, [el("h3", {}, "What was said and heard"), transcript]),
    problems,
    el("section", { class: "card" }, [el("h3", {}, "About this call"), facts]),
    events,
  ]);
  let shown = null;
  let items = [];

  function tick(now) {
    if (shown && shown.state === "open") subtitle.textContent = lineOf(shown, now);
  }

  return {
    root,
    tick,
    placePlayer: (player) => place.replaceChildren(player),
    update(call, badge) {
      const isAtEnd = root.parentElement && nearEnd(root.parentElement);
      const grew = shown && call.turns.length > shown.turns.length;
      shown = call;
      controls.hidden = call.state !== "open" || actions.length === 0;
      heading.replaceChildren(el("h2", {}, call.display_name || call.ani || "number withheld"), badge);
      subtitle.textContent = lineOf(call, Date.now() / 1000);
      const now = turnItems(call, onSeek);
      keepOrReplace(transcript, items, now);
      items = now;
      facts.replaceChildren(...factsOf(call));
      showProblems(problems, call);
      if (grew && isAtEnd && call.state === "open") transcript.lastElementChild.scrollIntoView({ block: "nearest" });
    },
    markPlaying(second) {
      for (const { element, start, end } of items) {
        element.classList.toggle("is-playing", second !== null && start !== null && second >= start && second < end);
      }
    },
  };
}

// Only items that changed are replaced, so a screen reader is told of what is new and not of everything again.
function keepOrReplace(list, before, now) {
  now.forEach((item, index) => {
    const old = before[index];
    if (old && old.key === item.key) item.element = old.element;
    else if (list.children[index]) list.children[index].replaceWith(item.element);
    else list.append(item.element);
  });
  while (list.children.length > now.length) list.lastElementChild.remove();
  if (now.length === 0 && list.children.length === 0) list.append(el("li", { class: "soft" }, "Nothing was said yet."));
}

function nearEnd(box) {
  return box.scrollHeight - box.scrollTop - box.clientHeight < 200;
}

function lineOf(call, now) {
  const end = call.ended_at ? new Date(call.ended_at) / 1000 : now;
  const length = minutes(end - new Date(call.started_at) / 1000);
  const from = call.ani && call.display_name ? `from ${call.ani} ` : "";
  const ended = call.state === "open" ? "so far" : call.ended_by ? `ended by ${call.ended_by}` : call.cause;
  return `${from}to ${call.did || "?"} · ${fullTime(call.started_at)} · ${length} ${ended}`;
}

// -------------------------------------------------------------- the transcript

function turnItems(call, onSeek) {
  const tools = new Map();
  for (const tool of call.tool_calls) {
    tools.set(tool.turn_id, [...(tools.get(tool.turn_id) || []), tool]);
  }
  const items = [];
  for (const turn of call.turns) {
    for (const tool of tools.get(turn.turn_id) || []) items.push(toolItem(tool));
    tools.delete(turn.turn_id);
    items.push(turnItem(turn, call.sample_rate_hz, Boolean(call.recording) && call.state === "closed", onSeek));
  }
  for (const left of tools.values()) items.push(...left.map(toolItem)); // its turn is not there yet
  return items;
}

function turnItem(turn, rate, canSeek, onSeek) {
  const start = turn.start_sample === null ? null : turn.start_sample / rate;
  const end = turn.end_sample === null ? Infinity : turn.end_sample / rate;
  const element = el("li", { class: turn.role }, [
    timeOf(start, canSeek, onSeek),
    el("span", { class: "role" }, turn.role),
    el("div", {}, [el("div", { class: "words" }, wordsOf(turn)), el("div", { class: "marks" }, marksOf(turn, rate))]),
  ]);
  return { key: JSON.stringify([turn, canSeek]), element, start, end };
}

function timeOf(start, canSeek, onSeek) {
  if (start === null) return el("span", { class: "at" });
  if (!canSeek) return el("span", { class: "at" }, minutes(start));
  const button = el("button", { class: "at", type: "button", "aria-label": `Play from ${minutes(start)}` }, minutes(start));
  button.addEventListener("click", () => onSeek(start));
  return button;
}

// What was heard is what counts; what the agent would still have said stands struck through behind it.
function wordsOf(turn) {
  if (turn.role !== "agent") return [turn.heard_text || "(nothing understood)"];
  const generated = turn.generated_text || "";
  const heard = turn.heard_text;
  if (heard === null) return [generated || "…"];
  if (!turn.was_interrupted) return [heard || generated];
  const rest = generated.startsWith(heard) ? generated.slice(heard.length) : "";
  return rest ? [heard, el("span", { class: "unheard", title: "made, but not heard by the caller" }, rest)] : [heard || "(not heard)"];
}

function marksOf(turn, rate) {
  const marks = [];
  if (turn.was_interrupted) {
    const after = turn.cut_offset_samples === null ? "" : ` after ${(turn.cut_offset_samples / rate).toFixed(1)} s`;
    marks.push(el("span", { class: "cut" }, `interrupted${after}`));
  }
  if (turn.source === "keypad") marks.push(el("span", {}, "by keypad"));
  for (const [name, value] of Object.entries(turn.metrics)) {
    marks.push(el("span", {}, `${nameOf(name)} ${figureOf(name, value)}`));
  }
  if (turn.intent) marks.push(el("span", {}, turn.intent.replaceAll("_", " ")));
  if (turn.role === "caller" && turn.confidence !== null) {
    marks.push(el("span", {}, `recognised with ${Math.round(turn.confidence * 100)} %`));
  }
  return marks;
}

function toolItem(tool) {
  const given = Object.entries(tool.arguments).map(([key, value]) => `${key} ${value}`).join(", ");
  const result = tool.result ? ` → ${Object.entries(tool.result).map(([key, value]) => `${key} ${value}`).join(", ")}` : "";
  const words = `${tool.name}(${given})${result}`;
  const element = el("li", { class: "tool" }, [
    el("span", { class: "at" }),
    el("span", { class: "role" }, "tool"),
    el("div", {}, [el("div", { class: "words" }, words), el("div", { class: "marks" }, tool.state)]),
  ]);
  return { key: JSON.stringify(tool), element, start: null, end: null };
}

// --------------------------------------------------------------------- the rest

function fact(name, value, wide = false) {
  if (value === null || value === undefined || value === "") return [];
  return [el("div", wide ? { class: "all" } : {}, [el("dt", {}, name), el("dd", {}, value)])];
}

function factsOf(call) {
  const style = call.style || {};
  const manner = [style.language, style.dialect, style.emotion, style.rate].filter(Boolean).join(", ");
  const reasons = style.reasons && style.reasons.length ? el("ul", {}, style.reasons.map((reason) => el("li", {}, reason))) : "";
  const answered = call.answered_at ? `${secondsBetween(call.started_at, call.answered_at).toFixed(1)} s after the call came in` : "no";
  const notice = call.notice_end_sample === null ? "" : `, notice heard at ${minutes(call.notice_end_sample / call.sample_rate_hz)}`;
  const ofCall = call.metrics.filter((metric) => metric.turn_id === "");
  return [
    ...fact("Call", call.call_id),
    ...fact("Campaign", call.campaign),
    ...fact("Caller's address", call.source_address),
    ...lineFacts(call.line),
    ...fact("Codec", call.codec),
    ...fact("Answered", answered),
    ...fact("Ended", call.ended_at ? [call.disposition, call.cause].filter(Boolean).join(", ") : ""),
    ...fact("Recording", `${call.recording_policy.replaceAll("_", " ")}${notice}`),
    ...fact("Checkpoint", call.checkpoint),
    ...fact("Bridges", call.bridges === null ? "" : call.bridges.length ? call.bridges.join(", ") : "none"),
    ...ofCall.flatMap((metric) => fact(nameOf(metric.name), figureOf(metric.name, metric.value))),
    ...fact("Manner of speaking", manner),
    ...fact("Instruction to the model", style.instruction),
    ...fact("Why", reasons, true),
  ];
}

// By which line it came. What its headers say is the caller's claim, and stands there as that.
function lineFacts(line) {
  if (!line) return [];
  const number = line.is_withheld ? "withheld" : line.is_asserted ? "asserted by the trunk" : "as the caller claims";
  const claims = Object.entries(line.headers).flatMap(([header, value]) => fact(`${header}, as claimed`, value));
  return [...fact("Trunk", line.trunk), ...fact("Number", number), ...claims];
}

// What the person was told has several lines: the record's own words, one below the other.
function handoffItem(handoff) {
  const head = `Hand-off to ${handoff.target}: ${handoff.state}${handoff.reason ? ` (${handoff.reason})` : ""}`;
  return el("li", {}, [head, el("ul", {}, handoff.summary.split("\n").map((line) => el("li", {}, line)))]);
}

function showProblems(box, call) {
  const lines = [
    ...call.callback_requests.map((request) => `Call back ${request.number || "(number withheld)"}: ${request.reason || "asked for a person"}`),
    ...call.defects.map((defect) => `${defect.kind.replaceAll("_", " ")}: ${defect.detail}`),
  ];
  const items = [...call.handoffs.map(handoffItem), ...lines.map((line) => el("li", {}, line))];
  box.hidden = items.length === 0;
  box.replaceChildren(el("h3", {}, "To look after"), el("ul", {}, items));
}

function eventsOf(loadEvents) {
  const body = el("tbody");
  const table = el("table", {}, [
    el("thead", {}, [el("tr", {}, ["no.", "time", "event", "what"].map((name) => el("th", { scope: "col" }, name)))]),
    body,
  ]);
  const box = el("details", { class: "card" }, [el("summary", {}, "Journal"), el("div", { class: "journal" }, table)]);
  box.addEventListener("toggle", async () => {
    if (!box.open) return;
    const { events } = await loadEvents();
    body.replaceChildren(
      ...events.map((event) =>
        el("tr", {}, [
          el("td", { class: "number" }, String(event.seq)),
          el("td", { class: "number" }, new Date(event.at).toLocaleTimeString()),
          el("td", { class: "kind" }, event.kind.replaceAll("_", " ")),
          el("td", {}, JSON.stringify(event.payload)),
        ]),
      ),
    );
  });
  return box;
}
