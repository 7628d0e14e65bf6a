import torch

from pipelines.storage.fingerprint import digest, fingerprint
from tests.test_hierarchy import tiny


def test_a_fingerprint_changes_with_tensors_and_settings_and_nothing_else() -> None:
    model = tiny([8, 4])
    mark = fingerprint(model.tensors(), model.settings)
    other = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert mark == fingerprint(other.tensors(), dict(reversed(model.settings.items())))
    assert mark != fingerprint(model.tensors(), model.settings | {"width": 9})
    model.bottlenecks[0].vectors[0, 0] += 1e-6
    assert mark != fingerprint(model.tensors(), model.settings)


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
