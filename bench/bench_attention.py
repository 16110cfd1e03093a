"""Block-sparse attention, its pattern and tokens from logits, one provider at a time."""

SUITE = "attention"


def test_attention(time_contender, case, provider):
    time_contender(case, provider)
