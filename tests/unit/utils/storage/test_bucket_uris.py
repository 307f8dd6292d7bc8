import re
from pathlib import Path

import pytest

from utils.storage.bucket import (
    AlreadyExistsError,
    BucketError,
    NotFoundError,
    UnsafeKeyError,
    check_readable,
    check_writable,
    fetch_file,
    is_remote,
    join_uri,
    open_store,
    sync_to_node,
    uses_embedded_bucket,
)


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://b", ["a"], "s3://b/a"),
        ("s3://b/p/", ["/a/", "", "b"], "s3://b/p/a/b"),
        ("/x/", ["y"], "/x/y"),
        ("/", ["y"], "/y"),
        ("runs", [], "runs"),
    ],
)
def test_join_uri_separates_parts_by_single_slashes(uri: str, parts: list[str], joined: str):
    assert join_uri(uri, *parts) == joined


def test_remote_and_embedded_bucket_uris_are_recognized():
    assert is_remote("s3://b/p")
    assert not any(map(is_remote, ["/x", "x/y", "~/x", "file:///x", "x:y"]))
    assert uses_embedded_bucket("s3://anneal/runs")
    assert not any(map(uses_embedded_bucket, ["s3://anneal2/runs", "/anneal"]))


@pytest.mark.parametrize("scheme", ["hdfs", "http", "https", "s3a"])
def test_unsupported_schemes_raise_an_error_that_lists_the_supported_ones(scheme: str):
    with pytest.raises(BucketError, match=rf"{scheme}://.*s3://.*gs://, az://, abfs://"):
        open_store(f"{scheme}://somewhere/x")


def test_invalid_s3_uris_raise_an_error_that_hides_passwords():
    with pytest.raises(BucketError, match="AWS_ACCESS_KEY_ID") as caught:
        open_store("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    for without_bucket in ("s3:/bucket/x", "s3://", "s3:///x"):
        with pytest.raises(BucketError, match=r"^s3:/.*bucket.*s3://bucket/prefix"):
            check_readable(without_bucket)
    with pytest.raises(BucketError, match=r"^s3://My bucket!/x: .*bucket"):
        open_store("s3://My bucket!/x")


def test_local_paths_and_file_uris_open_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("a b", f"{tmp_path}/a b", f"file://{tmp_path}/a%20b"):
        assert open_store(uri).uri == str(tmp_path / "a b")
    with pytest.raises(BucketError, match="file:///absolute/path"):
        open_store("file://server/x")


def test_a_local_store_rejects_keys_outside_of_it(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    for key in ("../x", "/x", "a/../../x"):
        with pytest.raises(UnsafeKeyError, match=re.escape(key)):
            store.write(key, b"")
    assert list(tmp_path.iterdir()) == []


def test_local_errors_name_the_path(tmp_path: Path):
    store = open_store(str(tmp_path))
    with pytest.raises(NotFoundError, match=r"/none\b"):
        store.read("none")
    store.write("a/b", b"1")
    with pytest.raises(AlreadyExistsError, match=r"/a/b\b"):
        store.write("a/b", b"2", only_if_absent=True)
    with pytest.raises(BucketError, match=r"write .*/a/b"):
        store.write("a/b/c", b"2")
    for check in (check_readable, sync_to_node, fetch_file):
        with pytest.raises(NotFoundError, match="/none: no such file"):
            check(str(tmp_path / "none"), *([] if check is check_readable else [tmp_path]))


def test_partial_files_are_not_listed(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.write("a", b"1")
    (tmp_path / ".a.0123.partial").write_bytes(b"")
    assert [item.key for item in store.list()] == ["a"]


def test_local_checks_create_nothing(tmp_path: Path):
    check_writable(str(tmp_path / "x" / "y"))
    with pytest.raises(NotFoundError, match=f"{tmp_path}.*empty"):
        check_readable(str(tmp_path))
    (tmp_path / "file").write_bytes(b"1")
    check_readable(f"file://{tmp_path}/file")
    check_readable(str(tmp_path))
    with pytest.raises(BucketError, match="/file is a file"):
        check_writable(str(tmp_path / "file" / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_local_data_is_not_copied_to_the_node(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    assert sync_to_node(str(tmp_path / "model"), tmp_path / "cache") == tmp_path / "model"
    assert (
        fetch_file(f"{tmp_path}/model/config.json", tmp_path / "cache") == tmp_path / "model" / "config.json"
    )
    assert not (tmp_path / "cache").exists()
