"""Slots for large uploads at an edge."""

from __future__ import annotations

import threading

from espalier_edge.fleet.uploads import Upload, Uploads


def test_uploads_take_turns() -> None:
    uploads = Uploads(slots=1)
    first, second = Upload(1, "a", big=True), Upload(2, "b", big=True)
    assert uploads.admit(first, lambda: True)
    assert uploads.admit(Upload(3, "small", big=False), lambda: True)
    admitted = threading.Event()

    def second_one() -> None:
        if uploads.admit(second, lambda: True):
            admitted.set()

    thread = threading.Thread(target=second_one)
    thread.start()
    assert not admitted.wait(0.2)
    assert uploads.release("a") is first
    assert admitted.wait(5)
    thread.join()


def test_a_cancelled_upload_does_not_wait() -> None:
    uploads = Uploads(slots=1)
    assert uploads.admit(Upload(1, "a", big=True), lambda: True)
    assert not uploads.admit(Upload(2, "b", big=True), lambda: False)
    assert uploads.waiting == 0


def test_uploads_without_progress_are_named() -> None:
    uploads = Uploads(slots=1, stall=0.0)
    upload = Upload(1, "a", big=True, reply_id="r", session_id="s", pending={"x", "y"})
    assert uploads.admit(upload, lambda: True)
    assert uploads.find("s") is upload
    assert uploads.find("") is None
    assert uploads.stalled() == [upload]
    assert not uploads.arrived(upload, "x")
    assert uploads.arrived(upload, "y")
    assert uploads.stalled() == []
