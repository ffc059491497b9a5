import numpy as np

from allstep.data.keys import epoch_key, key_of, mix64, stream


def test_keys_of_many_seeds_and_epochs_are_all_different() -> None:
    values = [*range(-50, 50), 2**63, 2**64, -(2**64), 2**64 + 1, 10**30, -(10**30)]
    keys = {epoch_key(seed, epoch) for seed in values for epoch in values}
    assert len(keys) == len(values) ** 2
    assert all(0 <= key < 2**64 for key in keys)


def test_order_and_number_of_parts_matter() -> None:
    assert len({key_of(), key_of(0), key_of(0, 0), key_of(1, 2), key_of(2, 1), key_of(2**64, 1)}) == 6


def test_numpy_integers_give_the_key_of_their_value() -> None:
    assert key_of(np.int64(-5), np.uint8(3)) == key_of(-5, 3)


def test_one_changed_bit_of_the_epoch_changes_about_half_of_the_key() -> None:
    flips = [(epoch_key(1, epoch) ^ epoch_key(1, epoch ^ 1)).bit_count() for epoch in range(0, 2000, 2)]
    assert 31 < sum(flips) / len(flips) < 33


def test_the_word_of_a_position_does_not_depend_on_where_reading_began() -> None:
    words = stream(2**64 - 3, 0, 100)
    assert np.array_equal(words[40:50], stream(2**64 - 3, 40, 10))
    assert int(words[7]) == mix64(2**64 - 3 + 8 * 0x9E3779B97F4A7C15)
    assert stream(5, 2**62, 1)[0] == mix64(5 + (2**62 + 1) * 0x9E3779B97F4A7C15)
