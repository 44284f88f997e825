"""Agent side of a media worker: the legs of one worker process, over its Unix socket and shared-memory rings.

How to use it (these names are stable):

    client = await WorkerClient.connect(socket_path)         # retries until the worker listens or `timeout_s` is over
    client.hello                                             # Hello(sip_address, sip_port, max_calls, worker_pid)
    async for leg in client.legs():                          # each inbound call once; ends when the worker is gone
        ...                                                  # also calls that outlived an agent: leg.is_resumed is True
    leg = await client.place_call("sip:100@127.0.0.1:5070")  # outbound; TrunkRefused unless the host is configured
    await client.close()

    class WorkerLeg:  implements telephony.leg.Leg           (LoopbackLeg in loopback.py has the same attributes)
        leg_id: str; direction: "inbound" | "outbound"; sample_rate_hz: int; is_resumed: bool
        await leg.send(command)                              # every LegCommand; raises LegError
        async for event in leg.events(): ...                 # every LegEvent in order, ends after LegDisconnected
        leg.set_tap(tap)                                     # tap(start_sample: int, caller_pcm: bytes, agent_pcm: bytes):
                                                             # both directions, same samples, as really received and
                                                             # really sent (silence included): for recorder and monitor
        await leg.send_dtmf("123#")                          # RFC 4733 out (outbound legs of the synthetic caller)

    LoopbackLeg(leg_id, did=..., ani=...): .ring() .speak(pcm) .press(digit) .hang_up() .cancel() .advance(num_samples)
        .drain() -> list[LegEvent]  .heard -> bytes          # virtual time; nothing happens between two `advance` calls

After `Flush`, late `Play` chunks of a flushed item are dropped: use a new item_id. `Flush(item_id="x")` is always answered.
"""
