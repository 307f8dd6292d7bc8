"""Checks of messages by their facts: the wording around them may change."""


def assert_names(message: str, *facts: str) -> None:
    """Fail unless a message holds every fact: a place, a key, a value, a figure, or what to write."""
    missing = [fact for fact in facts if fact not in message]
    assert not missing, f"{missing} not in the message: {message}"
