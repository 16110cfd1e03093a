"""Whole denoising networks, one provider at a time."""

SUITE = "networks"


def test_networks(time_contender, case, provider):
    time_contender(case, provider)
