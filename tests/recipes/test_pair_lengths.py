from tulu_lightning.recipes.pair_lengths import pair_lengths


def test_means_and_shares_of_the_longer_side():
    # chosen 3, 5, 4, 2: 14 / 4; rejected 4, 5, 9, 1: 19 / 4; chosen is longer once, rejected twice, once neither.
    assert pair_lengths([(3, 4), (5, 5), (4, 9), (2, 1)]) == (4, 3.5, 4.75, 0.25, 0.5)


def test_no_pairs_have_no_lengths():
    assert pair_lengths([]) is None
