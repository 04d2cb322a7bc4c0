"""Judges of tests, as `module:function`."""


def e_count(comparison):
    """More letters "e" win; equally many are a tie, and longer texts by more than 12 get no verdict."""
    a, b = (side[0]["content"] for side in (comparison.completion_a, comparison.completion_b))
    if max(len(a), len(b)) > 60:
        return None
    return max(-1.0, min(1.0, (b.count("e") - a.count("e")) / 4))


def silent(comparison):
    return None


def equal(comparison):
    return 0.0
