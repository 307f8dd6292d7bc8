"""Console output of the `export` and `evaluate` commands."""

from rich.console import Console

from runs.display import print_facts, show_warning
from runs.layout import Export
from training.inference.evaluate import Evaluation
from training.inference.export import describe
from training.inference.model_card import describe_verification
from utils.files import format_bytes
from utils.storage.bucket import join_uri


def show_export(console: Console, exported: Export) -> None:
    """Print the content, location and size of an export."""
    size = format_bytes(sum(file.size for file in exported.files))
    print_facts(
        console,
        [
            ("exported", f"{describe(exported)}, {len(exported.files)} files, {size}"),
            ("checkpoint", exported.checkpoint),
            ("location", exported.uri),
            ("created", exported.created),
            *([("GGUF", join_uri(exported.uri, exported.gguf))] if exported.gguf else []),
            *([("verified", describe_verification(exported.verification))] if exported.verification else []),
            *(("note", note) for note in exported.notes),
        ],
    )


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the score, how it was computed, and the location of the answers."""
    others = evaluation.rows - (evaluation.trained_rows or 0)
    trained = (
        "unknown: the prepared training rows were deleted, cannot be read, or are preference pairs"
        if evaluation.trained_rows is None
        else f"{evaluation.trained_rows:,} of the rows"
    )
    facts = [
        ("exact match", f"{evaluation.exact_match:.1%} ({evaluation.correct:,} of {evaluation.rows:,} rows)"),
        ("compared", "the final number" if evaluation.match == "number" else "the complete text"),
        ("nothing to compare", f"in {evaluation.without_answer:,} answers"),
        ("trained on", trained),
        ("checkpoint", evaluation.checkpoint),
        ("answers", evaluation.answers),
    ]
    if evaluation.trained_rows and evaluation.exact_match_of_others is not None:
        facts.insert(1, ("on unseen rows", f"{evaluation.exact_match_of_others:.1%} of {others:,} rows"))
    print_facts(console, facts)
    if evaluation.trained_rows:
        show_warning(
            console,
            f"{evaluation.trained_rows:,} of these rows were in the training data; their score says nothing about unseen rows.",
        )
