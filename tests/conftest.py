"""Settings for all tests, and what the tests of train.py need."""
import signal
from pathlib import Path

import pytest
import torch

# The tensors of the tests are tiny: a second thread costs more time than it saves.
torch.set_num_threads(1)

class StopAfter:
    """Like an Event that somebody sets during the given step. train() asks once in each step."""

    def __init__(self, steps):
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0

@pytest.fixture
def signals():
    """The signals that main() handles. Their handlers are restored after the test."""
    numbers = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = [signal.getsignal(number) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)

def write(folder, files):
    """Write files, {name: text or bytes}, into a folder; return the folder's name."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(folder)

def snapshot(folder):
    """Everything below a folder: {path: content of the file, or None for a folder}."""
    return {str(path): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}

def assert_same(a, b):
    """a and b are equal bit for bit, at every level. Only the measured speed may differ."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a.keys() - {"tokens_per_second"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def norm_of(tensors):
    return torch.cat([t.flatten() for t in tensors]).double().norm().item()

def distance(a, b):
    """Norm of a - b relative to that of b."""
    return norm_of([a.double() - b.double()]) / norm_of([b])

def listen(patch, place, name, note):
    """From now on every call of place.name is followed by note(result, *arguments)."""
    right = getattr(place, name)

    def both(*arguments, **keywords):
        result = right(*arguments, **keywords)
        note(result, *arguments)
        return result
    patch.setattr(place, name, both)

def assert_mutant_fails(check, monkeypatch, place, name, mutant):
    """`check` passes with the right code, and fails with `place.name` replaced by the mutant."""
    check()
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(place, name, mutant)
        check()
