import socket

import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.compute.ranks import adding_up, sum_over_ranks
from pipelines.errors import ConfigError, StageError


def test_one_process_adds_up_nothing_and_opens_nothing() -> None:
    with adding_up(ComputeConfig()):
        assert not torch.distributed.is_initialized()
        assert sum_over_ranks(torch.ones(2)).tolist() == [1, 1]


def test_a_process_whose_others_never_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    told = "another process of this job died, or has not answered for 1 s"
    with pytest.raises(StageError, match=told), adding_up(ComputeConfig(timeout_s=1)):
        pass
    assert not torch.distributed.is_initialized()
    monkeypatch.delenv("MASTER_PORT")
    told = "must know where they meet, but the environment lacks MASTER_PORT"
    with pytest.raises(ConfigError, match=told), adding_up(ComputeConfig()):
        pass
