"""The lab: calls under conditions that can be repeated.

virtual_call: the call's core, a loopback leg and the engine on one virtual clock, for the evaluation. Everything else
is the wire lab (`minmo lab`): a real SIP caller, a relay that spoils the line, an agent, and timings from the RTP.
"""
