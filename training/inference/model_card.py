"""Model card (README.md) of an export: base model, training, evaluation and usage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.loading import flat
from configs.schema import FinetuneConfig
from runs.layout import Export, Manifest, MetricsLine, RunResult, Verification, VllmVerification
from runs.reading import eval_losses_of
from training.inference.vllm_environment import max_lora_rank
from training.models.files import is_hub_id

_TITLES = {
    "merged": "LoRA adapter merged into {base}",
    "adapter": "LoRA adapter for {base}",
    "model": "fine-tuned from {base}",
}
_SETTINGS = (
    "task",
    "context_length",
    "packing",
    "num_devices",
    "train_batch_size_per_device",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "num_warmup_steps",
    "weight_decay",
    "optim",
    "seed",
    "dtype",
    "load_in_4bit",
    "deepspeed",
    "preference_tuning_config",
    "classifier_config",
)
_VLLM_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Card:
    """The content of a model card."""

    export: Export
    base: str
    """Base model: Hub id, directory or URI."""
    revision: str | None
    """Commit of a base model on the Hub that the adapter was trained on, if it is recorded."""
    config: FinetuneConfig
    manifest: Manifest
    """Manifest of the checkpoint."""
    sampling: Mapping[str, float]
    """Settings of the generation config that change what a vLLM server answers."""
    rope_limit: int | None
    """Longest sequence with RoPE's ordinary frequencies; None if they do not depend on the length."""
    rank: int
    """Largest LoRA rank of an adapter; 0 for a full-parameter model."""
    result: RunResult | None
    metrics: Sequence[MetricsLine]

    def to_markdown(self) -> str:
        """Return the card as Markdown, with the metadata block of the Hugging Face Hub at the top."""
        from huggingface_hub import ModelCardData

        kind = self.export.kind
        metadata = ModelCardData(
            # The Hub rejects a card that names another location.
            base_model=self.base if is_hub_id(self.base) else None,
            library_name="peft" if kind == "adapter" else "transformers",
            pipeline_tag="text-generation",
            tags=["anneal", *(["lora"] if self.config.trains_adapter else [])],
            # The Hub's terms for how a model relates to its base model.
            base_model_relation={"adapter": "adapter"}.get(kind, "finetune")
            if is_hub_id(self.base)
            else None,
        )
        run_name = self.export.checkpoint.split("/")[-3]
        return "\n".join(
            [
                f"---\n{metadata.to_yaml()}\n---\n",
                f"# {run_name}: {_TITLES[kind].format(base=self.base)}\n",
                *(f"{note}\n" for note in self.export.notes),
                "## Training\n",
                _table(("", ""), self._facts()),
                "\n## Evaluation\n",
                self._evaluations(),
                "\n## Settings\n",
                _table(("key", "value"), self._settings()),
                "\n## Usage\n",
                *self._usage(),
                "\n## Versions\n",
                _table(("package", "version"), self.export.versions.items()),
                "",
            ]
        )

    def _facts(self) -> list[tuple[str, Any]]:
        config, manifest = self.config, self.manifest
        facts = [
            ("base model", f"{self.base} (commit {self.revision})" if self.revision else self.base),
            ("checkpoint", self.export.checkpoint),
            ("weights", self.export.dtype or "adapter, in its training dtype"),
            ("trained on", _locations(config.train_sources)),
            ("evaluated on", _locations(config.valid_sources) or "nothing"),
            ("fingerprint of the training rows", manifest.data.train),
            ("trained", f"{manifest.step:,} steps, {manifest.epoch:.2f} epochs"),
        ]
        if self.result and self.result.best_checkpoint == self.result.last_checkpoint:
            facts.append(
                ("tokens", f"{self.result.tokens:,}, including {self.result.trained_tokens:,} loss tokens")
            )
        if manifest.parent:
            facts.append(("started from", manifest.parent))
        facts.append(("exported", self.export.created))
        if self.export.verification:
            facts.append(("verified in fp32", describe_verification(self.export.verification)))
        return facts

    def _evaluations(self) -> str:
        losses = [loss for loss in eval_losses_of(self.metrics) if loss.step <= self.manifest.step]
        if not losses:
            return "The run had no validation rows."
        first, last = losses[0], losses[-1]
        rows = [("before the first step" if first.step == 0 else f"after step {first.step}", first)]
        if last.step != first.step:
            rows.append((f"this checkpoint, after step {last.step}", last))
        figures = list(last.figures)
        return _table(
            ("", "eval loss (nats per loss token)", *figures),
            [
                (
                    when,
                    f"{loss.eval_loss:.4f}",
                    *(f"{loss.figures.get(name, float('nan')):.4f}" for name in figures),
                )
                for when, loss in rows
            ],
        )

    def _settings(self) -> list[tuple[str, Any]]:
        values = self.config.model_dump(mode="json")
        chosen = {key: values[key] for key in (*_SETTINGS, "lora_config") if values[key] is not None}
        return list(flat(chosen).items())

    def _sampling_usage(self, also: str) -> list[str]:
        """Return how to turn off the settings of the generation config, if it has any.

        Args:
            also: What the same flag turns off.
        """
        if not self.sampling:
            return []
        return [
            f"By default, the server samples with {describe_sampling(self.sampling)}, from `generation_config.json`. "
            f"`--generation-config vllm` turns this off{also}.\n"
        ]

    def _usage(self) -> list[str]:
        limit = f" --max-model-len {self.rope_limit}" if self.rope_limit else ""
        if self.export.kind == "adapter":
            most = max_lora_rank(self.rank) or self.rank
            commit = f" --revision {self.revision}" if self.revision else ""
            python_commit = f', revision="{self.revision}"' if self.revision else ""
            return [
                f"    vllm serve {self.base}{commit} --enable-lora --max-lora-rank {most} --lora-modules tuned=DIRECTORY "
                f"--tokenizer DIRECTORY --generation-config DIRECTORY --dtype {_VLLM_DTYPES[self.config.dtype]}{limit}\n",
                "`--tokenizer` gives the chat template and added tokens of this adapter, and `--generation-config` its end tokens: "
                "without them, vLLM takes those of the base model.\n",
                *self._sampling_usage(", but also the end tokens of this adapter"),
                "or, in Python:\n",
                f"    base = AutoModelForCausalLM.from_pretrained(BASE{python_commit})",
                "    model = PeftModel.from_pretrained(base, DIRECTORY)",
            ]
        return [
            f"    vllm serve DIRECTORY{limit}\n",
            *self._sampling_usage(""),
            "or, in Python:\n",
            "    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)",
            "    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
        ]


