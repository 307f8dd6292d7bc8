"""Flags of rows and messages: what is in the loss, and how good an answer is."""

import re
from numbers import Number
from typing import Any

from training.data.errors import RowError, short

IN_LOSS = (
    *("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask"),
    *("weights", "loss_weights", "sample_weight", "train_on_turn"),
    *("assistant_mask", "assistant_masks", "completion_mask"),
)
"""Keys of a message, and columns, that say whether its tokens are in the loss: false or 0 excludes them."""
OUT_OF_LOSS = ("mask", "masked", "ignore")
"""Keys that say the opposite."""
_MASK = re.compile(
    "(loss|train(ing)?|labels?|target|turn|message|assistant|response|completion|answer|token)s?_(mask|weight)s?"
)
"""Names of lists that say which parts of a row are in the loss."""
_FLAGS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
"""Labels and their meaning; 1 and 0 equal True and False, and CSV files have texts."""
_RATINGS = ("good", "bad", "chosen", "rejected", "desirable", "undesirable")
"""Texts of a label that say how good an answer is; others may be a topic."""
_IS_GOOD = re.compile(r"(is_)?(good|correct|helpful|accepted|acceptable|approved)")
_IS_BAD = re.compile(r"(is_)?(bad|wrong|incorrect|unhelpful)")
_VERDICT = re.compile(r"((response|answer|user|human)_)?(quality|feedback|rating|verdict|vote|thumbs?)")
"""Names of other verdicts about an answer."""
_BAD = frozenset(
    (
        *("bad", "poor", "low", "wrong", "incorrect", "negative", "rejected", "unhelpful"),
        *("thumbsdown", "down", "downvote", "dislike", "👎", "false"),
    )
)
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?%?")


def is_in_loss(value: dict[str, Any], at: str) -> bool:
    """Return whether the keys of a message put it in the loss; raise RowError for a weight between 0 and 1 or a contradiction."""
    judged = {}
    for key in (*IN_LOSS, *OUT_OF_LOSS):
        flag = value.get(key)
        if flag in (None, "", []):
            continue
        is_on = flag_of(flag)
        if is_on is None:
            raise RowError(
                "wrong weight",
                f"{at} has {key} {short(flag)}. Use 1 or true to include the message in the loss, 0 or false to exclude it"
                if key in IN_LOSS
                else f"{at} has {key} {short(flag)}. Use true to exclude the message from the loss, or false",
            )
        judged[key] = is_on == (key in IN_LOSS)
    if len(set(judged.values())) > 1:
        raise RowError(
            "wrong weight", f"{at}: {' and '.join(judged)} contradict each other. Keep one of them"
        )
    return all(judged.values())


def flag_of(value: Any) -> bool | None:
    """Return the meaning of true, false, 1 or 0, also as text, or None for another value."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return _FLAGS.get(value) if isinstance(value, Number) else None


def is_quality_tag(key: str, value: Any) -> bool:
    """Return whether a column or a key of a message says how good an answer is."""
    if key == "kto_tag":
        return True
    if _says_bad(key, value):
        return True
    if isinstance(value, str):
        text = value.strip().lower()
        value = value if flag_of(text) is None and text not in _RATINGS and not _NUMBER.fullmatch(text) else 0
    return key in ("label", "score") and isinstance(value, Number)


def _says_bad(key: str, value: Any) -> bool:
    """Return whether a verdict about an answer under another name than `label` is a bad one; a plain rating may have any scale."""
    if not isinstance(value, str | int | float):
        return False
    if _IS_GOOD.fullmatch(key):
        return flag_of(value) is False
    if _IS_BAD.fullmatch(key):
        return flag_of(value) is True
    if isinstance(value, str):
        is_bad = re.sub(r"[\s_-]+", "", value.lower()) in _BAD or value.strip() == "-1"
    else:
        is_bad = value is False or (isinstance(value, int | float) and value < 0)
    return is_bad and _VERDICT.fullmatch(key) is not None


def excludes_something(key: str, value: Any) -> bool:
    """Return whether a column says that something is excluded from the loss, or has a weight other than 1."""
    is_list = isinstance(value, list | tuple)
    is_mask = is_list and _MASK.fullmatch(key) is not None
    if not is_mask and key not in (*IN_LOSS, *OUT_OF_LOSS, "masks"):
        return False
    included = is_mask or key in IN_LOSS
    values = value if is_list else [value]
    return any(flag_of(each) is not included for each in values)
