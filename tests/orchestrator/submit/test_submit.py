"""Tests `layerboost submit` without a cluster: which files are uploaded, what is refused, that no secret is shown."""

from __future__ import annotations

import http.server
import os
import random
import shutil
import threading
from pathlib import Path
from zipfile import ZipFile

import pytest

from orchestrator import cli
from orchestrator.recipe.errors import InputError
from orchestrator.submit import submit, working_directory
from orchestrator.submit.job_log import _Log
from orchestrator.submit.working_directory import pack

ADDRESS = "http://127.0.0.1:8265"
OUT = "/shared/run"
SECRET = "hf_wouldBeASecret123"


def prepared(*arguments: str) -> submit.Job:
    parsed = cli.build_parser().parse_args(["submit", "recipe.yaml", "--address", ADDRESS, "--out", OUT, *arguments])
    return submit.prepare(parsed)


@pytest.fixture
def project(inputs, monkeypatch) -> Path:
    """Makes the inputs' folder the working directory."""
    monkeypatch.chdir(inputs.folder)
    return inputs.folder


def write(path: Path, n_bytes: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    return path


LARGE = int(working_directory.LARGE_FILE_MIB * 1024**2) + 1


def test_what_is_heavy_stays_and_what_the_recipe_names_travels(project, tmp_path):
    write(project / "env" / "pyvenv.cfg")
    write(project / "env" / "lib" / "module.py")
    write(project / "old" / "run.json")
    write(project / "old" / "records" / "heal" / "a.json")
    write(project / ".git" / "config")
    write(project / ".env")
    write(project / "notes [1] ?*.txt", LARGE)
    write(project / "notes 1 ab.txt")
    write(project / "deep" / "more.parquet", LARGE)
    write(project / "deep" / "code.py")
    (project / "ignored").mkdir()
    write(project / "ignored" / "x.txt")
    (project / ".gitignore").write_text("ignored/\n")
    (project / "circle").symlink_to(project)
    job = prepared()
    names = set(job.package.sizes)
    assert {"recipe.yaml", "task.yaml", "items.jsonl", "judge.txt", "heal.txt", "model/model.safetensors"} <= names
    assert {"deep/code.py", "notes 1 ab.txt"} <= names
    assert set(job.package.stays) == {
        ".env", ".git", "circle", "deep/more.parquet", "env", "notes [1] ?*.txt", "old",
    }  # fmt: skip
    assert not [name for name in names if name.startswith((".git/", "env/", "old/", "ignored/", "circle/"))]

    # Ray's own archive, made as its client makes it, holds the same files and has the predicted size.
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    archive = tmp_path / "package.zip"
    excludes = [*get_runtime_env_default_excludes(), *job.runtime_env()["excludes"]]
    create_package(job.runtime_env()["working_dir"], archive, include_gitignore=True, excludes=excludes)
    assert {name for name in ZipFile(archive).namelist() if not name.endswith("/")} == names
    assert archive.stat().st_size <= job.package.n_bytes <= archive.stat().st_size * 1.1


def test_a_folder_that_cannot_be_read_stays_unless_something_in_it_is_needed(project, monkeypatch):
    shutil.copytree(project / "model", project / "locked" / "model")
    scan = os.scandir

    def refuse(path):  # root may read every folder, so refuse as for other users
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "locked" in prepared().package.stays
    with pytest.raises(PermissionError):
        prepared("--set", "model.path=./locked/model")


def test_large_files_travel_where_the_recipe_or_its_tasks_name_them(project):
    for name in ("heal.txt", "items.jsonl", "model/weights-of-old"):
        path = project / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n" * LARGE)
    shutil.copytree(project / "model", project / "other")
    job = prepared()
    assert {"heal.txt", "items.jsonl", "model/weights-of-old"} <= set(job.package.sizes)
    assert job.package.stays == ("other/weights-of-old",)
    run = project / "old"
    write(run / "run.json")
    write(run / "records" / "a.json")
    shutil.copytree(project / "model", run / "healed")
    job = prepared("--set", "model.path=./old/healed")
    assert {name for name in job.package.sizes if name.startswith("old/")} == {
        f"old/healed/{path.name}" for path in (run / "healed").iterdir()
    }


def test_the_command_of_the_job(project):
    job = prepared("--set", "search.trials=3", "--until", "search", "--python", "/opt/my env/bin/python")
    command = "'/opt/my env/bin/python' -m orchestrator run recipe.yaml --out /shared/run"
    assert job.entrypoint == f"{command} --set search.trials=3 --until search"
    assert not job.brings_layerboost
    for name in ("layerboost", "tasks", "orchestrator"):
        write(project / name / "__init__.py")
    assert prepared().brings_layerboost
    assert prepared("--submission-id", "mine.1").submission_id == "mine.1"


def test_ids_are_readable_and_differ(project):
    ids = {submit.new_submission_id("My recipe (v2)") for _ in range(20)}
    assert len(ids) > 1
    for one in ids:
        assert one.startswith("My-recipe-v2-20") and submit.check_submission_id(one)
    assert prepared().submission_id.startswith("recipe-20")


def test_absolute_paths_and_hub_names_are_the_nodes_own_affair(project):
    job = prepared(
        "--set", "model.path=/mnt/model", "--set", "healing.text=some/data", "--set", "quality.text=s3://b/t"
    )
    assert [note for note in job.notes if "every node" in note] == [
        "model.path: /mnt/model does not travel; every node must have it"
    ]


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        (["--set", "healing.text=../outside.txt"], "healing.text", "lies outside the working directory"),
        (["--set", "model.path=./none"], "model.path", "no such file or folder here"),
        (["--set", "healing.text=ignored.txt"], "healing.text", r"ignored\.txt does not travel \(see \.gitignore"),
        (["--set", "model.path=ignored"], "model.path", r"ignored/model\.safetensors does not travel"),
        (["--set", "quality.tasks=[./broken.yaml]"], "quality.tasks", "has no `task: NAME`"),
        (["--set", "quality.tasks=[./far.yaml]"], "quality.tasks", r"reads .*none\.jsonl, which is missing"),
        (["--set", "healing.tokns=3"], "healing.tokns", "did you mean tokens"),
        (["--out", "runs/a"], "--out", "is relative, and a job's folder is deleted"),
        (["--out", "~/runs"], "--out", "is relative"),
        (["--out", "memory://run"], "--out", "of one process only"),
        (["--out", "nope://run"], "--out", "no file system is called nope"),
        (["--out", "file://run"], "--out", "is relative"),
        (["--env", "LAYERBOOST_UNSET"], "--env", "is not set here; export LAYERBOOST_UNSET"),
        (["--env", f"HF_TOKEN={SECRET}"], "--env", "give the name alone"),
        (["--env", "A B"], "--env", "is no name"),
        (["--submission-id", "a/b"], "--submission-id", "must be up to 100 letters"),
    ],
)
def test_what_is_refused_before_anything_travels(project, arguments, field, remedy):
    shutil.copytree(project / "model", project / "ignored")
    for path in (project / "ignored.txt", project.parent / "outside.txt"):
        shutil.copy(project / "heal.txt", path)
    (project / ".gitignore").write_text("ignored.txt\nignored/*.safetensors\n")
    (project / "broken.yaml").write_text("output_type: multiple_choice\n")
    task = (project / "task.yaml").read_text().replace("items.jsonl", "none.jsonl")
    (project / "far.yaml").write_text(task)
    with pytest.raises(InputError, match=remedy) as refused:
        prepared(*arguments)
    assert refused.value.field.startswith(field)
    assert SECRET not in str(refused.value)


