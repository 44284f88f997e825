// Hearing a running call: pieces of int16 sound from the server, caller left and agent right, played as they come.

const LEAD_S = 0.15; // kept in hand against late pieces
const MOST_S = 1.0; // more than this behind: catch up

export class LiveEar {
  constructor(onChange) {
    this.onChange = onChange; // onChange(isOver)
    this.stopping = new AbortController();
  }

  async start(path) {
    this.onChange(false);
    try {
      const response = await fetch(path, { signal: this.stopping.signal });
      if (response.ok) await this.play(response.body.getReader(), Number(response.headers.get("x-sample-rate")));
    } catch (error) {
      if (error.name !== "AbortError") console.error(error);
    }
    if (this.context) this.context.close();
    this.onChange(true);
  }

  stop() {
    this.stopping.abort();
  }

  async play(reader, rate) {
    this.context = new AudioContext();
    let rest = new Uint8Array(0);
    let at = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const bytes = new Uint8Array(rest.length + value.length);
      bytes.set(rest);
      bytes.set(value, rest.length);
      const whole = bytes.length - (bytes.length % 4);
      rest = bytes.slice(whole);
      if (!whole) continue;
      const now = this.context.currentTime;
      if (at < now || at > now + MOST_S) at = now + LEAD_S;
      at += this.queue(new Int16Array(bytes.buffer, 0, whole / 2), rate, at);
    }
  }

  queue(samples, rate, at) {
    const buffer = this.context.createBuffer(2, samples.length / 2, rate);
    for (const channel of [0, 1]) {
      const lane = buffer.getChannelData(channel);
      for (let index = 0; index < lane.length; index += 1) lane[index] = samples[2 * index + channel] / 32768;
    }
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.start(at);
    return buffer.duration;
  }
}
