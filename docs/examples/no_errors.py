"""sample_filter: which samples are trained on; the others stay in their group's statistics.

In a recipe:

    sample_filters: {no_errors: "no_errors:no_errors"}
"""


def no_errors(sample):
    """None keeps a sample, a text takes it out and says why."""
    return "the calculator could not read it" if "error" in sample.metadata["response"] else None
