"""Words of one island in the words of another: one message each. Used by agent/call.py and its parts."""

from __future__ import annotations

from agent import floor
from agent.playout_book import Piece
from minmo_runtime import api
from telephony import leg as tel


def play_command(leg_id: str, piece: Piece, may_duck: bool) -> tel.Play:
    return tel.Play(
        leg_id=leg_id, item_id=piece.item_id, pcm=piece.pcm, sample_rate_hz=piece.rate_hz, is_final=piece.is_final,
        may_duck=may_duck,
    )  # fmt: skip


def predicted(event: api.DuplexPrediction) -> floor.Predicted:
    return floor.Predicted(
        at_s=event.sample / api.INPUT_SAMPLE_RATE_HZ,
        idle=event.idle,
        user_continues=event.user_continues,
        user_done=event.user_done,
        user_waits=event.user_waits,
        backchannel=event.backchannel,
        interrupt=event.interrupt,
    )
