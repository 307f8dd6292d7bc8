import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.loading import ConfigError, default_keys, load_config, to_marked_yaml, to_yaml
from configs.schema import FinetuneConfig
from configs.yaml_source import MAX_BYTES
from tests.support.messages import assert_names

BASE = "model_id: org/model\ntrain_path: train.jsonl\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def error_message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "pydantic" not in message
    assert "Traceback" not in message
    return message


def test_valid_file_loads_with_its_given_keys(write):
    path = write(BASE + "learning_rate: 5e-6\nlora_config:\n  r: 4\n")
    loaded = load_config(path)
    assert loaded.path == path
    assert loaded.config.learning_rate == 5e-6
    assert loaded.given_keys == {"model_id", "train_path", "learning_rate", "lora_config", "lora_config.r"}
    assert (loaded.warnings, loaded.rejections) == ((), ())


def test_marked_yaml_marks_every_default(write):
    loaded = load_config(write(BASE + "lora_config:\n  r: 4\nchat_template: |\n  seed: 1\n  text\n"))
    marked = to_marked_yaml(loaded)
    assert load_config(write(marked)).config == loaded.config
    assert {"seed", "lora_config.lora_alpha", "weight_decay"} <= set(default_keys(loaded))
    assert not set(default_keys(loaded)) & {"model_id", "lora_config.r", "chat_template"}
    assert "\n  lora_alpha: 16  # default\n" in marked
    assert "\n  r: 4\n" in marked
    assert marked.count("  # default\n") == len(default_keys(loaded))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5e-6", 5e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("5.e-1", 0.5),
        ("1_000.5", 1000.5),
        ("2", 2.0),
    ],
)
def test_number_notations_load_as_numbers(write, text: str, number: float):
    assert load_config(write(f"{BASE}weight_decay: {text}\n")).config.weight_decay == number


@pytest.mark.parametrize(
    "text", ["yes", "on", "no", "12:30", "2024-01-01", "0x10", "007", "1.2.3", "'5'", "=", "0o7"]
)
def test_ambiguous_scalars_load_as_text(write, text: str):
    assert load_config(write(f"{BASE}output_dir: {text}\n")).config.output_dir == text.strip("'")


def test_resources_load_with_underscored_integers_and_shape_names(write):
    text = "worker_resources:\n  memory: 53_687_091_200\n  anyscale/accelerator_shape:4xA10G: 0.001\n"
    resources = load_config(write(BASE + text)).config.worker_resources
    assert resources == {"memory": 53687091200, "anyscale/accelerator_shape:4xA10G": 0.001}


def test_yes_for_a_bool_raises_an_error_that_suggests_true_or_false(write):
    path = write(BASE + "packing: yes\n")
    message = error_message(path)
    assert message.startswith(f"{path}:3: ")
    assert_names(message, "`packing`", "'yes'", "true", "false")


def test_all_errors_are_reported_with_their_lines(write):
    path = write(
        "model_id: 3\n"
        "trian_path: a\n"
        "num_devices: '4'\n"
        "optim: adam_torch\n"
        "lora_config:\n"
        "  r: abc\n"
        "  rank: 3\n"
        "lora_alpha: 16\n"
        "seed: 1\n"
        "seed: 2\n"
        "num_warmup_steps: 1e2\n"
    )
    override = "override 'lora_config.lora_alpha=-1'"
    lines = error_message(path, "lora_config.lora_alpha=-1").splitlines()
    locations = [line.split(": ")[0].removeprefix(f"{path}:") for line in lines]
    assert locations == ["1", "2", "3", "4", "6", "7", "8", "10", "11", override]
    message_at = dict(zip(locations, lines, strict=True))
    for location, facts in {
        "1": ("`model_id`", "text"),
        "2": ("`trian_path`", "`train_path`"),
        "3": ("`num_devices`", "'4'"),
        "4": ("'adam_torch'", "`adamw_torch`"),
        "6": ("`lora_config.r`", "'abc'"),
        "7": ("`lora_config.rank`",),
        "8": ("`lora_alpha`", "`lora_config.lora_alpha`"),
        "10": ("`seed`", "twice"),
        "11": ("`num_warmup_steps`", "100"),
        override: ("`lora_config.lora_alpha`", "above 0"),
    }.items():
        assert_names(message_at[location], *facts)


