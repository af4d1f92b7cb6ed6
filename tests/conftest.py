"""What several test files share: the check of a mutant, and what a run of train.py needs."""
import signal
from pathlib import Path

import pytest
import torch

# The tensors of the tests are tiny: a second thread costs more time than it saves.
torch.set_num_threads(1)

# 400 lines, 11,027 bytes. No line is like another, and every computer has the same ones.
TEXT = "".join(f"The square of {i} is {i * i}.\n" for i in range(400))


def assert_mutant_fails(check, monkeypatch, place, name, mutant, match=None):
    """`check` passes with the right code. With the mutant as `place.name` an assertion fails, and
    its text matches the regular expression `match`. Any other error is an error of the test."""
    check()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, mutant)
        with pytest.raises(AssertionError, match=match):
            check()


def write(folder, files):
    """Write files, {name: text or bytes}, into a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode("utf-8")
        path.write_bytes(content)


def files():
    """{path: content} of all files in the current folder, and {path: None} of the folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


class StopAfter:
    """Like an Event that somebody sets during the given step. train() asks once in each step."""

    def __init__(self, steps):
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def signals():
    """The signals that train.py handles. None is ignored, as SIGHUP is under nohup. Their handlers
    are restored after the test."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
    numbers = [number for number in signal.Signals if number.name in names]
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
