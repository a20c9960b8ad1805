from fedpipe_core.seeding import derive_seed, random_generator


def test_derive_seed_is_the_same_on_every_machine():
    assert derive_seed(0, 3, "edge-a") == 6838262319834496660


def test_derive_seed_tells_apart_parts_that_look_alike_when_joined():
    assert (
        len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed("1", 23), derive_seed("123")}) == 5
    )


def test_derive_seed_fits_what_torch_and_numpy_accept():
    assert all(0 <= derive_seed(part) < 2**63 for part in range(100))


def test_random_generator_repeats_for_the_same_parts():
    assert random_generator(1, "a").permutation(50).tolist() == random_generator(1, "a").permutation(50).tolist()
    assert random_generator(1, "a").permutation(50).tolist() != random_generator(1, "b").permutation(50).tolist()