def test_a_conflict_is_reported_at_the_line_of_its_key(write):
    path = write(BASE + "num_epochs: 1\ndtype: fp32\nmax_steps: 3\nflash_attention_2: true\n")
    first, second = error_message(path).splitlines()
    assert first.startswith(f"{path}:5: ")
    assert_names(first, "`num_epochs`", "`max_steps`")
    assert second.startswith(f"{path}:6: `flash_attention_2`")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", (":1: ", "empty")),
        ("# nothing\n", (":1: ", "empty")),
        ("- a\n- b\n", (":1: ", "mapping")),
        ("just text\n", (":1: ", "mapping")),
        (BASE + "---\n" + BASE, (":3: ", "second", "`---`")),
        ("model_id: &m a\ntrain_path: *n\n", (":2: `train_path`", "alias", "`&n`")),
        ("model_id: &m a\ntrain_path: [*m, *n]\n", (":2: `train_path.1`", "alias", "`&n`")),
        ("model_id: &m [*m]\ntrain_path: b\n", (":1: `model_id.0`", "alias", "`&m`")),
        (BASE + "lora_config:\n  <<: 3\n", (":4: `<<`", "`<<: *NAME`")),
        (BASE + "lora_config: &l {rank: 3}\nlogger: *l\n", (":3: `lora_config.rank`",)),
        (BASE + "seed: !!int 3\n", (":3: `seed`", "tag")),
        (BASE + "x: !!python/object/apply:os.system [ls]\n", (":3: `x`", "tag")),
        (BASE + "? [a]\n: 3\n", (":3: ", "key", "list")),
        (BASE + "'': 3\n", (":3: ", "key", "empty")),
        (BASE + ": 3\n", (":3: ", "YAML", "found ':'")),
        (BASE + "\tseed: 3\n", (":3: ", "YAML", r"'\t'")),
        (BASE + "seed: a: b\n", (":3: ", "YAML", "`: `")),
        (BASE + "output_dir: [a\n", (":4: ", "YAML", "']'")),
        (BASE + "output_dir: 'a\n", (":4: ", "YAML", "quote")),
        ("model_id: a\ntrain_path:\n", (":2: `train_path`", "null")),
        (BASE + "device: gpu\n", (":3: `device`", "'gpu'", "`cuda`")),
        (BASE + "deepspeed: ds.json\n", (":3: `deepspeed`", "{config_path: ds.json}")),
        (BASE + 'output_dir: "\\UFFFFFFFF"\n', (":3: ", "out of range")),
        (BASE + 'output_dir: "\\uD800"\n', (":3: `output_dir`", "surrogate")),
        (b"model_id: a\ntrain_path: \xff\n", (":2: ", "UTF-8")),
        ("model_id: a\n".encode("utf-16"), (":1: ", "UTF-8")),
        (b"model_id: a\ntrain_path: b\0c\n", (":2: ", "control character")),
        ("x: " + "[" * 100_000, (":1: ", "20 levels")),
        ("x: " + "{a: " * 1_000, (":1: ", "20 levels")),
        ("\n".join(" " * depth + "a:" for depth in range(200)), (":22: ", "20 levels")),
        (b"a: b\n" * (MAX_BYTES // 5 + 1), (f"{MAX_BYTES:,} bytes",)),
        (BASE + "seed:\n", (":3: `seed`", "null")),
        (BASE + f"train_batch_size: {10**14}\n", (":3: `train_batch_size`", "at most 100,000,000")),
        (BASE + f"num_devices: {10**14}\n", (":3: `num_devices`", "at most 100,000")),
        (BASE + "num_devices: 200000\n", (":3: `num_devices`", "at most 100,000")),
        (BASE + "num_devices: 0\n", (":3: `num_devices`", "above 0")),
        (BASE + f"num_devices: {{min: 1, max: {10**14}}}\n", (":3: `num_devices.max`", "at most 100,000")),
        (BASE + f"sequence_parallel_size: {10**14}\n", (":3: `sequence_parallel_size`", "at most 100,000")),
        (BASE + "num_devices: [1, 2]\n", (":3: `num_devices`", "[1, 2]")),
        (BASE + "seed: " + "9" * 5000 + "\n", (":3: `seed`", "'9999")),
        (BASE + "learning_rate: 1e999\n", (":3: `learning_rate`", "finite")),
        (BASE + "worker_resources:\n  memory: lots\n", (":4: ", "worker_resources", "`memory`", "50GiB")),
        (BASE + "columns: {answer: a}\n", (":3: `columns.answer`", "messages", "conversations")),
        (BASE + "logger: {provider: neptune}\n", (":3: `logger`", "neptune", "`provider: wandb`")),
        (BASE + "logger: {}\n", (":3: `logger`", "{}", "`provider: wandb`")),
        (BASE + "lora_config: {learning_rate: 1}\n", (":3: `lora_config.learning_rate`", "top level")),
        (BASE + "deepspeed: {config_pth: a}\n", ("`deepspeed.config_pth`", "`deepspeed.config_path`?")),
        (BASE + "run_name: 'a b'\n", (":3: `run_name`", "'a b'")),
        (BASE + "storage_path: hdfs://b/x\n", (":3: `storage_path`", "hdfs://b/x", "s3://")),
    ],
)
def test_bad_files_raise_an_error_with_the_line(write, text: str | bytes, facts: tuple[str, ...]):
    assert_names(error_message(write(text)), *facts)


