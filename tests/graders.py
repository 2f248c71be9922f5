"""Verifiers for tests whose rewards are graded: `evaluation.verifier.name: tests.graders:by_reference`."""


def by_reference(response: str, reference: str) -> float:
    """2.5 where the reference is a multiple of 4, else -0.5."""
    return 2.5 if int(reference) % 4 == 0 else -0.5


def always(response: str, reference: str) -> float:
    """3, whatever was written."""
    return 3.0