def test_a_recipe_elsewhere_does_not_travel(project, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    parsed = cli.build_parser().parse_args(["submit", str(project / "recipe.yaml"), "--out", OUT])
    with pytest.raises(InputError, match=r"recipe: .*lies outside the working directory"):
        submit.prepare(parsed)


def test_too_much_is_refused_with_the_largest_folders(project):
    for n in range(4):
        write(project / "data" / "raw" / f"{n}.bin", 1024**2)
    package = pack(project, [])
    with pytest.raises(InputError, match=r"would travel, and the job server takes 3 MiB.*largest: data/raw/ 4\.0 MiB"):
        submit.check_size(package, 3 * 1024**2)
    submit.check_size(package, 5 * 1024**2)


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379", "ray://head:10001", "http://", "http://me:pass@head:8265"])
def test_addresses_that_are_no_job_servers(project, address):
    with pytest.raises(InputError, match=r"--address: .*for example http://HEAD:8265"):
        submit.check_address(address)


class _Answers(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (None, "nobody answers"),
        (200, "no job server answers there"),
        (404, "no job server answers there"),
        (401, "the token is missing or refused"),
        (403, "the token is missing or refused"),
    ],
)
def test_servers_that_will_not_do(project, monkeypatch, capfd, code, remedy):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"code": code}))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    if code is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    # Ray prefers these variables to the address that it is given.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    try:
        result = cli.main(["submit", "recipe.yaml", "--address", address, "--out", OUT, "--env", "HF_TOKEN"])
    finally:
        if code is not None:
            server.shutdown()
            server.server_close()
    said = capfd.readouterr()
    assert (result, said.out) == (2, "")
    assert said.err.startswith(f"error: --address: {address}: ") and remedy in said.err and said.err.count("\n") == 1


def test_secrets_are_in_the_environment_of_the_job_and_nowhere_else(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("DEBUG", "1")
    job = prepared("--env", "HF_TOKEN", "--env", "DEBUG")
    assert job.runtime_env()["env_vars"] == {"HF_TOKEN": SECRET, "DEBUG": "1"}
    assert SECRET not in repr(job) + job.entrypoint + job.submission_id + "".join(job.notes)
    assert submit.hide(f"a {SECRET} of 1", job.variables) == "a $HF_TOKEN of 1"


def test_a_log_read_many_times_from_its_beginning_is_written_once():
    text = "".join(random.choices("ab\n", k=500))
    written: list[str] = []
    log = _Log(written.append)
    for _ in range(20):
        start, stop = 0, random.randint(0, len(text))
        while start < stop:
            piece = text[start : min(stop, start + random.randint(1, 40))]
            log.write_new(piece, start=start)
            start += len(piece)
    log.write_new(text)
    assert "".join(written) == text
