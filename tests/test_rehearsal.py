"""Whole jobs on a GPU that is not there; `tests/rehearsal.py` says how, and what that cannot follow."""

import json
from collections import Counter
from typing import Any

import pytest

from tests.jobs import Job
from tests.rehearsal import BY_DESIGN
from tests.rehearsal_jobs import JOBS, REFUSED


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    job = Job("tests.rehearsal_jobs", folder=tmp_path_factory.mktemp("rehearsal"))
    assert job.wait(600) == 0, job.errors
    return json.loads(job.out.splitlines()[-1])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_keeps_to_its_device_and_does_not_wait_for_it(job: str, rehearsed: dict[str, dict]) -> None:
    assert rehearsed[job]["error"] is None


def test_the_host_waits_where_it_is_meant_to_and_there_it_does(rehearsed: dict[str, dict]) -> None:
    waits: Counter[str] = sum((Counter(rehearsed[job]["waits"]) for job in JOBS), Counter())
    assert waits.keys() == BY_DESIGN.keys()


def test_more_steps_make_the_host_wait_no_more_often(rehearsed: dict[str, dict]) -> None:
    few, many = (rehearsed[f"{steps} quiet steps"]["waits"] for steps in (2, 4))
    assert few == many


@pytest.mark.parametrize("act", REFUSED)
def test_what_a_gpu_or_nccl_cannot_do_or_waits_for_is_refused(act: str, rehearsed: dict[str, dict]) -> None:
    kinds = {"nonzero": "DynamicOutputShapeException", "mixed devices": "FakeTensorDeviceMismatchError"}
    collective = "RuntimeError" if "host's" in act else "WaitsError"
    assert rehearsed["refused"][act] == kinds.get(act, collective)
