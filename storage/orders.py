"""The demo shop: a seeded table of orders and the opening hours, which the agent's tools read.

Order numbers are five digits, statuses and weekdays are the very words the model was taught to copy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from storage.database import insert_new, writing
from storage.tables import opening_hours, orders

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
STATUSES = ("preparing", "shipped", "delivered", "delayed", "returned", "cancelled", "unpaid")
GONE = frozenset({"shipped", "delivered", "returned", "cancelled"})  # the delivery day cannot be changed any more
_WEIGHTS = (25, 30, 20, 15, 4, 3, 3)  # per cent of the demo's orders
NUM_DEMO_ORDERS = 400
SEED = 20_501  # any constant: the same shop on every machine
_HOURS: dict[int, tuple[str, str] | None] = {
    0: ("09:00", "18:00"), 1: ("09:00", "18:00"), 2: ("09:00", "18:00"), 3: ("09:00", "20:00"), 4: ("09:00", "18:00"),
    5: ("10:00", "16:00"), 6: None,
}  # fmt: skip


@dataclass(frozen=True)
class Order:
    order_number: str
    status: str
    day: str


@dataclass(frozen=True)
class OpeningHours:
    day: str
    is_open: bool
    opens: str  # "09:00", "" when closed
    closes: str


def seed_demo_shop(engine: Engine, *, seed: int = SEED, num_orders: int = NUM_DEMO_ORDERS) -> int:
    """Fills the demo tables; rows that are there stay as they are. Returns how many orders were new."""
    chooser = random.Random(seed)
    numbers = chooser.sample(range(100_000), num_orders)
    num_new = 0
    row: dict[str, Any]
    with writing(engine) as connection, connection.begin():
        for number in numbers:
            status = chooser.choices(STATUSES, _WEIGHTS)[0]
            row = {"order_number": f"{number:05d}", "status": status, "day": chooser.choice(WEEKDAYS)}
            num_new += insert_new(connection, orders, row)
        for weekday, hours in _HOURS.items():
            opens, closes = hours or (None, None)
            row = {"campaign": "", "weekday": weekday, "opens": opens, "closes": closes}
            insert_new(connection, opening_hours, row)
    return num_new


def look_up_order(connection: Connection, order_number: str) -> Order | None:
    row = connection.execute(sa.select(orders).where(orders.c.order_number == order_number)).one_or_none()
    return Order(row.order_number, row.status, row.day) if row else None


def list_orders(connection: Connection, *, limit: int = 1_000) -> list[Order]:
    """By number; the demo draws its order from here."""
    rows = connection.execute(sa.select(orders).order_by(orders.c.order_number).limit(limit))
    return [Order(row.order_number, row.status, row.day) for row in rows]


def look_up_hours(connection: Connection, day: str, campaign: str = "") -> OpeningHours | None:
    """Hours of weekday `day` ("monday" ...); a campaign's own rows win over the common ones. None: not a weekday."""
    name = day.strip().lower()
    if name not in WEEKDAYS:
        return None
    row = connection.execute(
        sa.select(opening_hours)
        .where(opening_hours.c.weekday == WEEKDAYS.index(name), opening_hours.c.campaign.in_(["", campaign]))
        .order_by(sa.desc(opening_hours.c.campaign))
    ).first()
    if row is None or not row.opens:
        return OpeningHours(name, False, "", "")
    return OpeningHours(name, True, row.opens, row.closes)


def delivery_refusal(order: Order | None, day: str) -> str:
    """Why `day` cannot become the delivery day: unknown_order | unknown_day | too_late; "" = it can."""
    if order is None:
        return "unknown_order"
    if day.strip().lower() not in WEEKDAYS:
        return "unknown_day"
    return "too_late" if order.status in GONE else ""
