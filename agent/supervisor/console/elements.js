// Building blocks: elements from text, and times as people read them. The only place that makes elements.

// el("a", {href: "#x"}, ["text", otherElement]); a child that is not an element becomes text, never markup.
export function el(name, attributes = {}, children = []) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  for (const child of Array.isArray(children) ? children : [children]) {
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

export function clock() {
  return Date.now() / 1000;
}

// 75.3 -> "1:15"
export function minutes(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

export function shortTime(iso) {
  const at = new Date(iso);
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const isToday = at.toDateString() === new Date().toDateString();
  return isToday ? time : `${at.toLocaleDateString([], { day: "numeric", month: "short" })} ${time}`;
}

export function fullTime(iso) {
  return iso ? new Date(iso).toLocaleString() : "";
}

export function secondsBetween(from, to) {
  return (new Date(to) - new Date(from)) / 1000;
}
