"""The report page of a run is complete, escaped and self-contained."""

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

from configs.loading import to_yaml
from configs.schema import FinetuneConfig
from runs.layout import EvalSample, MetricsLine
from runs.report import RunReport, to_html
from tests.support.stored_runs import eval_losses, make_manifest_with_weights, make_result

ATTACK = "<script>alert(1)</script>"
RUN = "s3://bucket/runs/a-run"


class _Elements(HTMLParser):
    """The element names, headings and requested addresses of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []
        self.headings = re.findall(r"<h2>(.*?)</h2>", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]


def figures(step: int) -> dict[str, float]:
    return {"learning_rate": 1e-3 / step, "tokens_per_second": 100.0 * step, "peak_memory_bytes": 2**30}


def metrics(*losses: float) -> list[MetricsLine]:
    steps = [
        MetricsLine(step=step, epoch=step / 10, loss=2 / step, **figures(step))
        for step in range(1, 10 * len(losses))
    ]
    return steps + [
        MetricsLine(step=loss.step, epoch=loss.epoch, eval_loss=loss.eval_loss)
        for loss in eval_losses(*losses)
    ]


def report(**changes: Any) -> RunReport:
    config = FinetuneConfig(model_id="org/base", train_path="rows.jsonl")
    defaults: dict[str, Any] = {
        "result": make_result(RUN, eval_losses(2.0, 1.25)),
        "metrics": metrics(2.0, 1.25),
        "parent_metrics": [],
        "samples": [],
        "checkpoints": [make_manifest_with_weights(eval_losses(2.0, 1.25)[-1])],
        "data": [("training rows", "1,234 rows of 1 file"), ("", "56,789 tokens")],
        "config": to_yaml(config),
        "environment": {"device": "cpu, 2 workers"},
        "command": ["python", "main.py", "my file.yaml", "seed=1"],
        "base_model": "org/base",
        "trains_adapter": True,
    }
    return RunReport(**defaults | changes)


def test_page_is_self_contained_and_complete():
    page = to_html(report())
    elements = _Elements(page)
    assert not elements.names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert {address for address in elements.addresses if not address.startswith("#")} == {"data_report.html"}
    assert not re.search(r"@import|url\((?!#)", page)
    assert page.count("<svg") == 4
    assert elements.headings == [
        *("Loss", "Learning rate", "Throughput", "Peak memory"),
        *("Evaluations", "Data", "Checkpoints", "Next steps", "Configuration", "Environment"),
    ]
    for part in (
        "completed: all steps done",
        "2.0000 initial, 1.2500 lowest",
        "12,345 tokens",
        "model_id: org/base",
        "cpu, 2 workers",
        "2.13.0",
        "1,234 rows of 1 file",
        "56,789 tokens",
        f"resume_from_checkpoint: {RUN}/checkpoints/step-000010",
        f"aws s3 cp --recursive {RUN}/checkpoints/step-000010 step-000010",
        f"initial_adapter_model_ckpt_path: {RUN}/checkpoints/step-000010",
        f"main.py chat {RUN}",
        f"main.py evaluate {RUN} --data test.jsonl",
        f"main.py export {RUN} --to exported\nvllm serve exported",
    ):
        assert part in unescape(page), part


def test_report_links_a_local_checkpoint():
    page = to_html(report(result=make_result("/my runs/a", eval_losses(2.0, 1.25))))
    assert "file:///my%20runs/a/checkpoints/step-000010" in _Elements(page).addresses
    assert "aws s3" not in page


def test_parent_curves_precede_those_of_the_run():
    without_parent, with_parent = to_html(report()), to_html(report(parent_metrics=metrics(4.0, 3.0)))
    for name in ("parent run, training", "parent run, evaluation"):
        assert name not in without_parent
        assert with_parent.index(name) < with_parent.index(">evaluation</text>")


def test_stopped_run_shows_the_command_that_resumes_it():
    page = unescape(to_html(report(result=make_result(RUN, eval_losses(2.0), status="stopped"))))
    assert "python main.py 'my file.yaml' seed=1" in page
    assert "stopped: SIGTERM" in page


def test_run_that_failed_before_the_first_step_has_a_page():
    page = to_html(report(result=make_result(RUN, [], status="failed"), metrics=[], checkpoints=[]))
    assert "failed: out of memory" in page
    assert "<svg" not in page
    assert "tokens/s, all workers" not in page
    assert "peak memory" not in page
    assert _Elements(page).headings == ["Data", "Checkpoints", "Next steps", "Configuration", "Environment"]


def test_checkpoint_without_evaluation_is_not_called_best():
    checkpoint = f"{RUN}/checkpoints/step-000015"
    result = make_result(RUN, eval_losses(2.0), best_checkpoint=checkpoint, last_checkpoint=checkpoint)
    assert "Chat with the best checkpoint" in to_html(report())
    page = to_html(report(result=result))
    assert "Chat with the latest checkpoint" in page
    assert "the best" not in page


def test_full_parameter_run_is_exported_without_merging():
    assert "Merge the best adapter" in to_html(report())
    page = unescape(to_html(report(trains_adapter=False)))
    assert "Merge" not in page
    assert "vllm serve exported" in page


def test_user_text_is_escaped():
    config = FinetuneConfig(model_id=f"org/{ATTACK}", train_path="rows.jsonl", chat_template=ATTACK)
    result = make_result(
        f"/runs/{ATTACK}",
        [loss.model_copy(update={"figures": {ATTACK: 0.5}}) for loss in eval_losses(2.0, 1.25)],
        status="failed",
        reason=f"row 3: {ATTACK}",
        run_name=ATTACK,
        parent=ATTACK,
        log_files=[ATTACK],
        versions={ATTACK: ATTACK},
    )
    page = to_html(
        report(
            result=result,
            config=to_yaml(config),
            data=[(ATTACK, ATTACK)],
            environment={ATTACK: ATTACK},
            command=["python", "main.py", ATTACK],
            base_model=ATTACK,
            checkpoints=[make_manifest_with_weights(loss) for loss in eval_losses(2.0)],
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert "script" not in _Elements(page).names


def test_only_the_command_that_trains_names_the_cluster():
    trains = ["RAY_ADDRESS=head:6379", "python", "main.py", "a.yaml"]
    stopped = make_result("/runs/a", eval_losses(2.0), status="stopped")
    page = to_html(report(result=stopped, command=trains))
    assert ">RAY_ADDRESS=head:6379 python main.py a.yaml<" in page
    assert ">python main.py chat /runs/a<" in page


def sample(step: int, **changes: Any) -> EvalSample:
    texts = {"prompt": "2 + 2?", "completion": f"answer {step}", "reference": "4"}
    return EvalSample(
        **{"step": step, "row": "valid.jsonl:7", "tokens": 3, "ended": True, **texts, **changes}
    )


def test_samples_of_a_prompt_share_a_table_and_are_escaped():
    samples = [sample(step, row=row) for step in (0, 10) for row in ("valid.jsonl:7", "valid.jsonl:9")]
    samples.append(sample(20, completion=ATTACK, prompt=ATTACK, reference=ATTACK, ended=False))
    page = to_html(report(samples=samples))
    assert "script" not in _Elements(page).names
    assert "Samples" in _Elements(page).headings
    assert page.count('class="samples"') == 3
    first, *_ = re.findall(r'<table class="samples">.*?</table>', page, re.DOTALL)
    for part in ("valid.jsonl:7", "2 + 2?", "step 0", "answer 0", "step 10", "answer 10", "reference"):
        assert part in first
    assert "cut after 3 tokens" in page