def test_errors_are_limited_to_50_lines(write):
    path = write("".join(f"key{number}: 1\n" for number in range(1000)))
    assert len(error_message(path).splitlines()) == 50


def test_byte_order_mark_is_ignored(write):
    assert load_config(write(b"\xef\xbb\xbf" + BASE.encode())).config.model_id == "org/model"


def test_missing_file_or_directory_raises_an_error_with_its_path(tmp_path: Path):
    assert_names(error_message(tmp_path / "absent.yaml"), f"{tmp_path}/absent.yaml", "no such file")
    assert_names(error_message(tmp_path), str(tmp_path), "directory")


TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("text", "key", "secret"),
    [
        (f"hf_token: {TOKEN}\n", "hf_token", TOKEN),
        ("aws_secret_access_key: abc/def+ghi\n", "aws_secret_access_key", "abc/def+ghi"),
        ("password: [hunter2]\n", "password", "hunter2"),
        ("env:\n  WANDB_API_KEY: 0123456789\n", "env", "0123456789"),
        (f"model_id: {TOKEN}\ntrain_path: 3\n", "model_id", TOKEN),
        ("valid_path: s3://KEYID:hush@bucket/x\n", "valid_path", "hush"),
        ("valid_path: {math: 's3://KEYID:hush@bucket/x'}\n", "valid_path.math", "hush"),
        ("valid_path: s3://bucket/x?X-Amz-Signature=hush\n", "valid_path", "hush"),
        ("logger: {provider: wandb, api_key: hush}\n", "logger.api_key", "hush"),
        (f"optim: {TOKEN}\n", "optim", TOKEN),
        (f"num_devices: [{TOKEN}]\n", "num_devices.0", TOKEN),
    ],
)
def test_secrets_raise_an_error_that_does_not_show_them(write, text: str, key: str, secret: str):
    message = error_message(write((BASE if "model_id" not in text else "") + text))
    assert_names(message, f"`{key}`")
    if key != "env":  # an unknown section is reported as such, whatever its keys
        assert_names(message, "environment", "HF_TOKEN", "AWS_")
    assert secret not in message


@pytest.mark.parametrize(
    "override", [f"hf_token={TOKEN}", "password=hunter2", f"optim={TOKEN}", f"seed=[{TOKEN}"]
)
def test_errors_do_not_show_secrets_in_overrides(write, override: str):
    key, _, value = override.partition("=")
    message = error_message(write(BASE), override)
    assert_names(message, key)
    assert value.strip("[]") not in message


def test_overridden_run_length_replaces_the_length_in_the_file(write):
    path = write(BASE + "num_epochs: 3\n")
    loaded = load_config(path, ["max_steps=20"])
    assert (loaded.config.num_epochs, loaded.config.max_steps) == (None, 20)
    assert "num_epochs" in default_keys(loaded)
    assert load_config(path, ["max_steps=null"]).config.num_epochs == 3
    assert_names(error_message(path, "max_steps=20", "num_epochs=1"), "`num_epochs`", "`max_steps`")


@pytest.mark.parametrize("override", ["num_epochs=", "storage_path= ", "lora_config.r="])
def test_empty_override_raises_an_error_that_suggests_null(write, override: str):
    """A shell variable that is not set would otherwise select the default or another training method."""
    key = override.partition("=")[0]
    assert_names(error_message(write(BASE), override), f"override '{override}'", "variable", f"{key}=null")


