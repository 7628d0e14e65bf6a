"""Places that are not local: a real S3 server, a real https server, connections that break off."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from pipelines.errors import ConfigError, StageError
from pipelines.storage import paths as places
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import read_manifest
from pipelines.storage.paths import matches, place, read_bytes, sweep, whole, write_text
from tests.test_pictures import data_of, noise

pytestmark = [
    # moto and botocore leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
Smalti = Callable[..., tuple[int, str]]
FORMAT1 = Path(__file__).parent / "data" / "format1" / "run"


class Dropping(threading.Thread):
    """A proxy that breaks off each connection after so many bytes of answers, `drops` times, then lets all pass."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.target, self.drops, self.dropped = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.copy, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self.copy, args=(far, near, True), daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers and self.drops and len(data) > 2000:
                    self.drops -= 1
                    self.dropped += 1
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture(scope="module")
def store() -> Iterator[Dropping]:
    """An S3 server behind a proxy, with one bucket; credentials come from the environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = Dropping(port)
    proxy.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield proxy
    os.environ.clear()
    os.environ.update(before)
    proxy.listener.close()
    server.stop()


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with whole(place(f"{url}/{path.relative_to(folder)}", writable=True)) as temporary:
                shutil.copyfile(path, temporary)


def test_a_whole_run_lives_in_a_store(
    store: Dropping, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    """Every stage reads and writes there; what it leaves has the bytes of a local run."""
    compute = {"cache_dir": str(tmp_path / "cache")}
    config = write_config(tmp_path, {"run_dir": "s3://bucket/run", "compute": compute})
    code, text = smalti("run", config)
    assert code == 0, text
    local = tiny_run.parent / "run"
    for path in sorted(path for path in local.rglob("*") if path.suffix in (".tar", ".json", ".safetensors", ".csv")):
        name = path.relative_to(local)
        if "checkpoints" not in name.parts:
            assert read_bytes(place(f"s3://bucket/run/{name}")) == path.read_bytes(), name
    assert smalti("verify", config)[0] == 0
    assert "skipped" in smalti("encode", config)[1] or smalti("encode", config)[0] == 0


def test_exported_tokens_lie_in_a_store(store: Dropping, tmp_path: Path, smalti: Smalti) -> None:
    shutil.copytree(FORMAT1 / "codes", tmp_path / "run" / "codes")
    upload(FORMAT1 / "codes", "s3://bucket/tokens/codes")
    local, remote = tmp_path / "local.yaml", tmp_path / "remote.yaml"
    for config, run in ((local, tmp_path / "run"), (remote, "s3://bucket/tokens")):
        settings = {"encode": {"views": ["image", "crop"]}, "export": {"format": ["bin", "litdata"], "single": True}}
        compute = {"cache_dir": str(tmp_path / "cache")}
        config.write_text(json.dumps({"run_dir": str(run), "compute": compute, **settings}))
    for config in (local, remote):
        code, text = smalti("export", config)
        assert code == 0, text
    tokens, there = tmp_path / "run" / "tokens", place("s3://bucket/tokens/tokens")
    files = [path.relative_to(tokens).as_posix() for path in tokens.rglob("*") if path.is_file()]
    kept = {path.path.partition("/tokens/tokens/")[2] for path in there.rglob("*") if path.is_file()}
    assert kept == {name for name in files if not name.endswith(".ds")}  # a store knows no links
    for name in kept - {"config.yaml"}:
        assert read_bytes(there / name) == (tokens / name).read_bytes(), name
    assert "skipped" in smalti("export", remote)[1]


def test_a_damaged_remote_shard_is_found_and_made_again(
    store: Dropping, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    upload(tiny_run.parent / "run", "s3://bucket/other")
    config = write_config(tmp_path, {"run_dir": "s3://bucket/other", "compute": {"cache_dir": str(tmp_path / "cache")}})
    shard = place("s3://bucket/other/codes/train-000001.tar")
    good = shard.read_bytes()
    shard.write_bytes(good[:700] + b"?" + good[701:])
    code, text = smalti("verify", config)
    assert code == 1
    assert "codes/train-000001.tar has sha256" in text
    shard.write_bytes(good[:-512])
    assert smalti("encode", config)[0] == 0
    assert shard.read_bytes() == good


def test_sources_are_read_from_a_store(
    store: Dropping, picture_folder: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    upload(picture_folder, "s3://bucket/pictures")
    cases = {"local": f"folder:{picture_folder}", "remote": "folder:s3://bucket/pictures"}
    for name, source in cases.items():
        images = {"source": source, "size": 16, "channels": 3, "shard_size": 20}
        code, text = smalti("pack", write_config(tmp_path / name, {"images": images}))
        assert code == 0, text
    shards = sorted((tmp_path / "local" / "run" / "images").glob("*.tar"))
    assert len(shards) == 3
    for shard in shards:
        assert (tmp_path / "remote" / "run" / "images" / shard.name).read_bytes() == shard.read_bytes()
        with whole(place(f"s3://bucket/tars/{shard.name}", writable=True)) as temporary:
            shutil.copyfile(shard, temporary)
    images = {"source": "shards:s3://bucket/tars/{train-*,val-000000}.tar", "size": 16, "channels": 3}
    code, text = smalti("pack", write_config(tmp_path / "tars", {"images": images}))
    assert code == 0, text
    manifest = read_manifest(tmp_path / "tars" / "run" / "images", "images", "pack")
    assert [sum(r["samples"] for r in manifest["splits"][split]) for split in ("train", "val")] == [36, 4]


def test_parquet_is_read_from_a_store(
    store: Dropping, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    rows = {
        "image": [{"bytes": data_of(Image.fromarray(noise(8, 8))), "path": None} for _ in range(12)],
        "label": [0, 1] * 6,
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with whole(place("s3://bucket/tables/train-0.parquet", writable=True)) as temporary:
        shutil.copyfile(tmp_path / "train.parquet", temporary)
    images = {"source": "parquet:s3://bucket/tables/*.parquet", "size": 8, "channels": 3}
    code, text = smalti("pack", write_config(tmp_path, {"images": images}))
    assert code == 0, text


def test_a_transfer_that_breaks_off_is_tried_again(store: Dropping, tmp_path: Path, cache: Cache) -> None:
    data = os.urandom(300_000)
    with whole(place("s3://bucket/big.tar", writable=True)) as temporary:
        temporary.write_bytes(data)
    store.drops, store.dropped = 2, 0
    local = cache.files(place("s3://bucket"), ["big.tar"]) / "big.tar"
    assert store.dropped == 2
    assert local.read_bytes() == data


def test_a_store_that_does_not_answer_is_an_error_of_one_line(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RETRIES_S", ())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    code, text = smalti("train-tokenizer", write_config(tmp_path, {"images": {"from": "s3://nobody/images"}}))
    assert code == 1
    assert len([line for line in text.splitlines() if line.startswith("smalti: error")]) == 1


def test_the_cache_makes_room(store: Dropping, tmp_path: Path) -> None:
    small = Cache(tmp_path / "small", 250_000)
    for number in range(4):
        with whole(place(f"s3://bucket/room/{number}.tar", writable=True)) as temporary:
            temporary.write_bytes(bytes([number]) * 100_000)
        small.files(place("s3://bucket/room"), [f"{number}.tar"])
    held = sum(path.stat().st_size for path in small.folder.rglob("*") if path.is_file())
    assert held <= 350_000
    assert (small.files(place("s3://bucket/room"), ["0.tar"]) / "0.tar").read_bytes() == bytes(100_000)


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Serve a folder by https, with a certificate that this test's processes trust."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(private)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    servers = []

    def serve(folder: Path) -> str:
        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"https://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_published_run_is_read_by_https(
    https: Callable[[Path], str], tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """In a process of its own: which certificates are trusted is settled when the library is imported."""
    url = https(tiny_run.parent / "run")
    changes = {
        "images": {"from": f"{url}/images"},
        "tokenizer": {"from": f"{url}/tokenizer"},
        "compute": {"cache_dir": str(tmp_path / "cache")},
    }
    config = write_config(tmp_path, changes)
    command = [sys.executable, "-m", "pipelines.cli"]
    done = subprocess.run([*command, "encode", config], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for path in (tiny_run.parent / "run" / "codes").glob("*.tar"):
        assert (tmp_path / "run" / "codes" / path.name).read_bytes() == path.read_bytes()


def test_https_is_for_reading(tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti) -> None:
    code, text = smalti("pack", write_config(tmp_path), "--run_dir=https://127.0.0.1/run")
    assert code == 2
    assert "must be a local path or a URL of s3://, gs://" in text


@pytest.mark.parametrize("name", ["pipe:cat x", "ftp://h/x", "simplecache::s3://b/x", "http://h/x", "zip://a::s3://b"])
def test_schemes_that_are_not_allowed_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be a local path or a URL of s3://, gs://, https://"):
        place(name)


def test_local_paths_stay_local(tmp_path: Path) -> None:
    assert place("runs/a") == Path("runs/a")
    assert place(f"file://{tmp_path}/x") == place(f"file:{tmp_path}/x") == tmp_path / "x"
    (tmp_path / "a.tar").write_text("")
    assert matches(f"{tmp_path}/*.tar") == matches(f"{tmp_path}/a.tar") == [tmp_path / "a.tar"]
    assert matches(f"{tmp_path}/b.tar") == []


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")

    def interrupted() -> None:
        with whole(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_what_a_gone_process_left_is_swept_away_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    with whole(tmp_path / "a") as mine:
        mine.write_text("")
        gone = mine.with_name(mine.name.replace(f"-{os.getpid()}.", "-4194304."))
        gone.write_text("")
        sweep(tmp_path)
        assert mine.exists()
        assert not gone.exists()


def test_a_folder_that_is_gone_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot write .*gone/a: No such file or directory; mend that"):
        write_text(tmp_path / "gone" / "a", "x")
