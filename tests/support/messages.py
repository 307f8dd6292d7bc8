"""Assertions on the facts in a message; its wording may change."""


def assert_names(message: str, *facts: str) -> None:
    """Fail unless a message contains every fact: a location, a key, a value, a number or the fix."""
    missing = [fact for fact in facts if fact not in message]
    assert not missing, f"{missing} not in the message: {message}"