def describe_sampling(sampling: Mapping[str, float]) -> str:
    """Return the settings of a generation config as one text."""
    return ", ".join(f"{name}: {value}" for name, value in sampling.items())


def describe_verification(verified: Verification) -> str:
    """Return how far an export is from the model as trained."""
    losses = (
        f"loss {verified.loss:.4f}, as trained {verified.loss_as_trained:.4f}; "
        if verified.loss is not None and verified.loss_as_trained is not None
        else ""
    )
    return (
        f"log-probabilities differ by {verified.mean_difference:.2g} nats on average and at most {verified.largest_difference:.2g} "
        f"(rounding of the dtype: {verified.mean_rounding:.2g} and {verified.largest_rounding:.2g}); {losses}"
        f"{verified.tokens:,} tokens of {verified.rows} {verified.source}{_describe_vllm(verified.vllm)}"
    )


def _describe_vllm(verified: VllmVerification | None) -> str:
    if verified is None:
        return ""
    if verified.error is not None:
        return f"; vLLM did not score it ({verified.error})"
    return (
        f"; in vLLM {verified.version}: {verified.mean_difference:.2g} on average and at most "
        f"{verified.largest_difference:.2g}"
    )


def _locations(sources: Sequence[Any]) -> str:
    return ", ".join(source.path for source in sources)


def _table(headings: Sequence[str], rows: Any) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
