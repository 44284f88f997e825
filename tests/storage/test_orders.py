from __future__ import annotations

import datetime as dt

from storage.calls import CallStore
from storage.orders import NUM_DEMO_ORDERS, STATUSES, WEEKDAYS


def test_demo_shop_is_the_same_everywhere_and_seeding_again_adds_nothing(store: CallStore) -> None:
    assert store.seed_demo_shop() == NUM_DEMO_ORDERS
    assert store.seed_demo_shop() == 0
    orders = store.list_orders()
    assert len(orders) == NUM_DEMO_ORDERS
    assert all(len(order.order_number) == 5 and order.order_number.isdigit() for order in orders)
    assert {order.status for order in orders} == set(STATUSES)
    assert {order.day for order in orders} == set(WEEKDAYS)
    assert store.look_up_order(orders[7].order_number) == orders[7]
    assert store.look_up_order("00000x") is None


def test_opening_hours_by_weekday(store: CallStore) -> None:
    store.seed_demo_shop()
    thursday = store.look_up_hours("Thursday")
    assert thursday is not None and thursday.is_open and (thursday.opens, thursday.closes) == ("09:00", "20:00")
    sunday = store.look_up_hours("sunday", campaign="acme")
    assert sunday is not None and not sunday.is_open
    assert store.look_up_hours("someday") is None


def test_delivery_day_changes_only_while_the_order_is_here(store: CallStore, now: dt.datetime) -> None:
    store.seed_demo_shop()
    store.open_call("c1", did="100", ani="", now=now)
    orders = store.list_orders()
    here = next(order for order in orders if order.status == "preparing")
    gone = next(order for order in orders if order.status == "shipped")
    assert store.change_delivery("c1", here.order_number, "Friday", now=now) == "ok"
    changed = store.look_up_order(here.order_number)
    assert changed is not None and changed.day == "friday"
    assert store.change_delivery("c1", gone.order_number, "friday", now=now) == "too_late"
    assert store.change_delivery("c1", "nope", "friday", now=now) == "unknown_order"
    assert store.change_delivery("c1", here.order_number, "someday", now=now) == "unknown_day"