def test_overrides_set_nested_keys(write):
    path = write(BASE + "num_epochs: 3\ndeepspeed: zero_2\nseed: 1\n")
    loaded = load_config(
        path,
        [
            "num_epochs=null",
            "max_steps=2",
            "lora_config.r=16",
            "lora_config.target_modules=[q_proj, v_proj]",
            "deepspeed=null",
            "worker_resources.accelerator_type:A10G=0.001",
            "train_path=hf://datasets/openai/gsm8k/main?split=train[50%:]",
            "seed=3",
        ],
    )
    config = loaded.config
    assert (config.num_epochs, config.max_steps, config.deepspeed, config.seed) == (None, 2, None, 3)
    assert config.lora_config is not None
    assert (config.lora_config.r, config.lora_config.target_modules) == (16, ["q_proj", "v_proj"])
    assert config.worker_resources == {"accelerator_type:A10G": 0.001}
    assert config.train_path == "hf://datasets/openai/gsm8k/main?split=train[50%:]"
    assert "lora_config.r" in loaded.given_keys


def test_null_restores_the_default_of_a_key_that_cannot_be_null(write):
    path = write(BASE + "gradient_accumulation_steps: 4\nlora_config: {r: 4}\n")
    config = load_config(path, ["gradient_accumulation_steps=null", "lora_config.r=null", "seed=null"]).config
    assert (config.gradient_accumulation_steps, config.seed) == (1, 42)
    assert config.lora_config is not None
    assert config.lora_config.r == 8
    misspelt = error_message(path, "gradient_acumulation_steps=null")
    assert_names(misspelt, "`gradient_acumulation_steps`", "`gradient_accumulation_steps`")


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("lora_config.r=abc", ("`lora_config.r`", "'abc'")),
        ("seed", ("key=value", "section.key=value")),
        ("=3", ("key=value", "section.key=value")),
        ("a..b=3", ("key=value", "section.key=value")),
        (".".join(["a"] * 5000) + "=3", ("key=value", "section.key=value")),
        ("deepspeed.config_path=x", ("`deepspeed`", "'zero_2'")),
        ("lora_config.target_modules.0=x", ("`lora_config.target_modules`", '["q"]')),
        ("nun_devices=3", ("`nun_devices`", "`num_devices`?")),
        ("seed=[", ("YAML",)),
        ("output_dir=*x", ("alias",)),
        ("optim=adamw_torc", ("`optim`", "'adamw_torc'", "`adamw_torch`?")),
    ],
)
def test_bad_overrides_raise_an_error_that_quotes_them(write, override: str, facts: tuple[str, ...]):
    path = write(BASE + "deepspeed: zero_2\nlora_config: {target_modules: [q]}\n")
    quoted = override if len(override) < 100 else override[:50]
    assert_names(error_message(path, override), f"override '{quoted}", *facts)


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        BASE + "run_name: '1e5'\noutput_dir: 'yes'\nlearning_rate: 1e-5\nworker_resources: {CPU: 1, x: .5}\n",
        BASE
        + "lora_config: {target_modules: 'null', rank_pattern: {'1': 2}}\ndeepspeed: {config_path: 'true'}\n",
        BASE + "task: classification\nclassifier_config: {label_tokens: ['1', '~', ' x ', \"a\\nb\", é]}\n",
        BASE + "logger: {provider: mlflow, tags: {a: '12:30', b: '.5'}}\n",
    ],
)
def test_resolved_yaml_loads_to_the_same_config(write, text: str):
    config = load_config(write(text)).config
    resolved = to_yaml(config)
    reloaded = load_config(write(resolved))
    assert reloaded.config == config
    top_level = [line.split(":")[0] for line in resolved.splitlines() if not line.startswith((" ", "-"))]
    assert top_level == list(FinetuneConfig.model_fields)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=30))
def test_any_text_round_trips_through_the_resolved_yaml(tmp_path: Path, text: str):
    path = tmp_path / "run.yaml"
    config = FinetuneConfig(model_id="a", train_path="b", columns={"prompt": text})
    path.write_text(to_yaml(config), encoding="utf-8", errors="surrogatepass", newline="")
    try:
        assert load_config(path).config.columns == {"prompt": text}
    except ConfigError as error:
        assert "secret" in str(error)


