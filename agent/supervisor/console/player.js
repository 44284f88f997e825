// The recording: two lanes drawn from their peaks (caller above, agent below), with the browser's own player under them.

import { el, minutes } from "./elements.js";

export class Player {
  constructor({ source, peaks, onTime }) {
    this.peaks = peaks;
    this.audio = el("audio", { controls: "", preload: "metadata", src: source });
    this.canvas = el("canvas", { role: "img", "aria-label": `Loudness of caller and agent over ${minutes(peaks.seconds)}` });
    this.root = el("section", { class: "card player", "aria-label": "Recording" }, [
      el("div", { class: "lanes" }, [
        el("span", { class: "caller" }, "caller, left"),
        el("span", { class: "agent" }, "agent, right"),
      ]),
      this.canvas,
      this.audio,
    ]);
    this.audio.addEventListener("timeupdate", () => {
      this.draw();
      onTime(this.audio.paused && this.audio.currentTime === 0 ? null : this.audio.currentTime);
    });
    this.canvas.addEventListener("click", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.seek(((event.clientX - box.left) / box.width) * peaks.seconds);
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  seek(second) {
    this.audio.currentTime = second;
    this.audio.play().catch(() => {}); // a browser may want a click first; the position is set anyway
  }

  draw() {
    const scale = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * scale);
    const height = Math.round(this.canvas.clientHeight * scale);
    if (!width || !height) return;
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    const pen = this.canvas.getContext("2d");
    const colours = getComputedStyle(document.documentElement);
    pen.clearRect(0, 0, width, height);
    const played = this.peaks.seconds ? this.audio.currentTime / this.peaks.seconds : 0;
    for (const [lane, values] of [["caller", this.peaks.caller], ["agent", this.peaks.agent]]) {
      const middle = height * (lane === "caller" ? 0.25 : 0.75);
      const step = width / values.length;
      pen.fillStyle = colours.getPropertyValue(`--${lane}`);
      values.forEach((value, index) => {
        pen.globalAlpha = index / values.length < played ? 1 : 0.55;
        const half = Math.max(scale / 2, Math.sqrt(value) * height * 0.22);
        pen.fillRect(index * step, middle - half, Math.max(step * 0.8, 1), half * 2);
      });
    }
    pen.globalAlpha = 1;
    pen.fillStyle = colours.getPropertyValue("--text");
    if (played > 0) pen.fillRect(played * width, 0, scale, height);
  }
}
