import threading
import time

import pytest
import torch

from lowbit.workers import PIECE, map_ranges, map_rows, whole_tensors


@pytest.fixture
def threads():
    """A setter of torch's number of threads that is undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_order_and_cover_every_row(threads):
    threads(3)
    ranges = map_ranges(lambda start, stop: (start, stop), 1000, 10, piece=70)
    assert ranges == [(start, min(start + 7, 1000)) for start in range(0, 1000, 7)]


def test_the_split_depends_on_the_shape_alone(threads):
    splits = []
    for count in (1, 2, 5):
        threads(count)
        splits.append(map_ranges(lambda start, stop: (start, stop), 5000, 1000, multiple=16))
    assert splits[0] == splits[1] == splits[2]
    assert all(start % 16 == 0 for start, _ in splits[0])
    assert len(splits[0]) == -(-5000 // (PIECE // 1000 // 16 * 16))


@pytest.mark.parametrize(("rows", "columns"), [(0, 10), (1, 10), (3, 0), (3, 4 * PIECE)])
def test_odd_sizes(rows, columns):
    ranges = map_ranges(lambda start, stop: (start, stop), rows, columns)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert len(ranges) >= 1


def test_rows_are_views_of_the_weight(threads):
    threads(2)
    weight = torch.arange(4000.0).reshape(400, 10)
    pieces = map_rows(lambda piece: piece * 2, weight, multiple=3, piece=100)
    assert all(len(piece) % 3 == 0 for piece in pieces[:-1])
    assert torch.equal(torch.cat(pieces), weight * 2)
    map_rows(lambda piece: piece.zero_(), weight, piece=100)
    assert not weight.any()


def test_small_work_stays_in_the_callers_thread():
    assert map_rows(lambda piece: threading.current_thread(), torch.ones(3, 4)) == [threading.current_thread()]
    assert len(map_rows(len, torch.ones(0, 4))) == 1


def test_workers_run_torch_on_one_thread_and_leave_the_caller_alone(threads):
    threads(3)
    found = map_ranges(lambda start, stop: (threading.current_thread().name, torch.get_num_threads()), 64, 1, piece=1)
    assert {count for _, count in found} == {1}
    assert all(name.startswith("lowbit-worker") for name, _ in found)
    assert torch.get_num_threads() == 3
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert seen == [3], "threads started later lost the setting"


def test_work_inside_a_worker_runs_there(threads):
    threads(2)

    def outer(start, stop):
        here = threading.current_thread().name
        inner = map_ranges(lambda a, b: (threading.current_thread().name, a, b), 4, 1, piece=1)
        return [(name == here, a, b) for name, a, b in inner]

    for inner in map_ranges(outer, 4, 1, piece=1):
        assert inner == [(True, row, row + 1) for row in range(4)]


def test_an_error_reaches_the_caller(threads):
    threads(2)

    def work(start, stop):
        if start == 5:
            raise ValueError("row 5")
        return start

    with pytest.raises(ValueError, match="row 5"):
        map_ranges(work, 10, 1, piece=1)
    assert map_ranges(lambda start, stop: start, 3, 1, piece=1) == [0, 1, 2]


def test_a_caller_that_joins_works_on_one_thread_too(threads):
    threads(3)
    both = threading.Barrier(3)  # nobody gets a second piece before everybody has one

    def work(start, stop):
        if start < 3:
            both.wait(timeout=60)
        return threading.current_thread().name, torch.get_num_threads(), start

    found = map_ranges(work, 64, 1, piece=1, join=True)
    assert [start for _, _, start in found] == list(range(64))
    assert {count for _, count, _ in found} == {1}
    assert len({name for name, _, _ in found}) == 3
    assert threading.current_thread().name in {name for name, _, _ in found}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("bad", [0, 5, 9])
def test_an_error_of_joined_work_reaches_the_caller_when_all_have_stopped(bad, threads):
    threads(2)
    running = []

    def work(start, stop):
        running.append(start)
        if start == bad:
            raise ValueError(f"row {bad}")
        time.sleep(0.002)
        running.remove(start)

    with pytest.raises(ValueError, match=f"row {bad}"):
        map_ranges(work, 10, 1, piece=1, join=True)
    assert running == [bad]
    assert torch.get_num_threads() == 2


def test_joined_work_may_have_pieces_of_its_own(threads):
    threads(2)
    inner = map_ranges(lambda a, b: map_ranges(lambda c, d: c, 3, 1, piece=1, join=True), 4, 1, piece=1, join=True)
    assert inner == [[0, 1, 2]] * 4
    assert torch.get_num_threads() == 2
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert seen == [2]


def test_whole_tensors_are_one_range():
    with whole_tensors():
        assert map_ranges(lambda start, stop: (start, stop), 5 * PIECE, 7) == [(0, 5 * PIECE)]
    assert len(map_ranges(lambda start, stop: (start, stop), 5, PIECE)) == 5