WORDS = """
model_id train_path lora_config r deepspeed config_path logger provider wandb worker_resources memory 50GiB
columns prompt generation_config prompt_format liger_kernel kwargs no_gradient_checkpoint task
classifier_config provider_config dataset_size_scaling_factor : - [ ] { } , ? | > & * ! % @ ` ' " # ~ << --- ... !!int true
null 1 1e5 .inf 0x1 \\ é \U0001f600
"""
SPACES = ["\n", "\n  ", ": ", "\n- ", "\t", " ", "\n\n", '"\\u', "\x85", "\ufeff"]
PIECES = st.sampled_from([*WORDS.split(), *SPACES])


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300), st.lists(PIECES, max_size=60).map(lambda parts: "".join(parts).encode())
    ),
    st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=3),
)
def test_any_input_loads_or_raises_a_config_error(tmp_path: Path, content: bytes, overrides: list[str]):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    try:
        load_config(path, overrides)
    except ConfigError as error:
        str(error).encode()
        assert "pydantic" not in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)
LEGACY = ["no_gradient_checkpoint", "liger_kernel", "generation_config", "checkpoint_every_n_epochs"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*FinetuneConfig.model_fields, *LEGACY]), VALUES, max_size=5))
def test_any_value_for_any_key_loads_or_raises_a_config_error(tmp_path: Path, data: dict[str, object]):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model_id": "a", "train_path": "b", **data}), encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:")


def test_loader_imports_quickly_and_without_frameworks():
    """Take the lowest CPU time of three imports, which does not depend on machine load."""
    code = (
        "import sys, time; start = time.process_time(); import configs.loading; "
        "print(time.process_time() - start, "
        "[name for name in ('torch', 'ray', 'transformers', 'boto3', 'numpy') if name in sys.modules])"
    )
    cpu_seconds = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds, loaded = out.split(" ", 1)
        assert loaded.strip() == "[]"
        cpu_seconds.append(float(seconds))
    assert min(cpu_seconds) < 0.5


def test_unknown_key_in_a_list_item_has_the_nearest_key(write):
    path = write(BASE.replace("train_path: train.jsonl", "train_path: [{path: a.jsonl, wieght: 2}]"))
    assert_names(error_message(path), "`train_path.0.wieght`", "`train_path.0.weight`")


@pytest.mark.parametrize("before", ["learning_rate=0.1", "run_name=a"])
def test_unknown_override_without_a_value_names_the_key_that_is_meant(write, before: str):
    message = error_message(write(BASE), before, "num_epcohs=null")
    assert_names(message, "num_epcohs=null", "did you mean `num_epochs`")


def test_override_with_a_comma_in_braces_names_the_list(write):
    message = error_message(write(BASE), "lora_config={target_modules: q_proj,v_proj}")
    assert_names(message, "`target_modules: [q_proj, v_proj]`")


