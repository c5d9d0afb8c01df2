"""What is kept between points, within a number of bytes."""

import torch

from omnimerge.generate.memory import ByteStore, bits, nbytes


def test_what_comes_when_it_is_full_is_not_kept():
    store = ByteStore(100)
    assert store.put("a", {"x": torch.zeros(15)})  # 60 bytes
    assert not store.put("b", torch.zeros(15))
    assert store.put("c", [torch.zeros(10)])
    assert (store.get("b"), store.used) == (None, 100)
    assert store.put("c", torch.zeros(1))  # in place of the other
    assert store.used == 64


def test_nothing_is_kept_without_bytes():
    assert not ByteStore(0).put("a", torch.zeros(1))


def test_what_is_not_read_for_two_points_goes():
    store = ByteStore(1000)
    store.put("read", torch.zeros(1))
    store.put("idle", torch.zeros(1))
    for _ in range(3):
        store.next_point()
        store.get("read")
    assert store.get("read") is not None
    assert store.get("idle") is None
    assert store.used == 4


def test_drop_where():
    store = ByteStore(1000)
    for key in (("a", 1), ("a", 2), ("b", 1)):
        store.put(key, torch.zeros(1))
    store.drop_where(lambda key: key[0] == "a")
    store.drop("never there")
    assert store.used == 4


def test_bytes_of_nested_values():
    value = ({"x": torch.zeros(2, dtype=torch.bfloat16)}, [torch.zeros(3)], "text", None)
    assert nbytes(value) == 4 + 12


def test_bits_tell_what_equality_does_not():
    a, b = torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")])
    assert (bits(a) != bits(b)).tolist() == [True, False]
    assert bits(torch.tensor(1.5, dtype=torch.bfloat16)).dtype == torch.int16
