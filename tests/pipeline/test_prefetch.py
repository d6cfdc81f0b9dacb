import threading
import time

import pytest

from lowbit.prefetch import prefetch


def test_items_come_in_order():
    assert list(prefetch(range(100))) == list(range(100))


def test_an_error_of_the_producer_is_raised_in_its_place():
    def broken():
        yield 1
        raise ValueError("disk")

    stream = prefetch(broken())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="disk"):
        next(stream)


def test_closing_stops_the_thread():
    stream = prefetch(iter(int, 1))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "lowbit-prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_reads_no_further_ahead_than_asked():
    produced = []

    def items():
        for item in range(10):
            produced.append(item)
            yield item

    stream = prefetch(items(), ahead=1)
    next(stream)
    time.sleep(0.3)
    assert len(produced) <= 3  # the one taken, the one waiting, the one in the producer's hand
    stream.close()