def test_key_that_the_command_line_sets_twice_raises_an_error(write):
    assert_names(error_message(write(BASE), "seed=1", "seed=2"), "command line", "`seed`", "twice")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("output_dir: ${WHERE}/x\n", "output_dir", "/disk/x"),
        ("output_dir: '${WHERE}'\n", "output_dir", "/disk"),
        ("output_dir: ${ABSENT:-/tmp}/x\n", "output_dir", "/tmp/x"),
        ("output_dir: ${EMPTY:-/tmp}\n", "output_dir", "/tmp"),
        ("output_dir: x${EMPTY:-}y\n", "output_dir", "xy"),
        ("output_dir: $${WHERE}/$x/${}\n", "output_dir", "${WHERE}/$x/${}"),
        ("max_steps: ${STEPS}\n", "max_steps", 20),
        ("learning_rate: ${ABSENT:-1e-5}\n", "learning_rate", 1e-5),
        ("train_path: [a, 's3://${WHERE}/b']\n", "train_path", ["a", "s3:///disk/b"]),
        ('prompt_template: "${question}: {answer}"\n', "prompt_template", "${question}: {answer}"),
        ("chat_template: '${WHERE} {{ messages }}'\n", "chat_template", "${WHERE} {{ messages }}"),
    ],
)
def test_environment_variables_in_values_are_replaced(
    write, monkeypatch: pytest.MonkeyPatch, text: str, key: str, value: object
):
    for name, setting in {"WHERE": "/disk", "STEPS": "20", "EMPTY": ""}.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(text if "train_path" in text else BASE + text)
    if "train_path" in text:
        path.write_text(f"model_id: m\n{text}")
    config = load_config(path).config
    assert getattr(config, key) == value
    (path.parent / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(path.parent / "resolved.yaml").config == config
    if key != "train_path":
        override = f"{key}={text.partition(': ')[2].strip()}"
        assert getattr(load_config(write(BASE), [override]).config, key) == value


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("output_dir: ${ABSENT}\n", (":3: `output_dir`", "${ABSENT}", "not set", "${ABSENT:-DEFAULT}")),
        ("output_dir: ${EMPTY}\n", (":3: `output_dir`", "${EMPTY}", "empty")),
        *(
            (f"output_dir: ${{{name}}}\n", (":3: `output_dir`", f"${{{name}}}", "secret", "environment"))
            for name in ("HF_TOKEN", "GITLAB_TOKEN", "DB_PASS")
        ),
        ("output_dir: x/${HARMLESS}\n", (":3: `output_dir`", "${HARMLESS}", "secret", "environment")),
        ("max_steps: ${WORD}\n", (":3: `max_steps`", "'twenty'", "integer")),
        ("logger: {provider: mlflow, tracking_uri: ${WORD}}\n", (":3: ", "quote", '"${NAME}"')),
    ],
)
def test_bad_environment_variables_raise_an_error_without_their_secrets(
    write, monkeypatch: pytest.MonkeyPatch, text: str, facts: tuple[str, ...]
):
    """A secret never gets into the configuration, so it is in no config.yaml, no log and no message."""
    settings = {"HF_TOKEN": "hush", "GITLAB_TOKEN": "hush", "DB_PASS": "hush"}
    settings |= {"HARMLESS": TOKEN, "EMPTY": "", "WORD": "twenty"}
    for name, setting in settings.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.delenv("ABSENT", raising=False)
    message = error_message(write(BASE + text))
    assert_names(message, *facts)
    assert "hush" not in message
    assert TOKEN not in message


def test_anchors_and_merge_keys_are_resolved(write):
    text = """\
model_id: org/model
train_path: &rows [a.jsonl, b.jsonl]
valid_path: *rows
worker_resources: &one {GPU: 1, CPU: 4}
trainer_resources:
  <<: *one
  CPU: 2
columns: {<<: [{prompt: q}, {prompt: r, completion: a}]}
"""
    config = load_config(write(text)).config
    assert config.valid_path == ["a.jsonl", "b.jsonl"]
    assert config.trainer_resources == {"GPU": 1, "CPU": 2}
    assert config.columns == {"prompt": "q", "completion": "a"}


def test_errors_in_a_copy_have_the_lines_of_the_anchor(write):
    text = BASE + "worker_resources: &one\n  GPU: -1\ntrainer_resources:\n  <<: *one\n  CPU: x\n"
    message = error_message(write(text))
    assert_names(
        message, ":4: `worker_resources.GPU`", ":4: `trainer_resources.GPU`", ":7: `trainer_resources.CPU`"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "".join(f"k{number}: &a{number} x\n" for number in range(1_000)),
        "a: &a {x: 1}\nb:\n" + "  - {<<: *a}\n" * 50_000,
        "a:\n" + "  - {<<: {}}\n" * 60_000,
    ],
)
def test_expansion_of_anchors_is_bounded(write, text: str):
    began = time.process_time()
    message = error_message(write(text))
    assert time.process_time() - began < 10
    assert len(message) < 300
    assert_names(message, "write")


def test_conflicts_are_reported_beside_other_errors_unless_those_decide_them(write):
    lines = error_message(
        write(BASE + "seed: x\nnum_epochs: 1\nmax_steps: 3\ntask: classify\nclassifier_config: {}\n")
    )
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines.splitlines()] == ["3", "6", "7", "5"]
    assert "has no effect" not in lines


def test_secrets_and_missing_keys_come_first(write):
    first, second, third = error_message(
        write(f"packing: maybe\ntrain_path: b\noutput_dir: {TOKEN}\n")
    ).splitlines()
    assert_names(first, "`output_dir`", "secret")
    assert_names(second, "`model_id`", "missing")
    assert_names(third, "`packing`")


def test_invalid_name_of_a_validation_set_raises_an_error_that_names_it(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model_id: m\ntrain_path: t.jsonl\nvalid_path:\n  'a b': v.jsonl\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: `valid_path\.a b`.*letters, digits"):
        load_config(path)
