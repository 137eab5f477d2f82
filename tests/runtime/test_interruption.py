import os
import signal
import threading

import pytest

from qlora_trainer.errors import Interrupted
from qlora_trainer.runtime.interruption import StoppedAtOnce, stop_requests, terminable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_ends_at_once(number):
    with stop_requests() as stop:
        assert not stop
        send(number)
        assert stop
        assert stop.signal_name == number.name
        with pytest.raises(KeyboardInterrupt):
            send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_changes_nothing_is_left_at_once_and_the_request_stays(number):
    with stop_requests() as stop:
        with pytest.raises(StoppedAtOnce), stop.at_once():
            send(number)
        assert stop
        with stop.at_once(), pytest.raises(KeyboardInterrupt):
            send(number)


def test_after_such_work_a_signal_waits_again():
    with stop_requests() as stop:
        with stop.at_once():
            pass
        send(signal.SIGINT)
        assert stop


@pytest.mark.parametrize("number", SIGNALS)
def test_former_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(ZeroDivisionError), stop_requests():
        _ = 1 / 0
    assert signal.getsignal(number) is before


def test_sigterm_is_an_error_that_says_how_to_go_on_and_a_second_one_is_not_caught():
    with terminable():
        with pytest.raises(Interrupted, match="run the same command again"):
            send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_caller_is_left_alone():
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with terminable():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [signal.SIGTERM]


def test_a_thread_that_may_not_have_handlers_works_without():
    found = []

    def work():
        with terminable(), stop_requests() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
